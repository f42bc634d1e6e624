"""Search in bfloat16: what exact search finds is among its candidates, and who gets it."""

from __future__ import annotations

import numpy as np
import pytest

from envs.retrieval import Corpus, DenseRetriever, Passage
from envs.retrieval.bfloat16_search import Bfloat16Search, has_bfloat16

ROWS, DIM = 20_000, 32


def unit(rows: np.ndarray) -> np.ndarray:
    return (rows / np.linalg.norm(rows, axis=1, keepdims=True)).astype(np.float32)


@pytest.fixture(scope="module")
def embeddings() -> np.ndarray:
    return unit(np.random.default_rng(0).normal(size=(ROWS, DIM)))


@pytest.fixture(scope="module")
def vectors() -> np.ndarray:
    return unit(np.random.default_rng(1).normal(size=(150, DIM)))


class FixedEncoder:
    """Knows the vectors of the queries "0", "1" and so on."""

    name, dim, fingerprint = "fixed", DIM, "fixed"

    def __init__(self, vectors: np.ndarray, dtype: str) -> None:
        self.vectors, self.dtype = vectors, dtype

    def encode_queries(self, texts: list[str]) -> np.ndarray:
        return self.vectors[[int(text) for text in texts]]

    def encode_passages(self, texts: list[str]) -> np.ndarray:
        return self.encode_queries(texts)


def test_the_best_rows_are_among_the_candidates(embeddings: np.ndarray, vectors: np.ndarray) -> None:
    best = np.argsort(-(vectors @ embeddings.T), axis=1)[:, :3]
    scores, rows = Bfloat16Search(embeddings).search(vectors, 11)
    assert rows.shape == scores.shape == (150, 44)
    assert (np.diff(scores, axis=1) <= 0).all()
    found = [
        len({*wanted.tolist()} & {*candidates.tolist()}) / 3 for wanted, candidates in zip(best, rows, strict=True)
    ]
    assert np.mean(found) >= 0.999


def test_more_candidates_than_rows_are_all_rows(vectors: np.ndarray) -> None:
    _, rows = Bfloat16Search(vectors[:5]).search(vectors[:2], 3)
    assert [sorted(of_query) for of_query in rows.tolist()] == [[0, 1, 2, 3, 4]] * 2


@pytest.mark.skipif(not has_bfloat16(), reason="this CPU has no bfloat16 arithmetic")
def test_a_bfloat16_encoder_has_it_with_exact_scores_and_another_fingerprint(
    embeddings: np.ndarray, vectors: np.ndarray
) -> None:
    corpus = Corpus(Passage(id=str(row), title="", text=f"passage {row}") for row in range(ROWS))
    exact, half = (
        DenseRetriever(corpus, FixedEncoder(vectors, dtype), embeddings) for dtype in ("float32", "bfloat16")
    )
    queries = [str(number) for number in range(len(vectors))]
    same = [a == b for a, b in zip(exact.search(queries, 3), half.search(queries, 3), strict=True)]
    assert np.mean(same) >= 0.99
    assert half.fingerprint != exact.fingerprint


@pytest.mark.skipif(not has_bfloat16(), reason="this CPU has no bfloat16 arithmetic")
def test_equal_passages_are_ordered_by_id_however_many_there_are(vectors: np.ndarray) -> None:
    corpus = Corpus(Passage(id=f"{row:05}", title="", text=f"passage {row}") for row in range(ROWS))
    copies = np.repeat(vectors[:1], ROWS, axis=0)
    hits = DenseRetriever(corpus, FixedEncoder(vectors, "bfloat16"), copies).search(["0"], 3)[0]
    assert [hit.passage.id for hit in hits] == ["00000", "00001", "00002"]
