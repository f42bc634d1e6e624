"""How well the student acts while it learns: `evaluate.during_training_every_steps`.

The learner publishes its weights every so many steps (`learner.publish`) to one vLLM worker that runs beside it
(`rollout.weight_sync`): loaded in place, proven by their log-probabilities, with a deadline. Each version that is in
use then acts on held-out tasks, with the episodes in a ledger like any other. A version that comes while another one
acts waits, and is passed over when a newer one comes; nothing here holds the training up or ends it. Nothing is chosen
by these scores either, which is why they may be of test tasks where none are held out of training; to choose the best
student by its rollouts is `learner.best_by` (`launch.evaluation.student_scores`).

Example::

    live = LiveEvaluation(workers.start, publisher=publisher, published=folder, record=path, say=view.say)
    LearnerGroup.start(config, source, publisher=live.publisher)
    while not learner.finished():
        live.serve(learner)                # never blocks
    live.close()
"""

from __future__ import annotations

import contextlib
import json
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Protocol

from envs.base import Task
from launch.config import DistillConfig
from launch.evaluation.student_scores import FAILURES, Evaluation, StudentWorkers, validation_tasks
from launch.wiring import Environments
from learner.base import Progress
from learner.publish import WeightPublisher, hold
from rollout.weight_sync import RayWorker, WeightSync

HOLD_S = 3600.0
"""How long a version is kept for its evaluation at most."""


class PublishingLearner(Protocol):
    """Of a `learner.learner_actor.LearnerGroup`, what is used here."""

    def progress(self) -> Progress: ...


class LiveEvaluation:
    """`start`: begins the evaluation of (folder, step). `published`: where the learner's versions are; `record`: gets a
    JSON line for each score. `close` ends what is under way and calls `end`."""

    def __init__(
        self,
        start: Callable[[Path, int], Evaluation],
        *,
        publisher: WeightPublisher,
        published: Path,
        record: Path,
        say: Callable[[str], None],
        end: Callable[[], None] = lambda: None,
    ) -> None:
        self.publisher = publisher
        self._start, self._published, self._record, self._say, self._end = start, published, record, say, end
        self._under_way: tuple[int, Evaluation, contextlib.ExitStack] | None = None
        self._newest = self._receipt = ""
        self._failures = 0

    def serve(self, learner: PublishingLearner) -> None:
        """Look after the evaluation that is under way; begin that of the newest version in use."""
        at = learner.progress()
        if at.publish_failures > self._failures:
            self._say(f"not published: {at.publish_told}")
        self._failures = at.publish_failures
        if self._under_way is not None:
            step, evaluation, _ = self._under_way
            try:
                if not evaluation.poll():
                    return
                self._tell(step, evaluation.score())
            except FAILURES as error:
                self._say(f"the student of step {step} could not be evaluated: {error}")
            self._end_evaluation()
        if at.published and at.published != self._newest:
            self._newest, self._receipt = at.published, at.publish_told
            self._begin(at.published)

    def close(self) -> None:
        """May be called twice."""
        self._end_evaluation()
        self._end()

    def _begin(self, version: str) -> None:
        folder, step = self._published / version, int(version.rpartition("-")[2])
        held = contextlib.ExitStack()
        try:
            held.enter_context(hold(folder, by="evaluation", for_s=HOLD_S))
            self._under_way = (step, self._start(folder, step), held)
        except (*FAILURES, FileNotFoundError) as error:
            held.close()
            self._say(f"the student of step {step} could not be evaluated: {error}")

    def _tell(self, step: int, score: float) -> None:
        self._say(f"the student of step {step} solves {100 * score:.0f}% of the tasks that it is watched on")
        self._record.parent.mkdir(parents=True, exist_ok=True)
        line = {"step": step, "score": score, "receipt": self._receipt, "unix_s": time.time()}
        with open(self._record, "a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")

    def _end_evaluation(self) -> None:
        if self._under_way is not None:
            _, evaluation, held = self._under_way
            self._under_way = None
            evaluation.close()
            held.close()


def start_live_evaluation(
    config: DistillConfig,
    environments: Environments,
    *,
    train: Sequence[Task],
    test: Sequence[Task],
    base: str,
    group: int,
    learner_folder: Path,
    ledgers: Path,
    record: Path,
    say: Callable[[str], None],
) -> LiveEvaluation | None:
    """With a worker of its own, whose engine begins to load; None where the configuration asks for none."""
    if not config.evaluate.during_training_every_steps:
        return None
    workers = StudentWorkers(
        config, environments, watched_tasks(config, train, test), base=base, group=group, ledgers=ledgers
    )
    actors: list[Any] = workers.actors()
    for actor in actors:
        actor.start.remote()
    handles = [RayWorker(actor, f"student worker {i}") for i, actor in enumerate(actors)]
    return LiveEvaluation(
        workers.start,
        # One that loads for the first time is slow, and no worse for it.
        publisher=WeightSync(handles, deadline_s=config.evaluate.publish_deadline_s, late="exclude"),
        published=learner_folder / "published",
        record=record,
        say=say,
        end=workers.close,
    )


def watched_tasks(config: DistillConfig, train: Sequence[Task], test: Sequence[Task]) -> list[Task]:
    """`evaluate.validation_tasks` of what the learner holds out of training; of the test tasks, evenly spread, where it
    holds out none."""
    if config.learner.validation_share > 0:
        return validation_tasks(config, train)
    count = min(config.evaluate.validation_tasks, len(test))
    return [test[i * len(test) // count] for i in range(count)]
