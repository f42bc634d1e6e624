"""Makes a plan: where each role of a job would run, what each model takes of memory, how long it lasts and costs.

Plain data of a configuration and a list of nodes; `launch.plan` is the command, `launch.planning.drawing` shows it.
Nothing is started, loaded or downloaded.

Example::

    plan = make_plan(load_config(["recipe=paper"]), nodes_of("2*8xH100"))
    plan.fits, [warning.text for warning in plan.warnings]
"""

from __future__ import annotations

from collections.abc import Sequence

from launch.config import DistillConfig, JobConfig
from launch.planning.cost import Counts, Pace, count_tasks, estimate_job
from launch.planning.fitting import engines_of, learner_of
from launch.planning.nodes import PlanNode
from launch.planning.places import flops_of, gpus_of, groups_of, stage_of
from launch.planning.plans import Plan, Warned


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
    stages = [stage_of(when, groups, nodes, warnings) for when, groups in groups_of(config)]
    memory = engines_of(config, stages, nodes, gpu_gib, warnings)
    shape = None
    if isinstance(config, DistillConfig):
        shape, learner = learner_of(config, stages, nodes, gpu_gib, pace, warnings)
        memory.append(learner)
    gpus = max((gpus_of(stage.groups) for stage in stages), default=0.0)
    estimate = estimate_job(
        config,
        counts or count_tasks(config),
        pace,
        learner_parameters=None if shape is None else shape.parameters,
        gpu_flops=flops_of(config, stages, nodes),
        gpus=gpus,
        gpu_hour_usd=gpu_hour_usd,
    )
    warnings += [Warned(text=text, fatal=False) for text in estimate.warnings]
    return Plan(
        stages=tuple(stages), memory=tuple(memory), estimate=estimate, warnings=tuple(warnings), nodes=tuple(nodes)
    )
