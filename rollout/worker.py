"""`RolloutWorker`: one policy, many episodes at once as coroutines, every finished one recorded before anyone consumes
it.

Consumes requests from a `TaskFeed`, one whenever a slot is free. Produces ledger shards, then puts the resulting
trajectories into the trajectory queue. Waits for: the policy, the envs, and the queue when it is full, which holds new
episodes back too (the slots hand over to a bounded buffer). Unblocked by: whoever empties the queue, or the queue's
end.

A plain class; `rollout.collector` makes it a Ray actor.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Awaitable, Sequence
from typing import Any, Protocol

from envs.base import EnvError
from rollout.async_env import AsyncEnv
from rollout.episode import EpisodeSettings, run_episode
from rollout.ledger import LedgerWriter
from rollout.policy import Policy
from rollout.task_feed import EpisodeRequest, EpisodeSummary
from rollout.trajectory import Trajectory

ATTEMPTS = 3
"""How often an episode is tried within a run when it fails through our own fault."""
FLUSH_S = 0.25
FLUSH_COUNT = 64


class Feed(Protocol):
    """`TaskFeed`, awaited."""

    def next(self, worker: str, count: int) -> Awaitable[list[EpisodeRequest] | None]: ...

    def done(self, worker: str, summaries: Sequence[EpisodeSummary]) -> Awaitable[None]: ...


class Sink(Protocol):
    """Where results go; `rollout.trajectory_queue.TrajectoryQueue` is the real one."""

    def aput(self, trajectories: Sequence[Trajectory]) -> Awaitable[Any]: ...


class RolloutWorker:
    """Runs one collection with `len(envs)` episodes at a time."""

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
    ) -> None:
        self._name, self._policy, self._envs, self._settings = name, policy, envs, settings
        self._feed, self._ledger, self._sink = feed, ledger, sink
        self._requests: deque[EpisodeRequest] = deque()
        self._refill = asyncio.Lock()
        self._ended = False
        self._finished: asyncio.Queue[Trajectory | None] = asyncio.Queue(maxsize=FLUSH_COUNT)
        """Finished episodes; None is the end."""

    async def run(self) -> int:
        """Until the feed has nothing left; returns how many episodes were recorded. Raises what the ledger raises."""
        recorder = asyncio.create_task(self._record())
        slots = [asyncio.create_task(self._slot(env)) for env in self._envs]
        everything = asyncio.gather(*slots)
        try:
            await asyncio.wait([everything, recorder], return_when=asyncio.FIRST_COMPLETED)
            if recorder.done():  # only by an error: without a ledger nothing may go on
                recorder.result()
            await everything
            await self._finished.put(None)
            return await recorder
        finally:
            for task in (*slots, recorder):
                task.cancel()

    async def _slot(self, env: AsyncEnv) -> None:
        while (request := await self._next()) is not None:
            await self._finished.put(await self._episode(request, env))

    async def _episode(self, request: EpisodeRequest, env: AsyncEnv) -> Trajectory:
        for attempt in range(ATTEMPTS):
            if attempt:
                await asyncio.sleep(0.5 * 2**attempt)
            trajectory = await run_episode(
                request.task,
                policy=self._policy,
                env=env,
                settings=self._settings,
                sample_index=request.sample_index,
            )
            await _close(env)
            if trajectory.failure is None:
                break
        return trajectory

    async def _next(self) -> EpisodeRequest | None:
        async with self._refill:
            while not self._requests and not self._ended:
                got = await self._feed.next(self._name, max(1, len(self._envs) // 2))
                if got is None:
                    self._ended = True
                elif got:
                    self._requests.extend(got)
                else:
                    await asyncio.sleep(0.2)
            return self._requests.popleft() if self._requests else None

    async def _record(self) -> int:
        recorded, ended = 0, False
        while not ended:
            batch, ended = await self._batch()
            if not batch:
                continue
            await asyncio.to_thread(self._ledger.append, batch)
            recorded += len(batch)
            await self._feed.done(self._name, [_summary(trajectory) for trajectory in batch])
            results = [trajectory for trajectory in batch if trajectory.failure is None]
            if results and self._sink is not None:
                await self._sink.aput(results)  # the learner refuses, and counts, what it must not learn from
        return recorded

    async def _batch(self) -> tuple[list[Trajectory], bool]:
        """What finished within `FLUSH_S` of the first one, at most `FLUSH_COUNT`; and whether that was the end."""
        first = await self._finished.get()
        if first is None:
            return [], True
        batch = [first]
        try:
            async with asyncio.timeout(FLUSH_S):
                while len(batch) < FLUSH_COUNT:
                    trajectory = await self._finished.get()
                    if trajectory is None:
                        return batch, True
                    batch.append(trajectory)
        except TimeoutError:
            pass
        return batch, False


async def _close(env: AsyncEnv) -> None:
    try:
        await env.close()
    except EnvError:
        pass  # the host is gone, and the episode with it; its trajectory is what counts


def _summary(trajectory: Trajectory) -> EpisodeSummary:
    return EpisodeSummary(
        key=trajectory.key,
        kind=trajectory.task.kind,
        success=trajectory.success,
        stop_reason=trajectory.stop_reason.value,
        failed=trajectory.failure is not None,
        steps=len(trajectory.steps),
        completion_tokens=trajectory.completion_tokens,
        tool_calls=sum(step.tool_calls for step in trajectory.steps),
    )
