"""Scores of a ledger of evaluations: by kind, over exactly the tasks asked for, of the vote where there are several
runs."""

from __future__ import annotations

from dataclasses import replace

import pytest
from learner_samples import trajectory

from launch.config_reading import load_config
from launch.evaluation.scoring import EvaluationError, ledger_scores, student_settings
from rollout.ledger import LedgerWriter
from rollout.trajectory import Trajectory


def run_of(i: int, sample: int, *, right: bool) -> Trajectory:
    one = trajectory(i, success=right)
    prediction = one.task.answer if right else "0"
    return replace(one, key=f"{one.task.id}|{sample}", sample_index=sample, prediction=prediction)


def test_several_runs_of_a_task_are_scored_by_their_vote(tmp_path):
    mostly_right = [run_of(0, sample, right=sample != 0) for sample in range(3)]
    mostly_wrong = [run_of(1, sample, right=sample == 0) for sample in range(3)]
    LedgerWriter(tmp_path, writer="w").append([*mostly_right, *mostly_wrong])
    scores = ledger_scores(tmp_path, [trajectory(0).task, trajectory(1).task])
    assert (scores["arithmetic"].mean, scores["arithmetic"].n) == (0.5, 2)


def test_a_task_without_a_result_is_no_wrong_answer(tmp_path):
    LedgerWriter(tmp_path, writer="w").append([run_of(0, 0, right=True)])
    with pytest.raises(EvaluationError, match="1 of 2 tasks have no result"):
        ledger_scores(tmp_path, [trajectory(0).task, trajectory(1).task])


def test_students_are_shown_no_guide_and_no_teachers_prompt():
    config = load_config(["recipe=paper", "episode.guide=solution"])
    settings = {mode: student_settings(config, mode) for mode in ("greedy", "self_consistent", "whole_run_vote")}
    assert all(
        (each.prompt, each.guide, each.first_thought) == ("student", "none", False) for each in settings.values()
    )
    assert {mode: (each.candidates, each.temperature) for mode, each in settings.items()} == {
        "greedy": (1, 0.0),
        "self_consistent": (8, 0.4),
        "whole_run_vote": (1, 0.4),
    }
