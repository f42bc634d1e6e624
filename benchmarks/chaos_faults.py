"""What is broken when: faults drawn from a seed, and how each is done to a cluster.

A moment is a share of the run: 0 to 0.5 while episodes are recorded, 0.5 to 1 while the student goes on learning, 1
from the evaluation on. A fault whose target is not there at its moment waits for it; one whose target never comes is
told as not done.

Example::

    for fault in draw(random.Random(7), count=3):
        print(fault)                             # 0.31 network: a from head for 6 s
"""

from __future__ import annotations

import random
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path

import psutil

from benchmarks.chaos_cluster import HEAD, ChaosCluster, title

PROCESSES = {
    "rollout worker": "ray::RolloutActor",
    "engine": "VLLM::",
    "env host": "ray::EnvHost",
    "retrieval": "ray::RetrievalActor",
    "queue": "ray::_BufferActor",
    "feed": "ray::FeedActor",
    "learner rank": "ray::RankActor",
}
"""Kind -> how the title of its process begins."""
KINDS = ("node", "raylet", *PROCESSES, "driver", "network", "disk")
WHILE_LEARNING = ("learner rank", "queue")
"""May come at any time of the first stage; others of the rollout's processes only while episodes are left."""
ENGINE_AT = 1.0
ENGINE_EVERY = 5


@dataclass(frozen=True, slots=True, kw_only=True)
class Fault:
    """One that is drawn."""

    at: float
    """Moment, as a share of the run."""
    kind: str
    host: str = ""
    """Of a node or a raylet; one end of a network that is cut."""
    other: str = ""
    """The other end."""
    seconds: float = 0.0
    """Until a network heals or a disk is freed."""
    choice: float = 0.0
    """In [0, 1): which of several processes."""

    def __str__(self) -> str:
        where = f": {self.host}" if self.host else ""
        where += f" from {self.other}" if self.other else ""
        return f"{self.at:.2f} {self.kind}{where}" + (f" for {self.seconds:.0f} s" if self.seconds else "")


def draw(rng: random.Random, kinds: Sequence[str], workers: Sequence[str]) -> list[Fault]:
    """One fault of each of `kinds`, in the order of their moments."""
    return sorted((_drawn(rng, kind, workers) for kind in kinds), key=lambda fault: fault.at)


def kinds_of_run(seed: int, count: int) -> list[str]:
    """Of the run with that seed: runs that follow each other go through all kinds in turn, in an order that is drawn.
    Of every `ENGINE_EVERY` runs one has an engine, as an evaluation is the longest of stages."""
    others = [kind for kind in KINDS if kind != "engine"]
    engine = seed % ENGINE_EVERY == ENGINE_EVERY - 1
    first = seed * count - seed // ENGINE_EVERY
    chosen = ["engine"] if engine else []
    place = first
    while len(chosen) < count:
        order = random.Random(place // len(others)).sample(others, len(others))
        kind = order[place % len(others)]
        if kind not in chosen:
            chosen.append(kind)
        place += 1
    return chosen


def _drawn(rng: random.Random, kind: str, workers: Sequence[str]) -> Fault:
    choice, host = rng.random(), rng.choice(list(workers))
    if kind == "engine":
        return Fault(at=ENGINE_AT, kind=kind, choice=choice)
    latest = 0.95 if kind in (*WHILE_LEARNING, "driver", "node", "raylet", "network") else 0.45
    at = rng.uniform(0.02, latest)
    if kind in ("node", "raylet"):
        return Fault(at=at, kind=kind, host=host)
    if kind == "network":
        other = rng.choice([each for each in (HEAD, *workers) if each != host])
        # Half of them so short that nobody is given up, half so long that a node is.
        seconds = rng.uniform(2, 6) if rng.random() < 0.5 else rng.uniform(20, 30)
        return Fault(at=at, kind=kind, host=host, other=other, seconds=seconds)
    if kind == "disk":
        return Fault(at=at, kind=kind, seconds=rng.uniform(3, 8))
    return Fault(at=at, kind=kind, choice=choice)


def targets(fault: Fault, cluster: ChaosCluster, driver: int, *, but: Collection[int] = ()) -> list[psutil.Process]:
    """The processes that a fault kills; none for one that kills nothing. `but`: see `of_kind`."""
    if fault.kind == "driver":
        return [each for each in cluster.processes(HEAD) if each.pid == driver]
    if fault.kind == "node":
        return cluster.processes(fault.host)
    if fault.kind == "raylet":
        return [each for each in cluster.processes(fault.host) if Path(title(each).split(" ")[0]).name == "raylet"]
    if fault.kind in PROCESSES:
        found = of_kind(fault.kind, cluster, but=but)
        return [found[int(fault.choice * len(found))]] if found else []
    return []


def of_kind(kind: str, cluster: ChaosCluster, *, but: Collection[int] = ()) -> list[psutil.Process]:
    """Processes of that role, but for those with these ids."""
    return [each for each in cluster.processes() if each.pid not in but and title(each).startswith(PROCESSES[kind])]
