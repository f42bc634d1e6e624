"""What the rollout benchmarks share: the embedded default's world, env hosts, retrieval, student; and one collection.

`stage` starts them as `launch.wiring` does, with the student on vLLM in this process; `Stage.collect` runs one
`RolloutWorker` over some tasks, with a real feed and a real ledger on disk, and keeps what the engine was asked.

Example::

    with stage(student, concurrency=64, slots=64, tasks=200, engine=None, env_hosts=None) as ready:
        collected = ready.collect(ready.tasks, ready.settings(temperature=0.7), 64)
        print(collected.steps / collected.wall_s)
"""

from __future__ import annotations

import asyncio
import shutil
import tempfile
import time
import uuid
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from envs.base import Task
from envs.local_envs import LocalEnvs
from envs.pool import RemoteEnv, start_env_hosts
from envs.retrieval.ray_service import NamedSearch, RayRetrieverClient, start_retrieval_actor
from launch.config import DistillConfig
from launch.config_reading import load_config
from launch.world import World, load_world
from rollout.concurrency import Pressure
from rollout.episode import EpisodeSettings
from rollout.ledger import LedgerWriter
from rollout.policy import Policy
from rollout.task_feed import EpisodeRequest, EpisodeSummary, TaskFeed, WorkerState
from rollout.trajectory import Trajectory
from rollout.vllm_engine import VllmEngine
from rollout.vllm_policy import EngineKind, VllmPolicy
from rollout.worker import RolloutWorker

BASE_STUDENT = Path(__file__).resolve().parent.parent / "learner" / "base_student" / "checkpoint"
_START_TIMEOUT_S = 600.0
_ENV_S = 60.0


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineRequest:
    """What the engine was asked once, and how much it answered."""

    prompt_ids: tuple[int, ...]
    parameters: Mapping[str, Any]
    lengths: tuple[int, ...]
    """[n] generated tokens of each candidate."""
    submitted_s: float
    """Unix time, as all times here."""
    finished_s: float

    @property
    def tokens(self) -> int:
        return sum(self.lengths)


class RecordingEngine:
    """A `VllmEngine` that keeps every request; all else is the engine's own."""

    def __init__(self, engine: VllmEngine) -> None:
        self.engine: Any = engine
        self.requests: list[EngineRequest] = []

    async def generate(self, request_id: str, prompt_ids: Sequence[int], parameters: Mapping[str, Any]) -> list[Any]:
        submitted_s = time.time()
        outputs = await self.engine.generate(request_id, prompt_ids, parameters)
        lengths = tuple(len(output.token_ids) for output in outputs)
        self.requests.append(
            EngineRequest(
                prompt_ids=tuple(prompt_ids), parameters=parameters, lengths=lengths,
                submitted_s=submitted_s, finished_s=time.time(),
            )
        )  # fmt: skip
        return outputs

    async def prompt_logprobs(self, request_id: str, token_ids: Sequence[int], top_k: int) -> tuple[Any, Any]:
        return await self.engine.prompt_logprobs(request_id, token_ids, top_k)

    async def load(self, path: str, version: str) -> None:
        await self.engine.load(path, version)

    async def forget_prefixes(self) -> None:
        await self.engine.forget_prefixes()

    def running(self) -> int:
        return self.engine.running()

    def pressure(self) -> Pressure:
        return self.engine.pressure()

    def close(self) -> None:
        self.engine.close()


class LocalFeed:
    """A `TaskFeed` of this process, awaited."""

    def __init__(self, feed: TaskFeed) -> None:
        self._feed = feed

    async def next(self, worker: str, count: int) -> list[EpisodeRequest] | None:
        return self._feed.next(worker, count)

    async def done(self, worker: str, summaries: Sequence[EpisodeSummary]) -> None:
        self._feed.done(worker, summaries)

    async def report(self, worker: str, state: WorkerState) -> None:
        self._feed.report(worker, state)

    async def stop(self, reason: str) -> None:
        self._feed.stop(reason)

    async def give_back(self, worker: str, keys: Sequence[str]) -> None:
        self._feed.give_back(worker, keys)


class KeepingSink:
    """Keeps what a worker hands on."""

    def __init__(self) -> None:
        self.trajectories: list[Trajectory] = []

    async def aput(self, trajectories: Sequence[Trajectory]) -> None:
        self.trajectories += trajectories


@dataclass(frozen=True, slots=True, kw_only=True)
class Collected:
    """One collection."""

    wall_s: float
    trajectories: list[Trajectory]
    requests: list[EngineRequest] = field(default_factory=list)
    """In the order in which they were sent."""

    @property
    def steps(self) -> int:
        return sum(len(trajectory.steps) for trajectory in self.trajectories)

    @property
    def success(self) -> float:
        return sum(trajectory.success for trajectory in self.trajectories) / len(self.trajectories)

    @property
    def last_start_s(self) -> float:
        """From then on fewer episodes are in flight than there are slots."""
        return max(trajectory.started_at_s for trajectory in self.trajectories)


