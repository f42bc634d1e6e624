"""Collection on Ray: which episodes are missing, and the actors that run them.

`missing_requests` compares the tasks with the ledger, so that a collection that is run again does only what is missing.
`RolloutActor` holds one policy and serves any number of collections. `Collection` is one of them, seen from the driver:
start it, poll it, and it replaces a worker that dies and gives its leases back.

Example::

    actors = start_rollout_actors(spec, count=1)
    requests, found = missing_requests(tasks, policy=spec.policy_name, settings=settings, ledger=Ledger(folder))
    collection = Collection(actors, hosts, requests, found=found, settings=settings, ledger=folder, queue=queue)
    while not collection.poll():
        print(collection.progress())
"""

from __future__ import annotations

import asyncio
import dataclasses
import itertools
import os
import time
import uuid
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from envs.base import Task
from envs.local_envs import LocalEnvs
from envs.pool import RemoteEnv
from rollout.episode import EpisodeSettings
from rollout.episode_metrics import EpisodeMetrics
from rollout.ledger import Ledger, LedgerWriter
from rollout.placement import Group, Reservation, RoleResources, actor_group, engine_groups, places, reserve
from rollout.policy import PolicyError
from rollout.policy_spec import PolicySpec
from rollout.spend_meters import RemoteMeter
from rollout.task_feed import CollectProgress, EpisodeRequest, EpisodeSummary, TaskFeed, WorkerState
from rollout.weight_loading import Loaded, WeightLoader, Weights
from rollout.weight_sync import WorkerBusyError
from rollout.worker import RolloutWorker

BARREN_STARTS = 3
"""So many times in a row may a worker die without having recorded anything; more often it will not work at all."""
RESTART_S = 300.0
"""How long Ray may take to start a dead worker's process again."""
FEED_S = 120.0
"""How long the feed may take to answer; it does next to nothing."""
_reserved: dict[Any, Reservation] = {}
"""Rollout actor -> where its place is."""


class CollectionError(RuntimeError):
    """A collection that cannot go on; the message names what is missing."""


def missing_requests(
    tasks: Sequence[Task], *, policy: str, settings: EpisodeSettings, ledger: Ledger, samples: int = 1
) -> tuple[list[EpisodeRequest], int]:
    """The episodes of `tasks` x `samples` that the ledger does not hold yet, and how many it does hold."""
    recorded = ledger.keys()
    requests = [
        EpisodeRequest(key=settings.key(task, policy, sample), task=task, sample_index=sample)
        for sample in range(samples)
        for task in tasks
    ]
    missing = [request for request in requests if request.key not in recorded]
    return missing, len(requests) - len(missing)


@dataclass(frozen=True, slots=True)
class EnvSlots:
    """The env slots of one worker: (host, slot) pairs."""

    hosts: tuple[Any, ...]
    slots: tuple[tuple[int, int], ...]
    can_preview: bool
    timeout_s: float

    async def connect(self) -> list[RemoteEnv]:
        return [
            RemoteEnv(self.hosts[host], slot, can_preview=self.can_preview, timeout_s=self.timeout_s)
            for host, slot in self.slots
        ]

    async def close(self) -> None:
        """The hosts stay: they are not this worker's."""


class _RemoteFeed:
    """The feed actor, awaited."""

    def __init__(self, handle: Any) -> None:
        self._handle = handle

    async def next(self, worker: str, count: int) -> list[EpisodeRequest] | None:
        return await asyncio.wait_for(self._handle.next.remote(worker, count), FEED_S)

    async def done(self, worker: str, summaries: Sequence[EpisodeSummary]) -> None:
        await asyncio.wait_for(self._handle.done.remote(worker, list(summaries)), FEED_S)

    async def report(self, worker: str, state: WorkerState) -> None:
        await asyncio.wait_for(self._handle.report.remote(worker, state), FEED_S)

    async def stop(self, reason: str) -> None:
        await asyncio.wait_for(self._handle.stop.remote(reason), FEED_S)


