"""What an OpenAI-compatible endpoint answered, read once and checked: `Reply`, of chat completions and of completions.

Reading is strict where a turn would be wrong (no choices, no text, a stream that broke off) and lenient where servers
differ (usage, log-probabilities, contents in parts). Nothing of the answer is kept but what is named here: no headers,
no ids of requests.

Example::

    reply = read_chat(json.loads(body))          # raises UnusableAnswerError
    reply.choices[0].text, reply.usage.prompt_tokens
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True, slots=True, kw_only=True)
class ReplyUsage:
    """Tokens of one request, as the endpoint counts them; 0 where it does not tell."""

    prompt_tokens: int = 0
    completion_tokens: int = 0
    """Of all choices together, hidden reasoning included."""
    cached_prompt_tokens: int = 0
    """Of the prompt's, those that the provider had in its own cache."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ReplyChoice:
    """One sampled answer."""

    text: str
    finish_reason: str = "stop"
    """As the endpoint says it."""
    stop_reason: str | int | None = None
    """The stop string or token id that was met; None: the model stopped by itself. vLLM tells, see `tells_stop`."""
    tells_stop: bool = False
    logprobs: tuple[float, ...] | None = None
    token_ids: tuple[int, ...] | None = None
    """[n] sampled ids, where the endpoint returns them."""
    prompt_ids: tuple[int, ...] | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Reply:
    """An answer of at least one choice."""

    choices: tuple[ReplyChoice, ...]
    usage: ReplyUsage


class UnusableAnswerError(Exception):
    """An answer with status 200 and nothing in it to use; `usage` is what it cost where it told."""

    def __init__(self, message: str, usage: ReplyUsage | None = None) -> None:
        super().__init__(message)
        self.usage = usage


class WithheldError(Exception):
    """The provider's filter kept the answer back; it would do so again."""

    def __init__(self, message: str, usage: ReplyUsage | None = None) -> None:
        super().__init__(message)
        self.usage = usage


def parse_json(body: str) -> dict[str, Any]:
    """Raises `UnusableAnswerError` for what is no JSON object."""
    try:
        found = json.loads(body)
    except ValueError:
        raise UnusableAnswerError(f"an answer that is no JSON, of {len(body)} characters") from None
    if not isinstance(found, dict):
        raise UnusableAnswerError(f"an answer that is no JSON object but a {type(found).__name__}")
    return found


def read_chat(body: Mapping[str, Any]) -> Reply:
    """A body of /chat/completions. Raises `UnusableAnswerError`, and `WithheldError` where a filter left no text."""
    usage = _usage(body)
    choices = []
    for each in _choices(body, usage):
        message = each.get("message")
        message = message if isinstance(message, Mapping) else {}
        text = _text(message.get("content"))
        reason = each.get("finish_reason")
        if text is None and isinstance(message.get("refusal"), str):
            text = message["refusal"]
        if text is None and reason == "length":
            text = ""  # everything went into hidden reasoning
        if text is None and reason == "content_filter":
            raise WithheldError("the provider's content filter withheld the answer", usage)
        if text is None:
            raise UnusableAnswerError(f"a choice without text (finish_reason {str(reason)[:40]!r})", usage)
        logprobs = each.get("logprobs")
        content = logprobs.get("content") if isinstance(logprobs, Mapping) else None
        choices.append(_choice(each, text, _numbers(item.get("logprob") for item in content) if content else None))
    return Reply(choices=tuple(choices), usage=usage)


def read_completions(body: Mapping[str, Any]) -> Reply:
    """A body of /completions. Raises `UnusableAnswerError`."""
    usage = _usage(body)
    choices = []
    for each in _choices(body, usage):
        text = each.get("text")
        if not isinstance(text, str):
            raise UnusableAnswerError(
                f"a choice without text (finish_reason {str(each.get('finish_reason'))[:40]!r})", usage
            )
        logprobs = each.get("logprobs")
        values = logprobs.get("token_logprobs") if isinstance(logprobs, Mapping) else None
        choices.append(_choice(each, text, _numbers(values) if values else None))
    return Reply(choices=tuple(choices), usage=usage)


