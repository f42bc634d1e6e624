"""Which part of a job takes what of the cluster: roles of the configuration become groups, checked and reserved.

`learning_groups` and `evaluation_groups` are what is there at the same time in the two halves of the main job,
`collection_groups` in a collection. `Placed.start` checks them all before anything starts (does the sum fit, has a
node that shape), then reserves the first half as a whole, so that two jobs on one cluster never hold half each of what
both need. Nothing here loads or starts an actor.

Example::

    placed = Placed.start(config, [("while collecting", collection_groups(config, teachers))], say=view.say)
    workers = start_rollout_actors(spec, count=2, reserved=placed.take("teacher", spec.policy_name))
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, Literal

from launch.config import ClusterConfig, DistillConfig, JobConfig, TeacherShare
from rollout.collector import policy_groups
from rollout.placement import Reservation, RoleResources, actor_group, can_grow, cluster_nodes, reserve
from rollout.placement_fit import Group, check
from rollout.policy_spec import PolicySpec

if TYPE_CHECKING:
    from launch.wiring import Assignment

Role = Literal["teacher", "student", "envs", "retrieval", "learner", "services"]
SERVICES = 2
"""Actors beside each collection that only hand things on: the queue, and what hands out episodes."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RoleGroup:
    """A group of bundles, and whose they are."""

    role: Role
    name: str
    """Which of that role: a policy's name, a number; "" where there is one."""
    group: Group


def resources_of(cluster: ClusterConfig, role: Role) -> RoleResources:
    """As configured, with the GPUs that `cluster.gpus_per_worker` and `cluster.gpus_per_rank` say."""
    configured: RoleResources = getattr(cluster.roles, role)
    default = {"teacher": cluster.gpus_per_worker, "student": cluster.gpus_per_worker, "learner": cluster.gpus_per_rank}
    if configured.num_gpus is None and role in default:
        return replace(configured, num_gpus=default[role])
    return configured


def worker_groups(
    cluster: ClusterConfig, spec: PolicySpec, *, count: int, role: Literal["teacher", "student"], key: str = ""
) -> list[RoleGroup]:
    """`count` x `spec.data_parallel_size` workers with that policy. Raises `ValueError` for sizes that go with no
    GPU."""
    who = f"the {role}" if spec.policy_name == role else f"the {role} {spec.policy_name}"
    groups = policy_groups(
        spec,
        who=who,
        count=count * spec.data_parallel_size,
        resources=resources_of(cluster, role),
        key=key or role,
    )
    return [RoleGroup(role=role, name=spec.policy_name, group=group) for group in groups]


def newcomer_groups(config: JobConfig, spec: PolicySpec, *, hosts: int, key: str = "") -> list[Group]:
    """What one more worker of a teacher is placed by: itself, and `hosts` env hosts of its own."""
    one = replace(spec, data_parallel_size=1)
    groups = [each.group for each in worker_groups(config.cluster, one, count=1, role="teacher", key=key)]
    if hosts:
        groups.append(
            actor_group(
                who="the envs of one more worker",
                what="hosts",
                count=hosts,
                resources=config.cluster.roles.envs,
                strategy="SPREAD",
            )
        )
    return groups


def env_groups(config: JobConfig, count: int) -> list[RoleGroup]:
    """`count` groups of hosts, one for each collection that runs at a time; none where workers have their own."""
    hosts = config.rollout.env_hosts
    if not hosts:
        return []
    return [
        RoleGroup(
            role="envs",
            name=str(i),
            group=actor_group(
                who="the envs" if count == 1 else f"the envs of collection {i + 1} of {count}",
                what="hosts",
                count=hosts,
                resources=config.cluster.roles.envs,
                strategy="SPREAD",
                less="rollout.env_hosts or cluster.roles.envs",
            ),
        )
        for i in range(count)
    ]


def retrieval_group(config: JobConfig) -> RoleGroup:
    """The one index that all envs search."""
    group = actor_group(who="retrieval", what="actors", count=1, resources=config.cluster.roles.retrieval)
    return RoleGroup(role="retrieval", name="", group=group)


