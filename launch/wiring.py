"""Starts a run's actors from its configuration: retrieval, env hosts, rollout workers. Everything dies with the job."""

from __future__ import annotations

import os
import uuid
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from envs.base import EnvError, Task
from envs.local_envs import LocalEnvs
from envs.pool import start_env_hosts
from envs.retrieval.ray_service import NamedSearch, RayRetrieverClient, start_retrieval_actor
from envs.retrieval.spec import RetrieverSpec
from launch.config import DistillConfig, JobConfig, TeacherShare
from launch.evaluation.config import EvaluationJob
from launch.fleet import Fleet, Fleets, Newcomer
from launch.joint_collection import JointCollection
from launch.placement import Placed, grows, newcomer_groups, service_options
from launch.spending import JobMeter, is_endpoint
from launch.teachers import assign
from rollout.collector import Collection, Weights, missing_requests, start_rollout_actors
from rollout.episode import EpisodeSettings
from rollout.ledger import Ledger
from rollout.placement import NODE_ID, Reservation
from rollout.policy_spec import PolicySpec
from rollout.task_feed import EpisodeRequest

START_TIMEOUT_S = 900.0


@dataclass(frozen=True, slots=True)
class Environments:
    """The running env hosts, and the retrieval behind them."""

    groups: list[list[Any] | LocalEnvs]
    """Env hosts, or envs of the workers' own, for each collection that runs at the same time: two that shared a host
    would share its slots."""
    retrieval: RayRetrieverClient | None
    search: NamedSearch | None = None
    """How envs find it."""

    @classmethod
    def start(
        cls,
        config: JobConfig,
        retriever: RetrieverSpec | None,
        *,
        slots: Sequence[int],
        placed: Placed | None = None,
    ) -> Environments:
        """Starts everything, a group of hosts for each of `slots` (episodes at a time), and returns at once:
        `wait_ready` before the first episode."""
        client = search = None
        if retriever is not None:
            offline = os.environ.get("HF_HUB_OFFLINE", "1" if retriever.encoder == "minilm" else "0")
            name = f"retrieval-{uuid.uuid4().hex[:12]}"
            place = (placed or Placed(config.cluster, grows=grows(config.cluster))).retrieval(config)
            actor = start_retrieval_actor(retriever, name=name, env_vars={"HF_HUB_OFFLINE": offline}, **place)
            client = RayRetrieverClient(actor, timeout_s=config.retrieval.timeout_s)
            search = NamedSearch(name, config.retrieval.timeout_s)
        return cls(_groups(config, search, slots, placed), client, search)

    def beside(self, config: JobConfig, *, slots: Sequence[int]) -> Environments:
        """Further envs, of `config`, behind the same retrieval."""
        return Environments(_groups(config, self.search, slots), self.retrieval, self.search)

    def wait_ready(self) -> bool:
        """Waits until the index is loaded and every host answers; returns whether they can preview. A host that dies
        meanwhile is asked again once Ray has started it anew.

        Raises `EnvError`.
        """
        import ray

        if self.retrieval is not None:
            self.retrieval.wait_ready(START_TIMEOUT_S)
        try:
            hosts = [host for group in self.groups if not isinstance(group, LocalEnvs) for host in group]
            asked = [host.can_preview.options(max_task_retries=-1).remote() for host in hosts]
            return all(ray.get(asked, timeout=START_TIMEOUT_S))
        except (ray.exceptions.RayError, TimeoutError) as error:  # type: ignore[attr-defined]
            raise EnvError(f"the env hosts could not start: {str(error).strip().splitlines()[-1]}") from error


