"""FAISS indexes by kind: exact, scalar-quantized, graph, and inverted lists with product quantization.

They choose candidates; `dense.DenseRetriever` orders these by their exact scores. Measured on 100,000 passages (MiniLM,
384 dimensions; recall@3 against exact search, one thread, `python benchmarks/retrieval.py`):

    flat    exact; the right one up to some 200,000 passages, where encoding the query costs more than the search
    ivfpq   `IVF,PQ{dim/4}x4fs,Refine(SQ8)`: fastest and smallest of the approximate ones, the default of these
    hnsw    a graph: no training, but four times the memory and seven times the build time
    sq8     exact search over 8-bit codes: a quarter of flat's memory; sqfp16 half of it

Example::

    index = build_vector_index("ivfpq", embeddings)
    apply_search_settings(index, SearchSettings(nprobe=128))
    faiss.write_index(index, "index.faiss")

Papers: HNSW arXiv 1603.09320; product quantization with 4-bit codes in registers, arXiv 1704.07355; FAISS arXiv
2401.08281.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, get_args

if TYPE_CHECKING:
    import numpy as np

VectorKind = Literal["flat", "hnsw", "ivfpq", "sq8", "sqfp16"]
Device = Literal["auto", "cpu", "cuda"]

EXACT: frozenset[str] = frozenset({"flat"})
DEFAULT_APPROXIMATE: VectorKind = "ivfpq"
_ADD_ROWS = 65_536
_TRAIN_ROWS_PER_LIST = 64
_MIN_ROWS_PER_LIST = 39  # FAISS warns below it, and the lists mean little
_PQ_TRAIN_ROWS = 65_536
_PQ_CENTROIDS = 16  # of 4-bit codes
_HNSW_LINKS = 32
_BLAS_FROM_QUERIES = 4  # FAISS's own limit (333 queries at dim 384) leaves micro-batches on its slow path: 3x to 7x


class GpuMissing(RuntimeError):
    """A GPU was asked for and this FAISS has none, or cannot put this kind of index there."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SearchSettings:
    """How thoroughly an approximate index searches; None leaves the index's own."""

    nprobe: int | None = None
    """Lists that an ivfpq index looks into."""
    refine: int | None = None
    """Candidates that ivfpq scores again with its 8-bit codes, as a multiple of those asked for."""
    ef_search: int | None = None
    """Breadth of the search in an hnsw graph."""

    def __post_init__(self) -> None:
        for name in ("nprobe", "refine", "ef_search"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name} must be at least 1, got {value}")


def check_vector_kind(kind: str) -> None:
    """Raise `ValueError` for a kind that does not exist."""
    if kind not in get_args(VectorKind):
        raise ValueError(f"kind of vector index must be one of {', '.join(get_args(VectorKind))}, got {kind!r}")


