"""What is recorded of a step, and how it is shown.

`record` is for machines: flat names with a slash before what a number is split by, numbers only, so that every tracker
takes it. `figures` is for people: the few that say whether the run is well.

Example::

    record(progress)["loss/code"]; record(progress)["accuracy/thought"]
    figures(progress)                      # {"step": "120", "loss": "0.412", "correct": "88%", ...}
"""

from __future__ import annotations

import math
from collections.abc import Mapping

from learner.base import Progress

_SINGLE = (
    "loss",
    "accuracy",
    "grad_norm",
    "lr",
    "fraction",
    "epoch",
    "tokens",
    "trained_tokens",
    "rows",
    "tokens_per_s",
    "step_s",
    "mfu",
    "peak_memory_mb",
    "skipped_steps",
    "stall_share",
    "validation_loss",
    "validation_accuracy",
    "best_value",
    "best_step",
    "trajectories",
    "held_out",
)
_SPLIT = {
    "loss": "loss_by_span",
    "accuracy": "accuracy_by_span",
    "objective": "objective_metrics",
    "refused": "refused",
}


def record(progress: Progress) -> dict[str, float]:
    """Every number of the step, `step` included. What is unknown is left out; what is not finite is NaN or infinite."""
    numbers: dict[str, float] = {"step": progress.step}
    for name in _SINGLE:
        value = getattr(progress, name)
        if value is not None:
            numbers[name] = value
    for prefix, name in _SPLIT.items():
        parts: Mapping[str, float] = getattr(progress, name)
        numbers |= {f"{prefix}/{part}": value for part, value in parts.items()}
    return numbers


def figures(progress: Progress) -> dict[str, str]:
    """A line for a person."""
    shown = {
        "step": str(progress.step),
        "trained": f"{100 * progress.fraction:.0f}%",
        "loss": _number(progress.loss),
        "correct": f"{100 * progress.accuracy:.1f}%",
        "tokens/s": f"{progress.tokens_per_s:.0f}",
    }
    if progress.mfu is not None:
        shown["MFU"] = f"{100 * progress.mfu:.1f}%"
    if progress.peak_memory_mb:
        shown["memory"] = f"{progress.peak_memory_mb / 1024:.1f} GiB"
    if progress.validation_loss is not None:
        shown["held-out loss"] = _number(progress.validation_loss)
    if progress.best_step is not None:
        shown["best"] = f"step {progress.best_step}"
    if progress.skipped_steps:
        shown["skipped steps"] = str(progress.skipped_steps)
    if progress.restarts:
        shown["restarts"] = str(progress.restarts)
    shown["waited"] = f"{progress.wait_s:.0f} s ({100 * progress.stall_share:.0f}% of learning)"
    return shown


def _number(value: float) -> str:
    return f"{value:.3f}" if math.isfinite(value) else str(value)