class RolloutActor:
    """Consumes episodes from a feed actor, produces ledger shards and queue entries; waits for engine, envs and queue.

    Blocked by a full queue; unblocked by its reader, or killed with the job.
    """

    def __init__(self, spec: PolicySpec, meter: str = "", run: str = "") -> None:
        self._spec, self._run = spec, run
        self._meter = meter  # by name: an actor with a handle among its arguments cannot be started again
        self._loader: WeightLoader | None = None
        self._starting = asyncio.Lock()
        self._pinned = 0
        """Collections under way that act with weights of their own choice."""

    async def start(self) -> str:
        """Load the policy; returns its name."""
        return (await self._started()).policy.name

    async def load_weights(self, weights: Weights) -> Loaded:
        """See `WeightLoader.load`; collections that run go on with them. Raises `WorkerBusyError` where one acts with
        weights of its own choice."""
        loader = await self._started()
        if self._pinned:
            raise WorkerBusyError(f"it acts with weights {loader.policy.weights_version!r} until its collection ends")
        return await loader.load(weights)

    async def _started(self) -> WeightLoader:
        async with self._starting:
            if self._loader is None:
                policy = await asyncio.to_thread(self._build, None)
                self._loader = WeightLoader(policy, self._build)
            return self._loader

    def _build(self, weights: Weights | None) -> Any:
        meter = None
        if self._meter:
            import ray

            meter = RemoteMeter(ray.get_actor(self._meter))
        if weights is None:
            return self._spec.build(meter)
        name = self._spec.policy_name
        policy: Any = dataclasses.replace(self._spec, model=weights.folder, name=name).build(meter)
        policy.weights_version = weights.version
        return policy

    async def run(
        self,
        name: str,
        env_slots: EnvSlots | LocalEnvs,
        settings: EpisodeSettings,
        feed: Any,
        ledger: str,
        queue: Any,
        weights: Weights | None,
        adaptive: bool,
    ) -> int:
        """One collection, start to end; returns how many episodes this worker recorded."""
        loader = await self._started()
        self._pinned += weights is not None
        try:
            if weights is not None:
                await loader.load(weights)
            worker = RolloutWorker(
                name=name,
                policy=loader.policy,
                envs=await env_slots.connect(),
                settings=settings,
                feed=_RemoteFeed(feed),
                ledger=LedgerWriter(ledger, writer=name),
                sink=queue,
                adaptive=adaptive,
                observe=EpisodeMetrics(run=self._run, policy=loader.policy.name).observe,
            )
            return await worker.run()
        finally:
            self._pinned -= weights is not None
            await env_slots.close()

    async def stats(self) -> dict[str, float]:
        policy = None if self._loader is None else self._loader.policy
        stats: Callable[[], Mapping[str, float]] | None = getattr(policy, "stats", None)
        return dict(stats()) if stats is not None else {}

    async def forget_prefixes(self) -> None:
        """See `VllmPolicy.forget_prefixes`; for engines of this worker alone."""
        await (await self._started()).policy.forget_prefixes()

    async def pid(self) -> int:
        return os.getpid()

    async def close(self) -> None:
        if self._loader is not None:
            await self._loader.policy.close()


