"""Hybrid retrieval: the rankings of several retrievers made one by reciprocal rank fusion.

A passage's score is the sum of 1 / (60 + its rank) over the retrievers that found it (Cormack, Clarke and Buettcher,
SIGIR 2009, https://doi.org/10.1145/1571941.1572114); scores of different retrievers are never compared.

Example::

    retriever = HybridRetriever([Bm25Retriever.build(corpus), DenseRetriever.build(corpus, minilm_encoder())])
"""

from __future__ import annotations

from collections.abc import Sequence

from envs.retrieval.retriever import Hit, Retriever, check_k, digest


class HybridRetriever:
    """A `Retriever` made of at least one other; all must search the same passages."""

    def __init__(self, retrievers: Sequence[Retriever], *, rank_constant: int = 60, depth: int = 50) -> None:
        if not retrievers:
            raise ValueError("a hybrid needs at least one retriever, got none")
        if rank_constant < 1 or depth < 1:
            raise ValueError(f"rank_constant and depth must be at least 1, got {rank_constant} and {depth}")
        self.retrievers = tuple(retrievers)
        self._rank_constant = rank_constant
        self._depth = depth
        self.fingerprint = digest(
            {
                "kind": "hybrid",
                "of": [retriever.fingerprint for retriever in retrievers],
                "rank_constant": rank_constant,
                "depth": depth,
            }
        )

    def search(self, queries: list[str], k: int) -> list[list[Hit]]:
        """See `Retriever.search`; fuses the first max(k, depth) hits of each retriever."""
        check_k(k)
        rankings = [retriever.search(queries, max(k, self._depth)) for retriever in self.retrievers]
        return [self._fuse(list(of_query), k) for of_query in zip(*rankings, strict=True)]

    def _fuse(self, rankings: list[list[Hit]], k: int) -> list[Hit]:
        scores: dict[str, float] = {}
        passages = {}
        for ranking in rankings:
            for rank, hit in enumerate(ranking, start=1):
                identity = hit.passage.id
                scores[identity] = scores.get(identity, 0.0) + 1.0 / (self._rank_constant + rank)
                passages[identity] = hit.passage
        best = sorted(scores, key=lambda identity: (-scores[identity], identity))[:k]
        return [Hit(passage=passages[identity], score=scores[identity]) for identity in best]
