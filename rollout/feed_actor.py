"""`TaskFeed` as a Ray actor that may die, and how a worker sees it.

The actor holds nothing that cannot be made again: what is recorded is in the ledger, and what is under way the workers
know. Ray starts a dead one again, empty; `rollout.collector.Collection` loads it anew, and each worker tells it what it
holds. Meanwhile workers go on with the episodes that they have, and wait with what they want to say.

Example::

    feed = RemoteFeed(handle, "w0")                       # in a worker
    requests = await feed.next("w0", 16)
    trajectories = await feed.still_ours(trajectories)    # before they are recorded
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterable, Sequence
from typing import Any

from rollout.task_feed import (
    CollectProgress,
    EpisodeRequest,
    EpisodeSummary,
    NotJoinedError,
    TaskFeed,
    WorkerState,
)
from rollout.trajectory import Trajectory

ANSWER_S = 120.0
"""How long the feed may take to answer; it does next to nothing."""
AWAY_S = 300.0
"""How long a worker waits for a feed that is started again."""
AGAIN_S = 0.3


class FeedEmptyError(RuntimeError):
    """The feed's actor was started again and is not loaded yet."""


class FeedLostError(RuntimeError):
    """The feed did not come back."""


class FeedActor:
    """Consumes what workers report, produces leases; waits for nothing. Empty until `load`, which the collection calls
    again when the actor was started again; until then every other call raises `FeedEmptyError`."""

    def __init__(self) -> None:
        self._feed: TaskFeed | None = None

    def load(
        self,
        requests: Sequence[EpisodeRequest],
        found: int,
        recorded: Sequence[EpisodeSummary] = (),
        awaited: Sequence[str] = (),
        stopped: str = "",
    ) -> None:
        """See `TaskFeed`; `stopped`: why the first one was."""
        self._feed = TaskFeed(requests, found=found, recorded=recorded, awaited=awaited)
        if stopped:
            self._feed.stop(stopped)

    def loaded(self) -> bool:
        return self._feed is not None

    def next(self, worker: str, count: int) -> list[EpisodeRequest] | None:
        return self._loaded().next(worker, count)

    def done(self, worker: str, summaries: Sequence[EpisodeSummary]) -> None:
        self._loaded().done(worker, summaries)

    def report(self, worker: str, state: WorkerState) -> None:
        self._loaded().report(worker, state)

    def stop(self, reason: str) -> None:
        self._loaded().stop(reason)

    def join(self, worker: str, keys: Sequence[str]) -> list[str]:
        return self._loaded().join(worker, keys)

    def may_record(self, worker: str, keys: Sequence[str]) -> list[str]:
        return self._loaded().may_record(worker, keys)

    def retire(self, worker: str) -> bool:
        return self._loaded().retire(worker)

    def give_back(self, worker: str, keys: Sequence[str]) -> None:
        self._loaded().give_back(worker, keys)

    def release(self, worker: str, recorded_keys: Iterable[str] = ()) -> tuple[int, int]:
        """(episodes that it had recorded, episodes that went back)."""
        feed = self._loaded()
        held = feed.held(worker)
        before = feed.progress().recorded
        recorded = feed.release(worker, recorded_keys)
        return recorded, held - (feed.progress().recorded - before)

    def progress(self) -> CollectProgress:
        return self._loaded().progress()

    def _loaded(self) -> TaskFeed:
        if self._feed is None:
            raise FeedEmptyError("the feed of this collection was started again and is not loaded yet")
        return self._feed


class RemoteFeed:
    """The feed actor, awaited by one worker. Every method waits for a feed that is started again, for `AWAY_S` at most;
    then it raises `FeedLostError`."""

    def __init__(self, handle: Any, worker: str) -> None:
        self._handle, self._worker = handle, worker
        self._held: set[str] = set()
        self._leasing = asyncio.Lock()

    async def has_ended(self) -> bool:
        """Whether the collection was over before this worker could begin."""
        from ray.exceptions import RayActorError

        try:
            await self._ask("loaded")
        except RayActorError:
            return is_dead(self._handle)
        return False

    async def next(self, worker: str, count: int) -> list[EpisodeRequest] | None:
        async def lease() -> list[EpisodeRequest] | None:
            async with self._leasing:  # nobody joins while an answer is on its way
                got = await self._ask("next", worker, count)
                self._held.update(request.key for request in got or ())
                return got

        return await self._patiently(lease)

    async def done(self, worker: str, summaries: Sequence[EpisodeSummary]) -> None:
        await self._patiently(lambda: self._ask("done", worker, list(summaries)))
        self._held.difference_update(summary.key for summary in summaries)

    async def give_back(self, worker: str, keys: Sequence[str]) -> None:
        self._held.difference_update(keys)
        await self._patiently(lambda: self._ask("give_back", worker, list(keys)))

    async def report(self, worker: str, state: WorkerState) -> None:
        await self._patiently(lambda: self._ask("report", worker, state))

    async def stop(self, reason: str) -> None:
        await self._patiently(lambda: self._ask("stop", reason))

    async def still_ours(self, trajectories: Sequence[Trajectory]) -> list[Trajectory]:
        """Those that may be recorded: not what was given to others while this worker was taken for dead."""
        keys = [each.key for each in trajectories]
        refused = set(await self._patiently(lambda: self._ask("may_record", self._worker, keys)))
        return [each for each in trajectories if each.key not in refused]

    async def _ask(self, method: str, *arguments: Any) -> Any:
        return await asyncio.wait_for(getattr(self._handle, method).remote(*arguments), ANSWER_S)

    async def _join(self) -> None:
        async with self._leasing:
            self._held.difference_update(await self._ask("join", self._worker, sorted(self._held)))

    async def _patiently(self, ask: Any) -> Any:
        from ray.exceptions import RayActorError

        deadline_s = time.monotonic() + AWAY_S
        joining = False
        while True:
            try:
                if joining:
                    await self._join()
                    joining = False
                return await ask()
            except (NotJoinedError, TimeoutError) as error:  # one that was late may have been done all the same
                trouble, joining = error, True
            except (RayActorError, FeedEmptyError) as error:
                trouble = error
                if isinstance(error, RayActorError) and is_dead(self._handle):
                    raise FeedLostError("what hands out the episodes has ended") from error
            if time.monotonic() > deadline_s:
                raise FeedLostError(
                    f"what hands out the episodes did not answer for {AWAY_S:g} s: {type(trouble).__name__}"
                ) from trouble
            await asyncio.sleep(0.0 if joining else AGAIN_S)


def is_dead(actor: Any) -> bool:
    """For good, as far as Ray tells."""
    from ray._private.state import actors  # public under `ray.state` until 2.5

    return actors(actor._actor_id.hex()).get("State", "DEAD") == "DEAD"
