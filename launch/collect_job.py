"""The stages of a collection: who does what, the run with its live figures, the closing check, the summary.

tasks x samples -> teachers -> rollout workers <-> env hosts <-> retrieval        (Ray actors)
                                    |-> ledger (Parquet)
"""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass

from envs.base import EnvError
from launch.actor_watch import ActorWatch
from launch.cluster import ClusterError, ray_cluster
from launch.collect_folder import CollectFolder
from launch.collect_summary import Summary, summarise, summary_table
from launch.config import CollectConfig
from launch.config_reading import to_plain
from launch.environment import describe_environment
from launch.joint_collection import JointCollection
from launch.live.job_views import collect_view
from launch.live.ray_metrics import metrics_url
from launch.live.view import LiveView
from launch.placement import place_collection
from launch.report import reported
from launch.spending import JobMeter
from launch.wiring import Assignment, Environments, assignments, start_collections
from launch.world import World, load_world
from rollout.collector import CollectionError
from rollout.ledger import Ledger, LedgerError
from rollout.placement import PlacementError
from rollout.spend import SpendSnapshot

GRACE_S = 20.0
"""What has begun when a job is interrupted may have so long to end: its tokens are paid."""
TROUBLE = (ClusterError, CollectionError, EnvError, LedgerError, PlacementError)


class CollectJobError(RuntimeError):
    """The collection cannot go on; what it has is kept."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """How a collection ended."""

    summary: Summary
    stopped: str
    """Why it ended before all was done; "" when it did not."""
    spent: SpendSnapshot | None
    """None where no teacher is an API, or none was asked."""

    @property
    def at_cap(self) -> bool:
        """It was the spend cap that stopped it."""
        return "spend cap" in self.stopped


def run_collection(config: CollectConfig, folder: CollectFolder, *, resumed: bool) -> Outcome:
    """Everything from tasks to `summary.json`. Raises `CollectJobError`; whatever it started is ended in any case."""
    with reported(folder.out), collect_view(config, folder) as view:
        return _run_collection(config, folder, view, resumed=resumed)


def _run_collection(config: CollectConfig, folder: CollectFolder, view: LiveView, *, resumed: bool) -> Outcome:
    started_s = time.monotonic()
    world = load_world(config, folder.index)
    tasks = world.train if config.split == "train" else world.test
    view.say(f"collection {folder.out}: recipe {config.recipe}, seed {config.seed}, {len(tasks):,} tasks")
    try:
        ledger = Ledger(folder.ledger)
        if resumed and config.compact:
            ledger.compact_if_needed()
        assigned = assignments(config, tasks, ledger)
        for each in assigned:
            view.say(f"  {each.name}: {len(each.requests):,} episodes{each.earlier() if resumed else ''}")
        if any(each.missing for each in assigned):
            stopped, spent = _collect(config, folder, world, assigned, view)
        else:
            view.say("nothing is missing")
            stopped, spent = "", None
        expected = {each.name: {request.key for request in each.requests} for each in assigned}
        summary = summarise(
            Ledger(folder.ledger), expected, rule=config.rollout.retry, curation=config.curation.build()
        )
        if summary.complete and config.compact:
            Ledger(folder.ledger).compact()
        folder.write_summary(
            {
                "recipe": config.recipe,
                "seed": config.seed,
                "minutes": round((time.monotonic() - started_s) / 60, 2),
                **summary.to_json(),
                "stopped": stopped,
                "spent": asdict(spent) if spent else None,
                "environment": describe_environment(),
                "config": to_plain(config),
            }
        )
    except (*TROUBLE, OSError) as error:
        raise CollectJobError(str(error)) from error
    view.conclude(stopped or ("" if summary.complete else summary.closing_line()))
    view.console.print(summary_table(summary))
    view.console.print(summary.curation.table("a student would be trained on"))
    if spent is not None:
        view.say(f"spent: {spent}")
    if stopped:
        view.say(f"stopped: {stopped}")
    view.say(summary.closing_line())
    if again := sum(summary.failed.values()) - summary.quarantined:
        view.say(f"the same command tries {again:,} failed episodes again")
    if summary.quarantined:
        view.say(f"{summary.quarantined:,} are quarantined: rollout.retry_quarantined=true tries them again")
    return Outcome(summary=summary, stopped=stopped, spent=spent)


def _collect(
    config: CollectConfig, folder: CollectFolder, world: World, assigned: Sequence[Assignment], view: LiveView
) -> tuple[str, SpendSnapshot | None]:
    """Why it ended early, or "", and what was spent."""
    with ray_cluster(config.cluster, variables=config.variables()) as what:
        view.say(f"Ray: {what}")
        view.connected(metrics_url())
        meter = JobMeter.start(config, folder.spend)
        placed = place_collection(config, assigned, say=view.say)
        slots = [each.slots(config) for each in assigned]
        environments = Environments.start(config, world.retriever, slots=slots, placed=placed)
        collection, _ = start_collections(
            config, environments, assigned, ledger=folder.ledger, meter=meter, placed=placed
        )
        try:
            with folder.events(view.warn) as events, ActorWatch(events), view.stage("collecting"):
                stopped = _watch(collection, meter, view)
            return stopped, meter.snapshot() if meter else None
        finally:
            collection.close()
            if meter is not None:
                meter.close()


def _watch(collection: JointCollection, meter: JobMeter | None, view: LiveView) -> str:
    """Why it ended early, or "". The first interrupt lets what is under way come to its end, for a while."""
    try:
        return _until(collection, meter, view, math.inf)
    except KeyboardInterrupt:
        view.say(
            f"interrupted: nothing more is started, what runs has {GRACE_S:g} s to end; interrupt again to stop at once"
        )
        collection.stop("interrupted")
        _until(collection, meter, view, GRACE_S)
        raise


def _until(collection: JointCollection, meter: JobMeter | None, view: LiveView, limit_s: float) -> str:
    deadline_s = time.monotonic() + limit_s
    while True:
        ended = collection.poll(timeout_s=0.5) or time.monotonic() > deadline_s
        seen = collection.progress()
        view.update(
            episodes=seen, by_policy=collection.by_name(), spent=meter.snapshot() if meter else None, last=ended
        )
        if ended:
            return seen.stopped

