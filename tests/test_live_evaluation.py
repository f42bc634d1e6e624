"""What is watched of a student while it learns: the newest version in use acts, is recorded, and is kept until then."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
from learner_samples import trajectory

from launch.config_reading import load_config
from launch.evaluation.during_training import LiveEvaluation, watched_tasks
from launch.evaluation.scoring import EvaluationError
from learner.base import Progress
from learner.config import ConfigError
from learner.curriculum import held_out
from learner.publish import Publications


class Silent:
    def publish(self, folder: Path, version: str) -> str:
        return ""


class Learner:
    """Has published what it is told to have."""

    def __init__(self) -> None:
        self.at = Progress()

    def progress(self) -> Progress:
        return self.at


@dataclass
class MadeUpEvaluation:
    folder: Path
    step: int
    polls_left: int = 1
    result: float | Exception = 0.5
    closed: bool = False

    def poll(self) -> bool:
        assert self.folder.is_dir(), "it was removed while it was in use"
        self.polls_left -= 1
        return self.polls_left < 0

    def score(self) -> float:
        if isinstance(self.result, Exception):
            raise self.result
        return self.result

    def close(self) -> None:
        self.closed = True


class Watched:
    """A live evaluation with all its surroundings."""

    def __init__(self, folder: Path, result: Callable[[int], float | Exception] = lambda step: step / 1000) -> None:
        self.publications = Publications(folder / "published", Silent(), keep=1)
        self.learner, self.evaluations, self.said, self.ends = Learner(), [], [], 0
        self.record = folder / "scores" / "while_learning.jsonl"

        def start(version: Path, step: int) -> MadeUpEvaluation:
            self.evaluations.append(MadeUpEvaluation(version, step, result=result(step)))
            return self.evaluations[-1]

        def end() -> None:
            self.ends += 1

        self.live = LiveEvaluation(
            start, publisher=Silent(), published=folder / "published", record=self.record, say=self.said.append, end=end
        )

    def publish(self, step: int) -> None:
        os.makedirs(self.publications.folder(step))
        self.publications.offer(step)
        assert self.publications.wait(10)
        self.learner.at = Progress(**self.publications.figures())

    def serve(self) -> None:
        self.live.serve(self.learner)

    def scores(self) -> dict[int, float]:
        lines = self.record.read_text().splitlines() if self.record.exists() else []
        return {row["step"]: row["score"] for row in map(json.loads, lines)}


@pytest.fixture
def watched(tmp_path: Path) -> Watched:
    return Watched(tmp_path)


def test_each_version_acts_once_and_its_score_is_recorded(watched):
    watched.serve()
    assert not watched.evaluations
    for step in (100, 200):
        watched.publish(step)
        for _ in range(4):
            watched.serve()
    assert watched.scores() == {100: 0.1, 200: 0.2}
    assert all(each.closed for each in watched.evaluations)
    assert "the student of step 200 solves 20% of the tasks that it is watched on" in watched.said


def test_a_version_stays_while_it_acts_and_the_newest_is_next(watched):
    watched.publish(100)
    watched.serve()
    for step in (200, 300):
        watched.publish(step)
        watched.serve() if step == 200 else None
    assert watched.publications.folder(100).exists()
    for _ in range(4):
        watched.serve()
    assert [each.step for each in watched.evaluations] == [100, 300]
    watched.publish(400)
    assert not watched.publications.folder(100).exists()


def test_an_evaluation_that_fails_is_told_of_and_the_next_is_begun(tmp_path):
    watched = Watched(tmp_path, result=lambda step: EvaluationError("no result") if step == 100 else 0.9)
    for step in (100, 200):
        watched.publish(step)
        for _ in range(3):
            watched.serve()
    assert watched.said[0] == "the student of step 100 could not be evaluated: no result"
    assert watched.scores() == {200: 0.9}


def test_what_is_not_published_is_told_once(watched):
    watched.learner.at = Progress(publish_failures=1, publish_told="step-0000100: no worker took the weights")
    watched.serve()
    watched.serve()
    assert watched.said == ["not published: step-0000100: no worker took the weights"]


def test_a_version_that_is_gone_is_passed_over(watched):
    watched.learner.at = Progress(published="step-0000100")
    watched.serve()
    assert not watched.evaluations and "step 100 could not be evaluated" in watched.said[0]


def test_closing_ends_what_is_under_way_and_the_worker(watched):
    watched.publish(100)
    watched.serve()
    watched.live.close()
    assert watched.evaluations[0].closed and watched.ends == 1 and watched.scores() == {}


TASKS = [trajectory(i).task for i in range(200)]


def test_the_tasks_are_those_that_are_held_out_of_training():
    config = load_config(["learner.validation_share=0.2", "evaluate.validation_tasks=8"])
    tasks = watched_tasks(config, TASKS, [])
    assert len(tasks) == 8 and all(held_out(task.id, 0.2) for task in tasks)


def test_where_none_are_held_out_they_are_test_tasks_from_all_over():
    config = load_config(["learner.validation_share=0", "evaluate.validation_tasks=4"])
    assert watched_tasks(config, [], TASKS) == [TASKS[i] for i in (0, 50, 100, 150)]


def test_to_watch_and_to_choose_at_once_is_refused():
    chosen = ["learner.best_by=rollout_score", "learner.score_every_steps=50", "learner.validation_share=0.1"]
    with pytest.raises(ConfigError, match="both run the student while it learns"):
        load_config([*chosen, "evaluate.during_training_every_steps=50"])


def test_to_publish_to_nobody_is_refused():
    with pytest.raises(ConfigError, match="evaluate.during_training_every_steps says how often"):
        load_config(["learner.publish_every_steps=50"])
