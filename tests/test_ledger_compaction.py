"""Compaction of a ledger: same rows, fewer shards; killed at any instant, beside writers, readers and its like."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import threading
import time
from dataclasses import replace
from pathlib import Path

import pytest

from rollout import ledger_manifest
from rollout.ledger import Ledger, LedgerError, LedgerWriter
from rollout.ledger_compaction import MANY, compact, compact_if_needed
from rollout.ledger_manifest import Manifest
from rollout.retries import Attempts
from rollout.trajectory import FailureClass
from tests.test_ledger import ROOT, corrupt, trajectory


def fill(folder: Path, shards: int, *, rows: int = 2, writer: str = "w") -> set[str]:
    append = LedgerWriter(folder, writer=writer).append
    keys = {f"{writer}-{i}-{j}" for i in range(shards) for j in range(rows)}
    for i in range(shards):
        append([trajectory(f"{writer}-{i}-{j}") for j in range(rows)])
    return keys


def files(folder: Path, kind: str = "shards") -> set[str]:
    return {path.name for path in (folder / kind).iterdir()}


def test_many_small_shards_become_one_with_the_same_rows_in_the_same_order(tmp_path: Path) -> None:
    fill(tmp_path, 5)
    before = list(Ledger(tmp_path).trajectories())
    report = Ledger(tmp_path).compact()
    assert (report.merged, report.made, report.rows, report.generation) == (5, 1, 10, 1)
    assert list(Ledger(tmp_path).trajectories()) == before
    assert len(files(tmp_path)) == 1
    assert Ledger(tmp_path).validate().ok


def test_of_rows_that_share_a_key_the_first_stays_the_one_that_counts(tmp_path: Path) -> None:
    writer = LedgerWriter(tmp_path, writer="w")
    for question in ("first", "second", "third"):
        writer.append([trajectory("a", question=question)])
    assert Ledger(tmp_path).compact().duplicates == 2
    writer.append([trajectory("a", question="fourth"), trajectory("b")])
    ledger = Ledger(tmp_path)
    assert [(row.key, row.task.question[:6]) for row in ledger.trajectories()] == [("a", "first"), ("b", "What i")]
    assert (ledger.duplicates(), ledger.compact().duplicates, Ledger(tmp_path).duplicates()) == (1, 1, 0)


def test_a_full_shard_is_left_as_it_is_and_its_keys_still_count(tmp_path: Path) -> None:
    keys = fill(tmp_path, 3)
    compact(Ledger(tmp_path))
    [full] = files(tmp_path)
    writer = LedgerWriter(tmp_path, writer="x")
    writer.append([trajectory("w-0-0", question="again")])
    writer.append([trajectory("new")])
    report = compact(Ledger(tmp_path), full_bytes=1)
    assert (report.merged, report.rows, report.duplicates) == (2, 1, 1)
    assert full in files(tmp_path) and len(files(tmp_path)) == 2
    assert Ledger(tmp_path).keys() == keys | {"new"}


def test_rows_are_spread_over_shards_of_the_size_asked_for(tmp_path: Path) -> None:
    keys = fill(tmp_path, 6)
    assert compact(Ledger(tmp_path), target_bytes=1).made == 6
    assert Ledger(tmp_path).keys() == keys


def test_failures_are_merged_and_none_of_them_is_dropped(tmp_path: Path) -> None:
    writer = LedgerWriter(tmp_path, writer="w")
    for _ in range(3):
        writer.append([trajectory("a", failure=FailureClass.ENGINE)])
    Ledger(tmp_path).compact()
    assert len(files(tmp_path, "failures")) == 1
    assert Ledger(tmp_path).attempts() == {
        "a": Attempts(
            by_class={FailureClass.ENGINE: 3}, last_class=FailureClass.ENGINE, last_message="it broke", last_at_s=0.0
        )
    }


def test_nothing_to_merge_changes_nothing_and_says_so(tmp_path: Path) -> None:
    fill(tmp_path, 1)
    before = files(tmp_path)
    assert Ledger(tmp_path).compact().skipped == "there are no small shards to merge"
    assert files(tmp_path) == before
    assert not files(tmp_path, "manifests")


def test_a_run_compacts_at_its_start_when_small_shards_have_piled_up(tmp_path: Path) -> None:
    fill(tmp_path, MANY - 1, rows=1)
    assert Ledger(tmp_path).compact_if_needed() is None
    fill(tmp_path, 1, rows=1, writer="x")
    report = compact_if_needed(Ledger(tmp_path), limit_s=None)
    assert report is not None and report.merged == MANY
    assert Ledger(tmp_path).compact_if_needed() is None


def test_a_compaction_whose_time_is_up_keeps_what_it_has_merged_and_the_next_goes_on(tmp_path: Path) -> None:
    keys = fill(tmp_path, 5)
    before = list(Ledger(tmp_path).trajectories())
    assert compact(Ledger(tmp_path), limit_s=0.0).merged == 2
    assert list(Ledger(tmp_path).trajectories()) == before
    assert len(files(tmp_path)) == 4
    assert Ledger(tmp_path).compact().merged == 4
    assert list(Ledger(tmp_path).trajectories()) == before and Ledger(tmp_path).count() == len(keys)


def test_a_writer_opened_before_or_after_a_compaction_never_hits_a_name_that_is_replaced(tmp_path: Path) -> None:
    before = LedgerWriter(tmp_path, writer="w")
    before.append([trajectory("a")])
    before.append([trajectory("b")])
    Ledger(tmp_path).compact()
    before.append([trajectory("c")])
    LedgerWriter(tmp_path, writer="w").append([trajectory("d")])
    assert Ledger(tmp_path).keys() == {"a", "b", "c", "d"}


def test_a_damaged_shard_stops_the_compaction_and_nothing_is_changed(tmp_path: Path) -> None:
    fill(tmp_path, 3)
    before = files(tmp_path)
    damaged = sorted(before)[1]
    corrupt(tmp_path / "shards" / damaged)
    with pytest.raises(LedgerError, match=f"{damaged} cannot be read"):
        Ledger(tmp_path).compact()
    assert files(tmp_path) == before


def test_a_reader_goes_on_when_its_shards_are_compacted_away(tmp_path: Path) -> None:
    keys = fill(tmp_path, 4)
    reading = Ledger(tmp_path).trajectories()
    got = [next(reading).key]
    Ledger(tmp_path).compact()
    got += [row.key for row in reading]
    assert sorted(got) == sorted(keys), "each once"


def test_a_shard_that_is_lost_is_not_taken_for_one_that_was_compacted(tmp_path: Path) -> None:
    fill(tmp_path, 2)
    ledger = Ledger(tmp_path)
    ledger.compact()
    [shard] = ledger.shards()
    (tmp_path / shard).unlink()
    with pytest.raises(LedgerError, match=f"{shard} cannot be read"):
        Ledger(tmp_path).keys()
    assert [line.split(":")[0] for line in Ledger(tmp_path).validate().unreadable] == [shard]


def test_of_two_compactions_one_wins_and_the_other_says_so(tmp_path: Path) -> None:
    keys = fill(tmp_path, 12)
    both = threading.Barrier(4)
    reports = []

    def work() -> None:
        ledger = Ledger(tmp_path)
        both.wait(30)
        reports.append(ledger.compact())

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    won = [report for report in reports if not report.skipped]
    lost = {report.skipped for report in reports if report.skipped}
    assert len(won) == 1 and len(reports) == 4
    assert lost <= {"another compaction of this ledger was faster", "there are no small shards to merge"}
    assert Ledger(tmp_path).keys() == keys
    assert len(files(tmp_path)) == 1, "the losers took back what they had written"


def test_a_slow_compaction_that_finds_its_number_taken_removes_only_its_own(tmp_path: Path) -> None:
    keys = fill(tmp_path, 3)
    ledger = Ledger(tmp_path)
    assert ledger_manifest.claim(ledger.storage, replace(Manifest(generation=1), created="now"))
    assert not ledger_manifest.claim(ledger.storage, Manifest(generation=1))
    assert Ledger(tmp_path).compact().generation == 2
    assert Ledger(tmp_path).keys() == keys


def test_writers_and_readers_beside_compactions_lose_and_repeat_nothing(tmp_path: Path) -> None:
    stop = threading.Event()
    seen_twice: list[str] = []
    LedgerWriter(tmp_path, writer="first").append([trajectory("first")])

    def compactor() -> None:
        while not stop.is_set():
            Ledger(tmp_path).compact()

    def reader() -> None:
        held: set[str] = set()
        while not stop.is_set():
            rows = [row.key for row in Ledger(tmp_path).trajectories()]
            if len(rows) != len(set(rows)) or not held <= set(rows):
                seen_twice.append("rows went or came twice")
            held = set(rows)

    threads = [threading.Thread(target=work) for work in (compactor, compactor, reader)]
    for thread in threads:
        thread.start()
    try:
        keys = fill(tmp_path, 25) | fill(tmp_path, 25, writer="v")
    finally:
        stop.set()
        for thread in threads:
            thread.join(60)
    assert not seen_twice
    assert Ledger(tmp_path).keys() == keys | {"first"}
    assert Ledger(tmp_path).validate().ok


_COMPACT_FOR_EVER = """
import sys
from tests.test_ledger import trajectory
from rollout.ledger import Ledger, LedgerWriter
from rollout.ledger_compaction import compact
from rollout.trajectory import FailureClass
folder, start = sys.argv[1], int(sys.argv[2])
writer = LedgerWriter(folder, writer=f'w{start}')
for i in range(start, 10**9):
    for j in range(4):
        writer.append([trajectory(f'{i}-{j}'), trajectory(f'{i}-{j}', failure=FailureClass.ENGINE)])
    print(i, flush=True)
    compact(Ledger(folder), target_bytes=20_000)
