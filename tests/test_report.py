"""The figures of a report: what is counted over ledgers and learners, what is chosen, and what must not be told."""

from __future__ import annotations

import json
import math
import shlex
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from learner_samples import TOKENIZER, trajectory
from report_samples import KINDS, failed, metrics_row, run_folder, sampled, whole_run

from launch.config_reading import load_config, to_plain
from launch.report.figures import gather
from launch.report.ledger_figures import LedgerFigures, read_figures
from launch.report.run_files import Kind, ReportError, find
from launch.report.samples import read_samples
from launch.report.settings import HIDDEN, command, without_secrets
from launch.report.span_composition import compose
from launch.report.thinning import Thinned
from launch.report.throughput import over_time
from launch.report.training_figures import read_training
from rollout.ledger import Ledger, LedgerWriter
from rollout.trajectory import FailureClass, Trajectory


def ledger_of(folder: Path, *batches: list[Trajectory]) -> Ledger:
    writer = LedgerWriter(folder, "w")
    for batch in batches:
        writer.append(batch)
    return Ledger(folder)


def figures_of(folder: Path, *batches: list[Trajectory], reference: dict[str, int] | None = None) -> LedgerFigures:
    return read_figures(ledger_of(folder, *batches), reference=reference)


# -- ledgers


def test_counts_are_those_of_the_trajectories(tmp_path: Path) -> None:
    rows = [sampled(i, policy=f"p{i % 3}", kind=KINDS[i % 2], success=i % 4 > 0) for i in range(50)]
    found = figures_of(tmp_path, rows[:30], rows[30:])
    for (policy, kind), tally in found.tallies.items():
        own = [row for row in rows if row.policy == policy and row.task.kind == kind]
        assert (tally.n, tally.succeeded) == (len(own), sum(row.success for row in own))
        assert tally.accepted == sum(row.trainable for row in own)
        assert tally.completion_tokens == sum(row.usage.completion_tokens for row in own)
        assert tally.cost_usd == pytest.approx(0.01 * len(own))
    assert found.total.n == 50


def test_a_key_that_is_there_twice_counts_once(tmp_path: Path) -> None:
    assert figures_of(tmp_path, [sampled(1), sampled(2)], [sampled(1)]).total.n == 2


def test_success_is_told_by_the_number_of_steps(tmp_path: Path) -> None:
    short = replace(sampled(1), steps=sampled(1).steps[:1])
    found = figures_of(tmp_path, [short, sampled(2), sampled(3, success=False)])
    assert found.by_steps == {"teacher": {1: [1, 1], 2: [2, 1]}}


def test_difficulty_is_what_tasks_say_of_it(tmp_path: Path) -> None:
    rows = [sampled(i, success=i > 2, metadata={"level": f"Level {1 + i % 2}"}) for i in range(6)]
    rows += [sampled(9, metadata={"hops": 3}), sampled(10, metadata={"levels": "not one"})]
    assert figures_of(tmp_path, rows).by_level == {"teacher": {"Level 1": [3, 1], "Level 2": [3, 2], "hops 3": [1, 1]}}


def test_difficulty_is_what_the_teacher_needed(tmp_path: Path) -> None:
    rows = [sampled(1), sampled(2, success=False), sampled(3)]
    found = figures_of(tmp_path, rows, reference={"task-0001": 2, "task-0002": 4})
    assert found.by_reference == {"teacher": {2: [1, 1], 4: [1, 0]}}


def test_failures_are_told_by_class_with_the_message_that_came_most_often(tmp_path: Path) -> None:
    messages = ["gone", "busy", "busy"]
    rows = [failed(i, message) for i, message in enumerate(messages)]
    rows.append(failed(9, "no such grader", FailureClass.INPUT))
    found = figures_of(tmp_path, [sampled(1), *rows])
    told = {name: (each.attempts, each.example) for name, each in found.failures.items()}
    assert told == {"engine": (3, "busy"), "input": (1, "no such grader")}
    assert found.total.n == 1


def test_what_is_shown_does_not_depend_on_the_order_of_the_rows(tmp_path: Path) -> None:
    rows = [sampled(i, kind=KINDS[i % 2], success=i % 3 > 0) for i in range(60)]
    forth, back = figures_of(tmp_path / "a", rows), figures_of(tmp_path / "b", rows[::-1])
    assert forth.samples == back.samples
    assert set(forth.samples) == {("teacher", kind, success) for kind in KINDS for success in (True, False)}


def test_samples_are_read_whole_by_their_keys(tmp_path: Path) -> None:
    rows = [sampled(i) for i in range(20)]
    ledger = ledger_of(tmp_path, rows[:10], rows[10:])
    found = read_samples(ledger, [rows[3].key, rows[17].key, "not there"])
    assert found.trajectories == {rows[3].key: rows[3], rows[17].key: rows[17]}


# -- time


