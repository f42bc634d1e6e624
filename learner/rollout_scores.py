"""A teacher's scores from its own rollout: the likeliest tokens that were kept beside each one that it sampled.

They are the teacher's log-probabilities as it acted, before what it was shown (its own system prompt, a guide); the
student learns them behind its own prompt. Only turns whose sampled ids are the row's own have them: another tokenizer's
say nothing of these tokens. Scores behind the student's prompt, and of rows that somebody else wrote, are made by a
scoring engine instead (`learner.stored_scores`).

Example::

    ids, logprobs = teacher_of_rollout(trajectory, messages, runs, len(row))      # each [n, 1 + k]
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np

from rollout.trajectory import Message, Trajectory


def teacher_of_rollout(
    trajectory: Trajectory, messages: Sequence[Message], runs: Iterable[tuple[int, int]], tokens: int
) -> tuple[np.ndarray, np.ndarray] | None:
    """Ids int32 and log-probabilities float32, each [tokens, 1 + k]: each token itself, then the k likeliest that are
    not itself; -1 and NaN where there is none, and everywhere outside of the sampled tokens. None when none is known.

    `messages`: the row's conversation, an assistant turn with ids where those are the row's; `runs`: [start, end) of
    each assistant turn in the row. Raises ValueError for a turn whose numbers of ids and values do not fit.
    """
    said = [message for message in messages if message.role == "assistant"]
    found: list[tuple[int, np.ndarray, np.ndarray]] = []
    for step, message, (start, _) in zip(trajectory.steps, said, runs, strict=True):
        turn = step.completion
        own_ids, own = turn.sampled_ids, turn.logprobs
        if message.token_ids is None or own_ids is None or turn.top_ids is None or turn.top_logprobs is None or not own:
            continue
        k, rest = divmod(len(turn.top_ids), len(own_ids))
        if rest or len(turn.top_logprobs) != len(turn.top_ids) or len(own) != len(own_ids):
            raise ValueError(
                f"a turn has {len(turn.top_ids)} likeliest ids and {len(turn.top_logprobs)} values for "
                f"{len(own_ids)} tokens"
            )
        first = start + len(turn.token_ids or ()) - len(own_ids)  # behind the prefix that it was given
        mine = np.asarray(own_ids, np.int32)[:, None]
        likely = np.asarray(turn.top_ids, np.int32).reshape(-1, k)
        values = np.asarray(turn.top_logprobs, np.float32).reshape(-1, k)
        again = likely == mine
        ids = np.concatenate([mine, np.where(again, -1, likely)], axis=1)
        logprobs = np.concatenate([np.asarray(own, np.float32)[:, None], np.where(again, np.nan, values)], axis=1)
        found.append((first, ids, logprobs))
    if not found:
        return None
    width = max(ids.shape[1] for _, ids, _ in found)
    all_ids = np.full((tokens, width), -1, np.int32)
    all_logprobs = np.full((tokens, width), np.nan, np.float32)
    for first, ids, logprobs in found:
        all_ids[first : first + len(ids), : ids.shape[1]] = ids
        all_logprobs[first : first + len(ids), : ids.shape[1]] = logprobs
    return all_ids, all_logprobs
