"""An index folder served by several Ray actors: whole replicas of it, or one actor a shard behind a merging one.

    replicas    ReplicaClient -> the less busy of two replicas drawn at random; a dead one is passed over
    shards      RayRetrieverClient -> merging actor (batches, cache, encoder) -> every shard actor -> merged (`shards`)

Replicas are for throughput, shards for a corpus that fits no single machine. A shard actor consumes queries with their
vectors and produces rankings; it waits for nothing. The merging actor waits for all shards within the search's limit
and raises `EnvError` when one is missing. Ray restarts what dies; actors die with the process that started them.

Example::

    handles = start_replicas(RetrieverSpec(index_folder="outputs/wiki"), 4)
    hits = ReplicaClient(handles).search("capital of France", 3)

    sharded = start_sharded("outputs/wiki", name="wiki")           # made by: index ... --shards 8
    hits = RayRetrieverClient(sharded.router).search("capital of France", 3)
"""

from __future__ import annotations

import random
import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from envs.base import EnvError
from envs.retrieval.encoders import Dtype
from envs.retrieval.faiss_index import Device
from envs.retrieval.index_folder import checked_manifest, encoder_of_index, open_shard
from envs.retrieval.ray_service import ACTOR_ENV_VARS, RayRetrieverClient, RetrievalReady, start_retrieval_actor
from envs.retrieval.retriever import Hit, Retriever, digest
from envs.retrieval.service import ServiceSettings
from envs.retrieval.shards import Rankings, ShardedRetriever
from envs.retrieval.spec import RetrieverSpec

if TYPE_CHECKING:
    import numpy as np


def start_replicas(
    spec: RetrieverSpec, count: int, *, settings: ServiceSettings | None = None, **actor_options: Any
) -> list[Any]:
    """`count` retrieval actors with the same retriever, spread over the cluster's nodes; options as
    `start_retrieval_actor` has them."""
    if count < 1:
        raise ValueError(f"count must be at least 1, got {count}")
    actor_options.setdefault("scheduling_strategy", "SPREAD")
    return [start_retrieval_actor(spec, settings=settings, **actor_options) for _ in range(count)]


class ReplicaClient:
    """Blocking access to replicas from any thread; picklable. Each process balances by its own searches.

    A search that fails is tried on the other replicas, each within `timeout_s`.
    """

    def __init__(self, handles: Sequence[Any], timeout_s: float = 30.0) -> None:
        if not handles:
            raise ValueError("at least one replica is needed, got none")
        self._clients = [RayRetrieverClient(handle, timeout_s) for handle in handles]
        self._busy = [0] * len(handles)
        self._lock = threading.Lock()

    def __getstate__(self) -> dict[str, Any]:
        return {"_clients": self._clients, "_busy": [0] * len(self._clients)}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state, _lock=threading.Lock())

    def search(self, query: str, k: int) -> list[Hit]:
        """At most `k` hits, best first. Raises `EnvError` when every replica has failed."""
        tried: set[int] = set()
        while True:
            at = self._take(tried)
            try:
                return self._clients[at].search(query, k)
            except EnvError:
                tried.add(at)
                if len(tried) == len(self._clients):
                    raise
            finally:
                with self._lock:
                    self._busy[at] -= 1

    def wait_ready(self, timeout_s: float) -> list[RetrievalReady]:
        """Wait until all replicas have loaded. Raises `EnvError`, also when they hold different retrievers."""
        ready = [client.wait_ready(timeout_s) for client in self._clients]
        if len({one.fingerprint for one in ready}) != 1:
            raise EnvError(f"the replicas differ: {', '.join(one.fingerprint[:12] for one in ready)}")
        return ready

    def _take(self, tried: set[int]) -> int:
        """The less busy of two replicas that have not been tried, now one search busier."""
        with self._lock:
            left = [at for at in range(len(self._clients)) if at not in tried]
            at = min(random.sample(left, min(2, len(left))), key=lambda at: self._busy[at])
            self._busy[at] += 1
            return at


class ShardActor:
    """The class that `start_sharded` wraps, one for a shard; see the module's docstring."""

    def __init__(self, folder: str, number: int, device: Device) -> None:
        import faiss

        faiss.omp_set_num_threads(1)
        # The encoder is only asked for its dimension: queries come encoded.
        self._shard = open_shard(folder, number, encoder=encoder_of_index(folder), device=device)

    def ready(self) -> str:
        """The fingerprint of what it searches."""
        return digest({"parts": [part.fingerprint for part in self._shard.parts]})

    def search(self, queries: list[str], vectors: np.ndarray | None, k: int) -> Rankings:
        """See `Shard.search`."""
        return self._shard.search(queries, vectors, k)