def test_a_thinned_series_keeps_its_mean_and_its_ends() -> None:
    series = Thinned(limit=50)
    values = [math.sin(i / 40) for i in range(3200)]
    for i, value in enumerate(values):
        series.add(float(i), value)
    points = series.points
    assert len(points) <= 50
    assert math.fsum(point.y for point in points) / len(points) == pytest.approx(math.fsum(values) / 3200, abs=1e-9)
    assert (min(point.low for point in points), max(point.high for point in points)) == (min(values), max(values))
    assert points[-1].x == 3199


@given(st.lists(st.floats(0, 5000), min_size=2, max_size=200))
def test_rates_over_time_add_up_to_all_episodes(ended: list[float]) -> None:
    rates = over_time(1.7e9 + np.array(ended), np.full(len(ended), 10.0))
    if rates is None:
        return
    each = (rates.minutes[1] - rates.minutes[0]) if len(rates.minutes) > 1 else 2 * rates.minutes[0]
    assert sum(rates.episodes) * each == pytest.approx(len(ended), rel=1e-3)
    assert sum(rates.tokens) * each == pytest.approx(10 * len(ended), rel=1e-3)


def test_a_night_without_work_is_cut_out() -> None:
    day = np.arange(600.0)
    rates = over_time(1.7e9 + np.concatenate([day, 50_000 + day]), np.ones(1200))
    assert rates is not None and rates.cuts == 1
    assert rates.minutes[-1] < 25


def test_learning_is_read_by_span_and_over_time() -> None:
    found = read_training(metrics_row(step) for step in range(0, 40))
    assert found.steps == 39
    assert {name: series.last for name, series in found.loss.items()} == pytest.approx(
        {"all": 3 / 40, "thought": 4 / 40, "code": 2 / 40}
    )
    assert [point.y for point in found.tokens_per_s.points] == pytest.approx([1000 / 6] * 39)
    assert found.queue_depth.last == 39 % 7


def test_a_run_that_went_on_has_no_negative_rate() -> None:
    rows = [metrics_row(step) for step in range(1, 20)]
    again = [metrics_row(step, minutes=2.0 + step / 10, wait_s=0.1 * step) for step in range(10, 30)]
    found = read_training([*rows, *again])
    assert all(point.low >= 0 for series in (found.tokens_per_s, found.waiting) for point in series.points)
    assert found.steps == 39


def test_a_held_out_loss_is_one_point_each_time_it_is_measured() -> None:
    rows = [metrics_row(step, validation_loss=1.0 if step < 5 else 0.5) for step in range(1, 10)]
    assert [point.y for point in read_training(rows).validation.points] == [1.0, 0.5]


# -- rows that are trained


def test_composition_counts_the_tokens_that_a_student_has_to_produce() -> None:
    from tokenizers import Tokenizer

    rows = [trajectory(i, system_prompt="Add.") for i in range(4)]
    found = compose(rows, TOKENIZER, {"span_weights": {"code": 0.5}})
    assert found is not None and found.unit == "tokens" and found.weights == {"code": 0.5}
    tokenizer = Tokenizer.from_file(str(TOKENIZER / "tokenizer.json"))
    said = [step.completion.text for row in rows for step in row.steps]
    assert found.trained.total() == sum(len(tokenizer.encode(text, add_special_tokens=False).ids) for text in said)
    assert set(found.trained) == {"thought", "format", "code"} and set(found.read) == {"system", "user", "observation"}


def test_composition_counts_characters_where_there_is_no_tokenizer() -> None:
    found = compose([trajectory(1)], None, {})
    assert found is not None and found.unit == "characters"
    assert found.trained.total() == sum(len(step.completion.text) for step in trajectory(1).steps)


# -- whole runs


def test_scores_are_those_of_the_results(tmp_path: Path) -> None:
    figures = gather(find(whole_run(tmp_path)))
    assert figures.scored == "results"
    assert figures.scores["student"]["arithmetic"].n == 12
    assert list(figures.scores) == ["untrained", "student", "teacher"]


def test_a_run_that_did_not_end_is_scored_by_what_it_recorded(tmp_path: Path) -> None:
    evaluated = {"student": [sampled(i, policy="student", success=i < 3) for i in range(4)]}
    figures = gather(find(run_folder(tmp_path, collected=[sampled(1)], evaluated=evaluated)))
    assert figures.scored == "ledgers"
    assert figures.scores["student"]["arithmetic"].mean == 0.75


def test_what_curation_removed_is_told_though_nobody_recorded_it(tmp_path: Path) -> None:
    collected = [sampled(i, success=i > 3) for i in range(10)]
    curation = gather(find(run_folder(tmp_path, collected=collected))).curation
    assert curation is not None
    removed = {each["filter"]: each["removed"] for each in curation["filters"]}
    assert (curation["seen"], removed["correct"]) == (10, 4)


def test_a_damaged_shard_is_told_and_the_rest_is_reported(tmp_path: Path) -> None:
    run = whole_run(tmp_path)
    next((run / "evaluation" / "student" / "shards").iterdir()).write_bytes(b"no parquet")
    figures = gather(find(run))
    assert any("cannot be read" in trouble for trouble in figures.troubles)
    assert figures.ledgers["training"].total.n == 40 and "student" not in figures.ledgers


