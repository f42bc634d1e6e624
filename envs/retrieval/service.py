"""`RetrievalService`: one retriever shared by many concurrent callers, inside one asyncio loop.

    callers --search()--> cache? --> same query in flight? --> pending --batch--> one compute thread --> retriever
                            |             (joins it)              |
                            hit                     32 queries, or 2 ms after the first

Encoding and exact search gain three to seven times from batches, so the first query waits 2 ms for company. Whatever
arrives during a computation forms the next batch, together with what those just answered ask next (callers in a loop
would else fall into two groups that take turns at half the size): until as many wait as were answered and waited then,
or for a quarter of that computation's time, 50 ms at most. It is not a server: `ray_service` puts it into an actor.

Who waits for what: a caller waits for its result, at most `timeout_s`; a query that nobody waits for any more is
dropped before it is computed; more than `max_pending` waiting queries are refused at once.

Example::

    async with RetrievalService(retriever) as service:
        hits = await service.search("capital of France", 3)
"""

from __future__ import annotations

import asyncio
import time
from collections import OrderedDict, deque
from collections.abc import Sequence
from concurrent.futures import Executor, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

from envs.base import EnvError
from envs.retrieval.retriever import Hit, Retriever, check_k, clean_query

_LULL = 0.25  # of a computation's time is waited, at most, for the next queries of those it answered
_LONGEST_LULL_S = 0.05


class RetrievalTimeout(EnvError):
    """No result within the caller's limit."""


