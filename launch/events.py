"""`events.jsonl` of a run: what went wrong on the way, and how long it took to be right again. One line an event.

A job that rides out a fault looks like one that had none; this record is how its user learns of it. Whoever sees a
fault tells it (`launch.actor_watch` most of them); the report and the terminal show it. A record that cannot be written
(the disk is full) is kept and written with the next event: it never ends a job.

Example::

    events = EventRecord(folder, say=view.say)
    events.tell("env host", "an env host died on 10.0.0.7 and came back", away_s=3.2)
    read_events(folder)[-1].away_s                       # 3.2
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from launch.patient_lines import PatientLines, lines_of

NAME = "events.jsonl"


@dataclass(frozen=True, slots=True, kw_only=True)
class Event:
    """Something that went wrong, and is right again or was given up."""

    unix_s: float
    """When it was told."""
    what: str
    """Of which part: "node", "rollout worker", "env host", "retrieval", "queue", "feed", "learner", "job", "disk"."""
    words: str
    """For people, in a sentence."""
    away_s: float | None = None
    """How long that part was away; None where nobody can tell, or where it has not come back."""
    returned: bool = False
    """It is right again, and was told of before when it went wrong."""


class EventRecord:
    """Appends to `folder`/events.jsonl; for any thread. `say` is told each event in words."""

    def __init__(self, folder: Path, *, say: Callable[[str], None] = lambda line: None) -> None:
        self.folder, self._lines, self._say = folder, PatientLines(folder / NAME), say

    def tell(self, what: str, words: str, *, away_s: float | None = None, returned: bool = False) -> None:
        away_s = None if away_s is None else round(away_s, 1)
        event = Event(unix_s=round(time.time(), 1), what=what, words=words, away_s=away_s, returned=returned)
        self._lines.add(asdict(event))
        self._say(words if away_s is None else f"{words} (away for {away_s:g} s)")

    def close(self) -> None:
        """A last attempt to write what could not be written."""
        self._lines.close()


def read_events(folder: Path) -> list[Event]:
    """Of all jobs on that folder, in order; lines that were torn are passed over."""
    return events_of(lines_of(folder / NAME))


def events_of(rows: Iterable[Mapping[str, Any]]) -> list[Event]:
    """Of the lines of an events.jsonl; those of another shape are passed over."""
    found = []
    for row in rows:
        try:
            found.append(Event(**row))
        except TypeError:
            continue
    return sorted(found, key=lambda event: event.unix_s)
