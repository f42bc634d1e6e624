"""Where the roles of a job would run: its stages on a list of nodes, and what GPU a role gets by that.

The rules are those of `launch.placement` and `rollout.placement_fit`, which place a job for real.

Example::

    when, groups = groups_of(config)[0]
    stage_of(when, groups, nodes_of("2*8xH100"), warnings).places      # node -> what -> how many
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

from launch.config import DistillConfig, JobConfig
from launch.placement import RoleGroup, collection_groups, evaluation_groups, learning_groups, resources_of
from launch.planning.memory import GIB
from launch.planning.nodes import PlanNode
from launch.planning.plans import Stage, Warned
from rollout.placement_fit import PlacementError, assign, check, words


def groups_of(config: JobConfig) -> list[tuple[str, list[RoleGroup]]]:
    """(when, the roles that are there then), in the order of the job."""
    teachers = config.all_teachers
    if isinstance(config, DistillConfig):
        return [
            ("while the teacher acts and the student learns", learning_groups(config, teachers)),
            ("for the evaluation", evaluation_groups(config, teachers)),
        ]
    return [("while it collects", collection_groups(config, teachers))]


def stage_of(when: str, groups: Sequence[RoleGroup], nodes: Sequence[PlanNode], warnings: list[Warned]) -> Stage:
    """Where each actor of the roles would go; what stands against it is added to `warnings`."""
    if not nodes:
        return Stage(when=when, groups=tuple(groups), places=None)
    plain = [node.node for node in nodes]
    wanted = [each.group for each in groups]
    try:
        check(wanted, plain, when=when)
    except PlacementError as error:
        warnings.append(Warned(text=str(error), fatal=True))
        return Stage(when=when, groups=tuple(groups), places=None, missing=str(error))
    found = assign(wanted, plain)
    if found is None:
        return Stage(when=when, groups=tuple(groups), places=None, missing="no way to place them was found in time")
    if any(node.free is not None for node in plain) and assign(wanted, plain, free=True) is None:
        warnings.append(
            Warned(
                text=f"others hold what is needed {when}: the job would wait for cluster.place_s, then end", fatal=False
            )
        )
    places: dict[str, Counter[str]] = {node.name: Counter() for node in plain}
    for each, at in zip(groups, found, strict=True):
        one = each.group.what.removesuffix("s")
        for bundle, node in zip(each.group.bundles, at, strict=True):
            what = f"{one} of {words(bundle)}" if bundle else f"{one} (asks for nothing)"
            places[plain[node].name][f"{each.group.who.removeprefix('the ')}: {what}"] += 1
    return Stage(when=when, groups=tuple(groups), places={name: dict(count) for name, count in places.items()})


def device_of(
    role: str, share: float, stages: Sequence[Stage], nodes: Sequence[PlanNode], gpu_gib: float | None
) -> tuple[str, float | None]:
    """What a rank of that role is on, in words, and the bytes of it: the smallest GPU that it was placed on."""
    if share <= 0:
        return "CPU", None
    kinds = {node.node.name: node for node in nodes}
    places = [kinds[name] for name in nodes_of_role(role, stages) if kinds[name].node.total.get("GPU")]
    places = places or [node for node in nodes if node.node.total.get("GPU")]
    part = f"{share:g} of a " if share < 1 else ""
    known = [node for node in places if node.gpu_gib]
    if known:
        least = min(known, key=lambda node: node.gpu_gib or 0.0)
        gib = least.gpu_gib or 0.0
        return f"{part}{least.gpu}, {gib:g} GiB", gib * GIB
    if gpu_gib is not None:
        return f"{part}GPU of {gpu_gib:g} GiB (--gpu-gib)", gpu_gib * GIB
    return f"{part}GPU of unknown memory (--gpu-gib says it)", None


def nodes_of_role(role: str, stages: Sequence[Stage]) -> list[str]:
    """The nodes that a role was placed on."""
    found = []
    for stage in stages:
        whose = {each.group.who.removeprefix("the ") for each in stage.groups if each.role == role}
        for name, what in (stage.places or {}).items():
            if any(told.startswith(f"{who}:") for told in what for who in whose):
                found.append(name)
    return list(dict.fromkeys(found))


def flops_of(config: JobConfig, stages: Sequence[Stage], nodes: Sequence[PlanNode]) -> tuple[str, float] | None:
    """(the learner's GPU, its peak in FLOP/s), where both are known."""
    from learner.tracking.flops import peak_of_gpu

    where = nodes_of_role("learner", stages)
    gpus = [node.gpu for node in nodes if node.node.name in where and node.gpu]
    if not gpus or not (resources_of(config.cluster, "learner").num_gpus or 0.0):
        return None
    name = gpus[0].partition("-")[0]
    peak = peak_of_gpu(name)
    return None if peak is None else (name, peak)


def gpus_of(groups: Sequence[RoleGroup]) -> float:
    return sum(bundle.get("GPU", 0.0) for each in groups for bundle in each.group.bundles)
