"""`RetrieverSpec`: which retriever to make, as plain data that travels to another process and is built there.

Example::

    spec = RetrieverSpec(corpus_path="wiki.jsonl", index_folder="outputs/index", encoder_dtype="bfloat16")
    retriever = spec.build()
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

from envs.retrieval.corpus import Corpus, Passage
from envs.retrieval.encoders import Encoder
from envs.retrieval.retriever import Retriever

Kind = Literal["hybrid", "bm25", "dense"]


@dataclass(frozen=True, slots=True, kw_only=True)
class RetrieverSpec:
    """Passages (from a file or given), kind of retriever, encoder, and where indexes are kept.

    With an `index_folder` alone, it is the index that `python -m envs.retrieval index` made there: kind, encoder and
    prefixes are then the index's own, `encoder_dtype` is what queries are encoded in.
    """

    kind: Kind = "hybrid"
    """hybrid finds most; bm25 needs no torch, starts at once and costs 0.1 ms a query instead of 10."""
    corpus_path: str | None = None
    """A file of passages as `Corpus.from_file` reads it: JSON lines or Parquet."""
    passages: tuple[Passage, ...] | None = None
    index_folder: str | None = None
    """Where indexes are stored and found again; None builds them in memory each time."""
    encoder: str = "minilm"
    """"minilm" for the packaged model, else a folder or a name on the Hugging Face hub."""
    encoder_dtype: Literal["float32", "bfloat16"] = "float32"
    query_prefix: str = ""
    """What the encoder wants before a query; empty takes what its folder says, and "query: " for E5."""
    passage_prefix: str = ""

    def __post_init__(self) -> None:
        if self.kind not in get_args(Kind):
            raise ValueError(f"kind must be one of {', '.join(get_args(Kind))}, got {self.kind!r}")
        if self.corpus_path is None and self.passages is None and self.index_folder is not None:
            return
        if (self.corpus_path is None) == (self.passages is None):
            given = "both" if self.passages is not None else "neither"
            raise ValueError(f"exactly one of corpus_path and passages is needed, got {given}")
        if self.encoder == "minilm" and (self.query_prefix or self.passage_prefix):
            raise ValueError(
                f"the encoder minilm takes no prefixes, got {self.query_prefix!r} and {self.passage_prefix!r}"
            )

    def build(self) -> Retriever:
        """Load the corpus and the encoder, then load or build the indexes: seconds to minutes.

        Raises `CorpusError`, `FileNotFoundError`, `EncoderError`, or `EnvError` for a store that stays locked.
        """
        from envs.retrieval.bm25 import Bm25Retriever
        from envs.retrieval.dense import DenseRetriever
        from envs.retrieval.hybrid import HybridRetriever
        from envs.retrieval.index_store import bm25_from_store, build_or_load, dense_from_store

        if self.corpus_path is not None:
            corpus = Corpus.from_file(self.corpus_path)
        elif self.passages is None and self.index_folder is not None:
            from envs.retrieval.index_folder import open_index

            return open_index(self.index_folder, dtype=self.encoder_dtype)
        else:
            corpus = Corpus(self.passages or ())
        folder = self.index_folder
        if self.kind == "bm25":
            return bm25_from_store(corpus, folder) if folder else Bm25Retriever.build(corpus)
        encoder = self._encoder()
        if self.kind == "dense":
            return dense_from_store(corpus, encoder, folder) if folder else DenseRetriever.build(corpus, encoder)
        if folder:
            return build_or_load(corpus, encoder, folder)
        return HybridRetriever([Bm25Retriever.build(corpus), DenseRetriever.build(corpus, encoder)])

    def _encoder(self) -> Encoder:
        from envs.retrieval.encoders import load_encoder

        if self.encoder == "minilm":
            return load_encoder(self.encoder, dtype=self.encoder_dtype)
        return load_encoder(
            self.encoder,
            dtype=self.encoder_dtype,
            query_prefix=self.query_prefix or None,
            passage_prefix=self.passage_prefix or None,
        )
