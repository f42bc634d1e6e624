"""Writing a report: `write_report` for the command, `reported` around a job.

A job leaves its page whether it ended well, failed or was interrupted. A page that cannot be made is one line, and
never what a job fails of.

Example::

    with reported(folder.path), distill_view(config, folder) as view:
        ...the job...
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from launch.report.run_files import ReportError, RunFiles, find
from launch.report.settings import text_without_secrets
from rollout.storage import FolderStorage, open_storage

REPORT = "report.html"


def write_report(
    place: str | Path,
    out: str | Path | None = None,
    data: str | Path | None = None,
    *,
    ledgers: str | Path | None = None,
) -> str:
    """Makes the page of a run, a collection, an evaluation or a ledger, and returns where it is.

    `out`: a file; without it `report.html` in the place itself. `data`: a file for the figures as JSON, too. `ledgers`:
    where the run's ledgers are, when that is elsewhere.
    Raises `ReportError` for a place where there is nothing, and `OSError` where nothing can be written.
    """
    from launch.report.figures import gather
    from launch.report.page import html_page

    files = find(place, ledgers=ledgers)
    figures = gather(files)
    page = html_page(figures)
    if data is not None:
        _write(Path(data), (json.dumps(figures.to_json(), indent=1, default=str) + "\n").encode("utf-8", "replace"))
    if out is not None:
        _write(Path(out), page)
        return str(out)
    return _leave(files, page)


@contextmanager
def reported(
    place: str | Path, *, say: Callable[[str], None] = print, ledgers: str | Path | None = None
) -> Iterator[None]:
    """Around a job on a run's folder or bucket: leaves its report however it ends. Raises nothing of its own.

    It goes around the job's view, so that `status.json` says already how it ended. A report is left as it is when the
    job ends well and gave no new results.
    """
    before = _results_ns(place)
    try:
        yield
    except BaseException:
        leave_report(place, say=say, ledgers=ledgers)
        raise
    if before is None or before != _results_ns(place):
        leave_report(place, say=say, ledgers=ledgers)


def leave_report(place: str | Path, *, say: Callable[[str], None] = print, ledgers: str | Path | None = None) -> None:
    """`write_report`, and one line of where it is or why there is none."""
    try:
        say(f"report: {write_report(place, ledgers=ledgers)}")
    except Exception as error:  # whatever it is, the job itself is done
        line = text_without_secrets(" ".join(str(error).split()))[:300]
        say(f"no report could be made: {line or type(error).__name__}")


def _leave(files: RunFiles, page: bytes) -> str:
    if files.folder is not None:
        path = files.folder / REPORT
        _write(path, page)
        return str(path)
    files.storage.replace(REPORT, page)
    place, mark, options = files.place.partition("?")
    return f"{place}/{REPORT}{mark}{options}"


def _write(path: Path, data: bytes) -> None:
    """Atomically, so that a reader sees the old file or the new one."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        temporary.write_bytes(data)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def _results_ns(place: str | Path) -> int | None:
    """When the results that a report is beside were written; None where either is missing."""
    if not isinstance(open_storage(place), FolderStorage) or not (Path(place) / REPORT).is_file():
        return None
    try:
        return (Path(place) / "results.json").stat().st_mtime_ns
    except OSError:
        return None


__all__ = ["REPORT", "ReportError", "leave_report", "reported", "write_report"]
