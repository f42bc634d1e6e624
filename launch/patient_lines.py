"""Lines of JSON that are added to a file, by a job that must not end because a disk is full: what cannot be written is
kept and written with the next line. A line that a full disk or a kill has torn is ended first, so that it spoils no
other; readers pass over lines that are not JSON.

Example::

    lines = PatientLines(folder / "metrics.jsonl")
    lines.add({"step": 1})
"""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any


class PatientLines:
    """Appends to `path`; for any thread."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._lock = threading.Lock()
        self._unwritten: list[str] = []

    def add(self, row: Mapping[str, Any]) -> None:
        """Whatever JSON does not know is taken for a mapping."""
        with self._lock:
            self._unwritten.append(json.dumps(row, default=dict) + "\n")
            self._write()

    def close(self) -> None:
        """A last attempt at what could not be written."""
        with self._lock:
            self._write()

    def _write(self) -> None:
        if not self._unwritten:
            return
        try:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            with open(self._path, "ab+") as file:
                if end := file.tell():
                    file.seek(end - 1)
                    torn = file.read(1) != b"\n"
                    file.write(b"\n" if torn else b"")
                # One by one: what a disk takes before it is full is not written again.
                while self._unwritten:
                    file.write(self._unwritten[0].encode())
                    file.flush()
                    self._unwritten.pop(0)
        except OSError:
            return


def lines_of(path: Path) -> Iterator[dict[str, Any]]:
    """What such a file holds, in order; lines that were torn are passed over."""
    for line in path.read_text(errors="replace").splitlines() if path.exists() else ():
        try:
            row = json.loads(line)
        except ValueError:
            continue
        if isinstance(row, dict):
            yield row