def _groups(
    config: JobConfig, search: NamedSearch | None, slots: Sequence[int], placed: Placed | None = None
) -> list[list[Any] | LocalEnvs]:
    hosts = config.rollout.env_hosts
    if hosts == 0:
        timeout_s = config.rollout.env_timeout_s
        return [LocalEnvs(config.env, search, count=n, timeout_s=timeout_s) for n in slots]
    places = (placed or Placed(config.cluster, grows=grows(config.cluster))).envs(config, len(slots))
    return [
        start_env_hosts(config.env, count=hosts, slots_per_host=-(-n // hosts), search=search, options=options)
        for n, options in zip(slots, places, strict=True)
    ]


def start_workers(
    config: JobConfig,
    spec: PolicySpec,
    *,
    count: int,
    meter: JobMeter | None = None,
    role: Literal["teacher", "student"] = "student",
    placed: Placed | None = None,
    most: int = 0,
) -> list[Any]:
    """`count` x `spec.data_parallel_size` rollout actors; an engine gets its GPUs, an API client needs none. `most`: so
    many may become of `count`.

    Raises `PlacementError`.
    """
    reserved = (placed or Placed(config.cluster, grows=grows(config.cluster))).workers(spec, count=count, role=role)
    return _actors(config, spec, count=count, most=max(count, most), meter=meter, reserved=reserved)


def _actors(
    config: JobConfig,
    spec: PolicySpec,
    *,
    count: int,
    most: int,
    meter: JobMeter | None,
    reserved: Sequence[Reservation],
    options: Mapping[str, Any] | None = None,
) -> list[Any]:
    if is_endpoint(spec):  # its limits are those of all workers together
        spec = replace(spec, rate_limits=spec.rate_limits.shared_by(most * spec.data_parallel_size))
    name = meter.name if meter is not None and is_endpoint(spec) else ""
    return start_rollout_actors(spec, count=count, reserved=reserved, meter=name, run=config.run_name, options=options)


def start_evaluation(
    config: DistillConfig | EvaluationJob,
    environments: Environments,
    workers: list[Any],
    tasks: list[Task],
    *,
    policy: str,
    settings: EpisodeSettings,
    ledger: Path,
    samples: int = 1,
    weights: Weights | None = None,
    group: int = 0,
) -> Collection:
    """What of `tasks` x `samples` is not in the ledger yet, on `workers`, in that group of `environments`. Waits for
    the environments first."""
    can_preview = environments.wait_ready()
    requests, found = missing_requests(tasks, policy=policy, settings=settings, ledger=Ledger(ledger), samples=samples)
    return Collection(
        workers,
        environments.groups[group],
        requests,
        found=found,
        settings=settings,
        ledger=ledger,
        weights=weights,
        concurrency=config.evaluate.concurrency,
        can_preview=can_preview,
        env_timeout_s=config.rollout.env_timeout_s,
        feed_options=service_options(config.cluster),
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class Assignment:
    """A teacher, and the episodes that are its own."""

    share: TeacherShare
    requests: list[EpisodeRequest]
    """All of them, those that are recorded already included."""
    missing: list[EpisodeRequest]
    quarantined: int
    """Neither recorded nor missing: they failed too often to be tried again."""

    @property
    def found(self) -> int:
        """Nothing is left to do for them."""
        return len(self.requests) - len(self.missing)

    def earlier(self) -> str:
        """What an earlier job left, in words."""
        quarantined = f" and {self.quarantined:,} quarantined" if self.quarantined else ""
        return f", {self.found - self.quarantined:,} recorded{quarantined} by an earlier job"

    @property
    def name(self) -> str:
        return self.share.teacher.policy_name

    def slots(self, config: JobConfig) -> int:
        """Episodes at a time, over all its workers."""
        return self.concurrency(config) * self.workers(config) * self.share.teacher.data_parallel_size

    def concurrency(self, config: JobConfig) -> int:
        """Per worker."""
        return self.share.concurrency or config.rollout.concurrency

    def workers(self, config: JobConfig) -> int:
        return self.share.workers or config.rollout.workers

    def most_workers(self, config: JobConfig) -> int:
        """When nodes join."""
        most = self.share.max_workers or (config.rollout.max_workers if self.share.workers is None else None)
        return max(self.workers(config), most or 0)


def assignments(config: JobConfig, tasks: Sequence[Task], ledger: Ledger) -> list[Assignment]:
    """Who does what of `tasks` x `rollout.samples`, and what of it `ledger` does not hold yet."""
    settled = ledger.settled(config.rollout.retry, retry_quarantined=config.rollout.retry_quarantined)
    teachers = config.all_teachers
    assigned = assign(tasks, config.rollout.samples, teachers, config.share, config.episode)
    return [
        Assignment(
            share=share,
            requests=requests,
            missing=[request for request in requests if request.key not in settled],
            quarantined=sum(request.key in settled.quarantined for request in requests),
        )
        for share, requests in zip(teachers, assigned, strict=True)
    ]


def _teacher_workers(config: JobConfig, each: Assignment, meter: JobMeter | None, placed: Placed | None) -> list[Any]:
    return start_workers(
        config, each.share.teacher, count=each.workers(config), most=each.most_workers(config), meter=meter,
        role="teacher", placed=placed,
    )  # fmt: skip


def _fleet(
    config: JobConfig,
    each: Assignment,
    collection: Collection,
    environments: Environments,
    hosts: Sequence[Any] | LocalEnvs,
    meter: JobMeter | None,
    placed: Placed,
) -> Fleet:
    """Of the workers of one teacher; it grows only where the configuration lets it."""
    spec, most, ranks = each.share.teacher, each.most_workers(config), each.share.teacher.data_parallel_size
    shared = [] if isinstance(hosts, LocalEnvs) else hosts
    if most <= each.workers(config):
        return Fleet(collection, hosts=shared, say=placed.say)
    count = -(-config.rollout.env_hosts // (each.workers(config) * ranks))

    def grow(places: Sequence[Reservation], node: str) -> Newcomer:
        # By its label: an affinity to a node that has just joined may not be known to all yet.
        options = {"label_selector": {**places[0].group.labels, NODE_ID: node}} if node else {}
        [actor] = _actors(config, spec, count=1, most=most, meter=meter, reserved=places[:1], options=options)
        own: list[Any] = []
        if count:
            slots = -(-each.concurrency(config) // count)
            own = start_env_hosts(
                config.env, count=count, slots_per_host=slots, search=environments.search,
                options=[places[1].options(i) for i in range(count)],
            )  # fmt: skip

        def leave() -> None:
            import ray

            for host in own:
                ray.kill(host)
            for place in places[1:]:
                place.release()

        return Newcomer(actor=actor, hosts=own, leave=leave)

    groups = newcomer_groups(config, spec, hosts=count)
    return Fleet(
        collection, hosts=shared, groups=groups, most=most * ranks, grow=grow, grows=placed.grows, kept=placed.later,
        say=placed.say,
    )  # fmt: skip


def start_collections(
    config: JobConfig,
    environments: Environments,
    assigned: Sequence[Assignment],
    *,
    ledger: Path | str,
    queue: Any = None,
    meter: JobMeter | None = None,
    placed: Placed | None = None,
) -> tuple[JointCollection, list[list[Any]]]:
    """One collection a teacher, all at the same time, and their workers. Waits for the environments first.

    The first groups of `environments` are theirs, one for each of `assigned`. A teacher that has nothing left to do is
    not loaded: it has no workers. More may join them, or some leave (`launch.fleet`): `JointCollection.actors` says
    who is there.
    """
    can_preview = environments.wait_ready()
    placed = placed or Placed(config.cluster, grows=grows(config.cluster))
    collections: dict[str, Collection] = {}
    fleets: list[Fleet] = []
    workers: list[list[Any]] = []
    done = 0
    for each, hosts in zip(assigned, environments.groups[: len(assigned)], strict=True):
        if not each.missing:
            workers.append([])
            done += len(each.requests)
            continue
        workers.append(_teacher_workers(config, each, meter, placed))
        collections[each.name] = Collection(
            workers[-1],
            hosts,
            each.missing,
            found=each.found,
            settings=config.episode,
            ledger=ledger,
            queue=queue,
            concurrency=each.concurrency(config),
            adaptive=config.rollout.adaptive,
            can_preview=can_preview,
            env_timeout_s=config.rollout.env_timeout_s,
            feed_options=service_options(config.cluster),
            least=min(config.rollout.min_workers, len(workers[-1])),
            say=placed.say if len(assigned) == 1 else _named(each.name, placed.say),
        )
        fleets.append(_fleet(config, each, collections[each.name], environments, hosts, meter, placed))
    return JointCollection(collections, done=done, fleets=Fleets(fleets, say=placed.say)), workers


def _named(name: str, say: Callable[[str], None]) -> Callable[[str], None]:
    return lambda line: say(f"{name}: {line}")
