"""Dense retrieval: exact search by inner product of sentence embeddings in a flat FAISS index.

Exact is right up to some 200,000 passages, where encoding the query costs more than the search. The FAISS scores choose
candidates only: these are scored again one query at a time, since FAISS's two code paths (few queries, many queries)
differ in the last bits, and a query's hits must not depend on its batch.

Example::

    retriever = DenseRetriever.build(corpus, minilm_encoder())
    retriever.search(["first king of Norway"], 3)
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from envs.retrieval.corpus import Corpus
from envs.retrieval.encoders import Encoder
from envs.retrieval.retriever import Hit, check_k, clean_query, digest

if TYPE_CHECKING:
    import numpy as np

METRIC = "inner_product"
_MARGIN = 8  # candidates beyond k, so that equal scores at the edge are ordered by id and not by chance
_BLAS_FROM_QUERIES = 4  # FAISS's own limit (333 queries at dim 384) leaves micro-batches on its slow path: 3x to 7x
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

    Memory: 8 bytes x n x dim (the index and the array that candidates are scored from, which may be memory-mapped).
    Raises `ValueError` when the embeddings do not fit corpus and encoder.
    """

    def __init__(self, corpus: Corpus, encoder: Encoder, embeddings: np.ndarray) -> None:
        import faiss
        import numpy as np

        if embeddings.shape != (len(corpus), encoder.dim) or embeddings.dtype != np.float32:
            raise ValueError(
                f"embeddings are {embeddings.dtype} {embeddings.shape}; float32 {(len(corpus), encoder.dim)} is needed"
            )
        self._corpus, self._encoder, self._embeddings = corpus, encoder, embeddings
        threshold = _BLAS_FROM_QUERIES * encoder.dim
        faiss.cvar.distance_compute_blas_threshold = min(faiss.cvar.distance_compute_blas_threshold, threshold)
        self._faiss = faiss
        self._index = faiss.IndexFlatIP(encoder.dim)
        self._index.add(embeddings)
        self.fingerprint = digest({"kind": "dense", **dense_facts(corpus, encoder)})

    @classmethod
    def build(cls, corpus: Corpus, encoder: Encoder) -> DenseRetriever:
        """Encode `corpus` and index it; the encoding is nearly all of the time."""
        return cls(corpus, encoder, encoder.encode_passages([passage.contents for passage in corpus]))

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
            for at, hits in zip(asked, self._search(vectors, k), strict=True):
                found[at] = hits
        return found

    def _search(self, vectors: np.ndarray, k: int) -> list[list[Hit]]:
        import numpy as np

        self._faiss.omp_set_num_threads(1)  # a setting of the calling thread, hence here
        tie_rank = self._corpus.tie_rank
        results: list[list[Hit]] = [[] for _ in vectors]
        todo, count = np.arange(len(vectors)), min(k + _MARGIN, len(self._corpus))
        while len(todo):
            _, candidates = self._index.search(vectors[todo], count)
            tied = []
            for at, rows in zip(todo.tolist(), candidates, strict=True):
                scores = np.round(self._embeddings[rows].astype(np.float64) @ vectors[at], _SCORE_DECIMALS)
                order = np.lexsort((tie_rank[rows], -scores))
                if scores[order[-1]] == scores[order[min(k, count) - 1]] and count < len(self._corpus):
                    tied.append(at)  # as good as the last candidate: equals may be left outside
                    continue
                results[at] = [Hit(passage=self._corpus[int(rows[i])], score=float(scores[i])) for i in order[:k]]
            todo, count = np.array(tied, dtype=np.int64), min(4 * count, len(self._corpus))
        return results