"""


def test_a_compaction_that_is_killed_at_any_instant_loses_nothing(tmp_path: Path) -> None:
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    rng, acknowledged = random.Random(0), 0
    for _ in range(3):
        child = subprocess.Popen(
            [sys.executable, "-c", _COMPACT_FOR_EVER, str(tmp_path), str(acknowledged)],
            stdout=subprocess.PIPE, text=True, cwd=ROOT, env=environment,
        )  # fmt: skip
        assert child.stdout is not None
        lines = [int(child.stdout.readline())]
        time.sleep(rng.uniform(0.0, 0.4))
        child.send_signal(signal.SIGKILL)
        lines += [int(line) for line in child.stdout]
        child.wait(10)
        child.stdout.close()
        ledger = Ledger(tmp_path)
        promised = {f"{i}-{j}" for i in range(lines[-1] + 1) for j in range(4)}
        assert promised <= ledger.keys()
        attempts = ledger.attempts()
        assert all(attempts[key].total == 1 for key in promised), "no failure was counted twice, none was lost"
        assert ledger.validate().ok
        acknowledged = lines[-1] + 2  # the next numbers, those of an append that was cut short left out
        LedgerWriter(tmp_path, writer="mend").append([trajectory(f"{lines[-1] + 1}-{j}") for j in range(4)])
        LedgerWriter(tmp_path, writer="mend").append(
            [
                trajectory(f"{lines[-1] + 1}-{j}", failure=FailureClass.ENGINE)
                for j in range(4)
                if f"{lines[-1] + 1}-{j}" not in attempts
            ]
        )
    ledger = Ledger(tmp_path)
    keys = ledger.keys()
    ledger.compact()
    assert Ledger(tmp_path).keys() == keys
    left = {each.name for each in ledger.snapshot().listed}
    assert set(Ledger(tmp_path).shards()) <= left
    assert not Ledger(tmp_path).validate().duplicate_keys


def test_what_a_killed_compaction_left_is_not_read_and_goes_with_the_next_one(tmp_path: Path) -> None:
    keys = fill(tmp_path, 3)
    Ledger(tmp_path).compact()
    [whole] = files(tmp_path)
    shards = tmp_path / "shards"
    lost = shards / "compacted-000001-0badcafe-0001.parquet"  # of one that lost the race for number 1
    lost.write_bytes((shards / whole).read_bytes())
    flying = shards / "compacted-000002-0badcafe-0001.parquet"  # may still be named by its manifest
    flying.write_bytes((shards / whole).read_bytes())
    ledger = Ledger(tmp_path)
    assert (ledger.count(), ledger.duplicates()) == (len(keys), 0)
    assert ledger.validate().leftovers == (f"shards/{lost.name}",)
    ledger.compact_if_needed()
    assert files(tmp_path) == {whole, flying.name}
    os.utime(flying, (0, 0))
    ledger.compact()
    assert files(tmp_path) == {whole}


def test_a_manifest_that_says_otherwise_than_the_files_is_reported(tmp_path: Path) -> None:
    fill(tmp_path, 2)
    Ledger(tmp_path).compact()
    [shard] = Ledger(tmp_path).shards()
    LedgerWriter(tmp_path / "other", writer="w").append([trajectory("x")])
    [other] = Ledger(tmp_path / "other").shards()
    (tmp_path / shard).write_bytes((tmp_path / "other" / other).read_bytes())
    report = Ledger(tmp_path).validate()
    assert not report.ok
    assert any("bytes" in line and shard in line for line in report.disagreements)
    assert any("1 rows, 4 by the manifest" in line for line in report.disagreements)


def test_a_damaged_manifest_is_named(tmp_path: Path) -> None:
    fill(tmp_path, 2)
    Ledger(tmp_path).compact()
    (tmp_path / "manifests" / "000001.json").write_text("{}")
    with pytest.raises(LedgerError, match="manifests/000001.json is damaged"):
        Ledger(tmp_path).keys()


def test_a_writers_name_that_compactions_use_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="'compacted-w'"):
        LedgerWriter(tmp_path, writer="compacted-w")
