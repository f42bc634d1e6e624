"""`Thinned`: a series of any length kept in a bounded number of points, while it is read.

Neighbours are merged by their mean when there are too many, so a point stands for as many rows as its neighbours do
and nothing needs to be known of the length in advance. `span` keeps the smallest and largest value of what was merged.

Example::

    series = Thinned(limit=300)
    for row in rows: series.add(row["tokens"], row["loss"])
    series.points                       # at most 300 of them
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field


@dataclass(frozen=True, slots=True)
class Point:
    """Of one or several rows next to one another."""

    x: float
    """Of the last of them."""
    y: float
    """Mean."""
    low: float
    high: float


@dataclass(slots=True)
class Thinned:
    """Points in the order in which they came; values that are not finite are left out."""

    limit: int = 300
    """Points, at most; an even number."""
    _done: list[Point] = field(default_factory=list)
    _each: int = 1
    """How many rows a point stands for."""
    _open: list[tuple[float, float]] = field(default_factory=list)

    def add(self, x: float, y: float) -> None:
        if not (math.isfinite(x) and math.isfinite(y)):
            return
        self._open.append((x, y))
        if len(self._open) < self._each:
            return
        self._done.append(_point(self._open))
        self._open.clear()
        if len(self._done) >= self.limit:
            self._done = [_merged(a, b) for a, b in zip(self._done[::2], self._done[1::2], strict=True)]
            self._each *= 2

    @property
    def points(self) -> list[Point]:
        """The last one may stand for fewer rows."""
        return [*self._done, _point(self._open)] if self._open else list(self._done)

    @property
    def last(self) -> float | None:
        """The latest value, of a single row where that is known."""
        if self._open:
            return self._open[-1][1]
        return self._done[-1].y if self._done else None

    def __len__(self) -> int:
        return len(self._done) + bool(self._open)


def _point(rows: list[tuple[float, float]]) -> Point:
    values = [y for _, y in rows]
    return Point(rows[-1][0], math.fsum(values) / len(values), min(values), max(values))


def _merged(a: Point, b: Point) -> Point:
    return Point(b.x, (a.y + b.y) / 2, min(a.low, b.low), max(a.high, b.high))
