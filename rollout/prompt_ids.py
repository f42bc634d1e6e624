"""Prompt ids of an episode, kept compactly: what each prompt keeps of the conversation so far, and what it adds.

A multi-turn prompt grows by appending, so every prompt but the first is nearly all known: (ids kept, ids new). Exact in
every case, for a prompt that did not grow by appending too: it keeps as many ids as it shares, and the rest are new.

The conversation after a step is the prompt, without the ids of a prefix that ends it and begins the completion (a
first-thought prefix), then the completion's ids.

Example::

    split([completion_1, completion_2])           # [(0, (1, 2, 3)), (5, (9,))]: the second appends one id
    join([(0, (1, 2, 3), ...), ...])              # the prompts again
"""

from __future__ import annotations

from collections.abc import Iterable

from rollout.trajectory import Completion

Ids = tuple[int, ...]


def split(completions: Iterable[Completion]) -> list[tuple[int | None, Ids | None]]:
    """Per step (how many ids of the conversation so far the prompt keeps, the ids that follow); (None, None) where the
    prompt is unknown."""
    rows: list[tuple[int | None, Ids | None]] = []
    conversation: Ids = ()
    for completion in completions:
        prompt = completion.prompt_ids
        if prompt is None:
            rows.append((None, None))
            continue
        kept = shared(conversation, prompt)
        rows.append((kept, prompt[kept:]))
        conversation = after(prompt, completion.token_ids, completion.completion_tokens)
    return rows


def after(prompt: Ids, token_ids: Ids | None, completion_tokens: int) -> Ids:
    """The conversation after a step that was sent `prompt`."""
    if token_ids is None:
        return prompt
    prefix = len(token_ids) - completion_tokens
    if 0 < prefix <= len(prompt) and prompt[-prefix:] == token_ids[:prefix]:
        prompt = prompt[:-prefix]
    return prompt + token_ids


def shared(left: Ids, right: Ids) -> int:
    """How many ids both begin with."""
    low, high = 0, min(len(left), len(right))
    if left[:high] == right[:high]:
        return high
    while low + 1 < high:  # left[:low] == right[:low], and the first difference is before `high`
        middle = (low + high) // 2
        if left[low:middle] == right[low:middle]:
            low = middle
        else:
            high = middle
    return low