def factory_of(kind: VectorKind, count: int, dim: int) -> str:
    """The FAISS factory string of `kind` for `count` vectors of `dim` dimensions."""
    check_vector_kind(kind)
    if kind == "flat":
        return "Flat"
    if kind == "hnsw":
        return f"HNSW{_HNSW_LINKS},Flat"
    if kind == "ivfpq":
        subspaces = next(parts for parts in range(max(1, dim // 4), 0, -1) if dim % parts == 0)
        return f"IVF{lists_for(count)},PQ{subspaces}x4fs,Refine(SQ8)"
    return {"sq8": "SQ8", "sqfp16": "SQfp16"}[kind]


def lists_for(count: int) -> int:
    """Inverted lists for `count` vectors: the power of two nearest to twice the square root, 512 for 100,000."""
    wanted = 2 ** round(math.log2(2 * math.sqrt(count)))
    return max(1, min(wanted, count // _MIN_ROWS_PER_LIST))


def build_vector_index(
    kind: VectorKind, embeddings: np.ndarray, *, seed: int = 0, on_progress: Callable[[int, int], None] | None = None
) -> Any:
    """A trained FAISS index (inner product) of all rows of `embeddings`, float32 [n, dim], which may be memory-mapped.

    `on_progress` is called with (rows added, rows in all). The same rows and seed give the same index.
    """
    import faiss
    import numpy as np

    count, dim = embeddings.shape
    if kind == "ivfpq" and count < _PQ_CENTROIDS:
        raise ValueError(f"ivfpq needs at least {_PQ_CENTROIDS} passages, got {count}; flat is right for so few")
    index: Any = faiss.index_factory(dim, factory_of(kind, count, dim), faiss.METRIC_INNER_PRODUCT)
    if not index.is_trained:
        inner = _parts(index)[1]
        for clustered in [inner, getattr(inner, "pq", None)]:
            if clustered is not None and hasattr(clustered, "cp"):
                clustered.cp.min_points_per_centroid = 1  # a small corpus is no reason for a page of warnings
        wanted = max(_PQ_TRAIN_ROWS, _TRAIN_ROWS_PER_LIST * lists_for(count)) if kind == "ivfpq" else _PQ_TRAIN_ROWS
        rows = np.arange(count)
        if count > wanted:
            rows = np.sort(np.random.default_rng(seed).choice(count, wanted, replace=False))
        index.train(np.ascontiguousarray(embeddings[rows]))
    for start in range(0, count, _ADD_ROWS):
        index.add(np.ascontiguousarray(embeddings[start : start + _ADD_ROWS]))
        if on_progress is not None:
            on_progress(min(start + _ADD_ROWS, count), count)
    apply_search_settings(index, default_search(kind, count))
    return index


def default_search(kind: VectorKind, count: int) -> SearchSettings:
    """What reaches recall@3 of 0.98 at 100,000 passages and 0.96 at a million; `index_folder` measures its own."""
    if kind == "ivfpq":
        return SearchSettings(nprobe=max(1, lists_for(count) // 4), refine=16)
    return SearchSettings(ef_search=128) if kind == "hnsw" else SearchSettings()


def search_ladder(kind: VectorKind, count: int) -> list[SearchSettings]:
    """Settings from fast to thorough, of which the first that finds enough is taken; one for kinds without a choice."""
    if kind == "ivfpq":
        lists = lists_for(count)
        steps = ((16, 8), (8, 8), (4, 8), (4, 16), (2, 16), (1, 32))
        return [SearchSettings(nprobe=max(1, lists // part), refine=refine) for part, refine in steps]
    if kind == "hnsw":
        return [SearchSettings(ef_search=breadth) for breadth in (64, 128, 256, 512, 1024)]
    return [SearchSettings()]


def apply_search_settings(index: Any, settings: SearchSettings) -> None:
    """Set what is given; settings that this kind of index does not have are passed over."""
    whole, inner = _parts(index)
    if settings.refine is not None and hasattr(whole, "k_factor"):
        whole.k_factor = float(settings.refine)
    if settings.nprobe is not None and hasattr(inner, "nprobe"):
        inner.nprobe = settings.nprobe
    if settings.ef_search is not None and hasattr(inner, "hnsw"):
        inner.hnsw.efSearch = settings.ef_search


def describe_search(index: Any) -> dict[str, float]:
    """The search settings that an index has now, by FAISS's own names."""
    whole, inner = _parts(index)
    found = {"k_factor": float(whole.k_factor)} if hasattr(whole, "k_factor") else {}
    if hasattr(inner, "nprobe"):
        found["nprobe"] = int(inner.nprobe)
    if hasattr(inner, "hnsw"):
        found["ef_search"] = int(inner.hnsw.efSearch)
    return found


def _parts(index: Any) -> tuple[Any, Any]:
    """The outermost index, and the one that it refines (itself where it refines none)."""
    import faiss

    whole: Any = faiss.downcast_index(index)
    return whole, faiss.downcast_index(whole.base_index) if hasattr(whole, "base_index") else whole


def lower_blas_threshold(dim: int) -> None:
    """Let FAISS search micro-batches by matrix products; a setting of the whole process, which is only ever lowered."""
    import faiss

    threshold = _BLAS_FROM_QUERIES * dim
    faiss.cvar.distance_compute_blas_threshold = min(faiss.cvar.distance_compute_blas_threshold, threshold)


def on_device(index: Any, device: Device) -> Any:
    """`index` itself, or its copy on all GPUs: for "auto" where there is one and FAISS can put this kind there.

    Needs faiss-gpu. A GPU index must not be searched by two threads at once, not even for reading. Raises `GpuMissing`
    for "cuda" where that cannot be had.
    """
    import faiss

    if device not in get_args(Device):
        raise ValueError(f"device must be one of {', '.join(get_args(Device))}, got {device!r}")
    if device == "cpu":
        return index
    gpus = faiss.get_num_gpus() if hasattr(faiss, "get_num_gpus") else 0
    if not gpus or not hasattr(faiss, "StandardGpuResources"):
        if device == "cuda":
            raise GpuMissing("device 'cuda' needs faiss-gpu and a GPU that it sees; take 'cpu' or 'auto'")
        return index
    options = faiss.GpuMultipleClonerOptions()
    options.shard = True  # the rows are split among the GPUs: what does not fit one may fit all
    options.useFloat16 = False
    try:
        return faiss.index_cpu_to_all_gpus(index, co=options)
    except RuntimeError as error:  # graphs and 4-bit codes have no GPU counterpart
        if device == "cuda":
            raise GpuMissing(f"FAISS cannot put {type(_parts(index)[0]).__name__} on a GPU: {error}") from error
        return index
