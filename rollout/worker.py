"""`RolloutWorker`: one policy, many episodes at once as coroutines, every finished one recorded before anyone consumes
it.

Consumes requests from a `TaskFeed`, one whenever a slot is free. Produces ledger shards, then puts the resulting
trajectories into the trajectory queue. Waits for: the policy, the envs, the ledger's disk when it is full, and the
queue when it is full, which holds new episodes back too (the slots hand over to a bounded buffer). Unblocked by:
whoever empties the queue or the disk, or the queue's end.

How many episodes run at a time follows the engine's KV cache (`rollout.concurrency`), up to one an env. A budget that
is used up stops the feed, and what is under way ends by itself; an engine that died ends the worker, which gives its
leases back. A worker that is drained begins nothing more, and gives back what it cannot end in time.

A plain class; `rollout.collector` makes it a Ray actor.
"""

from __future__ import annotations

import asyncio
import random
import time
from collections import deque
from collections.abc import Awaitable, Callable, Sequence
from typing import Any, Protocol

from envs.base import EnvError
from rollout.async_env import AsyncEnv
from rollout.concurrency import AdaptiveConcurrency, Gate, Pressure
from rollout.episode import EpisodeSettings, run_episode
from rollout.ledger import LedgerWriter
from rollout.policy import Policy, PolicyError
from rollout.task_feed import EpisodeRequest, EpisodeSummary, WorkerState
from rollout.trajectory import FailureClass, Trajectory

ATTEMPTS = 3
"""How often an episode is tried within a run when it fails through our own fault."""
TRIED_AGAIN = (FailureClass.ENVIRONMENT, FailureClass.ENGINE)
FLUSH_S = 0.25
FLUSH_MOST_S = 2.0
FLUSH_SHARE = 0.1
"""What has finished waits to be recorded together with what finishes next: for this share of the time that it took,
within `FLUSH_S` and `FLUSH_MOST_S`. A shard, a report and a table for the queue cost the same for one episode as for
ten, and a worker that is killed loses little beside what it had under way."""
FLUSH_COUNT = 64
OBSERVE_S = 1.0
IDLE_S = 0.2
IDLE_MOST_S = 1.0
"""Between two times that a worker without work asks for some: more and more, since many of them would keep the feed
busy with that alone while the last episodes come to their end."""
LEDGER_PATIENCE_S = 900.0
"""How long a ledger that cannot be written (its disk is full, its store does not answer) is tried again."""


class Feed(Protocol):
    """`TaskFeed`, awaited."""

    def next(self, worker: str, count: int) -> Awaitable[list[EpisodeRequest] | None]: ...

    def done(self, worker: str, summaries: Sequence[EpisodeSummary]) -> Awaitable[None]: ...

    def report(self, worker: str, state: WorkerState) -> Awaitable[None]: ...

    def stop(self, reason: str) -> Awaitable[None]: ...

    def give_back(self, worker: str, keys: Sequence[str]) -> Awaitable[None]: ...


class Sink(Protocol):
    """Where results go; `rollout.trajectory_queue.TrajectoryQueue` is the real one."""

    def aput(self, trajectories: Sequence[Trajectory]) -> Awaitable[Any]: ...


