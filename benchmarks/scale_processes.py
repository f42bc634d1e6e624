"""Processor time and memory of a local Ray by role, sampled from a process of its own, so that the measuring is not
part of what is measured. Linux.

Roles go by the title that Ray gives an actor's process. `machine_s` counts every process of the machine, ours or not.

Example::

    with sampled(every_s=1.0) as samples:       # of this process and all below it
        ...
    print(spent(samples, began_s, ended_s))     # {"driver": 3.1, "feed": 1.2, "queue": 2.2, "workers": 80.4, ...}

python benchmarks/scale_processes.py PID SECONDS    # one JSON line a sample, until its input ends
"""

from __future__ import annotations

import json
import select
import subprocess
import sys
import tempfile
import time
from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

DRIVER, WORKERS, FEED, QUEUE, CONSUMER = "driver", "workers", "feed", "queue", "consumer"
GCS, RAYLET, AGENTS, IDLE, MEASURING = "GCS", "raylet", "Ray's agents", "idle workers", "measuring"
_TITLES = (
    ("ray::RolloutActor", WORKERS), ("ray::FeedActor", FEED), ("ray::_BufferActor", QUEUE), ("ray::Consumer", CONSUMER),
    ("ray::IDLE", IDLE), ("ray::DashboardAgent", AGENTS), ("ray::RuntimeEnvAgent", AGENTS), ("ray::", "other actors"),
)  # fmt: skip
_UNSETTLED = (IDLE, "other actors", AGENTS)
"""A process may still become something else: an idle worker an actor, a fork the program that it will run."""
_MEMORY_EVERY = 10
"""Samples between two looks at memory, which cost more."""
_END_S = 30.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Sample:
    """At one moment. Seconds of processor time are since each process began; one that has ended is left out."""

    unix_s: float
    cpu_s: dict[str, float]
    """By role."""
    processes: dict[str, int]
    pss_mb: dict[str, float]
    """Proportional set size by role: shared pages once. Empty in samples that did not look."""
    machine_s: float
    """Busy time of all cores together."""
    machine_free_mb: float


@contextmanager
def sampled(*, every_s: float) -> Iterator[list[Sample]]:
    """The list is filled when the block ends."""
    import os

    samples: list[Sample] = []
    with tempfile.TemporaryFile("w+") as written:
        process = subprocess.Popen(
            [sys.executable, str(Path(__file__).resolve()), str(os.getpid()), str(every_s)],
            stdin=subprocess.PIPE,
            stdout=written,
        )
        try:
            yield samples
        finally:
            assert process.stdin is not None
            process.stdin.close()  # which ends it, as the end of this process would
            try:
                process.wait(_END_S)
            finally:
                process.kill()
        written.seek(0)
        samples += [Sample(**json.loads(line)) for line in written if line.endswith("\n")]


def spent(samples: Sequence[Sample], began_s: float, ended_s: float) -> dict[str, float]:
    """Processor seconds of each role between two moments (Unix time), "machine" and "wall" included.

    Taken between the samples next to them inside; raises `ValueError` when there are not two.
    """
    inside = [sample for sample in samples if began_s <= sample.unix_s <= ended_s]
    if len(inside) < 2:
        raise ValueError(f"{len(inside)} samples in {ended_s - began_s:.1f} s; sample more often, or measure longer")
    first, last = inside[0], inside[-1]
    roles = {role: seconds - first.cpu_s.get(role, 0.0) for role, seconds in last.cpu_s.items()}
    return roles | {"machine": last.machine_s - first.machine_s, "wall": last.unix_s - first.unix_s}


def peak_memory_mb(samples: Sequence[Sample]) -> dict[str, float]:
    """Of each role, and of "all" at one moment."""
    peak: dict[str, float] = {}
    for sample in samples:
        for role, megabytes in sample.pss_mb.items():
            peak[role] = max(peak.get(role, 0.0), megabytes)
        if sample.pss_mb:
            peak["all"] = max(peak.get("all", 0.0), sum(sample.pss_mb.values()))
    return peak


def _role(command: Sequence[str]) -> str:
    title = command[0] if command else ""
    for start, role in _TITLES:
        if title.startswith(start):
            return role
    if "gcs_server" in title:
        return GCS
    if title.endswith("/raylet"):
        return RAYLET
    if any(Path(part).name == Path(__file__).name for part in command[:3]):
        return MEASURING
    return AGENTS


def _watch(parent_pid: int, every_s: float) -> None:
    import psutil

    parent = psutil.Process(parent_pid)
    known: dict[psutil.Process, str] = {}
    for number in range(10**9):
        cpu_s: defaultdict[str, float] = defaultdict(float)
        processes: Counter[str] = Counter()
        pss_mb: defaultdict[str, float] = defaultdict(float)
        for process in [parent, *parent.children(recursive=True)]:
            try:
                role = known.get(process, AGENTS)
                if role in _UNSETTLED:
                    role = DRIVER if process == parent else _role(process.cmdline())
                    known[process] = role
                times = process.cpu_times()
                cpu_s[role] += times.user + times.system
                processes[role] += 1
                if number % _MEMORY_EVERY == 0:
                    pss_mb[role] += process.memory_full_info().pss / 2**20
            except (psutil.NoSuchProcess, psutil.AccessDenied):
                continue
        whole = psutil.cpu_times()
        idle_s = whole.idle + getattr(whole, "iowait", 0.0)
        sample = Sample(
            unix_s=time.time(),
            cpu_s=dict(cpu_s),
            processes=dict(processes),
            pss_mb=dict(pss_mb),
            machine_s=sum(whole[: whole._fields.index("steal")]) - idle_s,
            machine_free_mb=psutil.virtual_memory().available / 2**20,
        )
        print(json.dumps(asdict(sample)), flush=True)
        if select.select([sys.stdin], [], [], every_s)[0]:  # its end
            return


if __name__ == "__main__":
    if len(sys.argv) != 3:
        sys.exit((__doc__ or "").strip().splitlines()[-1])
    _watch(int(sys.argv[1]), float(sys.argv[2]))
