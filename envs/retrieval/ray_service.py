"""A `RetrievalService` in a Ray actor, and the client that env actors use.

The actor consumes queries from any number of clients and produces lists of hits; it waits for nothing but its own
compute thread, and every search has a limit. It starts at once and loads corpus, encoder and indexes in its own process
while `ready` waits.

A client that gets no answer in time, or whose actor has died, raises `EnvError`: our failure, never the model's. A
search has no side effects, so Ray repeats it by itself when the actor is restarted.

Example::

    handle = start_retrieval_actor(RetrieverSpec(corpus_path="wiki.jsonl", index_folder="outputs/index"))
    await handle.ready.remote()                      # or RayRetrieverClient(handle).wait_ready(600)
    hits = RayRetrieverClient(handle, timeout_s=30).search("capital of France", 3)
"""

from __future__ import annotations

import asyncio
import functools
import os
import pickle
import time
import zlib
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, Protocol

from envs.base import EnvError
from envs.retrieval.retriever import Hit, Retriever, check_k
from envs.retrieval.service import RetrievalService, RetrievalTimeout, ServiceSettings, ServiceStats

_PART_BYTES = 64 << 10  # Ray keeps arguments below 100 kB in the actor's own description
TASK_RETRIES = 3
"""So often is one search made again when the actor dies under it: it may be what kills it."""
ACTOR_ENV_VARS = {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}


@dataclass(frozen=True, slots=True, kw_only=True)
class RetrievalReady:
    """What a loaded retrieval actor says of itself."""

    fingerprint: str
    """Of its retriever; belongs on the record of every run that used it."""
    load_s: float
    """From the actor's start to the retriever's being loaded."""
    pid: int


class Buildable(Protocol):
    """Plain data that a retriever is made from in the actor's process: a `RetrieverSpec`, say."""

    def build(self) -> Retriever:
        """Load or make everything; may take minutes and raise anything."""
        ...


class RetrievalActor:
    """The class that `start_retrieval_actor` wraps; see the module's docstring. Its methods are coroutines.

    `packed_spec` is a `Buildable` as `pack` gives it.
    """

    def __init__(self, settings: ServiceSettings | None, *packed_spec: bytes) -> None:
        self._started_s = time.monotonic()
        self._load_s = 0.0
        self._settings = settings or ServiceSettings()
        # The thread that loads is the thread that searches: whatever a library keeps per thread is set up once.
        self._executor = ThreadPoolExecutor(1, thread_name_prefix="retrieval")
        self._loading = self._executor.submit(self._load, packed_spec)
        self._service: RetrievalService | None = None

    def _load(self, packed_spec: tuple[bytes, ...]) -> Retriever:
        spec: Buildable = pickle.loads(zlib.decompress(b"".join(packed_spec)))
        retriever = spec.build()
        retriever.search(["warm up"], 1)  # compiles and first touches are paid here, not by the first caller
        self._load_s = time.monotonic() - self._started_s
        return retriever

    async def ready(self) -> RetrievalReady:
        """Wait for the load; raises what went wrong with it (`CorpusError`, `FileNotFoundError`, `EncoderError`...)."""
        retriever = await asyncio.shield(asyncio.wrap_future(self._loading))
        return RetrievalReady(fingerprint=retriever.fingerprint, load_s=self._load_s, pid=os.getpid())

    async def search(self, query: str, k: int, timeout_s: float | None = None) -> list[Hit]:
        """See `RetrievalService.search`; the time limit covers the load as well."""
        return await (await self._loaded(timeout_s)).search(query, k, timeout_s=timeout_s)

    async def search_many(self, queries: Sequence[str], k: int, timeout_s: float | None = None) -> list[list[Hit]]:
        """See `RetrievalService.search_many`; the time limit covers the load as well."""
        return await (await self._loaded(timeout_s)).search_many(queries, k, timeout_s=timeout_s)

    async def stats(self) -> ServiceStats:
        """See `RetrievalService.stats`; waits for the load."""
        return (await self._loaded(None)).stats()

    async def _loaded(self, timeout_s: float | None) -> RetrievalService:
        if self._service is not None:
            return self._service
        limit_s = self._settings.timeout_s if timeout_s is None else timeout_s
        try:
            async with asyncio.timeout(limit_s):
                retriever = await asyncio.shield(asyncio.wrap_future(self._loading))
        except TimeoutError:
            raise RetrievalTimeout(f"the retriever was still loading after {limit_s} s; await ready() first") from None
        except Exception as error:
            raise EnvError(f"the retriever could not be loaded: {type(error).__name__}: {error}") from error
        if self._service is None:
            self._service = RetrievalService(retriever, self._settings, executor=self._executor)
        return self._service


