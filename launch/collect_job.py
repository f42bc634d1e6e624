"""The stages of a collection: who does what, the run with its live figures, the closing check, the summary.

tasks x samples -> teachers -> rollout workers <-> env hosts <-> retrieval        (Ray actors)
                                    |-> ledger (Parquet)
"""

from __future__ import annotations

import time
from collections.abc import Sequence

from envs.base import EnvError
from launch.cluster import ClusterError, ray_cluster
from launch.collect_folder import CollectFolder
from launch.collect_summary import Summary, summarise, summary_table
from launch.config import CollectConfig
from launch.config_reading import to_plain
from launch.environment import describe_environment
from launch.joint_collection import JointCollection
from launch.live import LiveView
from launch.wiring import Assignment, Environments, assignments, start_collections
from launch.world import World, load_world
from rollout.collector import CollectionError
from rollout.ledger import Ledger, LedgerError
from rollout.task_feed import CollectProgress


class CollectJobError(RuntimeError):
    """The collection cannot go on; what it has is kept."""


def run_collection(config: CollectConfig, folder: CollectFolder, *, resumed: bool) -> Summary:
    """Everything from tasks to `summary.json`. Raises `CollectJobError`; whatever it started is ended in any case."""
    view = LiveView()
    started_s = time.monotonic()
    world = load_world(config, folder.index)
    tasks = world.train if config.split == "train" else world.test
    try:
        assigned = assignments(config, tasks, Ledger(folder.ledger))
        view.say(f"collection {folder.path}: recipe {config.recipe}, seed {config.seed}")
        for each in assigned:
            found = len(each.requests) - len(each.missing)
            view.say(
                f"  {each.name}: {len(each.requests):,} episodes"
                + (f", {found:,} of them recorded by an earlier job" if resumed else "")
            )
        if any(each.missing for each in assigned):
            _collect(config, folder, world, assigned, view)
        else:
            view.say("nothing is missing")
        summary = summarise(
            Ledger(folder.ledger), {each.name: {request.key for request in each.requests} for each in assigned}
        )
    except (ClusterError, CollectionError, EnvError, LedgerError) as error:
        raise CollectJobError(str(error)) from error
    folder.write_summary(
        {
            "recipe": config.recipe,
            "seed": config.seed,
            "minutes": round((time.monotonic() - started_s) / 60, 2),
            **summary.to_json(),
            "environment": describe_environment(),
            "config": to_plain(config),
        }
    )
    view.console.print(summary_table(summary))
    view.say(summary.closing_line())
    return summary


def _collect(
    config: CollectConfig, folder: CollectFolder, world: World, assigned: Sequence[Assignment], view: LiveView
) -> None:
    with ray_cluster(config.cluster) as what:
        view.say(f"Ray: {what}")
        environments = Environments.start(config, world.retriever, slots=[each.slots(config) for each in assigned])
        collection, _ = start_collections(config, environments, assigned, ledger=folder.ledger)
        try:
            with view.stage("collecting"):
                _watch(collection, view)
        finally:
            collection.close()


def _watch(collection: JointCollection, view: LiveView) -> None:
    ended = False
    while not ended:
        ended = collection.poll(timeout_s=0.5)
        view.show(figures(collection.progress()), last=ended)


def figures(seen: CollectProgress) -> dict[str, str]:
    """What a person wants to know while it runs."""
    per_s = seen.recorded / max(seen.elapsed_s, 1e-9)
    left = seen.total - seen.finished
    shown = {
        "episodes": f"{seen.finished:,}/{seen.total:,}",
        "success": f"{seen.succeeded:,}/{seen.recorded:,}",
        "running": f"{seen.running:,}",
        "tokens/s": f"{seen.completion_tokens / max(seen.elapsed_s, 1e-9):,.0f}",
    }
    if seen.failed:
        shown["failed"] = f"{seen.failed:,}"
    if left and per_s:
        shown["left"] = duration(left / per_s)
    return shown


def duration(seconds: float) -> str:
    """About: 45 s, 12 min, 3.4 h."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"
