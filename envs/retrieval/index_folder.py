"""A folder that holds all that searching a corpus needs: passages, indexes, and a manifest of what made them.

`build_index` makes it from a file of passages and `open_index` searches it, with nothing else but the encoder's model.
The embeddings of a killed build are found again by the next one. What is opened must be what was built: another
corpus, encoder, prefix or setting is an `IndexMismatch`, never a bad hit. `index_store` is the smaller sibling for a
corpus that a process has in memory anyway.

    folder/manifest.json                 identity, files, versions, measured recall: `index_store.IndexManifest`
    folder/data-*/shard-0000/            passages.arrow; by kind: BM25 arrays, embeddings.npy, index.faiss

Example::

    build_index("wiki.jsonl", "outputs/wiki", IndexRecipe(kind="hybrid"))
    open_index("outputs/wiki").search(["first king of Norway"], 3)
"""

from __future__ import annotations

import hashlib
import shutil
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal, get_args

from envs.retrieval.bm25 import Bm25Retriever, Bm25Settings
from envs.retrieval.corpus import read_passages
from envs.retrieval.dense import METRIC, DenseRetriever
from envs.retrieval.embedding_shards import encode_in_shards
from envs.retrieval.encoder_settings import EncoderError, Pooling
from envs.retrieval.encoders import Dtype, TransformerEncoder, load_encoder
from envs.retrieval.faiss_index import (
    DEFAULT_APPROXIMATE,
    EXACT,
    Device,
    SearchSettings,
    VectorKind,
    apply_search_settings,
    build_vector_index,
    check_vector_kind,
    describe_search,
)
from envs.retrieval.hybrid import HybridRetriever
from envs.retrieval.index_store import (
    IndexManifest,
    IndexMismatch,
    check_files,
    check_identity,
    locked,
    new_data_folder,
    publish_data,
    read_manifest,
)
from envs.retrieval.passage_store import StoredCorpus, write_passages
from envs.retrieval.recall import tune_search
from envs.retrieval.retriever import Retriever, digest
from envs.retrieval.shards import Shard, ShardedRetriever

IndexKind = Literal["bm25", "hybrid", "flat", "hnsw", "ivfpq", "sq8", "sqfp16"]
EXACT_UP_TO = 200_000
"""Passages up to which `vectors="auto"` searches exactly."""

Progress = Callable[[str, int, int | None], None]
"""Called with what is being done, how many passages are done, and how many there are (None while unknown)."""


@dataclass(frozen=True, slots=True, kw_only=True)
class IndexRecipe:
    """What to build. Encoder settings that are None are the model's own (`encoder_settings`)."""

    kind: IndexKind = "hybrid"
    """"bm25" needs no torch; "hybrid" is BM25 and `vectors` fused; the others are vectors alone."""
    vectors: VectorKind | Literal["auto"] = "auto"
    """Of a hybrid; "auto" is flat up to `EXACT_UP_TO` passages and ivfpq beyond."""
    encoder: str = "minilm"
    """"minilm" for the packaged model, else a folder or a name on the Hugging Face hub."""
    dtype: Dtype = "float32"
    """What passages are encoded in; queries may be encoded in the other one later."""
    query_prefix: str | None = None
    passage_prefix: str | None = None
    pooling: Pooling | None = None
    max_tokens: int | None = None
    bm25: Bm25Settings = field(default_factory=Bm25Settings)
    shards: int = 1
    """Parts of nearly equal size, each of which can be searched by a process of its own."""

    def __post_init__(self) -> None:
        if self.kind not in get_args(IndexKind):
            raise ValueError(f"kind must be one of {', '.join(get_args(IndexKind))}, got {self.kind!r}")
        if self.vectors != "auto":
            check_vector_kind(self.vectors)
        if self.shards < 1:
            raise ValueError(f"shards must be at least 1, got {self.shards}")

    def vector_kind(self, count: int) -> VectorKind | None:
        """The kind of vector index for `count` passages; None for none."""
        if self.kind == "bm25":
            return None
        if self.kind != "hybrid":
            return self.kind
        if self.vectors != "auto":
            return self.vectors
        return "flat" if count <= EXACT_UP_TO else DEFAULT_APPROXIMATE


