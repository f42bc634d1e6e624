"""What a job finds in its run's folder of an earlier one, and what it writes and shows there at its end.

Example::

    found_of_earlier(folder, 5500)               # "found of an earlier job: 120 of 5500 trajectories; no checkpoint"
    results = results_of(config, folder, scores, learned, minutes=17.2)
    show_results(view, results, folder)
"""

from __future__ import annotations

import contextlib
import json
import time
from collections import deque
from pathlib import Path
from typing import Any

from launch.config import DistillConfig
from launch.config_reading import to_plain
from launch.evaluation.intervals import Score
from launch.live.status_file import NAME as STATUS
from launch.live.view import LiveView
from launch.report import score_table, scores_to_json
from launch.run_folder import RunFolder
from rollout.curation import Curation
from rollout.ledger import Ledger


def found_of_earlier(folder: RunFolder, episodes: int) -> str:
    """What an earlier job left, in one line."""
    steps, evaluated = folder.checkpoints(), folder.evaluated()
    parts = [
        f"{len(Ledger(folder.ledger).keys())} of {episodes} trajectories",
        f"checkpoints {', '.join(steps)}" if steps else "no checkpoint",
        f"evaluations {', '.join(evaluated)}" if evaluated else "no evaluation",
    ]
    return "found of an earlier job: " + "; ".join(parts)


def silence_s(folder: RunFolder) -> float | None:
    """Since an earlier job last wrote how it stood; None where none came so far."""
    status = folder.path / STATUS
    return max(0.0, time.time() - status.stat().st_mtime) if status.exists() else None


def minutes_so_far(metrics: Path) -> float:
    """Where an earlier job's clock stopped; a line that was torn when it died does not count."""
    for line in reversed(metrics.read_text(errors="replace").splitlines() if metrics.exists() else []):
        with contextlib.suppress(ValueError, KeyError, TypeError):
            return float(json.loads(line)["minutes"])
    return 0.0


def collected_at_first_step(folder: RunFolder, total: int) -> dict[str, Any]:
    """How much had been collected when the run's first optimizer step ended."""
    if not folder.first_step.exists():
        return {}
    moment_s = json.loads(folder.first_step.read_text())["unix_s"]
    ended_s = [t.started_at_s + t.duration_s for t in Ledger(folder.ledger).trajectories()]
    before = sum(ended <= moment_s for ended in ended_s)
    return {"collected_at_first_step": before, "collected_share_at_first_step": before / max(total, 1)}


def removed_by_curation(curation: Curation, ledger: Ledger) -> dict[str, Any]:
    """What each filter removed of what was recorded."""
    curated = curation.stream.apply(ledger.trajectories)
    deque(curated.kept, maxlen=0)
    return curated.report.to_json()


def results_of(
    config: DistillConfig,
    folder: RunFolder,
    scores: dict[str, dict[str, Score]],
    learned: dict[str, Any],
    *,
    minutes: float,
) -> dict[str, Any]:
    from launch.environment import describe_environment

    return {
        "recipe": config.recipe,
        "seed": config.seed,
        "minutes": round(minutes, 2),
        "scores": scores_to_json(scores),
        "student": f"{folder.place}/learner/student",
        "learning_curve": f"{folder.place}/{folder.curve.name}",
        "learner": learned,
        "environment": describe_environment(),
        "config": to_plain(config),
    }


def show_results(view: LiveView, results: dict[str, Any], folder: RunFolder) -> None:
    scores = {name: {kind: Score(**s) for kind, s in by_kind.items()} for name, by_kind in results["scores"].items()}
    kinds = list(dict.fromkeys(kind for by_kind in scores.values() for kind in by_kind))
    if kinds:
        view.console.print(score_table(scores, kinds, title="success on held-out tasks, % [95% interval]"))
    view.console.print(f"student:        {results['student']}", markup=False)
    view.console.print(f"learning curve: {results['learning_curve']}", markup=False)
    view.console.print(f'try it:         python -m launch.ask --run {folder.path} "your question"', markup=False)
