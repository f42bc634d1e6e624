"""One simulated collection, driven as a job drives one, and what it cost: `WorkerPool`, `simulate`, `Measured`.

The loop is that of `launch.job`: `Collection.poll` for half a second, then ask feed, queue and learner how they are.
The workers' processes are kept from one collection to the next and grow in number, so that each is started once.

Example::

    with sampled(every_s=1.0) as samples:
        run = simulate(pool, "teacher", workers=50, slots=200, episodes_per_slot=3)
    print(run.figures(samples).steady.rate)
"""

from __future__ import annotations

import shutil
import statistics
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks import scale_figures
from benchmarks.scale_consumer import Consumed, start_consumer
from benchmarks.scale_figures import Window
from benchmarks.scale_processes import Sample, peak_memory_mb, spent
from benchmarks.scale_world import NAME, AllDelays, SimulatedSpec, deadline_s, lengths_s, sleeping_envs, tasks
from launch.joint_collection import JointCollection
from rollout.collector import Collection, missing_requests, start_rollout_actors, stop_rollout_actors
from rollout.episode import EpisodeSettings
from rollout.ledger import Ledger
from rollout.trajectory_queue import TrajectoryQueue

POLL_S = 0.5
QUEUE_CAPACITY = 256
"""That of a job by default."""
START_S = 600.0
STARTED_AT_ONCE = 4
TOO_LONG = 20.0
"""So many times the time that the delays alone take, and it is given up."""


class WorkerPool:
    """Rollout actors, started as they are needed; `start_s` tells how long that took: (how many, seconds)."""

    def __init__(self, delays: AllDelays) -> None:
        self.delays = delays
        self.start_s: list[tuple[int, float]] = []
        self._actors: list[Any] = []

    def first(self, count: int) -> list[Any]:
        """So many of them, with their policy built. Raises what a worker raises that cannot start."""
        import ray

        more = count - len(self._actors)
        if more > 0:
            began_s = time.monotonic()
            spec = SimulatedSpec(kind="expert", delays=self.delays)
            while len(self._actors) < count:  # Ray warns of more at a time, and all would only be slower
                added = start_rollout_actors(spec, count=min(STARTED_AT_ONCE, count - len(self._actors)))
                self._actors += added
                ray.get([actor.start.remote() for actor in added], timeout=START_S)
            self.start_s.append((more, time.monotonic() - began_s))
        return self._actors[:count]

    def close(self) -> None:
        stop_rollout_actors(self._actors)
        self._actors = []


@dataclass(frozen=True, slots=True, kw_only=True)
class Look:
    """What the driver saw when it asked."""

    unix_s: float
    feed_s: float
    """How long the feed took to answer."""
    queue_s: float
    running: int
    """Episodes under way, as the workers say of themselves."""
    depth: int
    """Trajectories in the queue."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Figures:
    """What a collection was and cost. Processor seconds by role of the steady window."""

    steady: Window
    limit: float
    """Episodes a second of the steady window, if nothing but the delays of the same episodes took time."""
    whole: Window
    peak: int
    cpu_s: dict[str, float]
    depth: float
    """Trajectories in the queue, median of the steady window."""
    depth_most: int
    feed_ms: float
    """The feed's answer, median of the steady window."""
    feed_most_ms: float
    memory_mb: dict[str, float]

    def cores(self, role: str) -> float:
        """Processor seconds a second of the steady window."""
        return self.cpu_s.get(role, 0.0) / self.cpu_s["wall"]

    @property
    def share(self) -> float:
        """Of `limit` that was reached."""
        return self.steady.rate / self.limit

    def ms_per_episode(self, role: str) -> float:
        return 1000 * self.cores(role) / self.steady.rate

    @property
    def ours(self) -> float:
        """Cores that the whole simulation took, its measuring included."""
        return sum(self.cores(role) for role in self.cpu_s if role not in ("machine", "wall"))


@dataclass(frozen=True, slots=True, kw_only=True)
class Run:
    """One collection that has ended."""

    name: str
    """Of its delays."""
    workers: int
    slots: int
    """Episodes at a time of each worker."""
    episodes: int
    steps: int
    times: tuple[tuple[float, float], ...]
    pure: tuple[tuple[float, float], ...]
    """The same if nothing but the delays took time; from 0."""
    looks: tuple[Look, ...]
    consumed: Consumed
    put_waits: int
    """How often a worker found the queue full."""
    prepare_s: float
    """Until the first worker had its call: which episodes are missing, and the feed's start."""
    shards: int
    ledger_bytes: int
    row_bytes: float
    """Of one trajectory as an Arrow table, as it is in the queue."""
    keys_s: float
    """How long a resumed run would take to read which episodes there are."""

    @property
    def at_once(self) -> int:
        return self.workers * self.slots

    def figures(self, samples: Sequence[Sample]) -> Figures:
        """Raises `ValueError` when it never was in a steady state or was not sampled then."""
        window = scale_figures.steady(self.times, at_once=self.at_once)
        whole = scale_figures.whole(self.times)
        looks = [look for look in self.looks if window.began_s <= look.unix_s <= window.ended_s] or self.looks
        return Figures(
            steady=window,
            limit=scale_figures.steady(self.pure, at_once=self.at_once).rate,
            whole=whole,
            peak=scale_figures.peak(self.times),
            cpu_s=spent(samples, window.began_s, window.ended_s),
            depth=statistics.median(look.depth for look in looks),
            depth_most=max(look.depth for look in self.looks),
            feed_ms=1000 * statistics.median(look.feed_s for look in looks),
            feed_most_ms=1000 * max(look.feed_s for look in self.looks),
            memory_mb=peak_memory_mb([s for s in samples if whole.began_s <= s.unix_s <= whole.ended_s]),
        )


