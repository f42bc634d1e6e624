"""`rollout.records` and `rollout.ledger`: exact rows, atomic shards, nothing lost, nothing twice."""

from __future__ import annotations

import dataclasses
import json
import os
import signal
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from envs.base import ObservationKind, Task
from rollout.ledger import Ledger, LedgerError, LedgerWriter
from rollout.records import SCHEMA, RecordsError, from_table, to_table
from rollout.trajectory import (
    Candidate,
    Completion,
    Failure,
    FailureClass,
    Span,
    SpanType,
    Step,
    StopReason,
    Trajectory,
    Usage,
)

ROOT = Path(__file__).parents[1]

texts = st.text(max_size=20)
small = st.integers(0, 2**31 - 1)
seconds = st.floats(allow_nan=False, allow_infinity=False)
json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | seconds | texts,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(texts, inner, max_size=3),
    max_leaves=5,
)


def optional_tuple(of: Any) -> Any:
    return st.none() | st.lists(of, max_size=4).map(tuple)


def every_field(of: type, **fields: st.SearchStrategy[Any]) -> st.SearchStrategy[Any]:
    """So that a field that is added to a trajectory cannot be forgotten in the ledger; what takes no part in comparing
    is of the moment, and not kept."""
    kept = {field.name for field in dataclasses.fields(of) if field.compare}
    assert set(fields) == kept, f"{of.__name__} has other fields"
    return st.builds(of, **fields)


tasks = every_field(
    Task,
    id=texts,
    question=texts,
    answer=texts,
    kind=texts,
    grader=texts,
    aliases=st.lists(texts, max_size=3).map(tuple),
    metadata=st.dictionaries(texts, json_values, max_size=3),
)
completions = every_field(
    Completion,
    text=texts,
    token_ids=optional_tuple(small),
    logprobs=optional_tuple(st.floats(width=32, allow_nan=False)),
    top_ids=optional_tuple(small),
    top_logprobs=optional_tuple(st.floats(width=32, allow_nan=False)),
    finish_reason=st.sampled_from(["stop", "length", "abort"]),
    weights_version=texts,
    prompt_tokens=small,
    completion_tokens=small,
    prompt_ids=optional_tuple(small),
    prefix_by=st.sampled_from(["", "tokens", "continue", "message", "asked"]),
    cost_usd=seconds,
    cached=st.booleans(),
)
candidates = every_field(
    Candidate,
    text=texts,
    observation=texts,
    kind=st.sampled_from(ObservationKind),
    votes=small,
    ran=st.booleans(),
    token_ids=optional_tuple(small),
    logprobs=optional_tuple(st.floats(width=32, allow_nan=False)),
)
usages = every_field(Usage, requests=small, prompt_tokens=small, completion_tokens=small, cost_usd=seconds)
steps = every_field(
    Step,
    completion=completions,
    spans=st.lists(every_field(Span, type=st.sampled_from(SpanType), start=small, end=small), max_size=3).map(tuple),
    action=st.none() | texts,
    observation=texts,
    observation_kind=st.sampled_from(ObservationKind),
    candidates=st.lists(candidates, max_size=2).map(tuple),
    chosen=small,
    tool_calls=small,
    policy_s=seconds,
    env_s=seconds,
)
trajectories = every_field(
    Trajectory,
    key=texts,
    task=tasks,
    dialect=texts,
    system_prompt=texts,
    steps=st.lists(steps, max_size=3).map(tuple),
    policy=texts,
    weights_version=texts,
    sample_index=small,
    seed=st.integers(-(2**63), 2**63 - 1),
    reward=seconds,
    success=st.booleans(),
    prediction=st.none() | texts,
    stop_reason=st.sampled_from(StopReason),
    failure=st.none() | every_field(Failure, failure_class=st.sampled_from(FailureClass), message=texts),
    stop_detail=texts,
    first_thought=st.none() | texts,
    shown_system_prompt=st.none() | texts,
    user_prompt=st.none() | texts,
    guide=st.none() | texts,
    leaks=st.lists(texts, max_size=2).map(tuple),
    usage=usages,
    started_at_s=seconds,
    duration_s=seconds,
)


def trajectory(key: str, *, question: str = "What is 6 * 7?", failure: FailureClass | None = None) -> Trajectory:
    step = Step(
        completion=Completion(text="Thought: easy", token_ids=(5, 6, 2), completion_tokens=3),
        spans=(Span(type=SpanType.THOUGHT, start=0, end=13),),
        action="final_answer(42)",
        observation="42",
        observation_kind=ObservationKind.FINAL,
    )
    return Trajectory(
        key=key,
        task=Task(id=key, question=question, answer="42", kind="arithmetic", metadata={"operations": 1}),
        dialect="code",
        system_prompt="You act.",
        steps=(step,),
        policy="teacher",
        success=failure is None,
        failure=failure and Failure(failure_class=failure, message="it broke"),
    )


def corrupt(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-20])


# -- records


@settings(max_examples=40, deadline=None)
@given(st.lists(trajectories, max_size=3))
def test_rows_come_back_exactly(rows: list[Trajectory]) -> None:
    assert from_table(to_table(rows)) == rows


