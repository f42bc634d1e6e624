"""How much an approximate index misses, measured against exact search, and the settings that miss little enough.

The questions are made from the corpus: the first words of passages spread over it, encoded as queries are. Real
questions are harder or easier; the number is for choosing settings and comparing indexes, and goes into the manifest.

Example::

    recall = tune_search(index, "ivfpq", embeddings, corpus, encoder)      # 0.985, and `index` is set accordingly
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from envs.retrieval.corpus import Corpus
from envs.retrieval.encoders import Encoder
from envs.retrieval.faiss_index import SearchSettings, VectorKind, apply_search_settings, search_ladder

if TYPE_CHECKING:
    import numpy as np

GOAL = 0.98
"""Recall@3 that settings are chosen for: some more than the 0.97 that is promised, since real questions differ."""
K = 3
CANDIDATES = K + 8  # as many as `DenseRetriever` scores for k = 3
_QUESTIONS = 256
_WORDS = 12
_BLOCK_ROWS = 65_536
_SAME_SCORE = 1e-6


def tune_search(
    index: Any, kind: VectorKind, embeddings: np.ndarray, corpus: Corpus, encoder: Encoder, *, goal: float = GOAL
) -> float:
    """Set `index` to the fastest settings that reach recall@3 of `goal`, else the most thorough; the recall reached."""
    vectors = encoder.encode_queries(sample_questions(corpus))
    best = exact_scores(vectors, embeddings)
    recall = 0.0
    for settings in search_ladder(kind, len(corpus)):
        recall = recall_of(index, settings, vectors, embeddings, best)
        if recall >= goal:
            break
    return recall


def sample_questions(corpus: Corpus, count: int = _QUESTIONS) -> list[str]:
    """The first words of at most `count` passages, evenly spread."""
    rows = range(0, len(corpus), max(1, len(corpus) // count))
    return [" ".join(f"{corpus[row].title} {corpus[row].text}".split()[:_WORDS]) for row in rows][:count]


def exact_scores(vectors: np.ndarray, embeddings: np.ndarray) -> np.ndarray:
    """float32 [queries, 3]: the best scores of each query, best first; fewer columns for fewer embeddings."""
    import numpy as np

    best = np.empty((len(vectors), 0), dtype=np.float32)
    for start in range(0, len(embeddings), _BLOCK_ROWS):
        block = vectors @ embeddings[start : start + _BLOCK_ROWS].T
        best = -np.sort(-np.concatenate([best, block], axis=1), axis=1)[:, :K]
    return best


def recall_of(
    index: Any, settings: SearchSettings, vectors: np.ndarray, embeddings: np.ndarray, best: np.ndarray
) -> float:
    """Share of the `best` (as `exact_scores` gives them) that are among the candidates; any equal passage counts."""
    import numpy as np

    apply_search_settings(index, settings)
    wanted = best.shape[1]
    _, candidates = index.search(vectors, min(CANDIDATES, len(embeddings)))
    found = 0
    for vector, rows, scores in zip(vectors, candidates, best, strict=True):
        seen = embeddings[rows[rows >= 0]] @ vector
        found += min(wanted, int(np.count_nonzero(seen >= scores[-1] - _SAME_SCORE)))
    return found / (wanted * len(vectors))