def build_index(
    corpus_path: str | Path,
    folder: str | Path,
    recipe: IndexRecipe | None = None,
    *,
    replace: bool = False,
    threads: int = 1,
    device: str = "cpu",
    embeddings_cache: str | Path | None = None,
    on_progress: Progress | None = None,
    lock_timeout_s: float = 10.0,
) -> IndexManifest:
    """Index the passages of `corpus_path` into `folder`; nothing is done where that index is there already.

    Encoding uses `threads` threads of the CPU, or `device`. Embeddings are kept in `embeddings_cache` for other indexes
    of the same corpus, else within `folder` until the index is whole; peak disk use is twice that of the folder.
    Raises `CorpusError`, `FileNotFoundError`, `EncoderError`, `IndexMismatch` when `folder` holds an index of something
    else and `replace` is not set, `EnvError` when another process is building there.
    """
    recipe = recipe or IndexRecipe()
    tell = on_progress or (lambda what, done, total: None)
    source, store = Path(corpus_path), Path(folder)
    if not source.is_file():
        raise FileNotFoundError(f"{source}: there is no such file of passages")
    work = store / ".work"
    work.mkdir(parents=True, exist_ok=True)
    with locked(store / ".lock", lock_timeout_s):
        started = time.perf_counter()
        sha256 = write_passages(
            read_passages(source),
            work / "passages.arrow",
            source=str(source),
            on_progress=lambda done: tell("reading passages", done, None),
        )
        corpus = StoredCorpus(work / "passages.arrow", sha256=sha256)
        if recipe.shards > len(corpus):
            raise ValueError(f"{recipe.shards} shards of {len(corpus)} passages: a shard needs at least one")
        vectors = recipe.vector_kind(len(corpus))
        encoder = None if vectors is None else _encoder_of(recipe, threads=threads, device=device)
        identity = _identity(recipe, corpus, vectors, encoder)
        present = None if replace else read_manifest(store)
        if present is not None:
            check_identity(store, present, identity)
            check_files(store, present)
            return present
        bm25 = None
        if recipe.kind in ("bm25", "hybrid"):
            tell("counting words", 0, len(corpus))
            bm25 = Bm25Retriever.build(corpus, recipe.bm25)
            tell("counting words", len(corpus), len(corpus))
        cache = work if embeddings_cache is None else Path(embeddings_cache)
        data = new_data_folder(store)
        facts = [
            _write_shard(data / f"shard-{number:04}", corpus, start, stop, bm25, encoder, vectors, cache, tell)
            for number, (start, stop) in enumerate(_bounds(len(corpus), recipe.shards))
        ]
        manifest = publish_data(
            store,
            data,
            identity,
            build_s=time.perf_counter() - started,
            facts={"source": str(source.resolve()), "shards": facts},
        )
        shutil.rmtree(work, ignore_errors=True)
        return manifest


def open_index(
    folder: str | Path,
    *,
    encoder: str | None = None,
    dtype: Dtype | None = None,
    device: Device = "cpu",
    search: SearchSettings | None = None,
) -> Retriever:
    """Search what `build_index` made, all shards in this process.

    `encoder` is where the model is now, if it has moved; `dtype` what queries are encoded in, if not what passages
    were; `device` where the vector index lives ("cuda" and "auto" need faiss-gpu); `search` overrides how thoroughly an
    approximate index searches. Raises `IndexMismatch` for a folder without index, a damaged one, or one made by
    another encoder, `EncoderError` for an encoder that cannot be loaded.
    """
    manifest = checked_manifest(folder)
    model = encoder_of_index(folder, encoder=encoder, dtype=dtype)
    shards = [
        open_shard(folder, number, encoder=model, device=device, search=search)
        for number in range(manifest.identity["shards"])
    ]
    if len(shards) == 1:
        parts = shards[0].parts
        return parts[0] if len(parts) == 1 else HybridRetriever(parts)
    return ShardedRetriever(
        shards,
        encoder=model,
        fuses=manifest.identity["kind"] == "hybrid",
        fingerprint=digest({"shards": [part.fingerprint for shard in shards for part in shard.parts]}),
    )


def open_shard(
    folder: str | Path,
    number: int,
    *,
    encoder: TransformerEncoder | None,
    device: Device = "cpu",
    search: SearchSettings | None = None,
) -> Shard:
    """One shard of an index; `encoder` is what `encoder_of_index` gave, and is not used by the shard itself."""
    import faiss
    import numpy as np

    manifest = checked_manifest(folder)
    facts = manifest.facts["shards"][number]
    at = Path(folder) / manifest.data / f"shard-{number:04}"
    if _sha256(at / "passages.arrow") != facts["passages_sha256"]:
        raise IndexMismatch(f"{at / 'passages.arrow'}: its checksum is not the manifest's: the index is damaged")
    corpus = StoredCorpus(at / "passages.arrow", sha256=facts["corpus_sha256"])
    identity = manifest.identity
    bm25 = dense = None
    if identity["bm25"] is not None:
        settings = Bm25Settings(k1=identity["bm25"]["k1"], b=identity["bm25"]["b"])
        if settings.facts() != identity["bm25"]:
            raise IndexMismatch(f"{folder}: its BM25 is {identity['bm25']}, this version makes {settings.facts()}")
        bm25 = Bm25Retriever.load(corpus, at, settings)
    if identity["vectors"] is not None:
        if encoder is None:
            raise ValueError(f"{folder} has a vector index: its encoder is needed")
        index = None
        if identity["vectors"] not in EXACT:
            index = faiss.read_index(str(at / "index.faiss"))
            apply_search_settings(index, search or SearchSettings())
        dense = DenseRetriever(
            corpus,
            encoder,
            np.load(at / "embeddings.npy", mmap_mode="r"),
            kind=identity["vectors"],
            index=index,
            device=device,
            embedded_by=identity["encoder"]["fingerprint"],
        )
    return Shard(bm25=bm25, dense=dense)


