"""The order in which trajectories arrived, on disk: a learner that starts again takes them in the same order.

The first pass trains on trajectories as they come, and a live stream never comes in the same order twice. With the log,
a run that was killed takes exactly the steps that it would have taken: first what had arrived, as it had arrived, then
what is new. It holds keys alone; the trajectories come again from the source, in whatever order.

Example::

    log = ArrivalLog(folder / "arrivals.jsonl", resume=True)
    for arrival in log.in_order(arrivals):      # those whose turn it is
        ...
    log.give_up_waiting()                       # the source has brought all that it had
"""

from __future__ import annotations

import json
import os
from collections import Counter, deque
from collections.abc import Iterable
from pathlib import Path
from typing import Generic, Protocol, TypeVar

from learner.full_disk import patiently


class Keyed(Protocol):
    """Something that arrived."""

    @property
    def key(self) -> str: ...


_Arrival = TypeVar("_Arrival", bound=Keyed)


class ArrivalLog(Generic[_Arrival]):
    """For one thread. `resume`: whether what is in the file counts; else it starts empty."""

    def __init__(self, path: Path, *, resume: bool) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        before = _keys(path) if resume else []
        partial = path.with_name(f".{path.name}")
        partial.write_text("".join(json.dumps(key) + "\n" for key in before))
        os.replace(partial, path)
        self._file = open(path, "a")  # noqa: SIM115  (closed by `close`)
        self._expected = deque(before)
        self._left = Counter(before)
        self._held: dict[str, deque[_Arrival]] = {}
        self._new: list[_Arrival] = []

    def in_order(self, arrivals: Iterable[_Arrival]) -> list[_Arrival]:
        """What of these, and of those held back before, is to be taken now; what is new is written down."""
        for arrival in arrivals:
            if self._left[arrival.key] > 0:
                self._left[arrival.key] -= 1
                self._held.setdefault(arrival.key, deque()).append(arrival)
            else:
                self._new.append(arrival)
        ready: list[_Arrival] = []
        while self._expected and self._held.get(self._expected[0]):
            ready.append(self._held[self._expected.popleft()].popleft())
        return ready if self._expected else ready + self._take_new()

    def give_up_waiting(self) -> list[_Arrival]:
        """All that is held back, in order: whatever is missing does not come."""
        rest = [self._held[key].popleft() for key in self._expected if self._held.get(key)]
        self._expected.clear()
        self._left.clear()
        return rest + self._take_new()

    def close(self) -> None:
        self._file.close()

    def _take_new(self) -> list[_Arrival]:
        new, self._new = self._new, []
        if new:
            self._file.write("".join(json.dumps(arrival.key) + "\n" for arrival in new))
            patiently(self._file.flush)
        return new


def _keys(path: Path) -> list[str]:
    """Up to a line that was torn."""
    keys: list[str] = []
    for line in path.read_text().splitlines(keepends=True) if path.exists() else ():
        try:
            if not line.endswith("\n"):
                break
            keys.append(json.loads(line))
        except json.JSONDecodeError:
            break
    return keys
