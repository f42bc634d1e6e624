"""A Ray of this process' own; what it starts ends with it, whatever ends it.

Ray's agents are ended by their raylet when it ends by itself. One that is killed cannot, and its agents then try for a
minute to tell a GCS that is gone (`ray/_private/process_watcher.py`, Ray 2.60). A raylet is killed with its driver,
by `ray.shutdown` where it needs more than a second on a machine under load, and a start that is interrupted may leave
all. So this process ends them, and where it is killed itself another does: this file as a program, which waits for it.
"""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import psutil

GRACE_S = 3.0
"""So long may what Ray has told to end take to do so."""
GONE_S = 5.0
"""So long may one that was killed take to be gone: it may hang in the kernel."""
POLL_S = 0.05


@contextmanager
def local_ray(**options: Any) -> Iterator[None]:
    """Starts Ray by `ray.init` with these options. At the end it is shut down; what runs `GRACE_S` later is killed.

    Only descendants of the Ray processes that were started here are touched.
    """
    import ray

    before = set(psutil.Process().children())
    package = str(Path(ray.__file__).parent)
    try:
        ray.init(address="local", **options)
        with _kept_by_another(_started_by_ray(before, package)):
            yield
    finally:
        started = _started_by_ray(before, package)
        try:
            ray.shutdown()
        finally:
            end(started)


def end(processes: Iterable[psutil.Process], grace_s: float = GRACE_S) -> None:
    """Tells the processes to end; kills what runs `grace_s` later, of them and of what they have started meanwhile."""
    running = {process for process in processes if _runs(process)}
    for process in running:
        with suppress(psutil.Error):  # gone meanwhile
            process.terminate()
    deadline = time.monotonic() + grace_s
    while running and time.monotonic() < deadline:
        time.sleep(POLL_S)
        running = {process for process in running | _children(running) if _runs(process)}
    for process in running:
        with suppress(psutil.Error):
            process.kill()
    deadline = time.monotonic() + GONE_S
    while any(_runs(process) for process in running) and time.monotonic() < deadline:
        time.sleep(POLL_S)


def _started_by_ray(before: set[psutil.Process], package: str) -> set[psutil.Process]:
    found: set[psutil.Process] = set()
    for process in set(psutil.Process().children()) - before:
        with suppress(psutil.Error):
            if any(part.startswith(package) for part in process.cmdline()):
                found.add(process)
    return found | _children(found)


def _children(processes: Iterable[psutil.Process]) -> set[psutil.Process]:
    found: set[psutil.Process] = set()
    for process in processes:
        with suppress(psutil.Error):
            found.update(process.children(recursive=True))
    return found


def _runs(process: psutil.Process) -> bool:
    with suppress(psutil.Error):  # `psutil.wait_procs` would wait for a zombie that nobody reaps
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    return False


@contextmanager
def _kept_by_another(processes: Iterable[psutil.Process]) -> Iterator[None]:
    """Until the end of the block, or of this process, a process of its own session waits to end `processes`."""
    null = subprocess.DEVNULL
    keeper = subprocess.Popen(
        [sys.executable, __file__], stdin=subprocess.PIPE, stdout=null, stderr=null, start_new_session=True
    )
    assert keeper.stdin is not None
    known = [(process.pid, process.create_time()) for process in processes]
    keeper.stdin.write(json.dumps(known).encode() + b"\n")
    keeper.stdin.flush()
    try:
        yield
    finally:
        keeper.kill()  # this process lives, and ends them itself
        keeper.wait()
        keeper.stdin.close()


def _keep() -> None:
    known = json.loads(sys.stdin.readline())
    sys.stdin.read()  # until the other end is gone
    processes = []
    for pid, created_s in known:
        with suppress(psutil.Error):
            process = psutil.Process(pid)
            if process.create_time() == created_s:
                processes.append(process)
    end(processes)


if __name__ == "__main__":
    _keep()