def start_rollout_actors(
    spec: PolicySpec,
    *,
    count: int,
    gpus_per_rank: float = 0.0,
    resources: RoleResources | None = None,
    reserved: Sequence[Reservation] | None = None,
    env_vars: Mapping[str, str] | None = None,
    meter: str = "",
    run: str = "",
) -> list[Any]:
    """`count` x `spec.data_parallel_size` Ray actors, each with the policy of its own; loading begins with `start()` or
    the first collection.

    `gpus_per_rank`: GPUs of each of an engine's tensor x pipeline parallel ranks; `resources`: the same and more;
    `reserved`: their places, of `policy_groups`, where they have some already. `meter`: name of a
    `rollout.spend.SpendMeter` actor; `run`: what their metrics are labelled with. Raises `PlacementError` when the
    cluster has no place for an engine.
    """
    import ray

    count *= spec.data_parallel_size
    if reserved is None:
        resources = resources or RoleResources(num_gpus=gpus_per_rank)
        reserved = reserve(policy_groups(spec, who=f"the policy {spec.policy_name}", count=count, resources=resources))
    actors = []
    for reservation, index in itertools.islice(places(reserved), count):
        actor = ray.remote(RolloutActor).options(  # type: ignore[attr-defined]
            max_concurrency=16,
            max_restarts=-1,  # `Collection` counts them
            runtime_env={"env_vars": {**spec.environment(), **(env_vars or {})}},
            **reservation.options(index),
        )
        actors.append(actor.remote(spec, meter, run))
        reservation.use()
        _reserved[actors[-1]] = reservation
    return actors


def policy_groups(spec: PolicySpec, *, who: str, count: int, resources: RoleResources, key: str = "") -> list[Group]:
    """What `count` actors with that policy are placed by. GPUs are for engines: others have none, whatever `resources`
    say. `key`: of the policy in a configuration. Raises `ValueError`."""
    if spec.kind == "vllm":
        return engine_groups(
            who=who,
            engines=count,
            tensor_parallel_size=spec.tensor_parallel_size,
            pipeline_parallel_size=spec.pipeline_parallel_size,
            resources=resources,
            key=key,
        )
    return [actor_group(who=who, what="workers", count=count, resources=dataclasses.replace(resources, num_gpus=None))]


def stop_rollout_actors(actors: Sequence[Any]) -> None:
    """End them and give back what was reserved for them."""
    import ray

    for actor in actors:
        ray.kill(actor)
        if (reservation := _reserved.pop(actor, None)) is not None:
            reservation.leave()


