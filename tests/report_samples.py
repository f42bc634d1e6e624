"""A run folder as a distillation leaves it, made up: for tests of its report."""

from __future__ import annotations

import functools
import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from learner_samples import trajectory

from launch.config_reading import load_config, to_plain
from launch.evaluation.intervals import score
from launch.report import scores_to_json
from rollout.ledger import LedgerWriter
from rollout.trajectory import Failure, FailureClass, StopReason, Trajectory, Usage

KINDS = ("arithmetic", "two_hop")


def sampled(
    i: int, *, policy: str = "teacher", kind: str = "arithmetic", success: bool = True, metadata: Mapping[str, Any] = {}
) -> Trajectory:
    """The i-th task's, by this policy, a second after the one before; every one costs a cent."""
    made = trajectory(i, success=success)
    return replace(
        made,
        key=f"{made.task.id}|{policy}|0|0",
        task=replace(made.task, kind=kind, metadata=dict(metadata)),
        policy=policy,
        usage=Usage(requests=2, prompt_tokens=100, completion_tokens=40, cost_usd=0.01),
        started_at_s=1.7e9 + i,
        duration_s=2.0,
    )


def failed(
    i: int, message: str = "the engine went away", failure_class: FailureClass = FailureClass.ENGINE
) -> Trajectory:
    return replace(
        sampled(i, success=False),
        key=f"failed-{i}|teacher|0|0",
        failure=Failure(failure_class=failure_class, message=message),
        stop_reason=StopReason.FAILED,
        prediction=None,
    )


@functools.cache
def _config(overrides: tuple[str, ...]) -> dict[str, Any]:
    return to_plain(load_config(overrides))


def metrics_row(step: int, **fields: Any) -> dict[str, Any]:
    """As `launch.job` writes one a step, six seconds apart."""
    return {
        "minutes": step / 10,
        "recorded": 4 * step,
        "total": 100,
        "queue_depth": step % 7,
        "step": step,
        "epoch": 0,
        "loss": 3.0 / (step + 1),
        "loss_by_span": {"thought": 4.0 / (step + 1), "code": 2.0 / (step + 1)},
        "accuracy": 1 - 1 / (step + 2),
        "accuracy_by_span": {"thought": 0.5, "code": 0.75},
        "validation_loss": None,
        "grad_norm": 1.0,
        "lr": 1e-3,
        "tokens": 1000 * step,
        "rows": 3 * step,
        "tokens_per_s": 100.0,
        "wait_s": 0.5 * step,
        **fields,
    }


def run_folder(
    folder: Path,
    *,
    collected: list[Trajectory],
    evaluated: Mapping[str, list[Trajectory]] | None = None,
    steps: int = 0,
    finished: bool = False,
    overrides: tuple[str, ...] = (),
) -> Path:
    """`steps`: of the learner; `finished`: with its results."""
    folder.mkdir(parents=True, exist_ok=True)
    config = {**_config(overrides), "run_dir": str(folder)}
    (folder / "config.json").write_text(json.dumps(config))
    LedgerWriter(folder / "ledger", "w").append(collected)
    for name, trajectories in (evaluated or {}).items():
        LedgerWriter(folder / "evaluation" / name, "w").append(trajectories)
    if steps:
        rows = [metrics_row(step) for step in range(steps + 1)]
        (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    if finished:
        scores = {
            name: {
                kind: score(sum(t.success for t in each), len(each))
                for kind in KINDS
                if (each := [t for t in trajectories if t.task.kind == kind])
            }
            for name, trajectories in (evaluated or {}).items()
        }
        results = {"scores": scores_to_json(scores), "minutes": 3.5, "learner": {"refused": {"too_long": 2}},
                   "environment": {"python": "3.11", "packages": {"torch": "2.13.0"}}}  # fmt: skip
        (folder / "results.json").write_text(json.dumps(results))
    return folder


def whole_run(folder: Path) -> Path:
    """Two kinds of tasks, an untrained student, a trained one that fails at some, and a teacher."""
    collected = [sampled(i, kind=KINDS[i % 2], success=i % 5 != 0) for i in range(40)]
    rates = {"untrained": 0, "student": 3, "teacher": 4}
    evaluated = {
        name: [sampled(100 + i, policy=name, kind=KINDS[i % 2], success=i % 4 < rate) for i in range(24)]
        for name, rate in rates.items()
    }
    return run_folder(
        folder, collected=[*collected, failed(1), failed(2)], evaluated=evaluated, steps=60, finished=True
    )
