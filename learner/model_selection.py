"""Which student is the best so far, by what is measured on held-out tasks, and when no better one is to be expected.

Two yardsticks: the validation loss of held-out rows, which the learner measures itself, and the score that a student's
own rollouts get on held-out tasks, which somebody else measures. For the second the learner hands students out
(`candidates/<step>`) and goes on; scores come back when they come (`Learner.report_score`), in any order.

The best student is in `best/`, which no rotation touches. While the stream still brings held-out rows, losses over few
and over many of them cannot be compared: a measurement over more rows than the best one's takes its place.

Example::

    best = BestStudent(config, folder=Path("runs/a/learner"))
    if best.measured(step, validation_loss, rows=80):
        ...                                    # export to best.folder
    best.exhausted                             # True after `patience` measurements in a row without a better one
"""

from __future__ import annotations

import math
import os
import shutil
from pathlib import Path
from typing import Any

from learner.config import LearnerConfig


class BestStudent:
    """Knows the best measurement and the students that still wait for a score."""

    def __init__(self, config: LearnerConfig, *, folder: Path) -> None:
        self._by = config.best_by
        self._patience = config.patience
        self.folder = folder / "best"
        self._candidates = folder / "candidates"
        self.step: int | None = None
        """Of the best student."""
        self.value: float | None = None
        self._rows = 0
        self._without_better = 0
        self.pending: dict[int, Path] = {}
        """Step -> folder of a student that waits for its score."""
        self._last_out: int | None = None

    @property
    def by_loss(self) -> bool:
        return self._by == "validation_loss"

    @property
    def by_score(self) -> bool:
        return self._by == "rollout_score"

    @property
    def exhausted(self) -> bool:
        """Whether `patience` is at its end."""
        return bool(self._patience) and self._without_better >= self._patience

    def measured(self, step: int, value: float, *, rows: int) -> bool:
        """Whether the student of `step` is the best so far. `rows`: how many rows or episodes `value` is a mean of."""
        if not math.isfinite(value):
            better = False
        elif self.value is None or rows > self._rows:
            better = True
        else:
            better = value < self.value if self.by_loss else value > self.value
        self._without_better = 0 if better else self._without_better + 1
        if better:
            self.step, self.value, self._rows = step, value, rows
        return better

    # -- by rollout score

    def hand_out(self, step: int) -> Path | None:
        """The folder for the student of `step`, who then waits for a score; None when it was handed out already."""
        if step == self._last_out:
            return None
        self._last_out = step
        self.pending[step] = self._candidates / f"{step:07d}"
        return self.pending[step]

    def scored(self, step: int, value: float) -> None:
        """The score of a student that was handed out: the best one becomes `folder`, others are removed. A step that
        does not wait is passed over."""
        candidate = self.pending.pop(step, None)
        if candidate is None:
            return
        if self.measured(step, value, rows=0):
            replace_folder(candidate, self.folder)
        shutil.rmtree(candidate, ignore_errors=True)

    # -- checkpoints

    def state(self) -> dict[str, Any]:
        """JSON-able."""
        return {
            "by": self._by,
            "step": self.step,
            "value": self.value,
            "rows": self._rows,
            "without_better": self._without_better,
            "pending": sorted(self.pending),
            "last_out": self._last_out,
        }

    def restore(self, state: dict[str, Any]) -> None:
        """What another yardstick measured does not count."""
        recover_folder(self.folder)
        if state["by"] != self._by:
            return
        self.step, self.value, self._rows = state["step"], state["value"], state["rows"]
        self._without_better = state["without_better"]
        folders = {step: self._candidates / f"{step:07d}" for step in state["pending"]}
        self.pending = {step: folder for step, folder in folders.items() if folder.is_dir()}
        self._last_out = state["last_out"]


def replace_folder(new: Path, old: Path) -> None:
    """Put `new` where `old` is. A kill on the way leaves one of them there, or beside it for `recover_folder`."""
    aside = old.with_name(f".old-{old.name}")
    if old.exists():
        shutil.rmtree(aside, ignore_errors=True)
        os.replace(old, aside)
    os.replace(new, old)
    shutil.rmtree(aside, ignore_errors=True)


def recover_folder(folder: Path) -> None:
    """Bring back what `replace_folder` had put aside when it was killed."""
    aside = folder.with_name(f".old-{folder.name}")
    if aside.is_dir() and not folder.exists():
        os.replace(aside, folder)


def copy_folder(source: Path, target: Path) -> None:
    """A whole copy of `source` in the place of `target`."""
    partial = target.with_name(f".partial-{target.name}")
    shutil.rmtree(partial, ignore_errors=True)
    shutil.copytree(source, partial)
    replace_folder(partial, target)