def learner_group(config: DistillConfig) -> RoleGroup:
    """All ranks, on few nodes."""
    group = actor_group(
        who="the learner",
        what="ranks",
        count=config.learner.ranks,
        resources=resources_of(config.cluster, "learner"),
        num_cpus=1.0,
        less="learner.ranks or what a rank takes (cluster.gpus_per_rank, cluster.roles.learner)",
    )
    return RoleGroup(role="learner", name="", group=group)


def service_groups(config: JobConfig, collections: int) -> list[RoleGroup]:
    """Where the configuration says something of them."""
    if config.cluster.roles.services == RoleResources():
        return []
    group = actor_group(
        who="the services",
        what="actors",
        count=1 + collections,
        resources=config.cluster.roles.services,
    )
    return [RoleGroup(role="services", name="", group=group)]


def collection_groups(config: JobConfig, teachers: Sequence[TeacherShare], *, further_envs: int = 0) -> list[RoleGroup]:
    """What a collection with these of its teachers has: workers, envs, retrieval."""
    several = len(config.all_teachers) > 1
    groups: list[RoleGroup] = []
    for share in teachers:
        key = f"teachers.{config.all_teachers.index(share)}.teacher" if several else "teacher"
        count = share.workers or config.rollout.workers
        groups += worker_groups(config.cluster, share.teacher, count=count, role="teacher", key=key)
    groups += env_groups(config, len(config.all_teachers) + further_envs)
    if config.retrieval.kind != "none" and (config.env.name != "answer" or config.env.context_passages > 0):
        groups.append(retrieval_group(config))
    groups += service_groups(config, max(1, len(teachers)))
    return groups


def student_groups(config: DistillConfig) -> list[RoleGroup]:
    """The worker that a student is scored with."""
    from launch.evaluation.scoring import student_spec

    return worker_groups(
        config.cluster, student_spec(config, config.learner.model_path), count=1, role="student", key="evaluate"
    )


def learning_groups(config: DistillConfig, teachers: Sequence[TeacherShare]) -> list[RoleGroup]:
    """While teachers act and the student learns."""
    watched = watches(config)
    groups = collection_groups(config, teachers, further_envs=int(watched))
    return [*groups, learner_group(config), *(student_groups(config) if watched else [])]


def evaluation_groups(config: DistillConfig, teachers: Sequence[TeacherShare]) -> list[RoleGroup]:
    """When the learner has ended: the student acts, while what `teachers` loaded is kept for their turn."""
    groups = collection_groups(config, teachers, further_envs=int(watches(config)))
    students = set(config.evaluate.rows) - {"teacher"}
    return [*groups, *(student_groups(config) if students else [])]


def watches(config: DistillConfig) -> bool:
    """Whether the student acts while it learns."""
    return config.learner.best_by == "rollout_score" or config.evaluate.during_training_every_steps > 0


