"""Where numbers go on this machine: `JsonLines` (a file, one line a step) and `ConsoleLines` (a terminal).

Example::

    sink = JsonLines(Path("metrics.jsonl"), after_step=0)
    sink.write(progress); sink.close()
"""

from __future__ import annotations

import json
import math
import os
import time
from pathlib import Path
from typing import Any, Protocol

from learner.base import Progress
from learner.full_disk import patiently
from learner.tracking.record import figures, record


class Sink(Protocol):
    """Takes a step's numbers."""

    def write(self, progress: Progress) -> None: ...

    def close(self) -> None: ...


class JsonLines:
    """One JSON object a step, written at once. `after_step`: lines of later steps, of a run that was cut, are removed,
    and so is a last line that was torn."""

    def __init__(self, path: Path, *, after_step: int) -> None:
        self._path = path
        kept = [line for line in _whole_lines(path) if line["step"] <= after_step]
        partial = path.with_name(f".{path.name}")
        partial.write_text("".join(json.dumps(line) + "\n" for line in kept))
        os.replace(partial, path)
        self._file = open(path, "a")  # noqa: SIM115  (closed by `close`)

    def write(self, progress: Progress) -> None:
        # JSON knows no NaN.
        numbers = {name: value if math.isfinite(value) else None for name, value in record(progress).items()}
        self._file.write(json.dumps({**numbers, "unix_s": round(time.time(), 3)}) + "\n")
        patiently(self._file.flush)

    def close(self) -> None:
        self._file.close()


def _whole_lines(path: Path) -> list[dict[str, Any]]:
    lines = []
    for text in path.read_text().splitlines() if path.exists() else ():
        try:
            lines.append(json.loads(text))
        except json.JSONDecodeError:
            break
    return lines


class ConsoleLines:
    """A line of figures every `every_s`, and the last one."""

    def __init__(self, *, every_s: float, console: Any = None) -> None:
        from rich.console import Console

        self._console = console or Console(highlight=False, soft_wrap=True)
        self._every_s = every_s
        self._shown_at_s = -math.inf
        self._unshown: Progress | None = None

    def write(self, progress: Progress) -> None:
        self._unshown = progress
        if time.monotonic() - self._shown_at_s >= self._every_s:
            self._show()

    def close(self) -> None:
        self._show()

    def _show(self) -> None:
        if self._unshown is None:
            return
        self._console.print(
            "; ".join(f"{name} {value}" for name, value in figures(self._unshown).items()), markup=False
        )
        self._shown_at_s, self._unshown = time.monotonic(), None