class Collection:
    """One running collection; a plain object of the driver.

    `hosts`: env host actors that all workers share (`envs.pool`), or envs that each worker has in its own process.
    `concurrency`: episodes at a time of each worker, at most; `adaptive` lets an engine that is full have fewer.
    `feed_options`: of the Ray actor that hands out the episodes.
    """

    def __init__(
        self,
        actors: Sequence[Any],
        hosts: Sequence[Any] | LocalEnvs,
        requests: Sequence[EpisodeRequest],
        *,
        found: int = 0,
        settings: EpisodeSettings,
        ledger: Path | str,
        queue: Any = None,
        weights: Weights | None = None,
        concurrency: int = 32,
        adaptive: bool = True,
        can_preview: bool = True,
        env_timeout_s: float = 60.0,
        feed_options: Mapping[str, Any] | None = None,
    ) -> None:
        import ray

        self._actors, self._settings = list(actors), settings
        self._hosts = hosts if isinstance(hosts, LocalEnvs) else tuple(hosts)
        self._ledger, self._queue, self._weights, self._adaptive = ledger, queue, weights, adaptive
        self._barren = [0] * len(self._actors)
        self._proven: set[int] = set()
        """Workers that have recorded something before they died."""
        self._can_preview, self._env_timeout_s, self._concurrency = can_preview, env_timeout_s, concurrency
        feed = ray.remote(TaskFeed).options(**(feed_options or {"num_cpus": 0}))
        self._feed: Any = feed.remote(list(requests), found=found)
        self._running: dict[Any, tuple[int, str]] = {}
        self._returning: dict[Any, tuple[int, float]] = {}
        """A call to come back -> the dead worker that it is made to, and until when."""
        for i in range(len(self._actors)):
            self._start(i)

    def poll(self, timeout_s: float = 0.0) -> bool:
        """True when every episode is recorded, or the feed was stopped (`progress().stopped` says why).

        Replaces dead workers and those whose engine died. Raises `CollectionError` when one dies again and again, or
        fails in a way that would only repeat.
        """
        import ray
        from ray.exceptions import RayActorError, RayTaskError

        waiting = [*self._running, *self._returning]
        done, _ = ray.wait(waiting, timeout=timeout_s) if waiting else ([], [])
        for reference in done:
            if reference in self._returning:
                self._restart(reference)
                continue
            index, name = self._running.pop(reference)
            try:
                ray.get(reference)
            except RayActorError as error:
                self._replace(index, name, error)
            except RayTaskError as error:
                if not self._may_work_again(index, error.cause):
                    raise CollectionError(f"rollout worker {index}: {_words(error.cause)}") from error
                ray.kill(self._actors[index], no_restart=False)  # what an engine leaves behind ends with its process
                self._replace(index, name, error.cause)
        for index, deadline_s in self._returning.values():
            if time.monotonic() > deadline_s:
                raise CollectionError(f"rollout worker {index} died and did not come back within {RESTART_S:g} s")
        return not self._running and not self._returning

    def progress(self, timeout_s: float = FEED_S) -> CollectProgress:
        import ray

        return ray.get(self._feed.progress.remote(), timeout=timeout_s)

    def stop(self, reason: str) -> None:
        """Start nothing more. What is under way comes to its end, and `poll` then says so."""
        import ray

        ray.get(self._feed.stop.remote(reason), timeout=FEED_S)

    def close(self) -> None:
        """Frees the feed; the actors stay for the next collection."""
        import ray

        ray.kill(self._feed)

    def _start(self, index: int) -> None:
        name = f"w{index}-{uuid.uuid4().hex[:8]}"
        reference = self._actors[index].run.remote(
            name, self._env_slots(index), self._settings, self._feed, str(self._ledger), self._queue, self._weights,
            self._adaptive,
        )  # fmt: skip
        self._running[reference] = (index, name)

    def _env_slots(self, index: int) -> EnvSlots | LocalEnvs:
        per_worker = self._concurrency
        if isinstance(self._hosts, LocalEnvs):
            return dataclasses.replace(self._hosts, count=per_worker)
        numbers = range(index * per_worker, (index + 1) * per_worker)
        slots = tuple((number % len(self._hosts), number) for number in numbers)
        return EnvSlots(self._hosts, slots, self._can_preview, self._env_timeout_s)

    def _may_work_again(self, index: int, error: BaseException) -> bool:
        """Its engine died; or could not be loaded again, though it had worked before: then it is not its settings."""
        return isinstance(error, PolicyError) and (error.ends_collection or index in self._proven)

    def _replace(self, index: int, name: str, error: Exception) -> None:
        import ray

        # What the dead worker had recorded but not reported must not be run again.
        keys = list(Ledger(self._ledger).keys())
        recorded = ray.get(self._feed.release.remote(name, keys), timeout=FEED_S)
        if recorded:
            self._proven.add(index)
        self._barren[index] = 0 if recorded else self._barren[index] + 1
        if self._barren[index] > BARREN_STARTS:
            raise CollectionError(
                f"rollout worker {index} died {self._barren[index]} times in a row without recording anything; "
                f"the last time: {_words(error)}"
            ) from error
        self._call_back(index, time.monotonic() + RESTART_S)

    def _call_back(self, index: int, deadline_s: float) -> None:
        self._returning[self._actors[index].pid.remote()] = (index, deadline_s)

    def _restart(self, call: Any) -> None:
        import ray
        from ray.exceptions import ActorUnavailableError, RayError

        index, deadline_s = self._returning.pop(call)
        try:
            ray.get(call)
        except ActorUnavailableError:  # its process is not there yet
            time.sleep(0.1)
            self._call_back(index, deadline_s)
        except RayError as error:
            raise CollectionError(f"rollout worker {index} cannot be started again: {_words(error)}") from error
        else:
            self._start(index)


def _words(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[-1] if lines else 'no message'}"
