"""BM25 over words: the retriever that needs no model, and the better half of the hybrid on multi-hop questions.

Scores are those of bm25s (Lucene's variant, arXiv 2407.03618), computed once at build time; a search adds up columns.
Words are lower-cased, stripped of accents and English stop words, and stemmed (Snowball English).

Example::

    retriever = Bm25Retriever.build(corpus)
    retriever.search(["first king of Norway"], 3)
"""

from __future__ import annotations

import json
import re
import unicodedata
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from envs.retrieval.corpus import Corpus
from envs.retrieval.retriever import Hit, check_k, clean_query, digest

if TYPE_CHECKING:
    import numpy as np

_WORD = re.compile(r"\w+")
_TOKENIZER_VERSION = 1  # raise it when `tokenize` changes: stored indexes are then rebuilt


@dataclass(frozen=True, slots=True, kw_only=True)
class Bm25Settings:
    """The two numbers of BM25, at the values that did best on 1,062 multi-hop questions over Wikipedia."""

    k1: float = 1.2
    """How soon a repeated word stops adding score."""
    b: float = 0.75
    """How much long passages are held back, 0 to 1."""

    def __post_init__(self) -> None:
        if not self.k1 >= 0:
            raise ValueError(f"k1 must be at least 0, got {self.k1}")
        if not 0 <= self.b <= 1:
            raise ValueError(f"b must be between 0 and 1, got {self.b}")

    def facts(self) -> dict[str, Any]:
        """What identifies an index built with these settings."""
        return {"method": "lucene", "k1": self.k1, "b": self.b, "tokenizer_version": _TOKENIZER_VERSION}


def tokenize(texts: list[str]) -> list[list[str]]:
    """Stemmed words of each text, in order, without stop words."""
    import Stemmer  # PyStemmer

    stemmer = Stemmer.Stemmer("english")  # one per call: a stemmer object must not be shared between threads
    stop_words = _stop_words()
    return [
        stemmer.stemWords([word for word in _WORD.findall(_fold(text)) if word not in stop_words]) for text in texts
    ]


def _fold(text: str) -> str:
    text = text.lower()
    if text.isascii():
        return text
    return "".join(char for char in unicodedata.normalize("NFKD", text) if not unicodedata.combining(char))


@lru_cache(maxsize=1)
def _stop_words() -> frozenset[str]:
    from bm25s.stopwords import STOPWORDS_EN

    return frozenset(STOPWORDS_EN)


class Bm25Retriever:
    """A `Retriever` that holds a sparse score matrix: about 4 kB per passage of 100 words.

    `vocabulary` maps a stem to its column; data, indices and indptr are the matrix by columns (see `bm25_kernel`).
    """

    def __init__(
        self,
        corpus: Corpus,
        *,
        vocabulary: dict[str, int],
        data: np.ndarray,
        indices: np.ndarray,
        indptr: np.ndarray,
        settings: Bm25Settings | None = None,
    ) -> None:
        import numpy as np

        from envs.retrieval.bm25_kernel import top_rows

        self._corpus = corpus
        self._vocabulary = vocabulary
        self._data, self._indices, self._indptr = data, indices, indptr
        self._top_rows = top_rows
        top_rows(data, indices, indptr, np.empty(0, dtype=np.int64), corpus.tie_rank, 1)  # compiled now, not by a query
        self.settings = settings or Bm25Settings()
        self.fingerprint = digest({"kind": "bm25", "corpus": corpus.sha256, **self.settings.facts()})

    @classmethod
    def build(cls, corpus: Corpus, settings: Bm25Settings | None = None) -> Bm25Retriever:
        """Index `corpus`: about 0.08 ms a passage."""
        import bm25s
        import numpy as np

        settings = settings or Bm25Settings()
        vocabulary: dict[str, int] = {}
        token_ids = [
            [vocabulary.setdefault(token, len(vocabulary)) for token in tokens]
            for tokens in tokenize([passage.contents for passage in corpus])
        ]
        if vocabulary:
            index = bm25s.BM25(k1=settings.k1, b=settings.b, method="lucene", backend="numpy")
            index.index((token_ids, vocabulary), create_empty_token=False, show_progress=False)
            matrix = index.scores
        else:  # nothing but stop words and punctuation
            matrix = {"data": np.empty(0), "indices": np.empty(0), "indptr": np.zeros(1)}
        return cls(
            corpus,
            vocabulary=vocabulary,
            data=np.ascontiguousarray(matrix["data"], dtype=np.float32),
            indices=np.ascontiguousarray(matrix["indices"], dtype=np.uint32),
            indptr=np.ascontiguousarray(matrix["indptr"], dtype=np.int64),
            settings=settings,
        )

    def part(self, corpus: Corpus, start: int) -> Bm25Retriever:
        """A retriever of `corpus`, rows `start` and on of this one's; scores stay those of the whole.

        So word frequencies and lengths are the whole's, and the parts' hits can be merged.
        """
        import numpy as np

        stop = start + len(corpus)
        kept = (self._indices >= start) & (self._indices < stop)
        before = np.concatenate([[0], np.cumsum(kept)])
        return Bm25Retriever(
            corpus,
            vocabulary=self._vocabulary,
            data=self._data[kept],
            indices=self._indices[kept] - np.uint32(start),
            indptr=np.ascontiguousarray(before[self._indptr], dtype=np.int64),
            settings=self.settings,
        )

    def save(self, folder: Path) -> None:
        """Write the index into `folder`, which must exist."""
        import numpy as np

        np.save(folder / "data.npy", self._data)
        np.save(folder / "indices.npy", self._indices)
        np.save(folder / "indptr.npy", self._indptr)
        (folder / "vocabulary.json").write_text(json.dumps(list(self._vocabulary)), encoding="utf-8")

    @classmethod
    def load(cls, corpus: Corpus, folder: Path, settings: Bm25Settings | None = None) -> Bm25Retriever:
        """Read what `save` wrote; that it belongs to `corpus` is the caller's to know (`index_store` does)."""
        import numpy as np

        words = json.loads((folder / "vocabulary.json").read_text(encoding="utf-8"))
        return cls(
            corpus,
            vocabulary={word: column for column, word in enumerate(words)},
            data=np.load(folder / "data.npy"),
            indices=np.load(folder / "indices.npy"),
            indptr=np.load(folder / "indptr.npy"),
            settings=settings,
        )

    def search(self, queries: list[str], k: int) -> list[list[Hit]]:
        """See `Retriever.search`. Only passages that share a word with the query are found."""
        check_k(k)
        return [self._search(tokens, k) for tokens in tokenize([clean_query(query) for query in queries])]

    def _search(self, tokens: list[str], k: int) -> list[Hit]:
        import numpy as np

        columns = [self._vocabulary[token] for token in tokens if token in self._vocabulary]
        if not columns:
            return []
        rows, scores = self._top_rows(
            self._data,
            self._indices,
            self._indptr,
            np.array(columns, dtype=np.int64),
            self._corpus.tie_rank,
            min(k, len(self._corpus)),
        )
        return [
            Hit(passage=self._corpus[row], score=score)
            for row, score in zip(rows.tolist(), scores.tolist(), strict=True)
        ]
