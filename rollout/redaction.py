"""What may be said of a call that failed: the server's words without the key and without what was asked.

Some servers repeat a request in their refusal (vLLM does, for a field of the wrong type), and some proxies repeat the
key. `Redactor` takes both out of a text, whole, in part, or escaped as JSON. `quiet_clients` keeps the `openai` client
and its HTTP library from logging below WARNING: older versions of it log whole requests at DEBUG.

Example::

    redact = Redactor(key)
    redact(str(error), [message.content for message in messages])     # "invalid value '[...]' for 'stop'"
"""

from __future__ import annotations

import json
import logging
import re
from collections.abc import Iterable

_LONGEST = 4000
_PIECE = 16
"""Characters that a text must share with a prompt, in a row, to count as part of it."""
_KEY_PIECE = 6
_SHORTEST = 4
"""A shorter message than this gives nothing away."""
_GAP = "[...]"
_LOOKS_LIKE_A_KEY = re.compile(r"\b(?:sk|pk|key|hf|gsk|xai|AIza)[-_][\w*.-]{6,}|Bearer\s+\S+", re.IGNORECASE)
_LOGGERS = (
    "openai",
    "openai._base_client",
    "openai._response",
    "openai._legacy_response",
    "httpx",
    "httpx2",
    "httpcore",
    "httpcore.http11",
    "httpcore.connection",
    "httpcore2",
    "httpcore2.http11",
    "httpcore2.connection",
)


class Redactor:
    """Takes one client's key, and the prompts of a call, out of texts."""

    def __init__(self, key: str = "") -> None:
        self._key = key

    def __call__(self, text: str, prompts: Iterable[str] = ()) -> str:
        """`text`, cut to a few thousand characters, with gaps where it repeats what nobody should read."""
        text = text[:_LONGEST]
        hidden = bytearray(len(text))
        if self._key:
            _hide(text, self._key, min(_KEY_PIECE, len(self._key)), hidden)
            _widen_to_words(text, hidden)
        for match in _LOOKS_LIKE_A_KEY.finditer(text):
            hidden[match.start() : match.end()] = b"\1" * (match.end() - match.start())
        for prompt in prompts:
            for form in {prompt, json.dumps(prompt)[1:-1], json.dumps(prompt, ensure_ascii=False)[1:-1], repr(prompt)}:
                if len(form) >= _SHORTEST:
                    _hide(text, form, min(_PIECE, len(form)), hidden)
        return _with_gaps(text, hidden)


class _Quiet(logging.Filter):
    def filter(self, record: logging.LogRecord) -> bool:
        return record.levelno >= logging.WARNING


_quiet = _Quiet()


def quiet_clients() -> None:
    """From now on the loggers of the openai client and its HTTP library say nothing below WARNING."""
    for name in _LOGGERS:
        logger = logging.getLogger(name)
        if _quiet not in logger.filters:
            logger.addFilter(_quiet)


def _hide(text: str, secret: str, piece: int, hidden: bytearray) -> None:
    """Mark every run of `piece` characters of `text` that occurs in `secret`."""
    pieces = {secret[i : i + piece] for i in range(len(secret) - piece + 1)}
    for i in range(len(text) - piece + 1):
        if text[i : i + piece] in pieces:
            hidden[i : i + piece] = b"\1" * piece


def _widen_to_words(text: str, hidden: bytearray) -> None:
    """A word of which a part is marked is marked whole."""
    for match in re.finditer(r"\S+", text):
        if any(hidden[match.start() : match.end()]):
            hidden[match.start() : match.end()] = b"\1" * (match.end() - match.start())


def _with_gaps(text: str, hidden: bytearray) -> str:
    parts: list[str] = []
    for i, character in enumerate(text):
        if not hidden[i]:
            parts.append(character)
        elif i == 0 or not hidden[i - 1]:
            parts.append(_GAP)
    return "".join(parts)