@dataclass(slots=True)
class Placed:
    """What a job has reserved, and its way to reserve more."""

    cluster: ClusterConfig
    say: Callable[[str], None] = lambda line: None
    grows: bool = False
    _reserved: dict[tuple[Role, str], list[Reservation]] = field(default_factory=dict)
    _later: dict[tuple[Role, str], Group] = field(default_factory=dict)

    @classmethod
    def start(
        cls,
        cluster: ClusterConfig,
        stages: Sequence[tuple[str, Sequence[RoleGroup]]],
        *,
        say: Callable[[str], None],
    ) -> Placed:
        """Check each of `stages` (when it is, in words; what is there then) and reserve the first of them, but for the
        student. Raises `PlacementError`."""
        placed = cls(cluster, say, grows(cluster))
        if placed.grows:
            say(f"nodes may be added to this cluster: what is missing is waited for, {cluster.autoscale_s:g} s at most")
        else:
            nodes = cluster_nodes()
            for when, groups in stages:
                check([each.group for each in groups], nodes, when=when)
        if stages:
            # A student that acts while it learns has its place when there is one to load; services hold nothing.
            placed.reserve([each for each in stages[0][1] if each.role not in ("student", "services")])
        students = (each for _, groups in stages for each in groups if each.role == "student")
        placed._later = {(each.role, each.name): each.group for each in students}
        return placed

    def later(self) -> list[Group]:
        """What is not reserved yet and will be: others must leave room for it."""
        return [group for group in self._later.values() if group.asks]

    def reserve(self, groups: Sequence[RoleGroup]) -> None:
        """All of them or none, with a deadline. Raises `PlacementError`."""
        taken = reserve([each.group for each in groups], timeout_s=self.timeout_s, say=self.say, grows=self.grows)
        for each, reservation in zip(groups, taken, strict=True):
            self._later.pop((each.role, each.name), None)
            self._reserved.setdefault((each.role, each.name), []).append(reservation)

    def take(self, role: Role, name: str = "") -> list[Reservation]:
        """What was reserved under that name, once; [] when nothing was, or it was taken."""
        return self._reserved.pop((role, name), [])

    def workers(self, spec: PolicySpec, *, count: int, role: Literal["teacher", "student"]) -> list[Reservation]:
        """Places for workers: those that are reserved, or new ones. Raises `PlacementError`."""
        if taken := self.take(role, spec.policy_name):
            return taken
        self.reserve(worker_groups(self.cluster, spec, count=count, role=role))
        return self.take(role, spec.policy_name)

    def envs(self, config: JobConfig, count: int) -> list[list[dict[str, Any]]]:
        """Options of the hosts' Ray actors, for each of `count` groups of them. Raises `PlacementError`."""
        found = []
        for group in env_groups(config, count):
            [reservation] = self._taken(group)
            found.append([reservation.options(i) for i in range(config.rollout.env_hosts)])
        return found

    def retrieval(self, config: JobConfig) -> dict[str, Any]:
        """Options of its Ray actor. Raises `PlacementError`."""
        [reservation] = self._taken(retrieval_group(config))
        return reservation.options()

    def learner(self, config: DistillConfig) -> dict[str, Any]:
        """Of `LearnerGroup.start`: what a rank takes, and the placement group of all. Raises `PlacementError`."""
        group = learner_group(config)
        [reservation] = self._taken(group)
        bundle = group.group.bundles[0] if group.group.bundles else {}
        return {
            "cpus_per_rank": bundle.get("CPU", 0.0),
            "gpus_per_rank": bundle.get("GPU", 0.0),
            "resources": {name: amount for name, amount in bundle.items() if name not in ("CPU", "GPU")},
            "placement": reservation.handle,
        }

    def _taken(self, group: RoleGroup) -> list[Reservation]:
        if taken := self.take(group.role, group.name):
            return taken
        self.reserve([group])
        return self.take(group.role, group.name)

    @property
    def timeout_s(self) -> float:
        return self.cluster.autoscale_s if self.grows else self.cluster.place_s


def place_job(
    config: DistillConfig, assigned: Sequence[Assignment], *, trained: bool, say: Callable[[str], None]
) -> Placed:
    """Places for what is left to do of the main job. Raises `PlacementError`."""
    busy = [] if trained else [each.share for each in assigned if each.missing]
    evaluation = ("for the evaluation", evaluation_groups(config, busy))
    if trained:
        return Placed.start(config.cluster, [evaluation], say=say)
    learning = ("while the teacher acts and the student learns", learning_groups(config, busy))
    return Placed.start(config.cluster, [learning, evaluation], say=say)


def place_collection(config: JobConfig, assigned: Sequence[Assignment], *, say: Callable[[str], None]) -> Placed:
    """Places for what is left to do of a collection. Raises `PlacementError`."""
    groups = collection_groups(config, [each.share for each in assigned if each.missing])
    return Placed.start(config.cluster, [("while it collects", groups)], say=say)


def grows(cluster: ClusterConfig) -> bool:
    """Whether nodes may be added when they are asked for."""
    return can_grow() if cluster.autoscale is None else cluster.autoscale


def service_options(cluster: ClusterConfig) -> Mapping[str, Any]:
    """Of the Ray actors that only hand things on: on the driver's node, which no job outlives, unless the configuration
    says where else."""
    services = cluster.roles.services
    if services == RoleResources():
        import ray
        from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

        here = ray.get_runtime_context().get_node_id()
        return {"num_cpus": 0, "scheduling_strategy": NodeAffinitySchedulingStrategy(here, soft=False)}
    options: dict[str, Any] = {"num_cpus": services.num_cpus or 0, "num_gpus": services.num_gpus or 0}
    if services.resources:
        options["resources"] = dict(services.resources)
    if services.labels:
        options["label_selector"] = dict(services.labels)
    return options
