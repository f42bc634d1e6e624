"""Steps whose gradient is not finite: skipped by the backend, counted here, and the end of the run at the n-th.

A single NaN in a gradient would turn every weight into NaN. The backend tells of each step whether it was taken
(`StepOutcome`); the trainer, which knows the step's rows, tells the guard, and the guard raises when there were too
many. What it counts goes into the checkpoint, so a run that is killed and resumed again and again still stops.

Example::

    guard = GradientGuard(limit=config.max_skipped_steps)
    outcome = backend.step(lr_factor)
    if outcome.skipped:
        guard.skipped(step, rows=keys_of_the_step, suspects=keys_with_a_loss_that_is_not_finite)
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from learner.base import LearnerError

logger = logging.getLogger(__name__)
NAMED_ROWS = 20
"""Keys in one message; a step may have thousands of rows."""


@dataclass(frozen=True, slots=True)
class StepOutcome:
    """What became of one optimizer step, the same on every rank."""

    grad_norm: float
    """Before clipping; 0.0 if unknown, inf or NaN when skipped."""
    skipped: bool = False
    """The gradient was not finite on some rank: weights and optimizer are as they were."""


@dataclass(slots=True)
class GradientGuard:
    """Counts what was skipped. `limit`: how many skipped steps end the run, at least 1."""

    limit: int
    count: int = 0
    """Skipped steps of the whole run, those before a resume included."""
    recent: list[tuple[int, tuple[str, ...]]] = field(default_factory=list)
    """(step, keys of its rows or of those suspected), oldest first, at most `limit`."""

    def skipped(self, step: int, rows: Sequence[str], suspects: Sequence[str] = ()) -> None:
        """Count one. `rows`: keys of the step's rows; `suspects`: those of them in a micro-batch whose loss was not
        finite, when it was the loss. Logs the rows; raises `LearnerError` that names them at the `limit`-th."""
        self.count += 1
        named = tuple(suspects or rows)
        self.recent = [*self.recent, (step, named)][-self.limit :]
        told = f"step {step}: the gradient is not finite; rows {_names(named)}"
        logger.warning("%s; the step is skipped (%d of at most %d)", told, self.count, self.limit)
        if self.count >= self.limit:
            raise LearnerError(
                f"{self.count} steps had gradients that are not finite (max_skipped_steps is {self.limit}). "
                + "; ".join(f"step {at}: rows {_names(keys)}" for at, keys in self.recent)
                + ". Look at these rows with learner.audit, lower lr, or set precision to 'fp32'"
            )

    def state(self) -> dict[str, Any]:
        """JSON-able, for the checkpoint."""
        return {"count": self.count, "recent": [[step, list(keys[:NAMED_ROWS])] for step, keys in self.recent]}

    def restore(self, state: dict[str, Any]) -> None:
        self.count = int(state["count"])
        self.recent = [(int(step), tuple(keys)) for step, keys in state["recent"]][-self.limit :]


def _names(keys: Sequence[str]) -> str:
    shown = ", ".join(keys[:NAMED_ROWS])
    return f"{shown} and {len(keys) - NAMED_ROWS} more" if len(keys) > NAMED_ROWS else shown
