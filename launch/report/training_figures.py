"""What the learner's rows in `metrics.jsonl` say: curves over tokens, and over time what went in and out.

Read once, line by line, into series of a few hundred points. A run that was stopped and went on has its steps in order;
those that it did again after the last checkpoint replace the earlier ones in effect, since they come later.

Example::

    training = read_training(files.lines("metrics.jsonl"))
    training.loss["code"].points
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from launch.report.thinning import Thinned

ALL = "all"
_CURVE = 160
"""Points of a curve: fewer are calmer, since each is a mean."""
_WINDOW_MINUTES = 0.05
"""A rate is taken over at least so long."""


@dataclass(slots=True)
class TrainingFigures:
    """Series; x is million tokens where it says so, else minutes."""

    loss: dict[str, Thinned] = field(default_factory=dict)
    """"all" or span type -> over million tokens, nats a token."""
    accuracy: dict[str, Thinned] = field(default_factory=dict)
    """"all" or span type -> over million tokens, in [0, 1]."""
    validation: Thinned = field(default_factory=Thinned)
    """Loss on held-out rows, over million tokens."""
    lr: Thinned = field(default_factory=Thinned)
    """Over million tokens."""
    grad_norm: Thinned = field(default_factory=Thinned)
    """Over million tokens."""
    tokens_per_s: Thinned = field(default_factory=Thinned)
    """Of the rows trained on, over minutes."""
    queue_depth: Thinned = field(default_factory=Thinned)
    """Trajectories that wait, over minutes."""
    recorded: Thinned = field(default_factory=Thinned)
    """Trajectories in the ledger, over minutes."""
    trained_rows: Thinned = field(default_factory=Thinned)
    """Over minutes, each pass counted."""
    waiting: Thinned = field(default_factory=Thinned)
    """Share of the time that the learner waited for trajectories, in [0, 1], over minutes."""
    last: Mapping[str, Any] = field(default_factory=dict)
    """The last row."""
    steps: int = 0
    """Rows of optimizer steps."""

    @property
    def found(self) -> bool:
        return self.steps > 0

    def to_json(self) -> dict[str, Any]:
        """The series as lists of [x, y]."""

        def plain(series: Thinned) -> list[list[float]]:
            return [[point.x, point.y] for point in series.points]

        return {
            "loss": {name: plain(series) for name, series in self.loss.items()},
            "accuracy": {name: plain(series) for name, series in self.accuracy.items()},
            **{
                name: plain(getattr(self, name))
                for name in ("validation", "tokens_per_s", "queue_depth", "recorded", "trained_rows", "waiting")
            },
            "last": dict(self.last),
        }


def read_training(rows: Iterable[Mapping[str, Any]]) -> TrainingFigures:
    """Rows as `launch.job` writes them; what a row lacks is left out."""
    figures = TrainingFigures()
    before: Mapping[str, Any] | None = None
    """The row that the present rates are taken from."""
    validated: float | None = None
    for row in rows:
        minutes = _number(row.get("minutes"))
        if minutes is None:
            continue
        figures.last = row
        for name, series in (
            ("queue_depth", figures.queue_depth), ("recorded", figures.recorded), ("rows", figures.trained_rows)
        ):  # fmt: skip
            if (value := _number(row.get(name))) is not None:
                series.add(minutes, value)
        before = _rates(figures, before, row, minutes)
        if not row.get("step"):
            continue
        figures.steps += 1
        tokens = (_number(row.get("tokens")) or 0.0) / 1e6
        for name, series in (("lr", figures.lr), ("grad_norm", figures.grad_norm)):
            if (value := _number(row.get(name))) is not None:
                series.add(tokens, value)
        for name, curves in (("loss", figures.loss), ("accuracy", figures.accuracy)):
            parts = row.get(f"{name}_by_span")
            named = {ALL: row.get(name), **(parts if isinstance(parts, Mapping) else {})}
            for span, value in named.items():
                if (number := _number(value)) is not None:
                    curves.setdefault(str(span), Thinned(limit=_CURVE)).add(tokens, number)
        validation = _number(row.get("validation_loss"))
        if validation is not None and validation != validated:  # it is repeated until it is measured again
            figures.validation.add(tokens, validation)
            validated = validation
    return figures


def _rates(
    figures: TrainingFigures, before: Mapping[str, Any] | None, row: Mapping[str, Any], minutes: float
) -> Mapping[str, Any]:
    """Adds what happened a second since `before`; returns the row that the next rates are taken from."""
    if before is None:
        return row
    passed = minutes - before["minutes"]
    if passed < 0:
        return row
    if passed < _WINDOW_MINUTES:
        return before
    tokens, waited = _difference(before, row, "tokens"), _difference(before, row, "wait_s")
    if tokens is not None and tokens >= 0:  # it falls where a run went on from its last checkpoint
        figures.tokens_per_s.add(minutes, tokens / (60 * passed))
    if waited is not None and waited >= 0:
        figures.waiting.add(minutes, min(1.0, waited / (60 * passed)))
    return row


def _difference(before: Mapping[str, Any], row: Mapping[str, Any], name: str) -> float | None:
    a, b = _number(before.get(name)), _number(row.get(name))
    return None if a is None or b is None else b - a


def _number(value: Any) -> float | None:
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        return None
    return float(value)
