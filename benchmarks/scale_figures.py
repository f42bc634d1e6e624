"""What the episodes of a collection say about it, by their begin and end alone: how many were under way at once, when
it was in its steady state, how many ended a second.

The steady window begins when as many episodes have ended as are `SETTLED` of the places (the first ones are begun in
the middle: `scale_world.tasks`), and ends when `BEGUN` of all have begun: from then on places are empty now and then.
Ramp-up and drain are outside of it.

Example::

    times = [(started_s, ended_s), ...]
    window = steady(times, at_once=10_000)
    print(window.rate, peak(times))
"""

from __future__ import annotations

import heapq
from bisect import bisect_left, bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate

SETTLED = 0.25
BEGUN = 0.95
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


def pure(lengths_s: Sequence[float], places: int) -> Times:
    """When episodes of these lengths begin and end where nothing but them takes time: in order, each in the place that
    is free first."""
    free = [0.0] * places
    times = []
    for length_s in lengths_s:
        begin = heapq.heappop(free)
        times.append((begin, begin + length_s))
        heapq.heappush(free, begin + length_s)
    return times


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
    begins, ends = sorted(begin for begin, _ in times), sorted(end for _, end in times)
    settled = max(1, round(SETTLED * at_once))
    last = round(BEGUN * len(times)) - 1
    if len(times) < settled or begins[last] <= ends[settled - 1]:
        raise ValueError(
            f"{len(times)} episodes, {at_once} at once at most: it is never in a steady state; give two for each place"
        )
    began_s, ended_s = ends[settled - 1], begins[last]
    count = bisect_right(ends, ended_s) - bisect_left(ends, began_s)
    return Window(began_s=began_s, ended_s=ended_s, episodes=count)
