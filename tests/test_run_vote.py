"""Votes over whole runs: which answers are one, who wins a tie, what does not count."""

from __future__ import annotations

import pytest

from envs.base import ObservationKind, Task
from rollout.run_vote import answer_key, vote_runs
from rollout.trajectory import Completion, Failure, FailureClass, Step, Trajectory


def task(grader: str = "numeric", name: str = "t1") -> Task:
    return Task(id=name, question="?", answer="42", kind="math", grader=grader)


def run(prediction: str | None, index: int, *, of: Task | None = None, likelihood: float | None = None) -> Trajectory:
    of = of or task()
    completion = Completion(text="x", logprobs=None if likelihood is None else (likelihood, likelihood))
    step = Step(completion=completion, spans=(), action="x", observation="", observation_kind=ObservationKind.FINAL)
    return Trajectory(
        key=f"{of.id}|{index}", task=of, dialect="code", system_prompt="", steps=(step,), policy="p",
        sample_index=index, prediction=prediction, success=prediction == of.answer,
    )  # fmt: skip


def test_the_majority_of_answers_decides():
    [vote] = vote_runs([run("7", 0), run("42", 1), run("42.0", 2), run(None, 3)])
    assert (vote.prediction, vote.success, vote.votes, vote.n, vote.key) == ("42", True, 2, 4, "t1|1")
    assert vote.agreement == 0.5


def test_a_tie_goes_to_the_first_sample_in_whatever_order_they_come():
    [vote] = vote_runs([run("42", 1), run("7", 0)])
    assert vote.prediction == "7" and not vote.success


def test_a_tie_goes_to_the_likeliest_where_all_tell():
    [vote] = vote_runs([run("7", 0, likelihood=-2.0), run("42", 1, likelihood=-0.5)])
    assert vote.prediction == "42"
    [vote] = vote_runs([run("7", 0, likelihood=-2.0), run("42", 1)])
    assert vote.prediction == "7"


def test_failures_do_not_count_and_a_task_of_failures_has_no_vote():
    import dataclasses

    failure = Failure(failure_class=FailureClass.ENGINE, message="gone")
    failed = dataclasses.replace(run("7", 0), failure=failure)
    other = dataclasses.replace(run("1", 0, of=task(name="t2")), failure=failure)
    [vote] = vote_runs([failed, run("42", 1), other])
    assert (vote.task.id, vote.votes, vote.n) == ("t1", 1, 1)


def test_runs_without_an_answer_make_none():
    [vote] = vote_runs([run(None, 0), run(None, 1)])
    assert (vote.prediction, vote.success, vote.votes, vote.n) == (None, False, 0, 2)


def test_tasks_are_apart_and_in_order():
    votes = vote_runs(run("42", index, of=task(name=name)) for index in range(2) for name in ("b", "a"))
    assert [(vote.task.id, vote.votes) for vote in votes] == [("b", 2), ("a", 2)]


@pytest.mark.parametrize(
    ("grader", "one", "other", "same"),
    [
        ("numeric", "1,000", "1000", True),
        ("numeric", "$0.5$", "1/2", True),
        ("math", "\\frac{1}{2}", "0.5", True),
        ("math", "\\left(1, 2\\right)", "(1,2)", True),
        ("math", "x + 1", "x+1", True),
        ("math", "x+1", "x-1", False),
        ("exact", "The Silver Harbor!", "silver harbor", True),
        ("exact", "Paris", "London", False),
        ("exact", "3", "3.5", False),
    ],
)
def test_which_answers_are_one(grader, one, other, same):
    assert (answer_key(task(grader), one) == answer_key(task(grader), other)) == same