def pack(spec: Buildable) -> list[bytes]:
    """`spec` in small parts.

    One large argument would go to the object store, and an actor whose argument was lost there cannot be restarted
    (https://github.com/ray-project/ray/issues/53727).
    """
    packed = zlib.compress(pickle.dumps(spec))
    return [packed[at : at + _PART_BYTES] for at in range(0, len(packed), _PART_BYTES)]


def start_retrieval_actor(
    spec: Buildable,
    *,
    settings: ServiceSettings | None = None,
    num_cpus: float = 0,
    name: str | None = None,
    max_restarts: int = -1,
    env_vars: Mapping[str, str] | None = None,
    **actor_options: Any,
) -> Any:
    """Start the actor in the running Ray cluster and return its handle without waiting for the load.

    `env_vars` are added to OMP_NUM_THREADS=1, HF_HUB_OFFLINE=1 and TOKENIZERS_PARALLELISM=false (give HF_HUB_OFFLINE=0
    to let an encoder be downloaded); `actor_options` go to Ray (`scheduling_strategy`, `num_gpus`...). The actor dies
    with its owner or by `ray.kill`; it is restarted `max_restarts` times, loading its stored index again (-1: as often
    as it takes, since nodes come and go in a long run; every search has its own limit).
    """
    import ray

    options: dict[str, Any] = {
        "num_cpus": num_cpus,
        "max_restarts": max_restarts,
        "max_task_retries": TASK_RETRIES if max_restarts else 0,
        "max_concurrency": 1000,
        "runtime_env": {"env_vars": {**ACTOR_ENV_VARS, **(env_vars or {})}},
        **actor_options,
    }
    if name is not None:
        options["name"] = name
    return ray.remote(RetrievalActor).options(**options).remote(settings, *pack(spec))


class RayRetrieverClient:
    """Blocking access to a retrieval actor from any thread of any Ray worker; picklable.

    `timeout_s` limits every search. Not for use on an event loop: await `handle.search.remote(...)` there.
    """

    def __init__(self, handle: Any, timeout_s: float = 30.0) -> None:
        if not timeout_s > 0:
            raise ValueError(f"timeout_s must be more than 0, got {timeout_s}")
        self._handle = handle
        self.timeout_s = timeout_s

    def search(self, query: str, k: int) -> list[Hit]:
        """At most `k` hits, best first. Raises `EnvError` on a timeout, a dead actor, or a failure inside it."""
        if not isinstance(query, str):
            raise TypeError(f"query must be a string, got {type(query).__name__} {query!r}")
        check_k(k)
        return self._get(self._handle.search.remote(query, k, self.timeout_s), self.timeout_s, f"search for {query!r}")

    def wait_ready(self, timeout_s: float) -> RetrievalReady:
        """Wait until the actor has loaded. Raises `EnvError`, with the cause in its message."""
        return self._get(self._handle.ready.remote(), timeout_s, "loading of the retriever")

    def stats(self) -> ServiceStats:
        """Counts of the service. Raises `EnvError` as `search` does."""
        return self._get(self._handle.stats.remote(), self.timeout_s, "stats of the retriever")

    def _get(self, reference: Any, timeout_s: float, what: str) -> Any:
        import ray
        from ray.exceptions import GetTimeoutError, RayError, RayTaskError

        try:
            return ray.get(reference, timeout=timeout_s)
        except GetTimeoutError:
            ray.cancel(reference)
            raise EnvError(f"{what}: no answer from the retrieval actor within {timeout_s} s") from None
        except RayTaskError as error:
            raise EnvError(f"{what}: {type(error.cause).__name__}: {error.cause}") from error
        except RayError as error:
            raise EnvError(f"{what}: the retrieval actor is gone: {type(error).__name__}: {error}") from error


@dataclass(frozen=True, slots=True)
class NamedSearch:
    """A search function that finds its retrieval actor by name, in whatever process it is called.

    What restartable actors are constructed with: a handle among their arguments would keep Ray from restarting them.
    """

    name: str
    timeout_s: float

    def __call__(self, query: str, k: int) -> list[Hit]:
        """See `RayRetrieverClient.search`; raises `EnvError` as well when there is no such actor."""
        return _client(self.name, self.timeout_s).search(query, k)


@functools.lru_cache(maxsize=8)
def _client(name: str, timeout_s: float) -> RayRetrieverClient:
    import ray

    try:
        return RayRetrieverClient(ray.get_actor(name), timeout_s)
    except ValueError as error:
        raise EnvError(f"there is no retrieval actor named {name!r}") from error
