"""Dense retrieval: search by inner product of sentence embeddings in a FAISS index of any kind (`faiss_index`).

The FAISS scores choose candidates only: these are scored again from the embeddings, one query at a time. So an
approximate index loses only what it did not see, scores mean the same in every kind, and a query's hits do not depend
on its batch, although FAISS's two code paths (few queries, many queries) differ in the last bits. An encoder of dtype
bfloat16 has a flat index searched in that dtype (`bfloat16_search`), where the CPU can; with float32 it is exact.

Example::

    retriever = DenseRetriever.build(corpus, minilm_encoder())
    retriever.search(["first king of Norway"], 3)
"""

from __future__ import annotations

import contextlib
import threading
from typing import TYPE_CHECKING, Any

from envs.retrieval.bfloat16_search import Bfloat16Search, has_bfloat16
from envs.retrieval.corpus import Corpus
from envs.retrieval.encoders import Encoder
from envs.retrieval.faiss_index import (
    EXACT,
    Device,
    VectorKind,
    build_vector_index,
    check_vector_kind,
    describe_search,
    lower_blas_threshold,
    on_device,
)
from envs.retrieval.retriever import Hit, check_k, clean_query, digest

if TYPE_CHECKING:
    import numpy as np

METRIC = "inner_product"
_MARGIN = 8  # candidates beyond k, so that equal scores at the edge are ordered by id and not by chance
_GPU_CANDIDATES = 2048
_BFLOAT16_FROM_PASSAGES = 20_000
_SCORE_DECIMALS = 6  # below the noise of float32 encoding


def dense_facts(corpus: Corpus, encoder: Encoder) -> dict[str, Any]:
    """What identifies the embeddings of `corpus` by `encoder`."""
    return {
        "corpus_sha256": corpus.sha256,
        "count": len(corpus),
        "encoder": encoder.name,
        "encoder_fingerprint": encoder.fingerprint,
        "dim": encoder.dim,
        "metric": METRIC,
    }


class DenseRetriever:
    """A `Retriever` over `embeddings`, float32 [n, dim] with unit rows in the corpus's order.

    `index` is a FAISS index of the same rows, of the kind that `kind` says; without one it is built. Memory: the index,
    and 4 bytes x n x dim for the array that candidates are scored from, which may be memory-mapped; 2 bytes more where
    the search is in bfloat16 (20,000 passages or more, see the module's docstring). `embedded_by` is
    the fingerprint of the encoder that made the embeddings, where that is not `encoder` (one of another dtype, say).
    Raises `ValueError` when the embeddings do not fit corpus and encoder.
    """

    def __init__(
        self,
        corpus: Corpus,
        encoder: Encoder,
        embeddings: np.ndarray,
        *,
        kind: VectorKind = "flat",
        index: Any = None,
        device: Device = "cpu",
        embedded_by: str | None = None,
    ) -> None:
        import faiss
        import numpy as np

        check_vector_kind(kind)
        if embeddings.shape != (len(corpus), encoder.dim) or embeddings.dtype != np.float32:
            raise ValueError(
                f"embeddings are {embeddings.dtype} {embeddings.shape}; float32 {(len(corpus), encoder.dim)} is needed"
            )
        self._corpus, self._encoder, self._embeddings, self._faiss = corpus, encoder, embeddings, faiss
        lower_blas_threshold(encoder.dim)
        self.kind: VectorKind = kind
        self.cpu_index = build_vector_index(kind, embeddings) if index is None else index
        """The FAISS index, for saving it and for its settings."""
        if (self.cpu_index.ntotal, self.cpu_index.d) != embeddings.shape:
            raise ValueError(f"the index holds {self.cpu_index.ntotal} x {self.cpu_index.d}, not {embeddings.shape}")
        self._index = on_device(self.cpu_index, device)
        on_gpu = self._index is not self.cpu_index
        # Not for few passages: there FAISS is as fast, and exact.
        in_bfloat16 = (
            kind == "flat"
            and not on_gpu
            and len(corpus) >= _BFLOAT16_FROM_PASSAGES
            and getattr(encoder, "dtype", None) == "bfloat16"
            and has_bfloat16()
        )
        if in_bfloat16:
            self._index = Bfloat16Search(embeddings)
        # A GPU index is not safe for two threads, and finds 2,048 candidates at most.
        self._turn = threading.Lock() if on_gpu else contextlib.nullcontext()
        self._most = min(len(corpus), _GPU_CANDIDATES) if on_gpu else len(corpus)
        facts = {"kind": "dense", **dense_facts(corpus, encoder)}
        if in_bfloat16:
            facts["index"] = [kind, "bfloat16"]
        elif kind != "flat":
            facts["index"] = [kind, describe_search(self.cpu_index)]
        if embedded_by not in (None, encoder.fingerprint):
            facts["embedded_by"] = embedded_by
        self.fingerprint = digest(facts)

    @classmethod
    def build(
        cls, corpus: Corpus, encoder: Encoder, *, kind: VectorKind = "flat", device: Device = "cpu"
    ) -> DenseRetriever:
        """Encode `corpus` and index it; the encoding is nearly all of the time."""
        embeddings = encoder.encode_passages([passage.contents for passage in corpus])
        return cls(corpus, encoder, embeddings, kind=kind, device=device)

    @property
    def embeddings(self) -> np.ndarray:
        """float32 [n, dim]: row i is passage i."""
        return self._embeddings

    def search(self, queries: list[str], k: int) -> list[list[Hit]]:
        """See `Retriever.search`; scores are cosines."""
        check_k(k)
        texts = [clean_query(query) for query in queries]
        asked = [at for at, text in enumerate(texts) if text]
        found: list[list[Hit]] = [[] for _ in texts]
        if asked:
            vectors = self._encoder.encode_queries([texts[at] for at in asked])
            for at, hits in zip(asked, self.search_vectors(vectors, k), strict=True):
                found[at] = hits
        return found

    def search_vectors(self, vectors: np.ndarray, k: int) -> list[list[Hit]]:
        """As `search` for queries that are encoded already: float32 [n, dim], unit rows."""
        import numpy as np

        check_k(k)
        self._faiss.omp_set_num_threads(1)  # a setting of the calling thread, hence here
        tie_rank = self._corpus.tie_rank
        results: list[list[Hit]] = [[] for _ in vectors]
        todo, count = np.arange(len(vectors)), min(k + _MARGIN, self._most)
        while len(todo):
            with self._turn:
                _, candidates = self._index.search(vectors[todo], count)
            # Of an exact index, equals of the last candidate may be left outside: then more are asked for.
            may_widen = self.kind in EXACT and count < self._most
            tied = []
            for at, rows in zip(todo.tolist(), candidates, strict=True):
                rows = rows[rows >= 0]  # an approximate index may find fewer
                scores = np.round(self._embeddings[rows].astype(np.float64) @ vectors[at], _SCORE_DECIMALS)
                order = np.lexsort((tie_rank[rows], -scores))
                if may_widen and scores[order[-1]] == scores[order[min(k, len(order)) - 1]]:
                    tied.append(at)
                    continue
                results[at] = [Hit(passage=self._corpus[int(rows[i])], score=float(scores[i])) for i in order[:k]]
            todo, count = np.array(tied, dtype=np.int64), min(4 * count, self._most)
        return results