def simulate(pool: WorkerPool, name: str, *, workers: int, slots: int, episodes_per_slot: float) -> Run:
    """Collect `workers` x `slots` x `episodes_per_slot` episodes with the delays called `name`.

    Raises `RuntimeError` when an episode is lost, comes twice or fails, or it takes far too long.
    """
    import ray

    delays = pool.delays[name]
    actors = pool.first(workers)
    count = round(workers * slots * episodes_per_slot)
    chosen = tasks(name, count, begun=workers * slots)
    settings = EpisodeSettings(max_steps=delays.most_steps, deadline_s=deadline_s(delays))
    folder = Path(tempfile.mkdtemp(prefix="scale-benchmark-"))
    ledger, looks = folder / "ledger", []
    queue = TrajectoryQueue.create(QUEUE_CAPACITY)
    consumer = start_consumer(ledger, queue)
    try:
        ray.get(consumer.progress.remote(), timeout=START_S)
        began_s = time.monotonic()
        requests, found = missing_requests(chosen, policy=NAME, settings=settings, ledger=Ledger(ledger))
        collection = JointCollection({
            NAME: Collection(
                actors, sleeping_envs(pool.delays), requests, found=found, settings=settings, ledger=ledger,
                queue=queue, concurrency=slots, can_preview=False,
            )
        })  # fmt: skip
        prepare_s = time.monotonic() - began_s
        deadline_at_s = time.monotonic() + TOO_LONG * (delays.episode_s * episodes_per_slot + 10.0)
        try:
            ended = False
            while not ended:
                ended = collection.poll(timeout_s=POLL_S)
                looks.append(_look(collection, queue))
                ray.get(consumer.progress.remote(), timeout=START_S)
                if time.monotonic() > deadline_at_s:
                    raise RuntimeError(f"{workers} workers, {count} episodes: still not at their end, far too late")
        finally:
            collection.close()
        put_waits = queue.stats().put_waits
        queue.close()
        consumed = _drained(consumer)
        times, steps, failed = _recorded(ledger)
        read_s = time.monotonic()
        keys = len(Ledger(ledger).keys())
        keys_s = time.monotonic() - read_s
        if not (len(times) == keys == consumed.trajectories == count) or failed:
            raise RuntimeError(
                f"of {count} episodes {len(times)} were recorded ({keys} keys), {consumed.trajectories} arrived, "
                f"{failed} failed"
            )
        shards = list((ledger / "shards").glob("*.parquet"))
        pure = scale_figures.pure(lengths_s(pool.delays, chosen), workers * slots)
        return Run(
            name=name, workers=workers, slots=slots, episodes=count, steps=steps, times=tuple(times),
            pure=tuple(pure), looks=tuple(looks), consumed=consumed, put_waits=put_waits, prepare_s=prepare_s,
            shards=len(shards), ledger_bytes=sum(shard.stat().st_size for shard in shards),
            row_bytes=_row_bytes(ledger), keys_s=keys_s,
        )  # fmt: skip
    finally:
        ray.kill(consumer)
        queue.kill()
        shutil.rmtree(folder)


def _look(collection: JointCollection, queue: TrajectoryQueue) -> Look:
    asked_s = time.monotonic()
    seen = collection.progress()
    answered_s = time.monotonic()
    waiting = queue.stats()
    return Look(
        unix_s=time.time(),
        feed_s=answered_s - asked_s,
        queue_s=time.monotonic() - answered_s,
        running=sum(state.running for state in seen.workers.values()),
        depth=waiting.depth,
    )


def _drained(consumer: Any) -> Consumed:
    import ray

    deadline_s = time.monotonic() + START_S
    while True:
        consumed: Any = ray.get(consumer.progress.remote(), timeout=START_S)
        if consumed.ended:
            return consumed
        if time.monotonic() > deadline_s:
            raise RuntimeError(f"the queue is not drained after {START_S:g} s: {consumed}")
        time.sleep(0.1)


def _row_bytes(ledger: Path) -> float:
    table = next(iter(Ledger(ledger).scan()))
    return table.nbytes / table.num_rows


def _recorded(ledger: Path) -> tuple[list[tuple[float, float]], int, int]:
    """(begin, end) of each result, their steps, and how many failures there are."""
    times: list[tuple[float, float]] = []
    steps = 0
    for table in Ledger(ledger).scan(["started_at_s", "duration_s", "step_count"]):
        begins, durations, counts = (column.to_pylist() for column in table.columns)
        times += [(begin, begin + duration) for begin, duration in zip(begins, durations, strict=True)]
        steps += sum(counts)
    return times, steps, sum(1 for _ in Ledger(ledger).failures())