def encoder_of_index(
    folder: str | Path, *, encoder: str | None = None, dtype: Dtype | None = None
) -> TransformerEncoder | None:
    """The encoder that an index was made by, checked to be the same; None for an index without vectors."""
    made_by: Mapping[str, Any] | None = checked_manifest(folder).identity["encoder"]
    if made_by is None:
        return None
    settings = {} if made_by["model"] == "minilm" else made_by["settings"]
    try:
        model = load_encoder(encoder or made_by["model"], dtype=dtype or made_by["dtype"], **settings)
    except EncoderError as error:
        raise EncoderError(f"{folder} was made by the encoder {made_by['model']!r}: {error}") from error
    if model.fingerprint_at(made_by["dtype"]) != made_by["fingerprint"]:
        raise IndexMismatch(
            f"{folder} was made by {made_by['model']!r} with weights {made_by['weights_sha256'][:12]} and "
            f"{made_by['settings']}; this encoder has weights {model.weights_sha256[:12]} and {asdict(model.settings)}"
        )
    return model


def checked_manifest(folder: str | Path) -> IndexManifest:
    """The manifest of an index whose files are all there. Raises `IndexMismatch`."""
    manifest = read_manifest(folder)
    if manifest is None or "shards" not in manifest.facts:
        raise IndexMismatch(
            f"{folder} holds no index; make one with: python -m envs.retrieval index CORPUS --out {folder}"
        )
    check_files(Path(folder), manifest)
    return manifest


def _encoder_of(recipe: IndexRecipe, *, threads: int, device: str) -> TransformerEncoder:
    return load_encoder(
        recipe.encoder,
        dtype=recipe.dtype,
        query_prefix=recipe.query_prefix,
        passage_prefix=recipe.passage_prefix,
        pooling=recipe.pooling,
        max_tokens=recipe.max_tokens,
        threads=threads,
        device=device,
    )


def _identity(
    recipe: IndexRecipe, corpus: StoredCorpus, vectors: VectorKind | None, encoder: TransformerEncoder | None
) -> dict[str, Any]:
    made_by = None
    if encoder is not None:
        made_by = {
            "model": recipe.encoder,
            "weights_sha256": encoder.weights_sha256,
            "settings": asdict(encoder.settings),
            "dtype": recipe.dtype,
            "dim": encoder.dim,
            "metric": METRIC,
            "fingerprint": encoder.fingerprint,
        }
    return {
        "kind": recipe.kind,
        "corpus_sha256": corpus.sha256,
        "count": len(corpus),
        "shards": recipe.shards,
        "bm25": recipe.bm25.facts() if recipe.kind in ("bm25", "hybrid") else None,
        "vectors": vectors,
        "encoder": made_by,
    }


def _bounds(count: int, shards: int) -> list[tuple[int, int]]:
    edges = [count * number // shards for number in range(shards + 1)]
    return list(zip(edges, edges[1:], strict=False))


def _write_shard(
    at: Path,
    whole: StoredCorpus,
    start: int,
    stop: int,
    bm25: Bm25Retriever | None,
    encoder: TransformerEncoder | None,
    vectors: VectorKind | None,
    cache: Path,
    tell: Progress,
) -> dict[str, Any]:
    """Write one shard's files and return what the manifest says of it."""
    import faiss
    import numpy as np

    at.mkdir()
    sha256 = write_passages(whole.slice(start, stop), at / "passages.arrow", source=whole.source)
    corpus = StoredCorpus(at / "passages.arrow", sha256=sha256)
    facts: dict[str, Any] = {
        "start": start,
        "stop": stop,
        "corpus_sha256": sha256,
        "passages_sha256": _sha256(at / "passages.arrow"),
    }
    if bm25 is not None:
        (bm25 if stop - start == len(whole) else bm25.part(corpus, start)).save(at)
    if encoder is not None and vectors is not None:
        shape = (len(corpus), encoder.dim)
        embeddings = np.lib.format.open_memmap(at / "embeddings.npy", mode="w+", dtype=np.float32, shape=shape)
        encode_in_shards(
            corpus,
            encoder,
            cache,
            into=embeddings,
            on_progress=lambda done, total: tell("encoding passages", start + done, len(whole)),
        )
        embeddings.flush()
        if vectors not in EXACT:
            tell(f"building {vectors}", start, len(whole))
            index = build_vector_index(vectors, embeddings)
            facts["recall_at_3"] = tune_search(index, vectors, embeddings, corpus, encoder)
            facts["search"] = describe_search(index)
            faiss.write_index(index, str(at / "index.faiss"))
        tell(f"building {vectors}", stop, len(whole))
    return facts


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