async def collect(
    tasks: Sequence[Task], *, policy: Policy, envs: Sequence[Any], settings: EpisodeSettings
) -> tuple[float, list[Trajectory]]:
    """One worker over `tasks`, always `len(envs)` at a time; wall seconds and results.

    Raises `RuntimeError` when an episode fails through our own fault.
    """
    requests = [EpisodeRequest(key=settings.key(task, policy.name, 0), task=task, sample_index=0) for task in tasks]
    folder, sink = tempfile.mkdtemp(prefix="rollout-benchmark-"), KeepingSink()
    try:
        worker = RolloutWorker(
            name="benchmark", policy=policy, envs=envs, settings=settings, feed=LocalFeed(TaskFeed(requests)),
            ledger=LedgerWriter(Path(folder), writer="benchmark"), sink=sink, adaptive=False,
        )  # fmt: skip
        started = time.monotonic()
        recorded = await worker.run()
        wall_s = time.monotonic() - started
    finally:
        shutil.rmtree(folder)
    if recorded != len(tasks) or len(sink.trajectories) != recorded:
        raise RuntimeError(f"of {len(tasks)} episodes {recorded} were recorded, {len(sink.trajectories)} with a result")
    return wall_s, sink.trajectories


class Stage:
    """Everything that runs, ready to be used again and again."""

    def __init__(
        self,
        config: DistillConfig,
        world: World,
        search: NamedSearch,
        envs: LocalEnvs | list[RemoteEnv],
        policy: VllmPolicy,
    ) -> None:
        self.config, self.tasks, self.search, self.policy = config, world.train, search, policy
        self.engine = RecordingEngine(policy._engine)
        policy._engine = self.engine
        self._runner = asyncio.Runner()
        self._local = envs if isinstance(envs, LocalEnvs) else None
        self.place = "on Ray hosts" if self._local is None else "in this process"
        """Where the envs are."""
        self._envs: Sequence[Any] = envs if isinstance(envs, list) else self.run(envs.connect())

    def settings(self, *, temperature: float, candidates: int = 1) -> EpisodeSettings:
        """The embedded default's limits and top-k; nothing ends an episode early."""
        return EpisodeSettings(
            dialect=self.config.episode.dialect,
            max_steps=self.config.episode.max_steps,
            max_tokens=self.config.evaluate.max_tokens,
            temperature=temperature,
            top_k=self.config.evaluate.top_k,
            candidates=candidates,
        )

    def run(self, coroutine: Any) -> Any:
        return self._runner.run(coroutine)

    def forget_prefixes(self) -> None:
        """So that no run finds the prefixes of an earlier one."""
        self.run(self.policy.forget_prefixes())

    def envs(self, count: int) -> Sequence[Any]:
        if count > len(self._envs):
            raise ValueError(f"{count} envs were asked for, there are {len(self._envs)}")
        return self._envs[:count]

    def collect(self, tasks: Sequence[Task], settings: EpisodeSettings, concurrency: int) -> Collected:
        self.forget_prefixes()
        self.engine.requests = []
        envs = self.envs(concurrency)
        wall_s, trajectories = self.run(collect(tasks, policy=self.policy, envs=envs, settings=settings))
        requests = sorted(self.engine.requests, key=lambda request: request.submitted_s)
        return Collected(wall_s=wall_s, trajectories=trajectories, requests=requests)

    def close(self) -> None:
        self.run(self.policy.close())
        if self._local is not None:
            self.run(self._local.close())
        self._runner.close()


@contextmanager
def stage(
    student: Path, *, concurrency: int, slots: int, tasks: int, engine: EngineKind | None, env_hosts: int | None
) -> Iterator[Stage]:
    """Ray, retrieval, `slots` env slots, the engine as for `concurrency` episodes; everything ends with the block.

    `engine`, `env_hosts` (Ray actors that hold the envs, 0 for envs of this process): None is the embedded default's.
    """
    from launch.cluster import ray_cluster
    from launch.evaluation.scoring import student_spec

    config = load_config([f"tasks.train_count={tasks}"])
    config = replace(config, evaluate=replace(config.evaluate, concurrency=concurrency))
    with tempfile.TemporaryDirectory(prefix="rollout-benchmark-") as index, ray_cluster(config.cluster):
        import ray

        world = load_world(config, Path(index))
        if world.retriever is None:
            raise RuntimeError("the embedded default has no retriever any more")
        name = f"retrieval-{uuid.uuid4().hex[:12]}"
        actor = start_retrieval_actor(world.retriever, name=name, env_vars={"HF_HUB_OFFLINE": "1"})
        RayRetrieverClient(actor, timeout_s=config.retrieval.timeout_s).wait_ready(_START_TIMEOUT_S)
        search = NamedSearch(name, config.retrieval.timeout_s)
        count = config.rollout.env_hosts if env_hosts is None else env_hosts
        if count == 0:
            envs = LocalEnvs(config.env, search, count=slots, timeout_s=_ENV_S)
        else:
            hosts = start_env_hosts(config.env, count=count, slots_per_host=-(-slots // count), search=search)
            can_preview = all(ray.get([host.can_preview.remote() for host in hosts], timeout=_START_TIMEOUT_S))
            envs = [RemoteEnv(hosts[i % count], i, can_preview=can_preview, timeout_s=_ENV_S) for i in range(slots)]
        spec = student_spec(config, str(student))
        policy = replace(spec, engine=engine or spec.engine).build()
        assert isinstance(policy, VllmPolicy)
        ready = Stage(config, world, search, envs, policy)
        try:
            yield ready
        finally:
            ready.close()
