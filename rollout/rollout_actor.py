"""`RolloutActor`: one policy in a process of its own, which serves any number of collections; and how such actors are
started, placed and ended.

Example::

    actors = start_rollout_actors(spec, count=2)
    actors[0].run.remote(...)                     # `rollout.collector.Collection` does
    stop_rollout_actors(actors)
"""

from __future__ import annotations

import asyncio
import dataclasses
import itertools
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from envs.local_envs import LocalEnvs
from envs.pool import RemoteEnv
from rollout.episode import EpisodeSettings
from rollout.episode_metrics import EpisodeMetrics
from rollout.feed_actor import RemoteFeed
from rollout.ledger import LedgerWriter
from rollout.placement import Group, Reservation, RoleResources, actor_group, engine_groups, places, reserve
from rollout.policy_spec import PolicySpec
from rollout.spend_meters import RemoteMeter
from rollout.weight_loading import Loaded, WeightLoader, Weights
from rollout.weight_sync import WorkerBusyError
from rollout.worker import RolloutWorker

_reserved: dict[Any, tuple[Reservation, int]] = {}
"""Rollout actor -> where its place is: the reservation, and the number of its bundle."""


@dataclass(frozen=True, slots=True)
class EnvSlots:
    """The env slots of one worker: (host, slot) pairs."""

    hosts: tuple[Any, ...]
    slots: tuple[tuple[int, int], ...]
    can_preview: bool
    timeout_s: float

    async def connect(self) -> list[RemoteEnv]:
        return [
            RemoteEnv(self.hosts[host], slot, can_preview=self.can_preview, timeout_s=self.timeout_s, others=self.hosts)
            for host, slot in self.slots
        ]

    async def close(self) -> None:
        """The hosts stay: they are not this worker's."""


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
        self._workers: dict[str, RolloutWorker] = {}
        self._drains: set[str] = set()
        """Names of workers that are to be drained and have not begun."""

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
        loader, remote = await self._started(), RemoteFeed(feed, name)
        if await remote.has_ended():
            return 0
        self._pinned += weights is not None
        try:
            if weights is not None:
                await loader.load(weights)
            worker = RolloutWorker(
                name=name,
                policy=loader.policy,
                envs=await env_slots.connect(),
                settings=settings,
                feed=remote,
                ledger=LedgerWriter(ledger, writer=name),
                sink=queue,
                adaptive=adaptive,
                observe=EpisodeMetrics(run=self._run, policy=loader.policy.name).observe,
                still_ours=remote.still_ours,
            )
            if name in self._drains:
                return 0
            self._workers[name] = worker
            return await worker.run()
        finally:
            self._workers.pop(name, None)
            self._drains.discard(name)
            self._pinned -= weights is not None
            await env_slots.close()

    async def drain(self, name: str, seconds: float) -> None:
        """`RolloutWorker.drain` of the collection that it runs under that name; one that has not begun ends at once."""
        if name in self._workers:
            await self._workers[name].drain(seconds)
        else:
            self._drains.add(name)

    async def stats(self) -> dict[str, float]:
        policy = None if self._loader is None else self._loader.policy
        stats: Callable[[], Mapping[str, float]] | None = getattr(policy, "stats", None)
        return dict(stats()) if stats is not None else {}

    async def forget_prefixes(self) -> None:
        """See `VllmPolicy.forget_prefixes`; for engines of this worker alone."""
        await (await self._started()).policy.forget_prefixes()

    async def pid(self) -> int:
        return os.getpid()

    async def node(self) -> str:
        """Ray's id of the node that it is on."""
        import ray

        return ray.get_runtime_context().get_node_id()

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
    options: Mapping[str, Any] | None = None,
) -> list[Any]:
    """`count` x `spec.data_parallel_size` Ray actors, each with the policy of its own; loading begins with `start()` or
    the first collection.

    `gpus_per_rank`: GPUs of each of an engine's tensor x pipeline parallel ranks; `resources`: the same and more;
    `reserved`: their places, of `policy_groups`, where they have some already. `meter`: name of a
    `rollout.spend.SpendMeter` actor; `run`: what their metrics are labelled with; `options`: further ones of Ray's.
    Raises `PlacementError` when the cluster has no place for an engine.
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
            **{**reservation.options(index), **(options or {})},
        )
        actors.append(actor.remote(spec, meter, run))
        reservation.use()
        _reserved[actors[-1]] = reservation, index
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
    without = dataclasses.replace(resources, num_gpus=None)
    return [actor_group(who=who, what="workers", count=count, resources=without, separate=True)]


def stop_rollout_actors(actors: Sequence[Any]) -> None:
    """End them and give back what was reserved for them."""
    import ray

    for actor in actors:
        ray.kill(actor)
        if (place := _reserved.pop(actor, None)) is not None:
            reservation, index = place
            reservation.leave(index)
