"""Merging ledgers, and tools that read a ledger's files as they are."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from rollout.ledger import Ledger, LedgerError, LedgerWriter
from rollout.ledger_merge import merge
from rollout.trajectory import FailureClass, Usage
from tests.test_ledger import trajectory


def test_each_result_comes_once_and_the_first_source_counts(tmp_path: Path) -> None:
    LedgerWriter(tmp_path / "a", writer="w").append([trajectory("1", question="of a"), trajectory("2")])
    LedgerWriter(tmp_path / "b", writer="w").append([trajectory("1", question="of b"), trajectory("3")])
    report = merge([tmp_path / "a", tmp_path / "b"], tmp_path / "all")
    assert (report.results, report.repeated) == (3, 1)
    rows = {row.key: row.task.question for row in Ledger(tmp_path / "all").trajectories()}
    assert rows.keys() == {"1", "2", "3"}
    assert rows["1"] == "of a"


def test_merging_again_adds_nothing_not_even_attempts(tmp_path: Path) -> None:
    failed = replace(trajectory("1", failure=FailureClass.ENGINE), started_at_s=1.0)
    LedgerWriter(tmp_path / "a", writer="w").append([failed, failed, trajectory("2")])
    LedgerWriter(tmp_path / "b", writer="w").append([replace(failed, started_at_s=2.0)])
    assert merge([tmp_path / "a", tmp_path / "b"], tmp_path / "all").failures == 3
    again = merge([tmp_path / "b", tmp_path / "a"], tmp_path / "all")
    assert (again.results, again.repeated, again.failures) == (0, 1, 0)
    assert Ledger(tmp_path / "all").attempts()["1"].total == 3


def test_a_source_that_is_missing_or_the_target_itself_is_refused(tmp_path: Path) -> None:
    LedgerWriter(tmp_path / "a", writer="w").append([trajectory("1")])
    with pytest.raises(LedgerError, match="there is no ledger at .*/nothing"):
        merge([tmp_path / "nothing"], tmp_path / "all")
    with pytest.raises(LedgerError, match="cannot be merged into itself"):
        merge([tmp_path / "a"], tmp_path / "a")
    assert not (tmp_path / "all").exists()


@pytest.fixture(params=["as written", "compacted"])
def folder(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    """A ledger of three results in two shards, or one."""
    writer = LedgerWriter(tmp_path / "ledger", writer="w")
    writer.append([replace(trajectory("a"), usage=Usage(cost_usd=0.25)), trajectory("b")])
    writer.append([trajectory("c")])
    if request.param == "compacted":
        Ledger(tmp_path / "ledger").compact()
    return tmp_path / "ledger"


def test_duckdb_reads_the_shards_as_they_are(folder: Path) -> None:
    duckdb = pytest.importorskip("duckdb")
    with duckdb.connect() as connection:
        shards = f"read_parquet('{folder}/shards/*.parquet')"
        question = f"select kind, count(*), sum(cost_usd), sum(tool_calls), min(tokens) from {shards} group by kind"
        assert connection.execute(question).fetchall() == [("arithmetic", 3, 0.25, 0, "sampled")]
        ids = f"select steps[1].completion.token_ids, task.answer from {shards} where key = 'a'"
        assert connection.execute(ids).fetchall() == [([5, 6, 2], "42")]


def test_pandas_reads_the_shards_as_they_are(folder: Path) -> None:
    pandas = pytest.importorskip("pandas")
    frame = pandas.read_parquet(folder / "shards").set_index("key")
    assert frame.loc["a", "cost_usd"] == 0.25
    assert list(frame.groupby("kind").size()) == [3]
    assert frame.loc["c", "steps"][0]["completion"]["text"] == "Thought: easy"


def test_datasets_loads_the_shards_as_they_are(folder: Path) -> None:
    datasets = pytest.importorskip("datasets")
    loaded = datasets.load_dataset(
        "parquet", data_files=f"{folder}/shards/*.parquet", cache_dir=str(folder.parent / "cache"), split="train"
    )
    assert sorted(loaded["key"]) == ["a", "b", "c"]
    assert loaded[0]["steps"][0]["completion"]["token_ids"] == [5, 6, 2]
    assert loaded[0]["failure"] is None
