"""From ledgers to rows of results: values of tasks, averages, votes, pairs, and the figures beside them."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
from learner_samples import trajectory

from envs.base import Task
from launch.compare import main as compare
from launch.evaluation.rows import AVERAGE, IN_DOMAIN, OUT_OF_DOMAIN, OtherTaskError, Row, keys_of, pairs
from launch.evaluation.significance import mcnemar
from launch.evaluation.summary import summarize
from rollout.ledger import Ledger, LedgerWriter
from rollout.trajectory import Failure, FailureClass, StopReason, Trajectory, Usage


def run_of(i: int, *, sample: int = 0, right: bool = True, kind: str = "arithmetic", **more: object) -> Trajectory:
    one = trajectory(i, success=right)
    task = replace(one.task, kind=kind)
    made = replace(
        one, key=f"{task.id}|{sample}", task=task, sample_index=sample, prediction=task.answer if right else "0"
    )
    return replace(made, **more)  # type: ignore[arg-type]


def ledger_of(folder, *trajectories: Trajectory) -> Ledger:
    LedgerWriter(folder, writer="w").append(list(trajectories))
    return Ledger(folder)


def test_a_task_with_several_runs_has_the_value_of_their_mean(tmp_path):
    runs = [run_of(0, sample=sample, right=sample == 0) for sample in range(4)]
    row = Row.read("a", ledger_of(tmp_path, *runs, *(run_of(1, sample=sample) for sample in range(4))))
    assert [each.value for each in row.results.values()] == [0.25, 1.0]
    assert row.scores()["arithmetic"].mean == 0.625
    assert {k: each.mean for k, each in row.pass_at().items()} == pytest.approx({1: 0.625, 2: 0.75, 4: 1.0})
    mean = row.mean_at_n()
    assert mean is not None and mean.mean == 0.625


def test_a_vote_gives_the_task_its_value_and_the_runs_give_pass_at_k(tmp_path):
    runs = [run_of(0, sample=sample, right=sample == 0) for sample in range(3)]
    row = Row.read("a", ledger_of(tmp_path, *runs), votes=True)
    assert row.scores()["arithmetic"].mean == 0.0
    assert row.pass_at()[3].mean == 1.0


def test_only_the_episodes_that_are_asked_for_count(tmp_path):
    ledger = ledger_of(tmp_path, run_of(0), run_of(1, right=False), run_of(2))
    tasks = [run_of(2).task, run_of(1).task, run_of(7).task]
    row = Row.read("a", ledger, keys=keys_of(tasks, lambda task, sample: f"{task}|{sample}", 1))
    assert list(row.results) == ["task-0002", "task-0001"]
    assert (row.missing, row.scores()["arithmetic"].mean, row.summary.all.n) == (1, 0.5, 2)


def test_a_task_that_asks_something_else_under_the_same_id_is_refused(tmp_path):
    ledger = ledger_of(tmp_path, run_of(0))
    other = replace(run_of(0).task, answer="another")
    with pytest.raises(OtherTaskError, match="'task-0000' has the answer .* here it is 'another'; choose another out"):
        Row.read("a", ledger, keys={"task-0000|0": other})


def test_parts_of_the_whole_are_scored_by_their_reward(tmp_path):
    row = Row.read("a", ledger_of(tmp_path, run_of(0, right=False, reward=0.5), run_of(1)))
    assert row.scores()["arithmetic"].mean == 0.75 and row.summary.all.mean_reward == 0.75
    assert row.summary.all.success is not None and row.summary.all.success.mean == 0.5


def test_benchmarks_are_averaged_within_and_without_the_domain(tmp_path):
    runs = [run_of(i, kind="hotpotqa") for i in range(3)]
    runs += [run_of(i, kind="math500", right=False) for i in range(3, 4)]
    runs += [run_of(i, kind="aime", right=i == 4) for i in range(4, 8)]
    row = Row.read("a", ledger_of(tmp_path, *runs))
    averages = row.averages({"hotpotqa": "in", "math500": "in", "aime": "out"})
    assert {name: each.mean for name, each in averages.items()} == pytest.approx(
        {IN_DOMAIN: 0.5, OUT_OF_DOMAIN: 0.25, AVERAGE: 1.25 / 3}
    )


def test_an_average_that_lacks_a_benchmark_is_not_given(tmp_path):
    row = Row.read("a", ledger_of(tmp_path, run_of(0, kind="hotpotqa")))
    assert row.averages({"hotpotqa": "in", "aime": "out"}).keys() == {IN_DOMAIN}


def test_rows_are_compared_on_the_tasks_that_both_have(tmp_path):
    first = Row.read("a", ledger_of(tmp_path / "a", *(run_of(i, right=i < 8) for i in range(12))))
    second = Row.read("b", ledger_of(tmp_path / "b", *(run_of(i, right=i < 2) for i in range(10))))
    [pair] = pairs([first, second])
    assert pair.test == mcnemar([i < 8 for i in range(10)], [i < 2 for i in range(10)])
    assert (pair.test.n, pair.test.first_better, pair.holm_p) == (10, 6, pair.test.p_value)


def test_rows_without_a_shared_task_are_no_pair(tmp_path):
    rows = [Row.read(str(i), ledger_of(tmp_path / str(i), run_of(i))) for i in range(2)]
    assert pairs(rows) == []


# -- the summary


def test_a_summary_counts_what_the_trajectories_say(tmp_path):
    usage = Usage(requests=2, prompt_tokens=100, completion_tokens=30, cost_usd=0.25)
    runs = [run_of(i, usage=usage, duration_s=float(i + 1)) for i in range(3)]
    runs.append(run_of(3, right=False, kind="two_hop", stop_reason=StopReason.MAX_STEPS, usage=usage, duration_s=9.0))
    summary = summarize(ledger_of(tmp_path, *runs))
    assert (summary.all.n, summary.all.tasks, summary.all.mean_steps) == (4, 4, 2.0)
    assert (summary.all.prompt_tokens, summary.all.mean_completion_tokens, summary.all.cost_usd) == (400, 30.0, 1.0)
    assert summary.all.stop_reasons == {"final": 3, "max_steps": 1}
    assert summary.kinds["arithmetic"].success is not None and summary.kinds["arithmetic"].success.n == 3
    latency = summary.all.latency
    assert latency is not None and (latency.p50_s, latency.p95_s) == pytest.approx((2.0, 9.0), rel=0.02)
    json.dumps(summary.to_json())


def test_the_latency_of_steps_is_that_of_policy_and_env(tmp_path):
    one = run_of(0)
    timed = tuple(replace(step, policy_s=s, env_s=0.5) for step, s in zip(one.steps, (0.5, 3.5), strict=True))
    latency = summarize(ledger_of(tmp_path, replace(one, steps=timed))).all.latency
    assert latency is not None and (latency.step_p50_s, latency.step_p95_s) == pytest.approx((1.0, 4.0), rel=0.02)


def test_failures_are_counted_by_class_and_those_that_are_left_by_their_last(tmp_path):
    def failed(i: int, why: FailureClass) -> Trajectory:
        failure = Failure(failure_class=why, message="m")
        return run_of(i, right=False, failure=failure, stop_reason=StopReason.FAILED, usage=Usage(cost_usd=0.5))

    writer = LedgerWriter(tmp_path, writer="w")
    writer.append([failed(0, FailureClass.ENGINE), failed(1, FailureClass.ENVIRONMENT)])
    writer.append([run_of(0)])
    summary = summarize(Ledger(tmp_path))
    assert summary.failures == {"engine": 1, "environment": 1} and summary.unresolved == {"environment": 1}
    assert summary.failed_cost_usd == 1.0 and summary.all.n == 1


def test_several_runs_of_a_task_make_no_interval_narrower(tmp_path):
    runs = [run_of(i, sample=sample, right=i % 2 == 0) for i in range(6) for sample in range(50)]
    several, single = ledger_of(tmp_path / "s", *runs), ledger_of(tmp_path / "o", *runs[::50])
    assert summarize(several).all.success == summarize(single).all.success


def test_a_ledger_without_rows_has_a_summary(tmp_path):
    summary = summarize(Ledger(tmp_path))
    assert (summary.all.n, summary.all.success, summary.all.latency, summary.kinds) == (0, None, None, {})


# -- the command over ledgers


def compared(capsys, *arguments: object) -> dict:
    assert compare([*map(str, arguments), "--json"]) == 0
    return json.loads(capsys.readouterr().out)


def test_ledgers_are_compared_by_what_tells_their_paths_apart(tmp_path, capsys):
    for name, limit in (("one", 6), ("two", 3)):
        ledger_of(tmp_path / name / "ledger", *(run_of(i, right=i < limit) for i in range(8)))
    found = compared(capsys, tmp_path / "one" / "ledger", tmp_path / "two" / "ledger")
    assert list(found["rows"]) == ["one", "two"]
    [pair] = found["pairs"]
    assert (pair["first"], pair["test"]["first_better"], pair["test"]["p_value"]) == ("one", 3, 0.25)


def test_policies_of_one_ledger_are_rows_of_their_own(tmp_path, capsys):
    mixed = [replace(run_of(i, sample=s, right=s == 0), policy=f"p{s}") for i in range(4) for s in range(2)]
    ledger_of(tmp_path / "mixed", *mixed)
    rows = compared(capsys, tmp_path / "mixed")["rows"]
    assert {name: row["scores"]["arithmetic"]["mean"] for name, row in rows.items()} == {"mixed: p0": 1, "mixed: p1": 0}


def test_settings_of_one_policy_are_rows_of_their_own(tmp_path, capsys):
    runs = [replace(run_of(i, right=s == "a"), key=f"task-{i}|p|0|{s * 12}") for i in range(4) for s in "ab"]
    ledger_of(tmp_path / "mixed", *runs)
    rows = compared(capsys, tmp_path / "mixed")["rows"]
    assert {name: row["scores"]["arithmetic"]["mean"] for name, row in rows.items()} == {
        "mixed: settings aaaaaaaaaaaa": 1,
        "mixed: settings bbbbbbbbbbbb": 0,
    }


def test_scores_are_over_the_tasks_that_all_ledgers_have(tmp_path, capsys):
    for name, count in (("one", 6), ("two", 3)):
        ledger_of(tmp_path / name, *(run_of(i, right=i < 3) for i in range(count)))
    assert compared(capsys, tmp_path / "one", tmp_path / "two")["rows"]["one"]["scores"]["arithmetic"]["n"] == 3
    whole = compared(capsys, tmp_path / "one", tmp_path / "two", "--all-tasks")
    assert whole["rows"]["one"]["scores"]["arithmetic"]["n"] == 6


@pytest.mark.parametrize(
    ("names", "more", "complaint"),
    [
        (["none"], [], "does not exist"),
        (["one", "far"], [], "share no task"),
        (["one", "one"], [], "named twice"),
        (["one"], ["--kind", "chess"], "--kind 'chess': the ledgers' tasks are of the kinds arithmetic"),
        (["one", "far"], ["--names", "a"], "give 2 different names"),
    ],
)
def test_ledgers_that_cannot_be_compared_are_refused_in_one_line(names, more, complaint, tmp_path, capsys):
    ledger_of(tmp_path / "one", run_of(0))
    ledger_of(tmp_path / "far", run_of(9))
    assert compare([*(str(tmp_path / name) for name in names), *more]) == 2
    said = capsys.readouterr().err
    assert complaint in said and len(said.strip().splitlines()) == 1


def test_the_tables_name_what_is_in_them(tmp_path, capsys):
    for name, limit in (("one", 6), ("two", 3)):
        ledger_of(tmp_path / name, *(run_of(i, right=i < limit) for i in range(8)))
    assert compare([str(tmp_path / "one"), str(tmp_path / "two")]) == 0
    said = capsys.readouterr().out
    assert "75.0 [40.9, 92.9]" in said and "3 : 0" in said and "McNemar's exact test" in said


def test_a_task_is_known_by_its_id():
    task = Task(id="t", question="q", answer="a", kind="k")
    assert keys_of([task], lambda name, sample: f"{name}|{sample}", 2) == {"t|0": task, "t|1": task}
