"""The stages of the main job: collect and learn at the same time, then evaluate, then report.

tasks -> rollout workers <-> env hosts <-> retrieval        (Ray actors)
             |-> ledger (Parquet)  -> bounded queue -> learner ranks -> student folder
student folder -> vLLM worker <-> the same env hosts -> scores -> results.json
"""

from __future__ import annotations

import contextlib
import json
import time
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from envs.base import EnvError
from launch.actor_watch import ActorWatch
from launch.cluster import ClusterError, ray_cluster
from launch.config import DistillConfig
from launch.evaluation.during_training import LiveEvaluation, start_live_evaluation
from launch.evaluation.intervals import Score
from launch.evaluation.scoring import EvaluationError, run_evaluation, student_settings, student_spec
from launch.evaluation.student_scores import StudentScores, StudentWorkers, validation_tasks
from launch.events import EventRecord
from launch.job_record import (
    collected_at_first_step,
    found_of_earlier,
    minutes_so_far,
    removed_by_curation,
    results_of,
    show_results,
    silence_s,
)
from launch.joint_collection import JointCollection
from launch.learning_trouble import LearningTrouble
from launch.live.job_views import distill_view
from launch.live.ray_metrics import metrics_url
from launch.live.view import LiveView
from launch.patient_lines import PatientLines
from launch.placement import Placed, place_job, service_options
from launch.report import draw_learning_curve, reported
from launch.reuse import reuse
from launch.run_folder import RunFolder, write_json
from launch.source import StreamSource
from launch.spending import JobMeter
from launch.wiring import Assignment, Environments, assignments, start_collections, start_workers
from launch.world import World, load_world
from learner.base import LearnerError
from learner.base_student import BASE_STUDENT_FOLDER
from learner.config import LearnerConfig
from learner.learner_actor import LearnerGroup
from rollout.collector import CollectionError, Weights, stop_rollout_actors
from rollout.curation import describe
from rollout.ledger import Ledger, LedgerError
from rollout.placement import PlacementError
from rollout.trajectory_queue import QueueError, TrajectoryQueue

FINAL = "final"
LEARNING = "the teacher acts, the student learns"


TROUBLE = (
    ClusterError, CollectionError, EvaluationError, LearnerError, EnvError, LedgerError, PlacementError, QueueError,
    OSError,
)  # fmt: skip


class JobError(RuntimeError):
    """The job cannot go on; what it has is kept."""


def run_job(config: DistillConfig, folder: RunFolder, *, resumed: bool) -> None:
    """Everything from tasks to `results.json`. Raises `JobError`; whatever it started is ended in any case."""
    silent_s = silence_s(folder) if resumed else None
    with reported(folder.path, ledgers=folder.place), distill_view(config, folder) as view:
        _run_job(config, folder, view, resumed=resumed, silent_s=silent_s)


def _run_job(
    config: DistillConfig, folder: RunFolder, view: LiveView, *, resumed: bool, silent_s: float | None
) -> None:
    started_s = time.monotonic()
    world = load_world(config, folder.index)
    view.say(f"run {folder.place}: recipe {config.recipe}, seed {config.seed}")
    if resumed:
        view.say(found_of_earlier(folder, config.episodes_of(len(world.train))))
    events = EventRecord(folder.path, say=view.warn)
    if folder.results.exists():
        view.say("this run is complete; its scores:")
        show_results(view, json.loads(folder.results.read_text()), folder)
        return
    if silent_s is not None:
        events.tell("job", "an earlier job ended before it was done; this one goes on", away_s=silent_s)
    try:
        with ray_cluster(config.cluster, variables=config.variables()) as what:
            view.say(f"Ray: {what}")
            view.connected(metrics_url())
            assigned = assignments(config, world.train, Ledger(folder.ledger))
            if config.reuse and any(each.missing for each in assigned):
                view.say(f"{reuse(config, assigned, folder.ledger):,} trajectories reused of earlier runs")
                assigned = assignments(config, world.train, Ledger(folder.ledger))
            placed = place_job(config, assigned, trained=(folder.learner / "final.json").exists(), say=view.say)
            environments = start_environments(config, world, assigned, placed)
            stages = _Stages(config, folder, world, environments, view, assigned, placed, events)
            view.plan(LEARNING, *stages.evaluations())
            with ActorWatch(events):
                learned = stages.learn()
                scores = stages.evaluate()
    except TROUBLE as error:
        raise JobError(str(error)) from error
    folder.gather()
    results = results_of(config, folder, scores, learned, minutes=(time.monotonic() - started_s) / 60)
    write_json(folder.results, results)
    draw_learning_curve(folder.metrics, folder.curve, title=f"{config.recipe}, seed {config.seed}")
    view.conclude()
    show_results(view, results, folder)