class RolloutWorker:
    """Runs one collection with at most `len(envs)` episodes at a time.

    `adaptive`: fewer when the policy's engine is full (one that cannot be asked, such as an API, gets them all).
    `observe`: is shown each trajectory once it is recorded (`rollout.episode_metrics`). `still_ours`: which of some
    trajectories this worker may record (`rollout.feed_actor`); None: all.
    """

    def __init__(
        self,
        *,
        name: str,
        policy: Policy,
        envs: Sequence[AsyncEnv],
        settings: EpisodeSettings,
        feed: Feed,
        ledger: LedgerWriter,
        sink: Sink | None = None,
        adaptive: bool = True,
        ledger_patience_s: float = LEDGER_PATIENCE_S,
        observe: Callable[[Trajectory], None] = lambda trajectory: None,
        still_ours: Callable[[Sequence[Trajectory]], Awaitable[list[Trajectory]]] | None = None,
    ) -> None:
        self._name, self._policy, self._envs, self._settings = name, policy, envs, settings
        self._feed, self._ledger, self._sink = feed, ledger, sink
        self._ledger_patience_s, self._observe, self._still_ours = ledger_patience_s, observe, still_ours
        self._requests: deque[EpisodeRequest] = deque()
        self._refill = asyncio.Lock()
        self._ended = False
        self._error: PolicyError | None = None
        self._note = ""
        self._acting: dict[asyncio.Task[None], str] = {}
        """Slot -> key of the episode that it has under way."""
        self._draining: asyncio.Task[None] | None = None
        self._finished: asyncio.Queue[Trajectory | None] = asyncio.Queue(maxsize=FLUSH_COUNT)
        """Finished episodes; None is the end."""
        self._pressure: Callable[[], Pressure] | None = getattr(policy, "pressure", None) if adaptive else None
        most = len(envs)
        self._concurrency = AdaptiveConcurrency(least=min(4, most), most=most)
        self._gate = Gate(most if self._pressure is None else self._concurrency.limit)

    async def run(self) -> int:
        """Until the feed has nothing left, or the worker is drained; returns how many episodes were recorded.

        Raises what the ledger raises, and `PolicyError` when the policy's engine died; what had finished is recorded
        first.
        """
        recorder = asyncio.create_task(self._record())
        watcher = asyncio.create_task(self._watch())
        slots = [asyncio.create_task(self._slot(env)) for env in self._envs]
        everything = asyncio.create_task(_all(slots))
        try:
            await asyncio.wait([everything, recorder], return_when=asyncio.FIRST_COMPLETED)
            if recorder.done():  # only by an error: without a ledger nothing may go on
                recorder.result()
            await everything
            await self._give_back()
            await self._finished.put(None)
            recorded = await recorder
            await self._feed.report(self._name, self._state(self._pressure() if self._pressure is not None else None))
            if self._error is not None:
                raise self._error
            return recorded
        finally:
            for task in (everything, *slots, recorder, watcher, self._draining):
                if task is not None:
                    task.cancel()

    async def drain(self, seconds: float) -> None:
        """Begin nothing more: what has not begun goes back at once, what runs has `seconds` to end and goes back then.
        `run` returns when what has ended is recorded. May be called again, with less time."""
        self._ended = True
        self._note = "draining"
        if self._draining is not None:
            self._draining.cancel()
        self._draining = asyncio.create_task(self._give_up(seconds))
        await self._give_back()

    async def _give_up(self, seconds: float) -> None:
        await asyncio.sleep(seconds)
        given_up = list(self._acting.values())
        for slot in self._acting:
            slot.cancel()
        if given_up:
            await self._feed.give_back(self._name, given_up)

    async def _give_back(self) -> None:
        keys = [request.key for request in self._requests]
        self._requests.clear()
        if keys:
            await self._feed.give_back(self._name, keys)

    async def _slot(self, env: AsyncEnv) -> None:
        while True:
            await self._gate.enter()
            try:
                request = await self._next()
                if request is None:
                    return
                trajectory = await self._act(request, env)
            except PolicyError as error:
                # The budget is used up, or the engine is gone. What others have finished is still recorded, and what
                # they have begun may come to its end, if it can.
                self._ended = True
                if error.failure_class is FailureClass.LIMIT:
                    await self._feed.stop(str(error))
                else:
                    self._error = error
                return
            finally:
                await self._gate.leave()
            await self._finished.put(trajectory)

    async def _act(self, request: EpisodeRequest, env: AsyncEnv) -> Trajectory:
        slot = asyncio.current_task()
        assert slot is not None
        self._acting[slot] = request.key
        try:
            return await self._episode(request, env)
        finally:
            del self._acting[slot]

    async def _episode(self, request: EpisodeRequest, env: AsyncEnv) -> Trajectory:
        for attempt in range(ATTEMPTS):
            if attempt:
                await asyncio.sleep(0.5 * 2**attempt * random.uniform(0.5, 1.0))
            try:
                trajectory = await run_episode(
                    request.task,
                    policy=self._policy,
                    env=env,
                    settings=self._settings,
                    sample_index=request.sample_index,
                )
            finally:
                await _close(env)
            if trajectory.failure is None or trajectory.failure.failure_class not in TRIED_AGAIN:
                break
        return trajectory

    async def _next(self) -> EpisodeRequest | None:
        async with self._refill:
            idle_s = IDLE_S
            while not self._requests and not self._ended:
                got = await self._feed.next(self._name, max(1, self._gate.limit // 2))
                if got is None:
                    self._ended = True
                elif got:
                    self._requests.extend(got)
                else:
                    await asyncio.sleep(idle_s)
                    idle_s = min(IDLE_MOST_S, 1.5 * idle_s)
            return self._requests.popleft() if self._requests and not self._ended else None

    async def _watch(self) -> None:
        """Once in a while: the limit follows the engine, and the feed hears how things are."""
        while True:
            pressure = self._pressure() if self._pressure is not None else None
            if pressure is not None:
                await self._gate.set(self._concurrency.observe(pressure, running=self._gate.inside))
            await self._feed.report(self._name, self._state(pressure))
            await asyncio.sleep(OBSERVE_S)

    def _state(self, pressure: Pressure | None) -> WorkerState:
        return WorkerState(
            running=self._gate.inside,
            limit=self._gate.limit,
            kv_usage=pressure.kv_usage if pressure is not None else None,
            note=self._note or "; ".join(getattr(self._policy, "notes", ())),
        )

    async def _record(self) -> int:
        recorded, ended = 0, False
        while not ended:
            batch, ended = await self._batch()
            if self._still_ours is not None and batch:
                batch = await self._still_ours(batch)
            if not batch:
                continue
            await self._append(batch)
            recorded += len(batch)
            for trajectory in batch:
                self._observe(trajectory)
            await self._feed.done(self._name, [summary_of(trajectory) for trajectory in batch])
            results = [trajectory for trajectory in batch if trajectory.failure is None]
            if results and self._sink is not None:
                await self._sink.aput(results)  # the learner refuses, and counts, what it must not learn from
        return recorded

    async def _append(self, batch: Sequence[Trajectory]) -> None:
        """Trajectories are dear: a ledger that cannot be written is waited for, and new episodes with it."""
        began, delay_s = time.monotonic(), 0.5
        while True:
            try:
                await asyncio.to_thread(self._ledger.append, batch)
            except OSError as error:
                if time.monotonic() - began > self._ledger_patience_s:
                    raise
                self._note = f"the ledger cannot be written: {error.strerror or error}"
                await asyncio.sleep(delay_s)
                delay_s = min(2 * delay_s, 15.0)
            else:
                self._note = ""
                return

    async def _batch(self) -> tuple[list[Trajectory], bool]:
        """What finished, and soon after it (`FLUSH_SHARE`), at most `FLUSH_COUNT`; and whether that was the end."""
        first = await self._finished.get()
        if first is None:
            return [], True
        batch = [first]
        try:
            async with asyncio.timeout(flush_s(first.duration_s)):
                while len(batch) < FLUSH_COUNT:
                    trajectory = await self._finished.get()
                    if trajectory is None:
                        return batch, True
                    batch.append(trajectory)
        except TimeoutError:
            pass
        return batch, False


async def _all(slots: Sequence[asyncio.Task[None]]) -> None:
    """Until they have ended, or one has failed, which is raised; one that gave its episode up has ended."""
    waiting = set(slots)
    while waiting:
        ended, waiting = await asyncio.wait(waiting, return_when=asyncio.FIRST_EXCEPTION)
        for slot in ended:
            if not slot.cancelled():
                slot.result()


def flush_s(duration_s: float) -> float:
    """How long an episode that took `duration_s` waits for others to be recorded with it."""
    return min(FLUSH_MOST_S, max(FLUSH_S, FLUSH_SHARE * duration_s))


async def _close(env: AsyncEnv) -> None:
    try:
        await env.close()
    except EnvError:
        pass  # the host is gone, and the episode with it; its trajectory is what counts


def summary_of(trajectory: Trajectory) -> EpisodeSummary:
    """What a worker tells of a recorded episode."""
    failure = trajectory.failure
    return EpisodeSummary(
        key=trajectory.key,
        kind=trajectory.task.kind,
        success=trajectory.success,
        stop_reason=trajectory.stop_reason.value,
        failed=failure is not None,
        failure_class=failure.failure_class if failure is not None else None,
        failure_message=failure.message[:300] if failure is not None else "",
        steps=len(trajectory.steps),
        completion_tokens=trajectory.completion_tokens,
        prompt_tokens=trajectory.usage.prompt_tokens,
        cost_usd=trajectory.usage.cost_usd,
        tool_calls=trajectory.tool_calls,
    )