@dataclass(frozen=True, slots=True)
class RayShard:
    """A shard actor as `ShardedRetriever` sees it, found by its name."""

    name: str

    def begin(self, queries: list[str], vectors: np.ndarray | None, k: int) -> Callable[[float], Rankings]:
        """See `ShardSearch`."""
        reference = self._actor().search.remote(queries, vectors, k)
        return lambda timeout_s: self._get(reference, timeout_s)

    def ready(self, timeout_s: float) -> str:
        """Wait until it has loaded; its fingerprint. Raises `EnvError`."""
        return self._get(self._actor().ready.remote(), timeout_s)

    def _actor(self) -> Any:
        import ray

        try:
            return ray.get_actor(self.name)
        except ValueError as error:
            raise EnvError(f"there is no shard actor named {self.name!r}") from error

    def _get(self, reference: Any, timeout_s: float) -> Any:
        import ray
        from ray.exceptions import GetTimeoutError, RayError, RayTaskError

        try:
            return ray.get(reference, timeout=timeout_s)
        except GetTimeoutError:
            raise EnvError(f"{self.name}: no answer within {timeout_s:.1f} s") from None
        except RayTaskError as error:
            raise EnvError(f"{self.name}: {type(error.cause).__name__}: {error.cause}") from error
        except RayError as error:
            raise EnvError(f"{self.name}: the shard is gone: {type(error).__name__}: {error}") from error


@dataclass(frozen=True, slots=True, kw_only=True)
class ShardedSpec:
    """What the merging actor builds its retriever from."""

    folder: str
    shard_names: tuple[str, ...]
    dtype: Dtype | None
    timeout_s: float
    load_timeout_s: float

    def build(self) -> Retriever:
        """Load the encoder and wait for the shards. Raises `EnvError`, `IndexMismatch`, `EncoderError`."""
        shards = [RayShard(name) for name in self.shard_names]
        encoder = encoder_of_index(self.folder, dtype=self.dtype)
        facts = {
            "shards": [shard.ready(self.load_timeout_s) for shard in shards],
            "encoder": encoder and encoder.fingerprint,
        }
        return ShardedRetriever(
            shards,
            encoder=encoder,
            fuses=checked_manifest(self.folder).identity["kind"] == "hybrid",
            fingerprint=digest(facts),
            timeout_s=self.timeout_s,
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class ShardedRetrieval:
    """The running actors; keep it for as long as they should live."""

    router: Any
    """For `RayRetrieverClient`."""
    shards: tuple[Any, ...]


def start_sharded(
    folder: str,
    *,
    name: str,
    dtype: Dtype | None = None,
    device: Device = "cpu",
    settings: ServiceSettings | None = None,
    load_timeout_s: float = 600.0,
    env_vars: Mapping[str, str] | None = None,
    **shard_options: Any,
) -> ShardedRetrieval:
    """Start an actor for each shard of the index in `folder`, which every node must see, and one that merges.

    `name` must be new in the cluster; `shard_options` go to Ray for the shards (`num_cpus`, `num_gpus`...). Raises
    `IndexMismatch` for a folder without index.
    """
    import ray

    count = checked_manifest(folder).identity["shards"]
    settings = settings or ServiceSettings()
    names = tuple(f"{name}-shard-{number}" for number in range(count))
    options: dict[str, Any] = {
        "num_cpus": 0,
        "max_restarts": 3,
        "max_task_retries": 3,
        "scheduling_strategy": "SPREAD",
        "runtime_env": {"env_vars": {**ACTOR_ENV_VARS, **(env_vars or {})}},
        **shard_options,
    }
    remote = ray.remote(ShardActor)
    shards = tuple(
        remote.options(name=shard_name, **options).remote(folder, number, device)  # type: ignore[attr-defined]
        for number, shard_name in enumerate(names)
    )
    spec = ShardedSpec(
        folder=folder,
        shard_names=names,
        dtype=dtype,
        timeout_s=settings.timeout_s,
        load_timeout_s=load_timeout_s,
    )
    router = start_retrieval_actor(spec, settings=settings, name=name, env_vars=env_vars)
    return ShardedRetrieval(router=router, shards=shards)
