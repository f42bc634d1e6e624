"""Students are scored one at a time while the learner goes on, and every score is reported."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import pytest

from envs.base import Task
from launch.config_reading import load_config
from launch.evaluation.scoring import EvaluationError
from launch.evaluation.student_scores import StudentScores, validation_tasks
from learner.base import Progress
from learner.config import ConfigError
from learner.curriculum import held_out


class Rollouts:
    """An evaluation that ends at the second look; `folder` says how well."""

    def __init__(self, folder: Path) -> None:
        self._folder, self._looks, self.closed = folder, 0, False

    def poll(self) -> bool:
        self._looks += 1
        if self._folder.name == "broken":
            raise EvaluationError("no result")
        return self._looks >= 2

    def score(self) -> float:
        return float(self._folder.name)

    def close(self) -> None:
        self.closed = True


class Handing:
    """A learner that hands students out and hears their scores."""

    def __init__(self) -> None:
        self.candidates: dict[str, str] = {}
        self.heard: dict[int, float] = {}

    def progress(self) -> Progress:
        return Progress(candidates=dict(self.candidates))

    def report_score(self, step: int, score: float) -> None:
        self.heard[step] = score
        self.candidates.pop(str(step), None)


@pytest.fixture
def started() -> list[Rollouts]:
    return []


@pytest.fixture
def scores(started: list[Rollouts]) -> StudentScores:
    def start(folder: Path, step: int) -> Rollouts:
        started.append(Rollouts(folder))
        return started[-1]

    return StudentScores(start, say=lambda line: None)


def test_students_are_scored_one_after_the_other(scores: StudentScores, started: list[Rollouts]) -> None:
    learner = Handing()
    learner.candidates = {"20": "/a/0.25", "40": "/a/0.5"}
    for _ in range(3):
        scores.serve(learner)
    assert learner.heard == {20: 0.25} and len(started) == 2 and started[0].closed
    for _ in range(3):
        scores.serve(learner)
    assert learner.heard == {20: 0.25, 40: 0.5} and not learner.candidates


def test_a_student_that_is_handed_out_again_is_not_scored_again(scores: StudentScores, started: list[Rollouts]) -> None:
    learner = Handing()
    for _ in range(2):
        learner.candidates, learner.heard = {"20": "/a/0.25"}, {}
        for _ in range(3):
            scores.serve(learner)
        assert learner.heard == {20: 0.25}
    assert len(started) == 1


def test_a_student_that_cannot_be_scored_holds_nothing_up(scores: StudentScores, started: list[Rollouts]) -> None:
    learner = Handing()
    learner.candidates = {"20": "/a/broken", "40": "/a/0.5"}
    for _ in range(4):
        scores.serve(learner)
    assert math.isnan(learner.heard[20]) and learner.heard[40] == 0.5
    assert all(one.closed for one in started)


def test_what_is_under_way_at_the_end_is_ended(scores: StudentScores, started: list[Rollouts]) -> None:
    learner = Handing()
    learner.candidates = {"20": "/a/0.25"}
    scores.serve(learner)
    scores.close()
    assert started[0].closed


def test_students_are_chosen_by_training_tasks_that_are_held_out() -> None:
    config = load_config(["learner.validation_share=0.2", "evaluate.validation_tasks=5"])
    tasks = [Task(id=f"t{i}", question="q", answer="a", kind="k") for i in range(100)]
    chosen = validation_tasks(config, tasks)
    assert len(chosen) == 5 and all(held_out(task.id, 0.2) for task in chosen)
    none = replace(config, learner=replace(config.learner, validation_share=0.0))
    with pytest.raises(ConfigError, match="holds out none of 100 training tasks"):
        validation_tasks(none, tasks)
