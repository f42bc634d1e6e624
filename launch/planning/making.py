"""Makes a plan: where each role of a job would run, what each model takes of memory, how long it lasts and costs.

Plain data of a configuration and a list of nodes; `launch.plan` is the command, `launch.planning.drawing` shows it.
Nothing is started, loaded or downloaded.

Example::

    plan = make_plan(load_config(["recipe=paper"]), nodes_of("2*8xH100"))
    plan.fits, [warning.text for warning in plan.warnings]
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

from launch.config import DistillConfig, JobConfig
from launch.placement import RoleGroup, collection_groups, evaluation_groups, learning_groups, resources_of
from launch.planning.cost import Counts, Estimate, Pace, count_tasks, estimate_job
from launch.planning.memory import GIB, EngineMemory, Memory, engine_memory, learner_memory
from launch.planning.nodes import PlanNode
from launch.planning.shapes import ModelShape, UnknownShapeError, shape_of
from rollout.placement_fit import PlacementError, assign, check, words
from rollout.policy_spec import PolicySpec

ROOM = 0.97
"""Of a GPU's memory that may be planned with: allocators leave gaps."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Warned:
    """Something to change, or to know."""

    text: str
    fatal: bool
    """It would not run."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Stage:
    """Roles that are there at the same time."""

    when: str
    groups: tuple[RoleGroup, ...]
    places: dict[str, dict[str, int]] | None
    """Node -> what (a role's group, in words) -> how many actors of it; None where there are no nodes, or it does not
    fit."""
    missing: str = ""
    """Why not."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelMemory:
    """Of one GPU (or process) of a role."""

    role: str
    model: str
    memory: Memory | None
    """None where the model's shape is not known: `note` says why."""
    device: str
    """What it is on, in words."""
    available: float | None
    """Bytes; None: not known."""
    engine: EngineMemory | None = None
    note: str = ""
    offloaded_ranks: int = 1


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """Everything."""

    stages: tuple[Stage, ...]
    memory: tuple[ModelMemory, ...]
    estimate: Estimate
    warnings: tuple[Warned, ...]
    nodes: tuple[PlanNode, ...]

    @property
    def fits(self) -> bool:
        """As far as is known."""
        return not any(warning.fatal for warning in self.warnings)

    def to_json(self) -> dict[str, Any]:
        """Plain data; bytes are bytes, times seconds."""
        return {
            "fits": self.fits,
            "warnings": [asdict(warning) for warning in self.warnings],
            "nodes": [
                {"name": n.node.name, "total": dict(n.node.total), "free": n.node.free and dict(n.node.free),
                 "labels": dict(n.node.labels), "gpu": n.gpu, "gpu_gib": n.gpu_gib}
                for n in self.nodes
            ],
            "stages": [
                {
                    "when": stage.when,
                    "roles": [
                        {"role": each.role, "who": each.group.who, "wants": each.group.wants(),
                         "bundles": [dict(bundle) for bundle in each.group.bundles], "strategy": each.group.strategy}
                        for each in stage.groups
                    ],
                    "places": stage.places,
                    "missing": stage.missing,
                }
                for stage in self.stages
            ],
            "memory": [
                {
                    "role": each.role, "model": each.model, "device": each.device, "available_bytes": each.available,
                    "total_bytes": each.memory and each.memory.total, "host_bytes": each.memory and each.memory.host,
                    "parts": [asdict(part) for part in each.memory.parts] if each.memory else [], "note": each.note,
                    **({"kv_bytes_per_token": each.engine.kv_bytes_per_token, "kv_tokens": each.engine.kv_tokens,
                        "sequences": each.engine.sequences} if each.engine else {}),
                }
                for each in self.memory
            ],
            "estimate": [asdict(line) for line in self.estimate.lines],
        }  # fmt: skip


def make_plan(
    config: JobConfig,
    nodes: Sequence[PlanNode],
    *,
    pace: Pace = Pace(),  # noqa: B008  (frozen)
    counts: Counts | None = None,
    gpu_gib: float | None = None,
    gpu_hour_usd: float | None = None,
) -> Plan:
    """`nodes`: none where the cluster is not known, and then only what is wanted is said. `gpu_gib`: of GPUs whose kind
    does not tell. Raises what reading the tasks raises."""
    warnings: list[Warned] = []
    stages = [_stage(when, groups, nodes, warnings) for when, groups in _groups(config)]
    memory = _engines(config, stages, nodes, gpu_gib, warnings)
    shape = None
    if isinstance(config, DistillConfig):
        shape, learner = _learner(config, stages, nodes, gpu_gib, pace, warnings)
        memory.append(learner)
    gpus = max((_gpus(stage.groups) for stage in stages), default=0.0)
    estimate = estimate_job(
        config,
        counts or count_tasks(config),
        pace,
        learner_parameters=None if shape is None else shape.parameters,
        gpu_flops=_flops(config, stages, nodes),
        gpus=gpus,
        gpu_hour_usd=gpu_hour_usd,
    )
    warnings += [Warned(text=text, fatal=False) for text in estimate.warnings]
    return Plan(
        stages=tuple(stages), memory=tuple(memory), estimate=estimate, warnings=tuple(warnings), nodes=tuple(nodes)
    )


def _groups(config: JobConfig) -> list[tuple[str, list[RoleGroup]]]:
    teachers = config.all_teachers
    if isinstance(config, DistillConfig):
        return [
            ("while the teacher acts and the student learns", learning_groups(config, teachers)),
            ("for the evaluation", evaluation_groups(config, teachers)),
        ]
    return [("while it collects", collection_groups(config, teachers))]


def _stage(when: str, groups: Sequence[RoleGroup], nodes: Sequence[PlanNode], warnings: list[Warned]) -> Stage:
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


def _engines(
    config: JobConfig, stages: Sequence[Stage], nodes: Sequence[PlanNode], gpu_gib: float | None, warnings: list[Warned]
) -> list[ModelMemory]:
    found = []
    for share in config.all_teachers:
        if share.teacher.kind == "vllm":
            concurrency = share.concurrency or config.rollout.concurrency
            found.append(_engine(config, "teacher", share.teacher, concurrency, stages, nodes, gpu_gib, warnings))
    if isinstance(config, DistillConfig):
        from launch.evaluation.scoring import student_spec

        spec = student_spec(config, config.learner.model_path)
        found.append(_engine(config, "student", spec, config.evaluate.concurrency, stages, nodes, gpu_gib, warnings))
    return found


def _engine(
    config: JobConfig,
    role: Literal["teacher", "student"],
    spec: PolicySpec,
    concurrency: int,
    stages: Sequence[Stage],
    nodes: Sequence[PlanNode],
    gpu_gib: float | None,
    warnings: list[Warned],
) -> ModelMemory:
    share = resources_of(config.cluster, role).num_gpus or 0.0
    device, whole = _device(role, share, stages, nodes, gpu_gib)
    room = None if whole is None else whole * min(share, 1.0)
    key = "evaluate" if role == "student" else "teacher"
    try:
        shape = shape_of(spec.model)
    except UnknownShapeError as error:
        warnings.append(Warned(text=f"the {role}'s memory is not known: {error}", fatal=False))
        return ModelMemory(role=role, model=spec.model, memory=None, device=device, available=room, note=str(error))
    engine = engine_memory(spec, shape, gpu_bytes=room, gpu=share > 0)
    made = ModelMemory(
        role=role, model=spec.model, memory=engine.memory, device=device, available=room, engine=engine
    )  # fmt: skip
    if shape.longest and spec.max_model_len > shape.longest:
        warnings.append(
            Warned(
                text=f"{key}.max_model_len={spec.max_model_len:,} is more than the {shape.longest:,} tokens that "
                f"{spec.model} was made for; vLLM would refuse it",
                fatal=True,
            )
        )
    _warn_of_cache(role, key, spec, shape, engine, room, concurrency, warnings)
    return made


def _warn_of_cache(
    role: str,
    key: str,
    spec: PolicySpec,
    shape: ModelShape,
    engine: EngineMemory,
    room: float | None,
    concurrency: int,
    warnings: list[Warned],
) -> None:
    tp = spec.tensor_parallel_size
    if shape.heads % tp or (shape.kv_heads % tp and tp % shape.kv_heads):
        good = [
            n for n in (1, 2, 4, 8, 16) if not shape.heads % n and (not shape.kv_heads % n or not n % shape.kv_heads)
        ]
        warnings.append(
            Warned(
                text=f"{key}.tensor_parallel_size={tp} does not divide {spec.model}'s {shape.heads} heads "
                f"({shape.kv_heads} of keys and values); it can be {', '.join(map(str, good))}",
                fatal=True,
            )
        )
    if room is not None and spec.kv_cache_bytes is not None and engine.memory.total > room:
        warnings.append(
            Warned(
                text=f"the {role} takes {engine.memory.total / GIB:.1f} GiB of a GPU with {room / GIB:.1f}: lower "
                f"{key}.kv_cache_bytes, or raise {key}.tensor_parallel_size",
                fatal=True,
            )
        )
    sequences = engine.sequences
    if sequences is None:
        return
    if sequences < 1:
        wider = _wider(spec, shape, room)
        instead = (
            f"{key}.tensor_parallel_size={wider}"
            if wider
            else f"a GPU with more memory, or {key}.pipeline_parallel_size"
        )
        weights = engine.memory.part("weights") / GIB
        shorter = f", or {key}.max_model_len={engine.kv_tokens:,}" if (engine.kv_tokens or 0) >= 1024 else ""
        warnings.append(
            Warned(
                text=f"the {role} {spec.model} does not fit: {weights:.1f} GiB of weights leave room for "
                f"{engine.kv_tokens:,} tokens of KV cache on each GPU, and one sequence may have "
                f"{spec.max_model_len:,} (max_model_len): use {instead}{shorter}",
                fatal=True,
            )
        )
    elif sequences < min(concurrency, spec.max_num_seqs):
        warnings.append(
            Warned(
                text=f"the {role}'s cache has room for {sequences:.0f} sequences of max_model_len, and up to "
                f"{concurrency} episodes at a time are asked for: shorter ones may all fit, else some wait "
                "(rollout.adaptive then has fewer)",
                fatal=False,
            )
        )


def _wider(spec: PolicySpec, shape: ModelShape, room: float | None) -> int | None:
    """The least tensor-parallel size at which a sequence fits."""
    from dataclasses import replace

    for size in (2, 4, 8, 16):
        if size > spec.tensor_parallel_size and not shape.heads % size:
            engine = engine_memory(replace(spec, tensor_parallel_size=size), shape, gpu_bytes=room, gpu=True)
            if (engine.sequences or 0) >= 1:
                return size
    return None


def _learner(
    config: DistillConfig,
    stages: Sequence[Stage],
    nodes: Sequence[PlanNode],
    gpu_gib: float | None,
    pace: Pace,
    warnings: list[Warned],
) -> tuple[ModelShape | None, ModelMemory]:
    from learner.engine_settings import refuse_what_does_not_work
    from learner.out_of_memory import advice

    learner = config.learner
    share = resources_of(config.cluster, "learner").num_gpus or 0.0
    device, whole = _device("learner", share, stages, nodes, gpu_gib)
    room = None if whole is None else whole * min(share, 1.0)
    try:
        refuse_what_does_not_work(learner)
    except ValueError as error:
        warnings.append(Warned(text=f"config learner: {error}", fatal=True))
    try:
        shape = shape_of(learner.model_path)
    except UnknownShapeError as error:
        warnings.append(Warned(text=f"the learner's memory is not known: {error}", fatal=False))
        empty = ModelMemory(
            role="learner", model=learner.model_path, memory=None, device=device, available=room, note=str(error)
        )
        return None, empty
    trained_share = pace.trained_share
    memory = learner_memory(
        learner, shape, gpu=share > 0, trained_share=1.0 if trained_share is None else trained_share.value
    )
    if room is not None and memory.total > room * ROOM:
        turn = "; ".join(advice(learner, world_size=learner.ranks))
        warnings.append(
            Warned(
                text=f"a learner's rank takes about {memory.total / GIB:.1f} GiB, and there are {room / GIB:.1f} "
                f"({device}). Turn one of these, cheapest first: {turn}",
                fatal=True,
            )
        )
    if trained_share is None:
        warnings.append(
            Warned(
                text="logits are reckoned as if all tokens were trained; --from RUN says their true share", fatal=False
            )
        )
    made = ModelMemory(
        role="learner",
        model=learner.model_path,
        memory=memory,
        device=device,
        available=room,
        offloaded_ranks=learner.ranks,
    )
    return shape, made


def _device(
    role: str, share: float, stages: Sequence[Stage], nodes: Sequence[PlanNode], gpu_gib: float | None
) -> tuple[str, float | None]:
    """What a rank of that role is on, in words, and the bytes of it: the smallest GPU that it was placed on."""
    if share <= 0:
        return "CPU", None
    kinds = {node.node.name: node for node in nodes}
    places = [kinds[name] for name in _where(role, stages) if kinds[name].node.total.get("GPU")]
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


def _where(role: str, stages: Sequence[Stage]) -> list[str]:
    found = []
    for stage in stages:
        whose = {each.group.who.removeprefix("the ") for each in stage.groups if each.role == role}
        for name, what in (stage.places or {}).items():
            if any(told.startswith(f"{who}:") for told in what for who in whose):
                found.append(name)
    return list(dict.fromkeys(found))


def _flops(config: JobConfig, stages: Sequence[Stage], nodes: Sequence[PlanNode]) -> tuple[str, float] | None:
    from learner.tracking.flops import peak_of_gpu

    where = _where("learner", stages)
    gpus = [node.gpu for node in nodes if node.node.name in where and node.gpu]
    if not gpus or not (resources_of(config.cluster, "learner").num_gpus or 0.0):
        return None
    name = gpus[0].partition("-")[0]
    peak = peak_of_gpu(name)
    return None if peak is None else (name, peak)


def _gpus(groups: Sequence[RoleGroup]) -> float:
    return sum(bundle.get("GPU", 0.0) for each in groups for bundle in each.group.bundles)