@settings(max_examples=12, deadline=None)
@given(st.lists(trajectories, min_size=1, max_size=3))
def test_a_parquet_file_keeps_rows_and_schema(rows: list[Trajectory]) -> None:
    sink = pa.BufferOutputStream()
    pq.write_table(to_table(rows), sink)
    table = pq.read_table(pa.BufferReader(sink.getvalue()))
    assert table.schema.equals(SCHEMA, check_metadata=True)
    assert from_table(table) == rows


def test_a_lone_surrogate_is_stored_as_its_escape_and_costs_no_other_row() -> None:
    rows = [trajectory("a", question="half \ud800 a pair"), trajectory("b", question="plain é 你好")]
    back = from_table(to_table(rows))
    assert back[0].task.question == "half \\ud800 a pair"
    assert back[1] == rows[1]


def test_a_table_of_another_schema_version_is_refused_by_name() -> None:
    table = to_table([trajectory("a")])
    newer = table.replace_schema_metadata({b"trajectory_schema_version": b"99"})
    with pytest.raises(RecordsError, match="schema version 99; this code reads 1 and 2"):
        from_table(newer)
    with pytest.raises(RecordsError, match="no table of trajectories"):
        from_table(pa.table({"key": ["a"]}))


def test_task_metadata_that_is_no_json_is_refused_with_the_tasks_id() -> None:
    bad = Task(id="t-7", question="?", answer="!", kind="math", metadata={"tool": object()})
    whole = trajectory("a")
    fields = {name: getattr(whole, name) for name in Trajectory.__dataclass_fields__}
    with pytest.raises(RecordsError, match="t-7"):
        to_table([Trajectory(**{**fields, "task": bad})])


