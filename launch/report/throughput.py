"""Episodes and tokens a minute over time, from when each trajectory of a ledger ended.

Times in which nothing ended for long (a job that was stopped and went on the next day) are cut out.

Example::

    rates = over_time(figures.ended_s, figures.tokens)
    rates.minutes, rates.episodes, rates.tokens       # as many of each
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

BUCKETS = 60
_LONGEST_GAP_S = 900.0
_LEFT_OF_A_GAP_S = 60.0
_SHORTEST_BUCKET_S = 1.0


@dataclass(frozen=True, slots=True)
class Throughput:
    """[n] rates over stretches of equal length."""

    minutes: list[float]
    """Middle of each stretch, since the first trajectory ended."""
    episodes: list[float]
    """A minute."""
    tokens: list[float]
    """Completion tokens a minute."""
    cuts: int
    """How many pauses were cut out."""


def over_time(ended_s: np.ndarray, tokens: np.ndarray, *, buckets: int = BUCKETS) -> Throughput | None:
    """`ended_s`: [n] Unix times in any order, `tokens`: [n]. None for fewer than two moments."""
    known = np.isfinite(ended_s) & (ended_s > 0)
    ended_s, tokens = ended_s[known], tokens[known]
    if len(ended_s) < 2:
        return None
    order = np.argsort(ended_s, kind="stable")
    ended_s, tokens = ended_s[order], tokens[order]
    gaps = np.diff(ended_s)
    long = gaps > _LONGEST_GAP_S
    cut = np.concatenate([[0.0], np.cumsum(np.where(long, gaps - _LEFT_OF_A_GAP_S, 0.0))])
    at_s = ended_s - ended_s[0] - cut
    whole_s = float(at_s[-1])
    if whole_s <= 0:
        return None
    count = max(1, min(buckets, int(whole_s / _SHORTEST_BUCKET_S)))
    each_s = whole_s / count
    index = np.minimum((at_s / each_s).astype(np.int64), count - 1)
    episodes = np.bincount(index, minlength=count) / (each_s / 60)
    sampled = np.bincount(index, weights=tokens, minlength=count) / (each_s / 60)
    minutes = (np.arange(count) + 0.5) * each_s / 60
    return Throughput(minutes.tolist(), episodes.tolist(), sampled.tolist(), int(long.sum()))
