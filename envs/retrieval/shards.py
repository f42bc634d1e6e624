"""One corpus over several shards: every shard searches its own rows, the merge is what one index would have found.

    queries -> encoded once -> shard 0 .. shard n (in this process, or Ray actors: `ray_shards`) -> merged -> fused

Equal to one index, hit for hit and score for score, for BM25 (its scores are made from the whole corpus, then split by
rows) and for exact vector search. Approximate vector indexes are built shard by shard, so they differ as two builds of
such an index do. A shard that fails fails the search: silent holes would change what a student is trained on.

Example::

    retriever = ShardedRetriever([Shard(bm25=a), Shard(bm25=b)], encoder=None, fuses=False, fingerprint="...")
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Protocol

from envs.base import EnvError
from envs.retrieval.bm25 import Bm25Retriever
from envs.retrieval.dense import DenseRetriever
from envs.retrieval.encoders import Encoder
from envs.retrieval.hybrid import DEPTH, fuse_rankings
from envs.retrieval.retriever import Hit, Retriever, check_k, clean_query

if TYPE_CHECKING:
    import numpy as np

Rankings = list[list[list[Hit]]]
"""[parts][queries][hits]: of each way to search (BM25, vectors) one ranking a query."""


class ShardSearch(Protocol):
    """A shard as its merger sees it."""

    def begin(self, queries: list[str], vectors: np.ndarray | None, k: int) -> Callable[[float], Rankings]:
        """Start a search; what is returned waits for it at most so many seconds and raises `EnvError` if it failed."""
        ...


class Shard:
    """Some rows of a corpus, searched by BM25, by vectors, or both (both give two rankings)."""

    def __init__(self, *, bm25: Bm25Retriever | None = None, dense: DenseRetriever | None = None) -> None:
        if bm25 is None and dense is None:
            raise ValueError("a shard needs bm25, dense or both, got neither")
        self._bm25, self._dense = bm25, dense

    @property
    def parts(self) -> list[Retriever]:
        """BM25 before vectors."""
        return [part for part in (self._bm25, self._dense) if part is not None]

    def search(self, queries: list[str], vectors: np.ndarray | None, k: int) -> Rankings:
        """`vectors`, float32 [queries, dim], are needed where the shard has a vector index."""
        rankings = [] if self._bm25 is None else [self._bm25.search(queries, k)]
        if self._dense is not None:
            if vectors is None:
                raise ValueError("this shard has a vector index: the queries' vectors are needed")
            rankings.append(self._dense.search_vectors(vectors, k))
        return rankings

    def begin(self, queries: list[str], vectors: np.ndarray | None, k: int) -> Callable[[float], Rankings]:
        """See `ShardSearch`; the search is done in the call itself."""
        found = self.search(queries, vectors, k)
        return lambda timeout_s: found


class ShardedRetriever:
    """A `Retriever` over shards of one corpus. `encoder` makes the queries' vectors, where shards need them; `fuses`
    says that they search in two ways, whose rankings are fused as `HybridRetriever` does."""

    def __init__(
        self,
        shards: Sequence[ShardSearch],
        *,
        encoder: Encoder | None,
        fuses: bool,
        fingerprint: str,
        timeout_s: float = 30.0,
    ) -> None:
        if not shards:
            raise ValueError("at least one shard is needed, got none")
        self._shards, self._encoder, self.fingerprint, self._timeout_s = tuple(shards), encoder, fingerprint, timeout_s
        self._fuses = fuses

    def search(self, queries: list[str], k: int) -> list[list[Hit]]:
        """See `Retriever.search`. Raises `EnvError` when a shard fails or gives no answer in time."""
        check_k(k)
        texts = [clean_query(query) for query in queries]
        asked = [at for at, text in enumerate(texts) if text]
        found: list[list[Hit]] = [[] for _ in texts]
        if not asked:
            return found
        words = [texts[at] for at in asked]
        vectors = None if self._encoder is None else self._encoder.encode_queries(words)
        depth = max(k, DEPTH) if self._fuses else k
        deadline = time.monotonic() + self._timeout_s
        waiting = [shard.begin(words, vectors, depth) for shard in self._shards]
        of_shards = [wait(max(0.0, deadline - time.monotonic())) for wait in waiting]
        if {len(rankings) for rankings in of_shards} != {1 + self._fuses}:
            raise EnvError(
                f"{1 + self._fuses} rankings of each shard are needed; these are not the shards of one index"
            )
        for number, at in enumerate(asked):
            merged = [
                merge_hits([rankings[part][number] for rankings in of_shards], depth) for part in range(1 + self._fuses)
            ]
            found[at] = fuse_rankings(merged, k) if self._fuses else merged[0]
        return found


def merge_hits(rankings: Sequence[list[Hit]], k: int) -> list[Hit]:
    """The best `k` of rankings of different passages whose scores can be compared; equals by id."""
    return sorted((hit for ranking in rankings for hit in ranking), key=lambda hit: (-hit.score, hit.passage.id))[:k]
