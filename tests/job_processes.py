"""Jobs that tests start as processes of their own, and what is left of them.

What belongs to a job is known by its session, and by a mark in the environment: Ray's workers and our servers inherit
both, a process that starts a session of its own keeps the mark, and Ray's agents, whose titles are written over their
environment, keep the session.
"""

from __future__ import annotations

import os
import subprocess
import time
from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import IO

import psutil

ROOT = Path(__file__).resolve().parent.parent
MARK = "APPRENTICE_TEST_RUN"
_sessions: defaultdict[str, set[int]] = defaultdict(set)


def start_marked(
    command: Sequence[str],
    mark: Path,
    *,
    output: int | IO[bytes] = subprocess.PIPE,
    stdin: int | None = None,
    environment: Mapping[str, str] | None = None,
) -> subprocess.Popen[str]:
    """The command, in the repository's folder; both of its outputs go to `output`."""
    process = subprocess.Popen(
        command, cwd=ROOT, env={**os.environ, **(environment or {}), MARK: str(mark)}, stdin=stdin,
        stdout=output, stderr=subprocess.STDOUT, text=True, start_new_session=True,
    )  # fmt: skip
    _sessions[str(mark)].add(process.pid)
    return process


def processes_of(mark: Path) -> list[psutil.Process]:
    """Those that live, zombies not."""
    return [process for process in psutil.process_iter() if process.pid != os.getpid() and _is_of(process, str(mark))]


def assert_nothing_left(mark: Path, within_s: float = 30.0) -> None:
    deadline = time.monotonic() + within_s
    while left := processes_of(mark):
        assert time.monotonic() < deadline, [title(process)[:120] for process in left]
        time.sleep(0.2)


def title(process: psutil.Process) -> str:
    """Its command line, or "" where it is gone."""
    try:
        return " ".join(process.cmdline()).strip()
    except psutil.Error:
        return ""


def _is_of(process: psutil.Process, mark: str) -> bool:
    try:
        if process.status() == psutil.STATUS_ZOMBIE:
            return False
        return os.getsid(process.pid) in _sessions[mark] or process.environ().get(MARK) == mark
    except (psutil.NoSuchProcess, psutil.AccessDenied, ProcessLookupError):
        return False
