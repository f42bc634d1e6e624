"""The stages of an evaluation: run what is missing of each mode, then score every row of the folder and compare them.

tasks x runs -> the policy's workers <-> envs of the mode <-> retrieval        (Ray actors)
                                |-> out/<policy>/<mode>/ledger -> results.json, tables
"""

from __future__ import annotations

import time
from dataclasses import asdict, dataclass
from typing import Any

from envs.base import EnvError, Task
from launch.cluster import ClusterError, ray_cluster
from launch.config_reading import to_plain
from launch.environment import describe_environment
from launch.evaluation.config import EvaluationConfig
from launch.evaluation.folder import EvaluationFolder, RowRecord
from launch.evaluation.rows import Row, keys_of, pairs, refuse_other_tasks
from launch.evaluation.scoring import EvaluationError, watch_evaluation
from launch.evaluation.tables import tables
from launch.evaluation.tasks import EvaluationWorld
from launch.live.ray_metrics import metrics_url
from launch.live.view import LiveView
from launch.run_folder import write_json
from launch.spending import JobMeter
from launch.wiring import Environments, start_evaluation, start_workers
from rollout.collector import CollectionError
from rollout.ledger import Ledger, LedgerError
from rollout.placement import PlacementError

TROUBLE = (ClusterError, CollectionError, EvaluationError, EnvError, LedgerError, PlacementError, OSError)


class EvaluationJobError(RuntimeError):
    """The evaluation cannot go on; what it has is kept."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """How a call ended."""

    results: dict[str, Any]
    missing: int
    """Episodes of this call's modes without a result."""


def run_evaluation_job(
    config: EvaluationConfig, folder: EvaluationFolder, world: EvaluationWorld, view: LiveView
) -> Outcome:
    """Everything from missing episodes to `results.json`; the folder must be claimed. Raises `EvaluationJobError`,
    `OtherTaskError`; whatever it started is ended in any case."""
    started_s = time.monotonic()
    for note in world.notes:
        view.say(note)
    records = {mode: RowRecord.of(config, mode) for mode in config.modes}
    for record in records.values():
        _refuse_other_tasks(folder, record, world.tasks)
        folder.begin(config, record, unix_s=time.time())
    try:
        missing = {mode: _missing(folder, record, world.tasks) for mode, record in records.items()}
        for mode, keys in missing.items():
            of = len(world.tasks) * records[mode].runs
            view.say(f"{records[mode].name}: {len(keys):,} of {of:,} episodes to do")
        if any(missing.values()):
            _run(config, folder, world, [mode for mode, keys in missing.items() if keys], view)
    except TROUBLE as error:
        raise EvaluationJobError(str(error)) from error
    rows = read_rows(folder, world.tasks)
    minutes = (time.monotonic() - started_s) / 60
    results = _results(config, folder, world, rows, minutes=minutes)
    write_json(folder.results, results)
    view.conclude()
    for table in tables(list(rows.values()), domains=world.domains):
        view.console.print(table)
    return Outcome(results=results, missing=sum(rows[record.name].missing for record in records.values()))


def read_rows(folder: EvaluationFolder, tasks: list[Task]) -> dict[str, Row]:
    """Every row of the folder that has results for some of `tasks`, by name."""
    rows: dict[str, Row] = {}
    for record in folder.rows():
        row = Row.read(
            record.name,
            Ledger(folder.ledger(record)),
            keys=keys_of(tasks, record.key, record.runs),
            votes=record.votes,
        )
        if row.results or row.summary.failures:
            rows[record.name] = row
    return rows


def _run(
    config: EvaluationConfig, folder: EvaluationFolder, world: EvaluationWorld, modes: list[str], view: LiveView
) -> None:
    slots = [config.evaluate.concurrency * config.rollout.workers * config.policy.data_parallel_size]
    # Retrieval is started once, by the first mode that searches.
    first = next((mode for mode in modes if world.retrievers[mode] is not None), modes[0])
    with ray_cluster(config.cluster, variables=world.jobs[first].variables()) as what:
        view.say(f"Ray: {what}")
        view.connected(metrics_url())
        view.plan(*(f"{config.policy.policy_name}, {mode}" for mode in modes))
        meter = JobMeter.start(world.jobs[first], folder.spend)
        try:
            started = Environments.start(world.jobs[first], world.retrievers[first], slots=slots)
            workers = start_workers(world.jobs[first], config.policy, count=config.rollout.workers, meter=meter)
            for mode in modes:
                job = world.jobs[mode]
                environments = started if mode == first else started.beside(job, slots=slots)
                collection = start_evaluation(
                    job, environments, workers, world.tasks, policy=config.policy.policy_name,
                    settings=job.episode, ledger=folder.ledger(RowRecord.of(config, mode)),
                    samples=config.runs(mode),
                )  # fmt: skip
                name = config.policy.policy_name
                watch_evaluation(collection, view, f"{name}, {mode}", policy=name, meter=meter)
            if meter is not None:
                view.say(f"spent: {meter.snapshot()}")
        finally:
            if meter is not None:
                meter.close()


def _missing(folder: EvaluationFolder, record: RowRecord, tasks: list[Task]) -> set[str]:
    recorded = Ledger(folder.ledger(record)).keys()
    return set(keys_of(tasks, record.key, record.runs)) - recorded


def _refuse_other_tasks(folder: EvaluationFolder, record: RowRecord, tasks: list[Task]) -> None:
    """Before anything is paid: a file may have changed under its name."""
    refuse_other_tasks(record.name, Ledger(folder.ledger(record)), keys_of(tasks, record.key, record.runs))


def _results(
    config: EvaluationConfig, folder: EvaluationFolder, world: EvaluationWorld, rows: dict[str, Row], *, minutes: float
) -> dict[str, Any]:
    counts = {kind: sum(task.kind == kind for task in world.tasks) for kind in world.kinds}
    graders = {task.kind: task.grader for task in world.tasks}
    details: dict[str, Any] = {}
    for record in folder.rows():
        if record.name in rows:
            details[record.name] = {
                **asdict(record),
                "ledger": str(folder.ledger(record)),
                "settings": folder.settings(record),
                **rows[record.name].to_json(world.domains),
            }
    return {
        "label": config.label,
        "tasks": counts,
        "graders": graders,
        "domains": dict(world.domains),
        "notes": world.notes,
        "scores": {name: row["scores"] for name, row in details.items()},
        "averages": {name: row["averages"] for name, row in details.items()},
        "rows": details,
        "pairs": [pair.to_json() for pair in pairs(list(rows.values()), world.domains)],
        "minutes": round(minutes, 2),
        "environment": describe_environment(),
        "config": to_plain(config),
    }
