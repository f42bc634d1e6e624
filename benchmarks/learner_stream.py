"""The learner's numbers that take Ray: how long it waits while rollouts can fill the queue, and two ranks beside one.

Stall: the built-in expert really rolls out, in a process of its own, into the real `TrajectoryQueue`; a `LearnerGroup`
of one rank takes from it through the job's own `StreamSource`, with the embedded default's settings. Counted is the
time from the first optimizer step until the last trajectory has arrived: the share of it that the learner itself says
it waited, and the share that was not spent in optimizer steps for any reason (waiting, rendering, planning). The queue
was never the learner's bound only if the expert could have done more; the benchmark says how often producers had to
wait for room.

Ranks: the same rows, all there at once, by one rank and by two (gloo, ZeRO 0); each rank has one thread.

Example::

    with a_ray() as _:
        print(stall(trajectories=600))
        print(rate(workload, ranks=2))
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from benchmarks.learner_ours import ListSource, learner_config
from benchmarks.learner_world import WARM_STEPS, Workload, expert_trajectories
from launch.cluster import ray_cluster
from launch.config_reading import load_config
from launch.source import StreamSource
from learner.base import Progress, TrajectorySource
from learner.config import LearnerConfig
from learner.learner_actor import LearnerGroup
from rollout.trajectory import Trajectory
from rollout.trajectory_queue import TrajectoryQueue

QUEUE_CAPACITY = 256
"""The embedded default's."""
PRODUCER_AT_ONCE = 16
_LOOK_S = 0.25
_LIMIT_S = 1800.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Stall:
    """One stream, from the first optimizer step until the last trajectory had arrived."""

    counted_s: float
    waited: float
    """Share of it that the learner waited for trajectories."""
    outside_steps: float
    """Share of it that it was not in an optimizer step."""
    put_waits: int
    """Times that the rollout found the queue full."""
    trained_per_s: float


@dataclass(frozen=True, slots=True)
class _Look:
    at_s: float
    progress: Progress


@contextmanager
def a_ray() -> Iterator[None]:
    """Ray on this machine, as the embedded default starts it, with room for two ranks or a rank and a producer."""
    cluster = load_config([]).cluster
    with ray_cluster(replace(cluster, num_cpus=max(2, cluster.num_cpus or 0))):
        yield


def stall(*, trajectories: int) -> Stall:
    """Run one stream of so many. Raises `LearnerError` when the learner fails, `RuntimeError` when it ends too soon."""
    import ray

    queue = TrajectoryQueue.create(QUEUE_CAPACITY)
    producer: Any = ray.remote(_Producer).options(num_cpus=1).remote(queue)  # type: ignore[attr-defined]
    with tempfile.TemporaryDirectory(prefix="learner-benchmark-") as folder:
        ledger = Path(folder) / "ledger"
        ledger.mkdir()
        config = learner_config(Path(folder) / "learner", optimizer="muon", rows_per_step=None)
        try:
            produced = producer.run.remote(trajectories)
            looks = _watched(config, StreamSource(ledger, queue))
            ray.get(produced, timeout=60)
            stats = queue.stats()
        finally:
            ray.kill(producer)
            queue.kill()
    live = [look for look in looks if look.progress.step >= 1 and look.progress.trajectories < trajectories]
    if len(live) < 2:
        raise RuntimeError(f"{trajectories} trajectories had arrived before the learner was seen at work; use more")
    first, last = live[0], live[-1]
    counted_s = last.at_s - first.at_s
    return Stall(
        counted_s=counted_s,
        waited=(last.progress.wait_s - first.progress.wait_s) / counted_s,
        outside_steps=max(0.0, 1 - (last.progress.train_s - first.progress.train_s) / counted_s),
        put_waits=stats.put_waits,
        trained_per_s=(last.progress.trained_tokens - first.progress.trained_tokens) / counted_s,
    )


def rate(workload: Workload, *, ranks: int, zero_stage: int = 0) -> float:
    """Trained tokens/s of so many ranks, from step `WARM_STEPS` on."""
    with tempfile.TemporaryDirectory(prefix="learner-benchmark-") as folder:
        config = learner_config(Path(folder), optimizer="muon", rows_per_step=workload.rows_per_step, ranks=ranks)
        looks = _watched(config, ListSource(workload.trajectories))
    steps = [look for look in _at_their_first(looks) if look.progress.step >= WARM_STEPS]
    if len(steps) < 2:
        raise RuntimeError(f"{len(workload.rows)} rows are too few steps to see any beyond the first {WARM_STEPS}")
    first, last = steps[0], steps[-1]
    return (last.progress.trained_tokens - first.progress.trained_tokens) / (last.at_s - first.at_s)


def _watched(config: LearnerConfig, source: TrajectorySource) -> list[_Look]:
    """Train to the end, looking in often."""
    group = LearnerGroup.start(config, source)
    looks: list[_Look] = []
    until = time.monotonic() + _LIMIT_S
    try:
        group.run()
        while not group.finished(timeout_s=_LOOK_S):
            looks.append(_Look(time.monotonic(), group.progress()))
            if looks[-1].at_s > until:
                raise RuntimeError(f"the learner is not done after {_LIMIT_S:g} s: {looks[-1].progress}")
    finally:
        group.shutdown()
    return looks


def _at_their_first(looks: list[_Look]) -> list[_Look]:
    """The first look at each step: the one that is nearest to the step's end."""
    return [look for before, look in zip(looks, looks[1:], strict=False) if look.progress.step > before.progress.step]


class _Producer:
    """Rolls the expert out into the queue, as fast as it goes and the queue lets it, then closes the queue."""

    def __init__(self, queue: TrajectoryQueue) -> None:
        self._queue = queue

    async def run(self, count: int) -> float:
        """Trajectories/s, waits for room included."""

        async def put(trajectory: Trajectory) -> None:
            await self._queue.aput([trajectory])

        _, wall_s = await expert_trajectories(count, at_once=PRODUCER_AT_ONCE, hand_on=put)
        await self._queue.aclose()
        return count / wall_s
