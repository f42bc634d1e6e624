"""Processor seconds by thread of this process and by part of the Ray below it, from /proc (Linux).

Example::

    before = processor_seconds()
    ...
    print(since(before))       # {"engine thread": 3.1, "event loop": 0.8, "env hosts": 1.9, ...}
"""

from __future__ import annotations

import os
import threading
from pathlib import Path

_TICK_S = 1 / os.sysconf("SC_CLK_TCK")
_PARTS = (("VLLM::", "engine process"), ("ray::EnvHost", "env hosts"), ("ray::Retrieval", "retrieval"))
_DAEMONS = ("/ray/", "ray::")
_THREADS = {"vllm-engine": "engine thread", "vllm-client": "engine client", "MainThread": "event loop"}


def processor_seconds() -> dict[str, float]:
    """Since each began; children that have ended are counted with whoever waited for them."""
    found: dict[str, float] = {}

    def add(name: str, seconds: float) -> None:
        found[name] = found.get(name, 0.0) + seconds

    names = {thread.native_id: thread.name for thread in threading.enumerate()}
    for entry in os.listdir("/proc/self/task"):
        name = names.get(int(entry), "")
        known = _THREADS.get(name, "ledger and other Python threads" if name else "Ray's own threads here")
        known = "threads of envs" if name.startswith("env_") else known
        add(known, sum(_ticks(f"/proc/self/task/{entry}/stat")[:2]) * _TICK_S)
    children = children_of_all()
    waiting = [(child, "") for child in children.get(os.getpid(), [])]
    for process, above in waiting:
        part = above if above not in ("", "Ray's daemons") else _part(process) or above
        add(part or "sandbox", sum(_ticks(f"/proc/{process}/stat")) * _TICK_S)
        waiting += [(child, part) for child in children.get(process, [])]
    return found


def since(before: dict[str, float]) -> dict[str, float]:
    """What has been spent since `before`, most first."""
    now = processor_seconds()
    spent = {name: seconds - before.get(name, 0.0) for name, seconds in now.items()}
    return dict(sorted(spent.items(), key=lambda item: -item[1]))


def _part(process: int) -> str:
    try:
        command = Path(f"/proc/{process}/cmdline").read_bytes().decode(errors="replace")
    except OSError:  # ended meanwhile
        return ""
    known = next((name for start, name in _PARTS if command.startswith(start)), "")
    return known or ("Ray's daemons" if any(mark in command for mark in _DAEMONS) else "")


def _ticks(path: str) -> list[int]:
    """User, system, and those two of the children that were waited for."""
    try:
        fields = Path(path).read_text().rpartition(")")[2].split()
    except OSError:  # ended meanwhile
        return [0, 0, 0, 0]
    return [int(field) for field in fields[11:15]]


def children_of_all() -> dict[int, list[int]]:
    """Process -> its children, over the whole machine."""
    children: dict[int, list[int]] = {}
    for entry in os.listdir("/proc"):
        if entry.isdigit():
            try:
                parent = int(Path(f"/proc/{entry}/stat").read_text().rpartition(")")[2].split()[1])
            except OSError:  # ended meanwhile
                continue
            children.setdefault(parent, []).append(int(entry))
    return children