def test_pandas_and_datasets_read_a_shard_as_it_is(tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets")
    pandas = pytest.importorskip("pandas")
    [shard] = LedgerWriter(tmp_path / "l", writer="w").append([trajectory("a"), trajectory("b")])
    frame = pandas.read_parquet(tmp_path / "l" / shard)
    assert list(frame["key"]) == ["a", "b"]
    assert list(frame["steps"][0][0]["completion"]["token_ids"]) == [5, 6, 2]
    dataset = datasets.Dataset.from_parquet(str(tmp_path / "l" / shard), cache_dir=str(tmp_path / "cache"))
    assert dataset[1]["task"]["answer"] == "42"
    assert dataset[0]["steps"][0]["completion"]["token_ids"] == [5, 6, 2]


# -- ledger


def test_what_is_appended_is_read_back_in_order(tmp_path: Path) -> None:
    rows = [trajectory(f"k{i}") for i in range(5)]
    writer = LedgerWriter(tmp_path / "l", writer="w")
    writer.append(rows[:3])
    writer.append(rows[3:])
    ledger = Ledger(tmp_path / "l")
    assert list(ledger.trajectories()) == rows
    assert ledger.keys() == {"k0", "k1", "k2", "k3", "k4"}
    assert ledger.count() == 5


def test_failures_go_to_the_sidecar_and_are_not_done(tmp_path: Path) -> None:
    LedgerWriter(tmp_path / "l", writer="w").append([trajectory("a", failure=FailureClass.ENGINE), trajectory("b")])
    ledger = Ledger(tmp_path / "l")
    assert ledger.keys() == {"b"}
    assert [row.key for row in ledger.trajectories()] == ["b"]
    assert [row.key for row in ledger.failures()] == ["a"]


@pytest.mark.parametrize("failure", FailureClass)
def test_a_failure_of_whatever_class_is_no_result(tmp_path: Path, failure: FailureClass) -> None:
    LedgerWriter(tmp_path / "l", writer="w").append([trajectory("a", failure=failure)])
    assert Ledger(tmp_path / "l").keys() == set()


def test_of_rows_that_share_a_key_the_first_wins_and_the_rest_are_counted(tmp_path: Path) -> None:
    writer = LedgerWriter(tmp_path / "l", writer="w")
    writer.append([trajectory("a", question="first"), trajectory("b")])
    writer.append([trajectory("a", question="second")])
    ledger = Ledger(tmp_path / "l")
    assert {row.key: row.task.question for row in ledger.trajectories()}["a"] == "first"
    assert (ledger.count(), ledger.duplicates()) == (2, 1)
    assert ledger.validate().duplicate_keys == ("a",)


def test_new_shards_are_the_ones_not_seen(tmp_path: Path) -> None:
    writer = LedgerWriter(tmp_path / "l", writer="w")
    seen = set(writer.append([trajectory("a")]))
    ledger = Ledger(tmp_path / "l")
    assert ledger.new_shards(seen) == []
    added = writer.append([trajectory("b")])
    assert ledger.new_shards(seen) == added
    assert [row.key for row in ledger.read(added[0])] == ["b"]
    assert ledger.keys() == {"a", "b"}


def test_a_folder_that_is_missing_is_a_ledger_without_rows_and_is_not_made_by_reading(tmp_path: Path) -> None:
    ledger = Ledger(tmp_path / "l")
    assert (ledger.keys(), list(ledger.trajectories()), ledger.count()) == (set(), [], 0)
    assert not (tmp_path / "l").exists()


def test_a_resumed_writer_uses_no_name_again(tmp_path: Path) -> None:
    names: list[str] = []
    for i in range(3):
        names += (shard := LedgerWriter(tmp_path / "l", writer="w").append([trajectory(str(i))]))
        (tmp_path / "l" / shard[0]).unlink()
    assert len(set(names)) == 3 and names == sorted(names), "in the order of time, also when the shards are gone"


def test_writers_of_one_name_at_the_same_time_lose_nothing(tmp_path: Path) -> None:
    writers = [LedgerWriter(tmp_path / "l", writer="w") for _ in range(4)]

    def work(number: int) -> None:
        for i in range(10):
            writers[number].append([trajectory(f"{number}-{i}")])

    threads = [threading.Thread(target=work, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert Ledger(tmp_path / "l").keys() == {f"{number}-{i}" for number in range(4) for i in range(10)}


def test_a_writer_that_is_killed_leaves_everything_it_was_promised(tmp_path: Path) -> None:
    script = (
        "import itertools\n"
        "from tests.test_ledger import trajectory\n"
        "from rollout.ledger import LedgerWriter\n"
        f"writer = LedgerWriter({str(tmp_path / 'l')!r}, writer='w')\n"
        "for i in itertools.count():\n"
        "    writer.append([trajectory(f'{i}-{j}') for j in range(8)])\n"
        "    print(i, flush=True)\n"
    )
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    child = subprocess.Popen(
        [sys.executable, "-c", script], stdout=subprocess.PIPE, text=True, cwd=ROOT, env=environment
    )
    assert child.stdout is not None
    acknowledged = [int(child.stdout.readline()) for _ in range(5)]
    child.send_signal(signal.SIGKILL)
    acknowledged += [int(line) for line in child.stdout]
    child.wait(10)
    child.stdout.close()
    ledger = Ledger(tmp_path / "l")
    assert {f"{i}-{j}" for i in acknowledged for j in range(8)} <= ledger.keys()
    report = ledger.validate()
    assert report.ok
    assert report.rows % 8 == 0, "a shard is there whole or not at all"
    LedgerWriter(tmp_path / "l", writer="w").append([trajectory("after")])
    assert "after" in Ledger(tmp_path / "l").keys()


def test_leftovers_of_killed_appends_are_cleaned_but_not_what_others_write_now(tmp_path: Path) -> None:
    LedgerWriter(tmp_path / "l", writer="w")
    mine, old, fresh = (tmp_path / "l" / "shards" / f".{name}-0123abcd.tmp" for name in ("w", "old-worker", "other"))
    for path in (mine, old, fresh):
        path.write_bytes(b"half a shard")
    os.utime(old, (0, 0))
    assert len(Ledger(tmp_path / "l").validate().leftovers) == 3
    LedgerWriter(tmp_path / "l", writer="w")
    assert [path.exists() for path in (mine, old, fresh)] == [False, False, True]


def test_a_damaged_shard_is_named_and_never_skipped_in_silence(tmp_path: Path) -> None:
    writer = LedgerWriter(tmp_path / "l", writer="w")
    [shard] = writer.append([trajectory("a")])
    writer.append([trajectory("b")])
    corrupt(tmp_path / "l" / shard)
    ledger = Ledger(tmp_path / "l")
    report = ledger.validate()
    assert not report.ok
    assert report.rows == 1
    assert [line.split(":")[0] for line in report.unreadable] == [shard]
    with pytest.raises(LedgerError, match=f"{shard} cannot be read"):
        ledger.keys()
    with pytest.raises(LedgerError, match=f"{shard} cannot be read"):
        list(ledger.trajectories())


def test_a_folder_of_another_schema_version_is_refused_by_readers_and_writers(tmp_path: Path) -> None:
    LedgerWriter(tmp_path / "l", writer="w")
    mark = tmp_path / "l" / "ledger.json"
    mark.write_text(json.dumps({**json.loads(mark.read_text()), "schema_version": 7}))
    with pytest.raises(LedgerError, match="schema version 7; this code reads 1 and 2"):
        Ledger(tmp_path / "l")
    with pytest.raises(LedgerError, match="schema version 7"):
        LedgerWriter(tmp_path / "l", writer="w")


@pytest.mark.parametrize("mark", [None, "no json", "[]", '{"format": "something else", "schema_version": 1}'])
def test_a_folder_that_is_no_ledger_is_refused(tmp_path: Path, mark: str | None) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    if mark is not None:
        (tmp_path / "ledger.json").write_text(mark)
    with pytest.raises(LedgerError):
        Ledger(tmp_path)
    with pytest.raises(LedgerError):
        LedgerWriter(tmp_path, writer="w")


def test_a_writers_name_that_is_no_file_name_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="'../w'"):
        LedgerWriter(tmp_path / "l", writer="../w")