def start_environments(
    config: DistillConfig, world: World, assigned: list[Assignment], placed: Placed | None = None
) -> Environments:
    """A group of hosts for each teacher; the first one serves the evaluations too, but for those of students that still
    learn: the last is theirs."""
    slots = [each.slots(config) for each in assigned]
    slots[0] = max(slots[0], config.evaluate.concurrency)
    if config.learner.best_by == "rollout_score" or config.evaluate.during_training_every_steps:
        slots.append(min(config.evaluate.concurrency, config.evaluate.validation_tasks))
    return Environments.start(config, world.retriever, slots=slots, placed=placed)


class _Stages:
    def __init__(
        self,
        config: DistillConfig,
        folder: RunFolder,
        world: World,
        environments: Environments,
        view: LiveView,
        assigned: list[Assignment],
        placed: Placed,
        events: EventRecord,
    ) -> None:
        self.config, self.folder, self.world, self.environments, self.view = config, folder, world, environments, view
        self.assigned, self.placed, self.events = assigned, placed, events
        self.teachers: list[list[Any]] = []
        self.meter = JobMeter.start(config, folder.spend)

    def learn(self) -> dict[str, Any]:
        """Collect and train until the student is exported; what was learned, as plain data."""
        record = self.folder.learner / "final.json"
        if record.exists():
            self.view.say("the student is trained already")
            return json.loads(record.read_text())
        config = self.config
        queue = TrajectoryQueue.create(config.rollout.queue_capacity, options=service_options(config.cluster))
        total = sum(len(each.requests) for each in self.assigned)
        curation = config.curation.build()
        if curation.needs_all:
            left_out = ", ".join(describe(each) for each in curation.filters if each not in curation.stream.filters)
            self.view.say(f"curation: {left_out} must see all trajectories first, and are left out on a stream")
        source = StreamSource(self.folder.ledger, queue, curation)
        live = start_live_evaluation(
            config, self.environments, train=self.world.train, test=self.world.test,
            base=str(_model_folder(config.learner)), group=len(self.assigned), learner_folder=self.folder.learner,
            ledgers=self.folder.scores / "while_learning", record=self.folder.watched, say=self.view.say,
        )  # fmt: skip
        learner = LearnerGroup.start(
            learner_config(config, self.folder, total), source, **self.placed.learner(config),
            publisher=None if live is None else live.publisher, keeper=self.folder.keeper(),
        )  # fmt: skip
        try:
            learner.run()
            collection, _ = start_collections(
                config, self.environments, self.assigned, ledger=self.folder.ledger, queue=queue, meter=self.meter,
                placed=self.placed,
            )  # fmt: skip
            workers = self._student_workers()
            scores = live if workers is None else StudentScores(workers.start, say=self.view.say)
            try:
                with self.view.stage(LEARNING):
                    self._watch(collection, learner, queue, scores)
                self.teachers = [collection.actors(each.name) for each in self.assigned]
            finally:
                collection.close()
                if scores is not None:
                    scores.close()
                if workers is not None:
                    workers.close()
            final = learner.result(timeout_s=60)
        finally:
            learner.shutdown()
            queue.kill()
        self.folder.bring_learner()
        learned = {
            **asdict(final),
            **collected_at_first_step(self.folder, total),
            "curation": removed_by_curation(curation, Ledger(self.folder.ledger)),
        }
        write_json(record, learned)
        return learned

    def _student_workers(self) -> StudentWorkers | None:
        """Who scores students while they learn, where the best one is chosen by that."""
        config = self.config
        if config.learner.best_by != "rollout_score":
            return None
        return StudentWorkers(
            config,
            self.environments,
            validation_tasks(config, self.world.train),
            base=str(_model_folder(config.learner)),
            group=len(self.assigned),
            ledgers=self.folder.scores / "while_learning",
        )

    def _watch(
        self,
        collection: JointCollection,
        learner: LearnerGroup,
        queue: TrajectoryQueue,
        scores: StudentScores | LiveEvaluation | None,
    ) -> None:
        began_s = time.monotonic() - 60 * minutes_so_far(self.folder.metrics)
        first_step, collected, last_step = self.folder.first_step, False, -1
        trouble = LearningTrouble(self.events)
        metrics = PatientLines(self.folder.metrics)
        while not (collected and learner.finished()):
            self.folder.check()
            if collected:
                time.sleep(0.5)
            else:
                collected = collection.poll(timeout_s=0.5)
            if collected or learner.finished():  # a learner that has enough must not leave the workers waiting
                queue.close()
            if learner.prepare_for_loss(collection.draining()):
                self.view.say("a node of the learner is to go: it writes a checkpoint")
            if scores is not None:
                scores.serve(learner)
            learned, seen = learner.progress(), collection.progress()
            waiting = queue.stats()
            self.view.update(
                episodes=seen, by_policy=collection.by_name(), queue=waiting, learning=learned,
                spent=self.meter.snapshot() if self.meter else None, last=collected and learner.finished(),
            )  # fmt: skip
            if seen.stopped:
                raise CollectionError(seen.stopped)
            trouble.look(learned, seen)
            if learned.first_step_unix_s is not None and not first_step.exists():
                with contextlib.suppress(OSError):  # a full disk; it is written the next time
                    write_json(first_step, {"unix_s": learned.first_step_unix_s})
            if learned.step != last_step:
                last_step = learned.step
                row = {"minutes": (time.monotonic() - began_s) / 60, "recorded": seen.finished, "total": seen.total}
                row["queue_depth"] = waiting.depth
                metrics.add(row | {name: getattr(learned, name) for name in _METRICS})
        metrics.close()
        trouble.close()

    def evaluate(self) -> dict[str, dict[str, Score]]:
        """Scores of the untrained student, the distilled one in both modes, and the teacher."""
        config = self.config
        base = str(_model_folder(config.learner))
        spec = student_spec(config, base)
        rows = self._students()
        scores: dict[str, dict[str, Score]] = {}
        workers = start_workers(config, spec, count=1, placed=self.placed) if rows else []
        if any(weights is not None for _, _, weights in rows):
            self.folder.bring_student(workers)
        for name, mode, weights in rows:
            scores[name] = run_evaluation(
                config, self.environments, workers, self.world.test, policy=spec.policy_name,
                settings=student_settings(config, mode), ledger=self.folder.scores / name, view=self.view,
                title=_title(name), weights=weights,
            )  # fmt: skip
        stop_rollout_actors(workers)
        for i, (name, each) in enumerate(self._teachers()):
            loaded = self.teachers[i] if self.teachers else []
            actors = loaded or start_workers(
                config, each.share.teacher, count=each.workers(config), meter=self.meter, role="teacher",
                placed=self.placed,
            )  # fmt: skip
            scores[name] = run_evaluation(
                config, self.environments, actors, self.world.test, policy=each.name, settings=config.episode,
                ledger=self.folder.scores / _file_name(name), view=self.view, title=_title(name),
            )  # fmt: skip
        return scores

    def evaluations(self) -> list[str]:
        """Titles of the stages of `evaluate`."""
        return [_title(name) for name, *_ in (*self._students(), *self._teachers())]

    def _students(self) -> list[tuple[str, str, Weights | None]]:
        """(name, mode, weights) of those that are scored."""
        final = Weights(str(self.folder.student), FINAL)
        wanted = self.config.evaluate.rows
        rows: list[tuple[str, str, Weights | None]] = []
        if "untrained" in wanted:
            rows.append(("untrained", "greedy", None))
        if "student" in wanted:
            rows.append(("student", "greedy", final))
        if "self_consistent" in wanted and self.config.env.name != "answer":
            rows.append(("student_self_consistent", "self_consistent", final))
        return rows

    def _teachers(self) -> list[tuple[str, Assignment]]:
        """(name, assignment) of those that are scored."""
        if "teacher" not in self.config.evaluate.rows:
            return []
        return [("teacher" if len(self.assigned) == 1 else f"teacher {each.name}", each) for each in self.assigned]


