"""Sampled ids to the text of a turn, the same for every policy that sees tokens (vLLM in process, vLLM's server).

Text is what the ids decode to, never the other way round. Where the two cannot agree (a stop string that ends inside
the last token, a tokenizer that does not give a prefix back as it was) the text is right and the ids are dropped.

Example::

    text, ids = sampled_turn(tokenizer, prefix="Thought: ", prefix_ids=(5, 9), sampled=(31, 2))
"""

from __future__ import annotations

from typing import Any


def sampled_turn(
    tokenizer: Any,
    *,
    prefix: str,
    prefix_ids: tuple[int, ...],
    sampled: tuple[int, ...],
    stop: str | None = None,
) -> tuple[str, tuple[int, ...] | None]:
    """The whole turn's text and ids [prefix + sampled]; the ids are None where they say more than the text.

    `stop` is the stop string that ended the turn, if one did: the text ends with it.
    """
    ids: tuple[int, ...] | None = prefix_ids + sampled
    text = tokenizer.decode(list(prefix_ids + sampled), skip_special_tokens=True)
    if not text.startswith(prefix):
        text = prefix + tokenizer.decode(list(sampled), skip_special_tokens=True)
        ids = None
    if stop is not None and (at := text.find(stop, len(prefix))) >= 0 and at + len(stop) < len(text):
        text = text[: at + len(stop)]
        ids = None
    return text, ids
