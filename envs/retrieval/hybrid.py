"""Hybrid retrieval: the rankings of several retrievers made one by reciprocal rank fusion.

A passage's score is the sum of 1 / (60 + its rank) over the retrievers that found it (Cormack, Clarke and Buettcher,
SIGIR 2009, https://doi.org/10.1145/1571941.1572114); scores of different retrievers are never compared.

Example::

    retriever = HybridRetriever([Bm25Retriever.build(corpus), DenseRetriever.build(corpus, minilm_encoder())])
"""

from __future__ import annotations

from collections.abc import Sequence

from envs.retrieval.retriever import Hit, Retriever, check_k, digest

RANK_CONSTANT = 60
DEPTH = 50
"""Hits of each retriever that are fused at least."""


class HybridRetriever:
    """A `Retriever` made of at least one other; all must search the same passages."""

    def __init__(
        self, retrievers: Sequence[Retriever], *, rank_constant: int = RANK_CONSTANT, depth: int = DEPTH
    ) -> None:
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
        return [
            fuse_rankings(of_query, k, rank_constant=self._rank_constant) for of_query in zip(*rankings, strict=True)
        ]


def fuse_rankings(rankings: Sequence[list[Hit]], k: int, *, rank_constant: int = RANK_CONSTANT) -> list[Hit]:
    """The best `k` of several rankings of one query, by the sum of 1 / (rank_constant + rank)."""
    scores: dict[str, float] = {}
    passages = {}
    for ranking in rankings:
        for rank, hit in enumerate(ranking, start=1):
            identity = hit.passage.id
            scores[identity] = scores.get(identity, 0.0) + 1.0 / (rank_constant + rank)
            passages[identity] = hit.passage
    best = sorted(scores, key=lambda identity: (-scores[identity], identity))[:k]
    return [Hit(passage=passages[identity], score=scores[identity]) for identity in best]