class ChatStream:
    """Puts the events of a chat stream together to the body that the same request would have had unstreamed."""

    def __init__(self) -> None:
        self._choices: dict[int, dict[str, Any]] = {}
        self._usage: Any = None

    def add(self, event: Mapping[str, Any]) -> None:
        if event.get("usage"):
            self._usage = event["usage"]
        for each in event.get("choices") or ():
            index = each.get("index") or 0
            choice = self._choices.setdefault(index, {"index": index, "text": None, "reason": None, "logprobs": []})
            delta = each.get("delta") or {}
            piece = _text(delta.get("content"))
            if piece is not None:
                choice["text"] = (choice["text"] or "") + piece
            content = (each.get("logprobs") or {}).get("content")
            choice["logprobs"].extend(content or ())
            choice["reason"] = each.get("finish_reason") or choice["reason"]
            if "stop_reason" in each:
                choice["stop_reason"] = each["stop_reason"]

    def body(self) -> dict[str, Any]:
        """Raises `UnusableAnswerError` when the stream ended before each of its choices had."""
        for choice in self._choices.values():
            if choice["reason"] is None:
                raise UnusableAnswerError("a stream that broke off before its end")
        choices = [
            {
                "index": index,
                "message": {"content": choice["text"]},
                "finish_reason": choice["reason"],
                "logprobs": {"content": choice["logprobs"]} if choice["logprobs"] else None,
                **({"stop_reason": choice["stop_reason"]} if "stop_reason" in choice else {}),
            }
            for index, choice in sorted(self._choices.items())
        ]
        return {"choices": choices, "usage": self._usage}


def to_json(reply: Reply) -> str:
    """For a cache; `from_json` gives it back."""
    choices = [{name: getattr(choice, name) for name in ReplyChoice.__dataclass_fields__} for choice in reply.choices]
    usage = {name: getattr(reply.usage, name) for name in ReplyUsage.__dataclass_fields__}
    return json.dumps({"choices": choices, "usage": usage}, separators=(",", ":"))


def from_json(text: str) -> Reply:
    """Raises `ValueError` for what `to_json` did not write."""
    try:
        found = json.loads(text)
        choices = tuple(_choice_from(each) for each in found["choices"])
        reply = Reply(choices=choices, usage=ReplyUsage(**found["usage"]))
    except (TypeError, KeyError, AttributeError) as error:
        raise ValueError(f"not a reply: {error}") from None
    if not choices or not all(isinstance(choice.text, str) for choice in choices):
        raise ValueError("not a reply: no text")
    return reply


def _choice_from(fields: Mapping[str, Any]) -> ReplyChoice:
    known: dict[str, Any] = {name: tuple(value) if isinstance(value, list) else value for name, value in fields.items()}
    return ReplyChoice(**known)


def _choices(body: Mapping[str, Any], usage: ReplyUsage) -> list[Mapping[str, Any]]:
    found = body.get("choices")
    if not isinstance(found, list) or not found or not all(isinstance(each, Mapping) for each in found):
        # Some gateways send a failure with status 200.
        error = body.get("error")
        said = error.get("message") if isinstance(error, Mapping) else error
        reason = f": {str(said)[:200]}" if said else ""
        raise UnusableAnswerError(f"an answer without choices{reason}", usage)
    return found


def _choice(each: Mapping[str, Any], text: str, logprobs: tuple[float, ...] | None) -> ReplyChoice:
    stop_reason = each.get("stop_reason")
    return ReplyChoice(
        text=text,
        finish_reason=str(each.get("finish_reason") or "stop"),
        stop_reason=stop_reason if isinstance(stop_reason, str | int) else None,
        tells_stop="stop_reason" in each,
        logprobs=logprobs,
        token_ids=_ids(each.get("token_ids")),
        prompt_ids=_ids(each.get("prompt_token_ids")),
    )


def _text(content: Any) -> str | None:
    """Plain, or the text parts of a content in parts (thinking parts are not said)."""
    if isinstance(content, list):
        parts = [part.get("text") for part in content if isinstance(part, Mapping) and part.get("type") == "text"]
        return "".join(part for part in parts if isinstance(part, str)) if parts else None
    return content if isinstance(content, str) else None


def _numbers(values: Iterable[Any]) -> tuple[float, ...] | None:
    numbers = tuple(values)
    return tuple(float(each) for each in numbers) if all(isinstance(each, int | float) for each in numbers) else None


def _ids(values: Any) -> tuple[int, ...] | None:
    return tuple(values) if isinstance(values, list) and all(isinstance(each, int) for each in values) else None


def _usage(body: Mapping[str, Any]) -> ReplyUsage:
    usage = body.get("usage")
    usage = usage if isinstance(usage, Mapping) else {}
    details = usage.get("prompt_tokens_details")
    cached = details.get("cached_tokens") if isinstance(details, Mapping) else usage.get("prompt_cache_hit_tokens")
    return ReplyUsage(
        prompt_tokens=_count(usage.get("prompt_tokens")),
        completion_tokens=_count(usage.get("completion_tokens")),
        cached_prompt_tokens=_count(cached),
    )


def _count(value: Any) -> int:
    return value if isinstance(value, int) and value >= 0 else 0
