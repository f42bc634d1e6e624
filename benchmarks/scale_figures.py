"""What the episodes of a collection say about it, by their begin and end alone: how many were under way at once, when
it was in its steady state, how many ended a second.

The steady window begins when `SETTLED` of the places have ended an episode (the first ones are begun in the middle:
`scale_world.tasks`), and ends when the number under way falls for good below `FULL` of the places (there is nothing
left to start). Ramp-up and drain are outside of it.

Example::

    times = [(started_s, ended_s), ...]
    window = steady(times, at_once=10_000)
    print(window.rate, peak(times))
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise

SETTLED = 0.25
FULL = 0.95
Times = Sequence[tuple[float, float]]
"""[n] (begin, end) of each episode, Unix time."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Window:
    """A stretch of a collection."""

    began_s: float
    ended_s: float
    """Both Unix time."""
    episodes: int
    """That ended in it."""

    @property
    def length_s(self) -> float:
        return self.ended_s - self.began_s

    @property
    def rate(self) -> float:
        """Episodes a second."""
        return self.episodes / self.length_s


def whole(times: Times) -> Window:
    """From the first begin to the last end."""
    return Window(began_s=min(times)[0], ended_s=max(end for _, end in times), episodes=len(times))


def under_way(times: Times) -> list[tuple[float, int]]:
    """(when, how many from then on) at each change, in order."""
    changes = sorted([(begin, 1) for begin, _ in times] + [(end, -1) for _, end in times])
    counts = accumulate(change for _, change in changes)
    return [(when, count) for (when, _), count in zip(changes, counts, strict=True)]


def peak(times: Times) -> int:
    """The most episodes that were under way at one moment."""
    return max(count for _, count in under_way(times))


def steady(times: Times, *, at_once: int) -> Window:
    """Raises `ValueError` when there was no such time: too few episodes for so many places."""
    ends = sorted(end for _, end in times)
    changes = under_way(times)
    full = [falls for (_, count), (falls, _) in pairwise(changes) if count >= FULL * at_once]
    settled = max(1, round(SETTLED * at_once))
    if len(ends) < settled or not full or full[-1] <= ends[settled - 1]:
        raise ValueError(
            f"{len(times)} episodes, {at_once} at once at most: it is never in a steady state; give at least two for "
            "each place"
        )
    began_s, ended_s = ends[settled - 1], full[-1]
    count = bisect_right(ends, ended_s) - bisect_left(ends, began_s)
    return Window(began_s=began_s, ended_s=ended_s, episodes=count)