class RetrievalOverloaded(EnvError):
    """Too many queries wait already; try again later."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ServiceSettings:
    """The knobs of a `RetrievalService`."""

    max_batch: int = 32
    """Queries computed together at most."""
    max_wait_s: float = 0.002
    """How long the first query of a batch waits for others."""
    cache_entries: int = 20_000
    """Results kept, least recently used out first; 0 for none. A result of 3 hits takes about 400 bytes."""
    max_pending: int = 4096
    """Queries that may wait to be computed."""
    timeout_s: float = 30.0
    """Limit of a search whose caller names none."""

    def __post_init__(self) -> None:
        if self.max_batch < 1 or self.max_pending < 1:
            raise ValueError(f"max_batch and max_pending must be at least 1, got {self.max_batch}, {self.max_pending}")
        if self.max_wait_s < 0 or self.cache_entries < 0:
            raise ValueError(
                f"max_wait_s and cache_entries must be at least 0, got {self.max_wait_s}, {self.cache_entries}"
            )
        if not self.timeout_s > 0:
            raise ValueError(f"timeout_s must be more than 0, got {self.timeout_s}")


@dataclass(frozen=True, slots=True, kw_only=True)
class ServiceStats:
    """Counts since the service began. requests = empty + cached + joined + computed + overloaded + those pending."""

    requests: int
    empty: int
    """Queries without a letter or digit, answered with nothing."""
    cached: int
    joined: int
    """Requests that shared the computation of the same query."""
    computed: int
    """Queries that the retriever was asked."""
    batches: int
    compute_s: float
    """Wall time inside the retriever."""
    timeouts: int
    abandoned: int
    """Queries dropped before their computation since every caller had given up."""
    overloaded: int
    failures: int
    """Batches in which the retriever raised."""
    pending: int
    """Queries that wait to be computed now."""
    cache_entries: int


_Key = tuple[str, str, int]


class _Flight:
    """One query on its way, and how many callers wait for it."""

    __slots__ = ("arrived_s", "future", "key", "waiters")

    def __init__(self, key: _Key, future: asyncio.Future[tuple[Hit, ...]]) -> None:
        self.key = key
        self.future = future
        self.arrived_s = time.monotonic()
        self.waiters = 0


class RetrievalService:
    """See the module's docstring. All methods belong to one event loop; the retriever runs in a thread of its own.

    `executor` must run one task at a time; without one the service makes and ends its own.
    """

    def __init__(
        self, retriever: Retriever, settings: ServiceSettings | None = None, *, executor: Executor | None = None
    ) -> None:
        self._retriever = retriever
        self.settings = settings or ServiceSettings()
        self._own_executor = executor is None
        self._executor = executor or ThreadPoolExecutor(1, thread_name_prefix="retrieval")
        self._cache: OrderedDict[_Key, tuple[Hit, ...]] = OrderedDict()
        self._flights: dict[_Key, _Flight] = {}
        self._pending: deque[_Flight] = deque()
        self._timer: asyncio.TimerHandle | None = None
        self._computing = False
        self._lull_ends_s = 0.0  # of the monotonic clock: until then a batch of fewer than `_expected` is held back
        self._expected = 0
        self._closed = False
        self._counts = dict.fromkeys(
            ("requests", "empty", "cached", "joined", "computed", "batches", "timeouts", "abandoned", "overloaded")
            + ("failures",),
            0,
        )
        self._compute_s = 0.0

    async def __aenter__(self) -> RetrievalService:
        return self

    async def __aexit__(self, *exc_info: object) -> None:
        await self.aclose()

    async def search(self, query: str, k: int, *, timeout_s: float | None = None) -> list[Hit]:
        """At most `k` hits, best first; the list is the caller's own.

        Raises `TypeError` or `ValueError` for a query that is no string or a wrong k, `RetrievalTimeout`,
        `RetrievalOverloaded`, and `EnvError` when the retriever failed or the service is closed.
        """
        if not isinstance(query, str):
            raise TypeError(f"query must be a string, got {type(query).__name__} {query!r}")
        check_k(k)
        if self._closed:
            raise EnvError("the retrieval service is closed")
        self._counts["requests"] += 1
        text = clean_query(query)
        if not text:
            self._counts["empty"] += 1
            return []
        key = (self._retriever.fingerprint, text, k)
        cached = self._cache.get(key)
        if cached is not None:
            self._cache.move_to_end(key)
            self._counts["cached"] += 1
            return list(cached)
        limit_s = self.settings.timeout_s if timeout_s is None else timeout_s
        return list(await self._wait_for(self._board(key), limit_s))

    async def search_many(self, queries: Sequence[str], k: int, *, timeout_s: float | None = None) -> list[list[Hit]]:
        """`search` for several queries at once, in their order; raises what the first failing one raises."""
        return list(await asyncio.gather(*(self.search(query, k, timeout_s=timeout_s) for query in queries)))

    def stats(self) -> ServiceStats:
        """Counts until now."""
        return ServiceStats(
            **self._counts, compute_s=self._compute_s, pending=len(self._pending), cache_entries=len(self._cache)
        )

    async def aclose(self) -> None:
        """Refuse new searches, fail the waiting ones, wait for the running computation. May be called twice."""
        self._closed = True
        self._cancel_timer()
        while self._pending:
            flight = self._pending.popleft()
            self._land(flight, error=EnvError("the retrieval service was closed"))
        running = [flight.future for flight in self._flights.values()]
        if running:
            await asyncio.wait(running, timeout=self.settings.timeout_s)
        if self._own_executor:
            self._executor.shutdown(wait=False, cancel_futures=True)

    def _board(self, key: _Key) -> _Flight:
        """The flight of `key`, with the caller counted among its waiters."""
        flight = self._flights.get(key)
        if flight is not None:
            self._counts["joined"] += 1
            flight.waiters += 1
            return flight
        if len(self._pending) >= self.settings.max_pending:
            self._counts["overloaded"] += 1
            raise RetrievalOverloaded(f"{len(self._pending)} queries wait already, the limit is max_pending")
        flight = _Flight(key, asyncio.get_running_loop().create_future())
        flight.waiters = 1  # before `_arm`, which may dispatch it at once and drops what nobody waits for
        self._flights[key] = flight
        self._pending.append(flight)
        self._arm()
        return flight

    async def _wait_for(self, flight: _Flight, timeout_s: float) -> tuple[Hit, ...]:
        try:
            async with asyncio.timeout(timeout_s):
                # Shielded: a caller that gives up or is cancelled must not take the others' result with it.
                return await asyncio.shield(flight.future)
        except TimeoutError:
            self._counts["timeouts"] += 1
            raise RetrievalTimeout(f"no result for {flight.key[1]!r} within {timeout_s} s") from None
        finally:
            flight.waiters -= 1

    def _arm(self) -> None:
        """See to it that the pending queries are computed when their time has come."""
        if self._computing or not self._pending:
            return
        ready_s = self._pending[0].arrived_s + self.settings.max_wait_s
        if len(self._pending) < self._expected:
            ready_s = max(ready_s, self._lull_ends_s)
        wait_s = ready_s - time.monotonic()
        self._cancel_timer()
        if wait_s <= 0 or len(self._pending) >= self.settings.max_batch:
            self._dispatch()
        else:
            self._timer = asyncio.get_running_loop().call_later(wait_s, self._dispatch)

    def _cancel_timer(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _dispatch(self) -> None:
        self._cancel_timer()
        batch: list[_Flight] = []
        while self._pending and len(batch) < self.settings.max_batch:
            flight = self._pending.popleft()
            if flight.waiters:
                batch.append(flight)
            else:
                self._counts["abandoned"] += 1
                del self._flights[flight.key]
                flight.future.cancel()
        if not batch:
            return
        self._computing = True
        loop = asyncio.get_running_loop()
        computing = loop.run_in_executor(self._executor, self._compute, [flight.key for flight in batch])
        computing.add_done_callback(lambda done: self._finish(batch, done))

    def _compute(self, keys: list[_Key]) -> tuple[list[tuple[Hit, ...]], float]:
        started = time.perf_counter()
        results: list[tuple[Hit, ...]] = [()] * len(keys)
        for k in dict.fromkeys(key[2] for key in keys):
            places = [place for place, key in enumerate(keys) if key[2] == k]
            found = self._retriever.search([keys[place][1] for place in places], k)
            for place, hits in zip(places, found, strict=True):
                results[place] = tuple(hits)
        return results, time.perf_counter() - started

    def _finish(self, batch: list[_Flight], done: asyncio.Future[Any]) -> None:
        self._computing = False
        self._counts["batches"] += 1
        self._counts["computed"] += len(batch)
        error: BaseException | None = asyncio.CancelledError() if done.cancelled() else done.exception()
        if error is None:
            results, seconds = done.result()
            self._compute_s += seconds
            self._lull_ends_s = time.monotonic() + min(_LONGEST_LULL_S, _LULL * seconds)
            self._expected = len(batch) + len(self._pending)
            for flight, hits in zip(batch, results, strict=True):
                self._remember(flight.key, hits)
                self._land(flight, hits=hits)
        else:
            self._counts["failures"] += 1
            for flight in batch:
                failure = EnvError(f"retrieval failed: {type(error).__name__}: {error}")
                failure.__cause__ = error
                self._land(flight, error=failure)
        if not self._closed:
            self._arm()

    def _land(self, flight: _Flight, *, hits: tuple[Hit, ...] = (), error: EnvError | None = None) -> None:
        self._flights.pop(flight.key, None)
        if flight.future.done():
            return
        if error is None:
            flight.future.set_result(hits)
        else:
            flight.future.set_exception(error)
            flight.future.exception()  # read once, so that asyncio does not warn when every caller has gone

    def _remember(self, key: _Key, hits: tuple[Hit, ...]) -> None:
        if self.settings.cache_entries == 0:
            return
        self._cache[key] = hits
        if len(self._cache) > self.settings.cache_entries:
            self._cache.popitem(last=False)
