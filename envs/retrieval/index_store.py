"""Indexes on disk: built once, loaded by every later process, rebuilt when anything that decides them has changed.

A store is a folder with `manifest.json`, which says what was indexed by what, and one data folder that it names. The
manifest is replaced in one step after the data is complete and synced, so a process that is killed while building
leaves the store as it was; what it had written is removed by the next build. A lock makes a second process wait and
then load.

Example::

    retriever = build_or_load(corpus, minilm_encoder(), "outputs/index")      # minutes, then seconds
    read_manifest("outputs/index/dense").versions["faiss-cpu"]
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import logging
import os
import secrets
import shutil
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass, field
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, Literal, TypeVar

from envs.base import EnvError
from envs.retrieval.bm25 import Bm25Retriever, Bm25Settings
from envs.retrieval.corpus import Corpus
from envs.retrieval.dense import DenseRetriever, dense_facts
from envs.retrieval.encoders import Encoder
from envs.retrieval.hybrid import HybridRetriever
from envs.retrieval.retriever import Retriever

OnMismatch = Literal["rebuild", "error"]
R = TypeVar("R", bound=Retriever)

_FORMAT = 1
_PACKAGES = ("numpy", "faiss-cpu", "faiss-gpu", "bm25s", "PyStemmer", "torch", "transformers")
_log = logging.getLogger(__name__)


class IndexMismatch(EnvError):
    """The stored index is of another corpus, encoder or setting, or is damaged; the message names the difference."""


@dataclass(frozen=True, slots=True, kw_only=True)
class IndexManifest:
    """What a stored index is of."""

    format: int
    identity: Mapping[str, Any]
    """Corpus checksum and count, encoder name and fingerprint, dim, metric, settings: compared on load."""
    data: str
    """Name of the data folder beside the manifest."""
    files: Mapping[str, int]
    """Bytes of each file of the data folder: compared on load."""
    build_s: float
    versions: Mapping[str, str]
    """Of the libraries that built it; for the record, not compared."""
    facts: Mapping[str, Any] = field(default_factory=dict)
    """Anything else that is worth knowing of it; not compared."""


def build_or_load(
    corpus: Corpus,
    encoder: Encoder,
    folder: str | Path,
    *,
    on_mismatch: OnMismatch = "rebuild",
    lock_timeout_s: float = 3600.0,
) -> HybridRetriever:
    """BM25 and `encoder` fused, from `folder` where it holds their indexes, else built and stored there.

    Raises `IndexMismatch` for a stored index of something else when `on_mismatch` is "error" (with "rebuild" it is
    replaced), `EnvError` when another process holds the store for longer than `lock_timeout_s`.
    """
    options: dict[str, Any] = {"on_mismatch": on_mismatch, "lock_timeout_s": lock_timeout_s}
    return HybridRetriever(
        [bm25_from_store(corpus, folder, **options), dense_from_store(corpus, encoder, folder, **options)]
    )


def bm25_from_store(
    corpus: Corpus,
    folder: str | Path,
    *,
    settings: Bm25Settings | None = None,
    on_mismatch: OnMismatch = "rebuild",
    lock_timeout_s: float = 3600.0,
) -> Bm25Retriever:
    """The BM25 half of `build_or_load`, kept in `folder`/bm25."""
    settings = settings or Bm25Settings()
    return _from_store(
        Path(folder) / "bm25",
        {"kind": "bm25", "corpus_sha256": corpus.sha256, "count": len(corpus), **settings.facts()},
        build=lambda: Bm25Retriever.build(corpus, settings),
        save=Bm25Retriever.save,
        load=lambda data: Bm25Retriever.load(corpus, data, settings),
        on_mismatch=on_mismatch,
        lock_timeout_s=lock_timeout_s,
    )


def dense_from_store(
    corpus: Corpus,
    encoder: Encoder,
    folder: str | Path,
    *,
    on_mismatch: OnMismatch = "rebuild",
    lock_timeout_s: float = 3600.0,
) -> DenseRetriever:
    """The dense half of `build_or_load`, kept in `folder`/dense: the embeddings, which are what takes long."""
    import numpy as np

    return _from_store(
        Path(folder) / "dense",
        {"kind": "dense", **dense_facts(corpus, encoder)},
        build=lambda: DenseRetriever.build(corpus, encoder),
        save=lambda retriever, data: np.save(data / "embeddings.npy", retriever.embeddings),
        load=lambda data: DenseRetriever(corpus, encoder, np.load(data / "embeddings.npy", mmap_mode="r")),
        on_mismatch=on_mismatch,
        lock_timeout_s=lock_timeout_s,
    )


def read_manifest(store: str | Path) -> IndexManifest | None:
    """The manifest of one store (`folder`/bm25 or `folder`/dense), or None. Raises `IndexMismatch` if unreadable."""
    path = Path(store) / "manifest.json"
    try:
        fields = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:
        raise IndexMismatch(f"{path}: cannot be read: {error}") from error
    if not isinstance(fields, dict) or fields.get("format") != _FORMAT:
        found = fields.get("format") if isinstance(fields, dict) else fields
        raise IndexMismatch(f"{path}: is of format {found!r}, this version reads {_FORMAT}")
    try:
        return IndexManifest(**fields)
    except TypeError as error:
        raise IndexMismatch(f"{path}: {error}") from error


def check_files(store: Path, manifest: IndexManifest) -> None:
    """Raise `IndexMismatch` unless every file of the store is there with its size."""
    for name, size in manifest.files.items():
        path = store / manifest.data / name
        found = path.stat().st_size if path.is_file() else None
        if found != size:
            raise IndexMismatch(f"{path}: {found} bytes, the manifest has {size}: the store is damaged")


def _from_store(
    store: Path,
    identity: dict[str, Any],
    *,
    build: Callable[[], R],
    save: Callable[[R, Path], None],
    load: Callable[[Path], R],
    on_mismatch: OnMismatch,
    lock_timeout_s: float,
) -> R:
    if on_mismatch not in ("rebuild", "error"):
        raise ValueError(f"on_mismatch must be 'rebuild' or 'error', got {on_mismatch!r}")
    store.mkdir(parents=True, exist_ok=True)
    with locked(store / ".lock", lock_timeout_s):
        try:
            manifest = read_manifest(store)
            if manifest is not None:
                check_identity(store, manifest, identity)
                check_files(store, manifest)
                return load(store / manifest.data)
        except IndexMismatch as mismatch:
            if on_mismatch == "error":
                raise
            _log.warning("%s; building it again", mismatch)
        started = time.perf_counter()
        retriever = build()
        _write(store, identity, lambda data: save(retriever, data), build_s=time.perf_counter() - started)
        return retriever


def check_identity(store: Path, manifest: IndexManifest, identity: Mapping[str, Any]) -> None:
    """Raise `IndexMismatch` naming the first thing that differs."""
    for name in sorted({*identity, *manifest.identity}):
        stored, needed = manifest.identity.get(name), identity.get(name)
        if stored != needed:
            raise IndexMismatch(f"{store}: the stored index has {name} {stored!r}, {needed!r} is needed")


def _write(store: Path, identity: dict[str, Any], save: Callable[[Path], None], *, build_s: float) -> None:
    data = new_data_folder(store)
    save(data)
    publish_data(store, data, identity, build_s=build_s)


def new_data_folder(store: Path) -> Path:
    """An empty data folder that no manifest names yet."""
    data = store / f"data-{secrets.token_hex(6)}"
    data.mkdir()
    return data


def publish_data(
    store: Path, data: Path, identity: Mapping[str, Any], *, build_s: float, facts: Mapping[str, Any] | None = None
) -> IndexManifest:
    """Make `data`, complete and inside `store`, the store's index in one step, and remove the former one."""
    files = sorted(path for path in data.rglob("*") if path.is_file())
    for path in [*files, *{path.parent for path in files}, data]:
        sync(path)
    manifest = IndexManifest(
        format=_FORMAT,
        identity=identity,
        data=data.name,
        files={str(path.relative_to(data)): path.stat().st_size for path in files},
        build_s=round(build_s, 3),
        versions=_versions(),
        facts=facts or {},
    )
    draft = store / "manifest.json.tmp"
    draft.write_text(json.dumps(asdict(manifest), indent=1) + "\n", encoding="utf-8")
    sync(draft)
    os.replace(draft, store / "manifest.json")  # from here on the new index is the store's
    sync(store)
    for old in store.glob("data-*"):
        if old.name != data.name:
            shutil.rmtree(old, ignore_errors=True)
    return manifest


def sync(path: Path) -> None:
    """Have the kernel write a file or folder to the disk now."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextlib.contextmanager
def locked(path: Path, timeout_s: float) -> Iterator[None]:
    """Hold an exclusive lock on `path`; the kernel frees it when the process dies. Raises `EnvError` when it waits
    longer than `timeout_s`."""
    deadline = time.monotonic() + timeout_s
    with path.open("a") as file:
        while True:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if time.monotonic() > deadline:
                    raise EnvError(f"{path}: another process has held the index for {timeout_s} s") from None
                time.sleep(0.05)
        yield


def _versions() -> dict[str, str]:
    found = {}
    for package in _PACKAGES:
        with contextlib.suppress(PackageNotFoundError):
            found[package] = version(package)
    return found
