"""Scores students while the learner goes on: it hands out a folder now and then, and is told how well that one acts.

The tasks are those that the learner holds out of training, never the test tasks: the best student is chosen by them.
Students are scored one at a time, oldest first, by really running their code and searches on a vLLM worker of their
own, with the episodes in a ledger like any other; a job that goes on does not run them again.

Example::

    scores = StudentScores(lambda folder, step: RolloutScore(...), say=view.say)
    while not learner.finished():
        scores.serve(learner)              # never blocks: starts, looks after and ends evaluations
    scores.close()
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Protocol

from envs.base import EnvError, Task
from launch.config import DistillConfig
from launch.evaluation.scoring import EvaluationError, ledger_scores, student_settings, student_spec
from launch.wiring import Environments, start_evaluation, start_workers
from learner.base import Progress
from learner.config import ConfigError
from learner.curriculum import held_out
from rollout.collector import Collection, CollectionError, Weights, stop_rollout_actors
from rollout.placement import PlacementError

FAILURES = (EnvError, EvaluationError, CollectionError, PlacementError)


def validation_tasks(config: DistillConfig, tasks: Sequence[Task]) -> list[Task]:
    """Of the training tasks, those that students are scored on: `evaluate.validation_tasks` of what the learner holds
    out. Raises `ConfigError` when it holds out none."""
    held = [task for task in tasks if held_out(task.id, config.learner.validation_share)]
    if not held:
        raise ConfigError(
            f"learner.validation_share is {config.learner.validation_share:g}, which holds out none of {len(tasks)} "
            "training tasks; best_by 'rollout_score' needs some: raise it"
        )
    return held[: config.evaluate.validation_tasks]


class Evaluation(Protocol):
    """One student's, under way."""

    def poll(self) -> bool:
        """Whether it has ended; returns at once. Raises one of `FAILURES`."""
        ...

    def score(self) -> float:
        """Once it has ended."""
        ...

    def close(self) -> None: ...


class ScoredLearner(Protocol):
    """Of a `learner.learner_actor.LearnerGroup`, what is used here."""

    def progress(self) -> Progress: ...

    def report_score(self, step: int, score: float) -> None: ...


class StudentScores:
    """`start`: begins the evaluation of (folder, step). A student whose evaluation fails gets no score (NaN)."""

    def __init__(self, start: Callable[[Path, int], Evaluation], *, say: Callable[[str], None]) -> None:
        self._start, self._say = start, say
        self._under_way: tuple[int, Evaluation] | None = None
        self.scores: dict[int, float] = {}
        """Step -> share of the tasks that were solved."""

    def serve(self, learner: ScoredLearner) -> None:
        """Look after the evaluation that is under way, report what is known, begin the next."""
        if self._under_way is not None:
            step, evaluation = self._under_way
            try:
                if not evaluation.poll():
                    return
                self.scores[step] = evaluation.score()
                self._say(f"the student of step {step} solves {100 * self.scores[step]:.0f}% of the held-out tasks")
            except FAILURES as error:
                self._give_up(step, error)
            self.close()
        for name, folder in learner.progress().candidates.items():
            step = int(name)
            if step in self.scores:  # not heard yet, or handed out once more by ranks that were started again
                learner.report_score(step, self.scores[step])
            elif self._under_way is None:
                try:
                    self._under_way = (step, self._start(Path(folder), step))
                except FAILURES as error:
                    self._give_up(step, error)

    def close(self) -> None:
        """End what is under way."""
        if self._under_way is not None:
            self._under_way[1].close()
            self._under_way = None

    def _give_up(self, step: int, error: Exception) -> None:
        self._say(f"the student of step {step} could not be scored: {error}")
        self.scores[step] = math.nan


class StudentWorkers:
    """Starts evaluations on one vLLM worker, which is loaded when the first student comes and takes the next ones'
    weights in. `group`: of `environments`, for these episodes alone."""

    def __init__(
        self,
        config: DistillConfig,
        environments: Environments,
        tasks: Sequence[Task],
        *,
        base: str,
        group: int,
        ledgers: Path,
    ) -> None:
        self._config, self._environments, self._tasks = config, environments, list(tasks)
        self._spec, self._group, self._ledgers = student_spec(config, base), group, ledgers
        self._actors: list[Any] = []

    def actors(self) -> list[Any]:
        """The worker, started if need be."""
        if not self._actors:
            self._actors = start_workers(self._config, self._spec, count=1)
        return list(self._actors)

    def start(self, folder: Path, step: int) -> Evaluation:
        ledger = self._ledgers / f"step-{step:07d}"
        collection = start_evaluation(
            self._config,
            self._environments,
            self.actors(),
            self._tasks,
            policy=self._spec.policy_name,
            settings=student_settings(self._config, "greedy"),
            ledger=ledger,
            weights=Weights(str(folder), folder.name),
            group=self._group,
        )
        return _RolloutScore(collection, ledger, self._tasks)

    def close(self) -> None:
        if self._actors:
            stop_rollout_actors(self._actors)
            self._actors = []


class _RolloutScore:
    """An `Evaluation` by rollouts."""

    def __init__(self, collection: Collection, ledger: Path, tasks: list[Task]) -> None:
        self._collection, self._ledger, self._tasks = collection, ledger, tasks

    def poll(self) -> bool:
        ended = self._collection.poll(timeout_s=0.0)
        if ended and (why := self._collection.progress().stopped):
            raise EvaluationError(why)
        return ended

    def score(self) -> float:
        scores = ledger_scores(self._ledger, self._tasks).values()
        return sum(score.mean * score.n for score in scores) / sum(score.n for score in scores)

    def close(self) -> None:
        self._collection.close()
