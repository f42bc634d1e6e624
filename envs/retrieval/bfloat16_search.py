"""Candidates by matrix products in bfloat16: twice as fast as FAISS's exact search on CPUs that have such arithmetic.

A score keeps 8 bits here, so several times as many candidates as are wanted are returned, and whoever asks orders them
by their exact scores (`dense.DenseRetriever` does): what is lost then is a passage whose score is within rounding of
some fifty others. It answers `search` as a FAISS index does, beside which it needs 2 bytes x n x dim.

Example::

    searcher = Bfloat16Search(embeddings)
    scores, rows = searcher.search(vectors, 11)      # rows is int64 [queries, at least 11]
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import numpy as np

_CANDIDATES = 4  # times those asked for are returned: the exact scores decide among them
_BLOCK_ROWS = 16_384
_BLOCK_QUERIES = 128  # bounds the scores that are in memory at once


def has_bfloat16() -> bool:
    """Whether this CPU multiplies bfloat16 in hardware; elsewhere it is slower than float32."""
    import torch

    return bool(getattr(torch.cpu, "_is_avx512_bf16_supported", bool)())  # a private name, which may go


class Bfloat16Search:
    """Over `embeddings`, float32 [n, dim], of which it keeps a copy in bfloat16; they may be memory-mapped."""

    def __init__(self, embeddings: np.ndarray) -> None:
        import torch

        self._torch = torch
        self.ntotal, self.d = embeddings.shape
        self._rows = torch.empty((self.ntotal, self.d), dtype=torch.bfloat16)
        for start in range(0, self.ntotal, _BLOCK_ROWS):
            block = embeddings[start : start + _BLOCK_ROWS]
            self._rows[start : start + len(block)] = torch.tensor(block)  # a copy: the array may be read-only

    def search(self, vectors: np.ndarray, count: int) -> tuple[np.ndarray, np.ndarray]:
        """Scores float32 and rows int64, each [queries, candidates], best first, for float32 [queries, dim].

        There are four times `count` candidates, or all rows where these are fewer.
        """
        torch = self._torch
        wanted = min(_CANDIDATES * count, self.ntotal)
        parts: list[tuple[Any, Any]] = []
        with torch.inference_mode():
            for start in range(0, len(vectors), _BLOCK_QUERIES):
                parts.append(self._best(torch.tensor(vectors[start : start + _BLOCK_QUERIES]).bfloat16(), wanted))
            scores, rows = (torch.cat(column) for column in zip(*parts, strict=True))
        return scores.float().numpy(), rows.numpy()

    def _best(self, queries: Any, wanted: int) -> tuple[Any, Any]:
        torch = self._torch
        scores, rows = [], []
        for start in range(0, self.ntotal, _BLOCK_ROWS):
            block = queries @ self._rows[start : start + _BLOCK_ROWS].T
            of_block, at = block.topk(min(wanted, block.shape[1]), dim=1, sorted=False)
            scores.append(of_block)
            rows.append(at + start)
        best, at = torch.cat(scores, dim=1).topk(wanted, dim=1)
        return best, torch.cat(rows, dim=1).gather(1, at)
