"""The views of the jobs: what each is called, and who is told beside the person in front of it.

Example::

    with distill_view(config, folder) as view:
        ...
"""

from __future__ import annotations

import json
from pathlib import Path

from rich.console import Console

from launch.collect_folder import CollectFolder
from launch.config import CollectConfig, DistillConfig
from launch.evaluation.config import EvaluationConfig
from launch.live.ray_metrics import RayMetrics
from launch.live.status_file import StatusFile, began_before
from launch.live.view import ALL, LiveView, StatusSink
from launch.run_folder import RunFolder


def distill_view(config: DistillConfig, folder: RunFolder) -> LiveView:
    """Of `launch/distill.py`; one that only shows the results of a run that is complete tells nobody else."""
    if folder.results.exists():
        return LiveView()
    sinks: list[StatusSink] = [StatusFile(folder.path), RayMetrics()]
    if config.learner.tracking.tensorboard:
        from launch.live.tensorboard_sink import TensorBoardFigures

        sinks.append(TensorBoardFigures(folder.path / "tensorboard"))
    view = LiveView(
        job="distill", run=config.run_name, folder=str(folder.path), note=_note(config.recipe, config.seed),
        began_unix_s=began_before(folder.path), sinks=sinks,
    )  # fmt: skip
    view.recall(_losses(folder.metrics))
    return view


def collect_view(config: CollectConfig, folder: CollectFolder) -> LiveView:
    """Of `launch/collect.py`."""
    return LiveView(
        job="collect", run=config.run_name, folder=folder.out,
        note=_note(config.recipe, config.seed), began_unix_s=began_before(folder.out),
        sinks=[StatusFile(folder.out), RayMetrics()],
    )  # fmt: skip


def evaluation_view(config: EvaluationConfig, folder: Path, console: Console | None = None) -> LiveView:
    """Of `launch/evaluate.py`; `folder`: where its ledgers are."""
    return LiveView(
        console, job="evaluate", run=config.label, folder=str(folder), note=f"seed {config.seed}",
        began_unix_s=began_before(folder), sinks=[StatusFile(folder), RayMetrics()],
    )  # fmt: skip


def _note(recipe: str, seed: int) -> str:
    return f"recipe {recipe}, seed {seed}"


def _losses(metrics: Path) -> list[dict[str, float]]:
    """Of the steps that an earlier job has trained, as the run's `metrics.jsonl` has them."""
    losses: list[dict[str, float]] = []
    for line in metrics.read_text().splitlines() if metrics.exists() else ():
        try:
            row = json.loads(line)
        except ValueError:  # the last line of a job that was killed
            break
        if row.get("step"):
            losses.append({ALL: row["loss"], **row["loss_by_span"]})
    return losses