def _title(name: str) -> str:
    return f"evaluation: {name.replace('_', ' ')}"


_METRICS = (
    "step", "epoch", "loss", "loss_by_span", "accuracy", "accuracy_by_span", "validation_loss", "grad_norm", "lr",
    "tokens", "rows", "tokens_per_s", "mfu", "peak_memory_mb", "skipped_steps", "wait_s", "stall_share", "restarts",
)  # fmt: skip


def learner_config(config: DistillConfig, folder: RunFolder, total: int) -> LearnerConfig:
    """The learner's configuration with its folders made absolute and what the stream will bring."""
    return replace(
        config.learner,
        model_path=str(_model_folder(config.learner)),
        output_dir=str(folder.learner),
        scores=_absolute(config.learner.scores),
        curriculum=replace(config.learner.curriculum, rates=_absolute(config.learner.curriculum.rates)),
        tracking=replace(config.learner.tracking, run_name=config.learner.tracking.run_name or folder.path.name),
        publish_every_steps=config.evaluate.during_training_every_steps,
        expected_trajectories=total,
    )


def _absolute(path: str) -> str:
    """Ranks run in another folder."""
    return str(Path(path).absolute()) if path else ""


def _model_folder(learner: LearnerConfig) -> Path | str:
    if learner.model_path == "base_student":
        return BASE_STUDENT_FOLDER
    path = Path(learner.model_path)
    return path.absolute() if path.exists() else learner.model_path


def _file_name(name: str) -> str:
    return "".join(c if c.isalnum() or c in "-_." else "_" for c in name)
