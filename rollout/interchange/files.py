"""Files as records, and records as files: JSON, JSON lines, Parquet and text in; JSON lines out, whole or not at all.

One record is one row of a table, one line, one element of a JSON list, one value of a JSON object of runs (its name
becomes `index`), one run of a text log, or the whole document. No formats in here beyond that.

Example::

    for row, record in records(path): ...        # record may be `Unreadable`
    with whole_file(path) as file: file.write("...")
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import uuid
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from rollout.interchange.recorded import InterchangeError

_ROWS_AT_A_TIME = 256
_TEXT = (".txt", ".log")
_RUN = re.compile(r"^Question: ", re.MULTILINE)
_TRIAL = re.compile(r"^BEGIN TRIAL (\d+)|^-+ BEGIN (\w+) AGENTS -+", re.MULTILINE)


@dataclass(frozen=True, slots=True)
class Unreadable:
    """A line that is no JSON."""

    reason: str


def records(path: Path) -> Iterator[tuple[int, Any]]:
    """(row from 1, record). Raises `InterchangeError` for a file that is not there or cannot be read as what it says
    it is."""
    if not path.is_file():
        what = "is a folder; name one file of it" if path.is_dir() else "is not there"
        raise InterchangeError(f"{path} {what}")
    suffix = path.suffix.lower()
    try:
        if suffix == ".parquet":
            yield from _parquet(path)
        elif suffix in _TEXT:
            yield from enumerate(_text_runs(path.read_text(encoding="utf-8")), start=1)
        elif suffix in (".json", ".traj"):
            yield from _json(path)
        else:
            yield from _lines(path)
    except UnicodeDecodeError as error:
        raise InterchangeError(f"{path} is no UTF-8 text: {error}") from error
    except OSError as error:
        raise InterchangeError(f"{path} cannot be read: {error}") from error


def _lines(path: Path) -> Iterator[tuple[int, Any]]:
    with open(path, encoding="utf-8-sig") as file:
        for row, line in enumerate(file, start=1):
            if not line.strip():
                continue
            try:
                yield row, json.loads(line)
            except (ValueError, RecursionError) as error:
                yield row, Unreadable(f"{type(error).__name__}: {error}")


def _json(path: Path) -> Iterator[tuple[int, Any]]:
    try:
        document = json.loads(path.read_text(encoding="utf-8-sig"))
    except json.JSONDecodeError as error:
        if error.msg == "Extra data":  # JSON lines by another name
            yield from _lines(path)
            return
        raise InterchangeError(f"{path} is no JSON: {error}") from error
    except RecursionError as error:
        raise InterchangeError(f"{path} is nested too deeply to be read") from error
    yield from enumerate(_elements(document), start=1)


def _elements(document: Any) -> list[Any]:
    if isinstance(document, list):
        # The steps of one smolagents run are a list too: its first is the task.
        steps = document and all(isinstance(each, Mapping) for each in document)
        if steps and "task" in document[0] and any("step_number" in each for each in document):
            return [{"steps": document}]
        return document
    if isinstance(document, Mapping) and document:
        if all(isinstance(run, Mapping) and "traj" in run for run in document.values()):
            return [{"index": name, **run} for name, run in document.items()]
        data = document.get("data")
        if isinstance(data, list) and len(document) <= 3:
            return data
    return [document]


def _parquet(path: Path) -> Iterator[tuple[int, Any]]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        with pq.ParquetFile(path) as file:
            row = 0
            for batch in file.iter_batches(batch_size=_ROWS_AT_A_TIME, use_threads=False):
                for record in batch.to_pylist():
                    row += 1
                    yield row, record
    except pa.ArrowException as error:
        raise InterchangeError(f"{path} is no Parquet file that can be read: {error}") from error


def _text_runs(content: str) -> Iterator[dict[str, Any]]:
    """Runs of a text log, each from `Question:` on, with the trial and the section it stands in."""
    marks = sorted([*_RUN.finditer(content), *_TRIAL.finditer(content)], key=lambda mark: mark.start())
    trial, section = 0, ""
    for mark, following in zip(marks, [*marks[1:], None], strict=False):
        if mark.re is _TRIAL:
            if mark[1]:
                trial, section = int(mark[1]), ""
            else:
                section = mark[2].lower()
            continue
        end = following.start() if following else len(content)
        # A section's heading has a line of signs above it.
        run = re.sub(r"\n#+\s*\Z", "\n", content[mark.start() : end])
        yield {"react_log": run, "trial": trial, "section": section}


@contextlib.contextmanager
def whole_file(path: Path) -> Iterator[IO[str]]:
    """A text file that appears under `path` when the block ends well, and not at all when it does not."""
    if not path.parent.is_dir():
        raise InterchangeError(f"{path} cannot be written: there is no folder {path.parent}")
    if path.is_dir():
        raise InterchangeError(f"{path} cannot be written: it is a folder; name a file")
    temporary = path.parent / f".{path.name}-{uuid.uuid4().hex}.tmp"
    try:
        with open(temporary, "x", encoding="utf-8", errors="backslashreplace") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError as error:
        raise InterchangeError(f"{path} cannot be written: {error}") from error
    finally:
        temporary.unlink(missing_ok=True)
