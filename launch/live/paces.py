"""How things go over time: `Pace` (how fast something grows of late, and when it will be done) and `Trail` (a curve of
the whole run in a bounded number of points). Plain Python, fed with clock times; they ask no clock.

Example::

    pace = Pace()
    pace.add(0, at_s=0.0); pace.add(50, at_s=10.0)
    pace.per_s, pace.left_s(100)                      # 5.0, 20.0
    trail = Trail(); trail.add(3.2); trail.points     # (3.2,)
"""

from __future__ import annotations

import math
from collections import deque

LEAST_S = 5.0
"""A pace is told after so long."""
WINDOW_S = 120.0
SHARE = 0.2
"""What is "of late": so much of the time that has passed, but `WINDOW_S` at least."""


class Pace:
    """Of a number that only grows. One that shrinks (something was begun again) starts a new pace."""

    def __init__(self) -> None:
        self._seen: deque[tuple[float, float]] = deque()
        self._began_s = self._last_s = 0.0
        self._last = 0.0

    def add(self, done: float, *, at_s: float) -> None:
        if not self._seen or done < self._last:
            self._seen = deque([(at_s, done)])
            self._began_s = at_s
        window_s = max(WINDOW_S, SHARE * (at_s - self._began_s))
        if at_s - self._seen[-1][0] >= window_s / 100:
            self._seen.append((at_s, done))
        while len(self._seen) > 2 and at_s - self._seen[1][0] >= window_s:
            self._seen.popleft()
        self._last, self._last_s = done, at_s

    @property
    def per_s(self) -> float | None:
        """None until it is known."""
        if not self._seen or self._last_s - self._seen[0][0] < LEAST_S:
            return None
        at_s, done = self._seen[0]
        return (self._last - done) / (self._last_s - at_s)

    def left_s(self, total: float) -> float | None:
        """Until `total` is reached; None while nobody can say."""
        if self._seen and self._last >= total:
            return 0.0
        rate = self.per_s
        return (total - self._last) / rate if rate else None


class Trail:
    """The means of equal parts of all that was added, at most `2 * least`, at least `least` once there are so many."""

    def __init__(self, least: int = 50) -> None:
        self._least, self._each = least, 1
        self._means: list[float] = []
        self._part: list[float] = []

    def add(self, value: float) -> None:
        """What is not finite is left out: a curve has no place for it."""
        if not math.isfinite(value):
            return
        self._part.append(value)
        if len(self._part) < self._each:
            return
        self._means.append(sum(self._part) / len(self._part))
        self._part = []
        if len(self._means) == 2 * self._least:
            self._means = [(a + b) / 2 for a, b in zip(self._means[::2], self._means[1::2], strict=True)]
            self._each *= 2

    @property
    def points(self) -> tuple[float, ...]:
        """Oldest first; the last one is the newest part, complete or not."""
        return (*self._means, *([sum(self._part) / len(self._part)] if self._part else []))
