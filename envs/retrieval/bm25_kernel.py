"""The inner loop of BM25 search, compiled by numba. Import it late: importing it loads numba (0.4 s).

It reads the score matrix of bm25s. bm25s has such a loop too, but compiles it anew in every process (5 s) and leaves
the order of equal scores to chance; this one is compiled once per machine (0.7 s, then 0.15 s from numba's cache) and
orders equal scores by `tie_rank`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numba
import numpy as np

_NOTHING = np.float32(1e-30)  # below every score that a shared word can give


def _top_rows(
    data: np.ndarray, indices: np.ndarray, indptr: np.ndarray, tokens: np.ndarray, tie_rank: np.ndarray, k: int
) -> tuple[np.ndarray, np.ndarray]:
    """Rows (int64) and scores (float32) of the at most k best rows that share a token with the query.

    data float32 [nnz], indices uint32 [nnz], indptr int64 [vocabulary + 1] are the columns of the score matrix;
    tokens int64 [t] are its columns to add up; tie_rank int64 [n]. Indices are unsigned since numba then leaves out the
    test for negative ones, which doubles the speed.
    """
    n = tie_rank.shape[0]
    scores = np.zeros(n, dtype=np.float32)
    for token in tokens:
        for at in range(indptr[token], indptr[token + 1]):
            scores[indices[at]] += data[at]
    best = np.empty(k, dtype=np.int64)
    size = 0
    floor = _NOTHING  # one comparison rules out nearly every row
    for row in range(n):
        score = scores[row]
        if score < floor:
            continue
        if size < k:
            size += 1
        elif score == floor and tie_rank[row] > tie_rank[best[k - 1]]:
            continue
        place = size - 1
        while place > 0:
            above = best[place - 1]
            if scores[above] > score or (scores[above] == score and tie_rank[above] < tie_rank[row]):
                break
            best[place] = above
            place -= 1
        best[place] = row
        if size == k:
            floor = scores[best[k - 1]]
    best = best[:size]
    return best, scores[best]


def _compile(function: Callable[..., Any]) -> Callable[..., Any]:
    try:
        return numba.njit(cache=True, nogil=True)(function)
    except RuntimeError:  # no folder that numba may write its cache to: compile in each process
        return numba.njit(nogil=True)(function)


top_rows = _compile(_top_rows)
