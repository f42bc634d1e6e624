"""What each model of a job takes of the GPU that it was placed on, and what to turn where that is too much.

`launch.planning.memory` does the sums; nothing is loaded.

Example::

    engines_of(config, stages, nodes, gpu_gib=None, warnings=warnings)[0].memory.total
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

from launch.config import DistillConfig, JobConfig
from launch.placement import resources_of
from launch.planning.cost import Pace
from launch.planning.memory import GIB, EngineMemory, engine_memory, learner_memory
from launch.planning.nodes import PlanNode
from launch.planning.places import device_of
from launch.planning.plans import ModelMemory, Stage, Warned
from launch.planning.shapes import ModelShape, UnknownShapeError, shape_of
from rollout.policy_spec import PolicySpec

ROOM = 0.97
"""Of a GPU's memory that may be planned with: allocators leave gaps."""


def engines_of(
    config: JobConfig, stages: Sequence[Stage], nodes: Sequence[PlanNode], gpu_gib: float | None, warnings: list[Warned]
) -> list[ModelMemory]:
    """Of the models that act: teachers on vLLM, and the student; what does not fit is added to `warnings`."""
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
    device, whole = device_of(role, share, stages, nodes, gpu_gib)
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


def learner_of(
    config: DistillConfig,
    stages: Sequence[Stage],
    nodes: Sequence[PlanNode],
    gpu_gib: float | None,
    pace: Pace,
    warnings: list[Warned],
) -> tuple[ModelShape | None, ModelMemory]:
    """The learner's shape, where it is known, and what a rank of it takes; what does not fit is added to `warnings`."""
    from learner.engine_settings import refuse_what_does_not_work
    from learner.out_of_memory import advice

    learner = config.learner
    share = resources_of(config.cluster, "learner").num_gpus or 0.0
    device, whole = device_of("learner", share, stages, nodes, gpu_gib)
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
