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

import json
import threading
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

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


class EventRecord:
    """Appends to `folder`/events.jsonl; for any thread. `say` is told each event in words."""

    def __init__(self, folder: Path, *, say: Callable[[str], None] = lambda line: None) -> None:
        self._path, self._say = folder / NAME, say
        self._lock = threading.Lock()
        self._unwritten: list[Event] = []
        self.count = 0
        """Of this job."""

    def tell(self, what: str, words: str, *, away_s: float | None = None) -> None:
        away_s = None if away_s is None else round(away_s, 1)
        with self._lock:
            self._unwritten.append(Event(unix_s=round(time.time(), 1), what=what, words=words, away_s=away_s))
            self.count += 1
            self._flush()
        self._say(words if away_s is None else f"{words} (away for {away_s:g} s)")

    def close(self) -> None:
        """A last attempt to write what could not be written."""
        with self._lock:
            self._flush()

    def _flush(self) -> None:
        lines = "".join(json.dumps(asdict(event)) + "\n" for event in self._unwritten)
        if not lines:
            return
        try:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            # A line that a full disk or a kill has torn is ended first.
            torn = self._path.exists() and not self._path.read_bytes().endswith(b"\n") and self._path.stat().st_size
            with open(self._path, "a") as file:
                file.write(("\n" if torn else "") + lines)
        except OSError:
            return
        self._unwritten.clear()


def read_events(folder: Path) -> list[Event]:
    """Of all jobs on that folder, in order, each once; lines that were torn are passed over."""
    path = folder / NAME
    found: dict[Event, None] = {}
    for line in path.read_text(errors="replace").splitlines() if path.exists() else ():
        try:
            found[Event(**json.loads(line))] = None
        except (ValueError, TypeError):
            continue
    return sorted(found, key=lambda event: event.unix_s)
