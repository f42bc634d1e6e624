"""Where a collection of this shape would break: which of its single processes is first to fill a core when everything
grows, and what to do then.

Workers, their envs and engines grow in number; the driver, the feed, the queue, the learner's intake and the GCS are
one each, whatever the size. Their processor time grows with episodes a second and with workers, which both grow alike
when workers are added, so what they took for an episode at the largest size that was run is scaled in proportion, to
the rate that the delays allow.

Example::

    for limit in limits(run, figures): print(limit.role, limit.breaks_at)
"""

from __future__ import annotations

from dataclasses import dataclass

from benchmarks.scale_processes import AGENTS, CONSUMER, DRIVER, FEED, GCS, QUEUE, RAYLET
from benchmarks.scale_run import Figures, Run

REMEDIES = {
    QUEUE: "several queues, each with some of the workers, read in turn",
    FEED: "several collections, each with some of the tasks and workers: a `JointCollection` adds them up",
    CONSUMER: "several readers of the queue",
    DRIVER: "ask less often: progress carries a state of each worker",
    GCS: "fewer, larger workers: it knows actors and nodes, not episodes",
    RAYLET: "one a node: on a cluster it is not alone",
    AGENTS: "one a node: on a cluster they are not alone",
}
"""What to do when a process fills its core."""
ALONE = (DRIVER, FEED, QUEUE, CONSUMER, GCS)
"""One of each in a collection, however large the cluster."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Limit:
    """Of one process."""

    role: str
    cores: float
    """That it takes at the size that was run, at the rate that the delays allow."""
    breaks_at: float
    """Episodes at once at which it would take a whole core."""
    breaks_rate: float
    """Episodes a second at that size."""

    @property
    def remedy(self) -> str:
        return REMEDIES[self.role]


def limits(run: Run, figures: Figures) -> list[Limit]:
    """Of the processes that are alone, the first to break first."""
    found = []
    for role in ALONE:
        cores = max(figures.ms_per_episode(role) / 1000 * figures.limit, 1e-6)
        breaks = {"breaks_at": run.at_once / cores, "breaks_rate": figures.limit / cores}
        found.append(Limit(role=role, cores=cores, **breaks))
    return sorted(found, key=lambda limit: limit.breaks_at)


@dataclass(frozen=True, slots=True, kw_only=True)
class Storage:
    """What `times` as many workers would do to the ledger and the object store."""

    shards_per_s: float
    megabytes_per_s: float
    keys_s: float
    """For a resumed run to read the keys of as many shards as `times` such collections leave, where nothing has
    compacted them."""
    queue_mb: float
    """A full queue, as Arrow tables; it does not grow."""


def storage(run: Run, figures: Figures, *, times: float, queue_capacity: int) -> Storage:
    rate = times * figures.limit / run.episodes
    return Storage(
        shards_per_s=rate * run.shards,
        megabytes_per_s=rate * run.ledger_bytes / 2**20,
        keys_s=times * run.keys_s,
        queue_mb=queue_capacity * run.row_bytes / 2**20,
    )