def test_a_line_that_a_kill_cut_off_is_left_out(tmp_path: Path) -> None:
    run = run_folder(tmp_path, collected=[sampled(1)], steps=5)
    with open(run / "metrics.jsonl", "a") as file:
        file.write('{"minutes": 0.9, "ste')
    assert gather(find(run)).training.steps == 5


def test_students_that_still_learned_are_a_curve(tmp_path: Path) -> None:
    watched = {
        f"while_learning/step-{step:07d}": [sampled(i, policy="student", success=i < right) for i in range(4)]
        for step, right in ((100, 1), (20, 0))
    }
    figures = gather(find(run_folder(tmp_path, collected=[sampled(1)], evaluated=watched)))
    assert [(step, each.mean) for step, each in figures.watched] == [(20, 0.0), (100, 0.25)]


def test_spending_is_summed_by_model(tmp_path: Path) -> None:
    run = run_folder(tmp_path, collected=[sampled(1)])
    calls = [{"model": "m", "requests": 1, "prompt_tokens": 10, "completion_tokens": 5, "usd": 0.5, "lost": lost}
             for lost in (False, True)]  # fmt: skip
    (run / "spend.jsonl").write_text("".join(json.dumps(call) + "\n" for call in calls))
    spent = gather(find(run)).spent["m"]
    assert (spent.requests, spent.prompt_tokens, spent.usd, spent.lost_usd) == (2, 20, 1.0, 0.5)


def test_figures_are_plain_data(tmp_path: Path) -> None:
    json.dumps(gather(find(whole_run(tmp_path))).to_json(), allow_nan=False)


def test_a_bare_ledger_has_a_row_for_each_policy(tmp_path: Path) -> None:
    ledger_of(tmp_path, [sampled(i, policy=f"p{i % 2}") for i in range(6)])
    files = find(tmp_path)
    assert files.kind is Kind.LEDGER
    assert list(gather(files).scores) == ["p0", "p1"]


def test_evaluations_are_named_by_their_policy_and_mode(tmp_path: Path) -> None:
    ledger_of(tmp_path / "a_b" / "agent" / "ledger", [sampled(1, policy="a/b")])
    (tmp_path / "a_b" / "agent" / "row.json").write_text(json.dumps({"policy": "a/b", "mode": "agent"}))
    files = find(tmp_path)
    assert (files.kind, [each.name for each in files.ledgers]) == (Kind.EVALUATE, ["a/b, agent"])


@pytest.mark.parametrize("name", ["missing", "empty"])
def test_a_place_without_a_run_is_refused_by_name(tmp_path: Path, name: str) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(ReportError, match=name):
        find(tmp_path / name)


# -- settings


def test_the_command_makes_the_same_configuration_again() -> None:
    given = ["seed=3", "learner.epochs=5", "learner.span_weights={thought: 2.0}", "evaluate.top_p=0.5",
             "curation.filters=[correct, {name: length, max_steps: 3}]", "teacher.name=a b"]  # fmt: skip
    config = to_plain(load_config(given))
    words = shlex.split(command(config, job="distill"))
    assert words[:2] == ["python", "launch/distill.py"]
    assert to_plain(load_config(words[2:])) == config


SECRETS: list[dict[str, Any]] = [
    {"api_key": "s3cr3t-value"},
    {"extra_body": {"headers": {"X-Whatever": "s3cr3t-value"}}},
    {"mcp_servers": [{"command": ["server", "--api-key", "s3cr3t-value"]}]},
    {"mcp_servers": [{"command": ["server", "--token=s3cr3t-value"]}]},
    {"mcp_servers": [{"command": ["env", "MY_TOKEN=s3cr3t-value", "server"]}]},
    {"mcp_servers": [{"env": {"WHATEVER": "s3cr3t-value"}}]},
    {"base_url": "https://user:s3cr3t-value@host/v1"},
    {"base_url": "https://host/v1?api_key=s3cr3t-value&x=1"},
    {"note": "Bearer s3cr3t-value"},
    {"note": "sk-s3cr3t-value-and-more"},
    {"Authorization": "s3cr3t-value"},
    {"access_token": "s3cr3t-value"},
]


@pytest.mark.parametrize("config", SECRETS, ids=str)
def test_secrets_are_hidden(config: dict[str, Any]) -> None:
    told = str(without_secrets(config))
    assert "s3cr3t-value" not in told and HIDDEN in told


def test_what_is_no_secret_stays() -> None:
    plain = to_plain(load_config([]))
    assert without_secrets(plain) == plain


def test_every_group_of_samples_has_both_outcomes(tmp_path: Path) -> None:
    figures = gather(find(whole_run(tmp_path)))
    shown = Counter((s.ledger, s.trajectory.success) for s in figures.samples if s.trajectory.failure is None)
    assert shown["training", True] and shown["training", False] and shown["student", True] and shown["student", False]
    assert [s.trajectory.failure.message for s in figures.samples if s.trajectory.failure] == ["the engine went away"]
