"""`rollout.records`, version 2: compact prompts, columns for tools, tables of version 1."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from envs.base import ObservationKind, Task
from rollout import prompt_ids
from rollout.ledger import Ledger, LedgerWriter
from rollout.records import SCHEMA, SCHEMA_VERSION, from_table, to_table
from rollout.trajectory import Completion, FailureClass, Trajectory, Usage
from tests.test_ledger import trajectory

V1 = Path(__file__).parent / "data" / "ledger_v1"

ids = st.lists(st.integers(0, 3), max_size=6).map(tuple)
"""Of few kinds, so that conversations agree by chance as well."""


@st.composite
def conversations(draw: st.DrawFn) -> list[Completion]:
    """Steps whose prompts mostly append to the conversation, and sometimes do anything else."""
    made: list[Completion] = []
    conversation: tuple[int, ...] = ()
    for _ in range(draw(st.integers(0, 5))):
        how = draw(st.sampled_from(["append", "append", "prefix", "cut", "other", "unknown"]))
        prefix = draw(ids) if how == "prefix" else ()
        sampled = draw(st.none() | ids)
        token_ids = None if sampled is None else prefix + sampled
        prompt = {
            "append": conversation + draw(ids),
            "prefix": conversation + draw(ids) + prefix,
            "cut": conversation[: draw(st.integers(0, 9))] + draw(ids),
            "other": draw(ids),
            "unknown": None,
        }[how]
        completion_tokens = draw(st.sampled_from([len(sampled or ()), draw(st.integers(0, 9))]))
        made.append(Completion(text="", token_ids=token_ids, prompt_ids=prompt, completion_tokens=completion_tokens))
        if prompt is not None:
            conversation = prompt + (sampled or ())
    return made


def episode(completions: list[Completion]) -> Trajectory:
    whole = trajectory("a")
    return replace(whole, steps=tuple(replace(whole.steps[0], completion=each) for each in completions))


@settings(max_examples=150, deadline=None)
@given(conversations())
def test_prompts_come_back_whether_or_not_they_grew_by_appending(completions: list[Completion]) -> None:
    assert from_table(to_table([episode(completions)])) == [episode(completions)]


@given(ids, ids)
def test_what_two_prompts_share_is_found(left: tuple[int, ...], right: tuple[int, ...]) -> None:
    n = prompt_ids.shared(left, right)
    assert left[:n] == right[:n]
    assert n == min(len(left), len(right)) or left[n] != right[n]


def test_a_prompt_that_grew_by_appending_costs_only_what_it_adds() -> None:
    first = Completion(text="", token_ids=(7, 8, 9), prompt_ids=(1, 2, 3, 7), completion_tokens=2)  # 7: a prefix
    second = Completion(text="", token_ids=(5,), prompt_ids=(1, 2, 3, 7, 8, 9, 4), completion_tokens=1)
    kept = [step["completion"] for step in to_table([episode([first, second])]).column("steps")[0].as_py()]
    assert [(each["prompt_kept"], each["prompt_new"]) for each in kept] == [(0, [1, 2, 3, 7]), (6, [4])]


def test_the_flat_columns_say_what_the_trajectory_says() -> None:
    whole = trajectory("a", failure=FailureClass.LIMIT)
    wrong = replace(whole.steps[0], observation_kind=ObservationKind.PARSE_ERROR, tool_calls=4)
    row = replace(whole, steps=(*whole.steps, wrong), usage=Usage(requests=3, completion_tokens=99, cost_usd=0.5))
    [flat] = to_table([row, row]).slice(1).to_pylist()
    assert {name: flat[name] for name in SCHEMA.names[SCHEMA.names.index("task_id") :]} == {
        "task_id": "a", "kind": "arithmetic", "failure_class": "limit", "trainable": False, "truncated": False,
        "tokens": "sampled", "step_count": 2, "tool_calls": 4, "parse_errors": 1, "completion_tokens": 6,
        "cost_usd": 0.5,
    }  # fmt: skip
    assert from_table(to_table([row]).set_column(SCHEMA.names.index("kind"), SCHEMA.field("kind"), [["x"]])) == [row]


def test_a_ledger_of_version_1_is_read_scanned_extended_and_compacted(tmp_path: Path) -> None:
    for name in ("ledger.json", "shards/w-000001.parquet", "failures/w-000001.parquet"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes((V1 / name).read_bytes())
    old = list(Ledger(tmp_path).trajectories())
    assert [each.key for each in old] == ["t1|teacher|0|0123456789ab", "t2|teacher|0|0123456789ab"]
    first, second = old[0].steps
    assert (first.completion.token_ids, first.completion.logprobs) == ((5, 6, 2), (-0.5, -0.25, 0.0))
    assert [each.votes for each in first.candidates] == [1, 0] and first.candidates[1].ran
    assert (first.completion.prompt_ids, old[0].usage, old[0].guide, old[0].leaks) == (None, Usage(), None, ())
    assert old[0].task == Task(
        id="t1|teacher|0|0123456789ab", question="What is 6 * 7?", answer="42", kind="arithmetic",
        metadata={"operations": 1},
    )  # fmt: skip
    assert second == trajectory("t1").steps[0]
    assert [each.failure.failure_class for each in Ledger(tmp_path).failures()] == [FailureClass.ENGINE]

    LedgerWriter(tmp_path, writer="w").append([trajectory("new")])
    ledger = Ledger(tmp_path)
    assert f'"schema_version": {SCHEMA_VERSION}' in (tmp_path / "ledger.json").read_text()
    rows = [row for table in ledger.scan(["tool_calls", "task_id"]) for row in table.to_pylist()]
    assert sorted(rows, key=lambda row: row["task_id"])[1] == {"tool_calls": 2, "task_id": old[0].key}
    assert ledger.compact().rows == 3
    assert {each.key: each for each in ledger.trajectories()} == {each.key: each for each in (*old, trajectory("new"))}


def test_a_ledger_of_version_1_is_compacted_without_a_writer(tmp_path: Path) -> None:
    shutil.copytree(V1, tmp_path / "l", ignore=shutil.ignore_patterns("*.md"))
    shards = tmp_path / "l" / "shards"
    (shards / "x-000001.parquet").write_bytes((shards / "w-000001.parquet").read_bytes())
    rows = list(Ledger(tmp_path / "l").trajectories())
    report = Ledger(tmp_path / "l").compact()
    assert (report.rows, report.duplicates) == (2, 2)
    assert list(Ledger(tmp_path / "l").trajectories()) == rows
    assert Ledger(tmp_path / "l").validate().ok


def test_compacting_what_is_no_ledger_yet_makes_none(tmp_path: Path) -> None:
    assert Ledger(tmp_path / "l").compact().skipped == "there is no ledger yet"
    assert not (tmp_path / "l").exists()


def test_scanning_a_column_that_there_is_not_names_those_that_there_are(tmp_path: Path) -> None:
    LedgerWriter(tmp_path / "l", writer="w").append([trajectory("a")])
    with pytest.raises(ValueError, match="no column 'costs'; there are key, task,.*cost_usd"):
        list(Ledger(tmp_path / "l").scan(["costs"]))
