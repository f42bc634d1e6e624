"""The ledger: the durable, append-only Parquet record of every finished trajectory, the source of truth of a run.

It is a folder, or a prefix of an object store (`s3://bucket/run/ledger`), that any number of writers and readers on any
number of machines share without locks::

    ledger.json                what this folder is, its schema version, when it was made; nothing of one run
    shards/*.parquet           results: rows of `rollout.records.SCHEMA`
    failures/*.parquet         what came to no result, one row an attempt: to be looked at, and run again by rule
    manifests/000001.json      which shards compactions have made and replaced; the newest counts

A shard appears whole or not at all and never changes, so a process that is killed at any instant leaves a ledger that
can be read. Of rows that share a key the first one counts. It is no queue and no index: rows are found by reading the
key column. `rollout.ledger_compaction` merges small shards, and removes only what is in a larger one.

Example::

    LedgerWriter(folder, writer="worker-0").append(trajectories)
    Ledger(folder).settled(RetryRule())          # what is done already, and what is not tried again
    for trajectory in Ledger(folder).trajectories(): ...
"""

from __future__ import annotations

import os
import re
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

import pyarrow as pa

from rollout import ledger_manifest, ledger_mark, ledger_shards
from rollout.ledger_manifest import COMPACTED, FAILURES, MANIFESTS, SHARDS, ManifestError, Snapshot
from rollout.ledger_shards import READ_ERRORS, LedgerError
from rollout.records import SCHEMA, from_table, to_table
from rollout.retries import Attempts, RetryRule, Settled, settle
from rollout.storage import Storage, StorageError, ahead, open_storage
from rollout.trajectory import FailureClass, Trajectory

if TYPE_CHECKING:
    from rollout.ledger_checks import LedgerReport
    from rollout.ledger_compaction import CompactionReport

__all__ = ["Ledger", "LedgerError", "LedgerWriter", "is_result"]

T = TypeVar("T")

_WRITER = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]*")
_LEFTOVER_AGE_S = 3600.0
"""A temporary file of another writer is its append in flight until it is this old."""
_REFRESHES = 20
"""How many compactions may end during one reading before it gives up."""
_DEFAULT_RULE = RetryRule()


def is_result(trajectory: Trajectory) -> bool:
    """It counts as done; what failed, in whatever class, goes to the sidecar."""
    return trajectory.failure is None


class LedgerWriter:
    """Appends to a ledger; makes the folder when it is missing or empty.

    `writer` begins the names of its shards: letters, digits, `_`, `.`, `-`. Two writers of one name lose nothing, but
    one name per process tells who wrote what. One thread at a time may append.
    Raises `LedgerError` for a folder that is something else or of a newer schema version, or a store that cannot be
    used.
    """

    def __init__(self, folder: Path | str, writer: str) -> None:
        if not _WRITER.fullmatch(writer):
            raise ValueError(f"ledger writer {writer!r}: use letters, digits, '_', '.' and '-' only, as in 'worker-0'")
        if writer.startswith(COMPACTED):
            raise ValueError(f"ledger writer {writer!r}: names that begin with {COMPACTED!r} are those of compactions")
        self._storage, self._writer = open_storage(folder), writer
        ledger_mark.make(self._storage)
        self._clean()
        # Never used again, also when compaction has removed these shards: a manifest speaks of shards by name. Names of
        # one writer sort in the order of time.
        self._session = f"{writer}-{int(time.time() * 1e6):013x}{os.urandom(3).hex()}"
        self._number = 0

    def append(self, trajectories: Sequence[Trajectory]) -> list[str]:
        """One atomic, durable shard of all results, and one of all failures; returns their names ('shards/...').

        When it returns the rows are stored. Raises `OSError` (disk full, folder gone, store away) or `RecordsError`;
        nothing of these rows is in the ledger then, and the same call may be tried again.
        """
        results = [trajectory for trajectory in trajectories if is_result(trajectory)]
        failures = [trajectory for trajectory in trajectories if not is_result(trajectory)]
        return self.append_tables(
            results=to_table(results) if results else None, failures=to_table(failures) if failures else None
        )

    def append_tables(self, *, results: pa.Table | None = None, failures: pa.Table | None = None) -> list[str]:
        """`append` for rows that are tables of `rollout.records.SCHEMA` already."""
        self._number += 1
        files = {
            f"{kind}/{self._session}-{self._number:06d}.parquet": ledger_shards.encode(table)
            for kind, table in ((SHARDS, results), (FAILURES, failures))
            if table is not None
        }
        if files:
            self._storage.publish(files, by=self._writer)
        return list(files)

    def _clean(self) -> None:
        """Remove what killed appends left behind: this writer's, and any that is too old to be in flight."""
        for each in self._storage.leftovers("", SHARDS, FAILURES, MANIFESTS):
            own = each.name.rpartition("/")[2].rpartition("-")[0] == f".{self._writer}"
            if own or time.time() - each.modified_s > _LEFTOVER_AGE_S:
                self._storage.remove(each.name)


class Ledger:
    """Reads a ledger while others write and compact it. A folder that is missing or empty is a ledger without rows.

    What was read of a shard's keys is remembered, so asking again costs only the new shards.
    Raises `LedgerError` for a folder that is something else or of another schema version, and from any reading method
    when a shard cannot be read (`validate` lists all such shards instead).
    """

    def __init__(self, folder: Path | str) -> None:
        self.storage: Storage = open_storage(folder)
        ledger_mark.version(self.storage)
        self._keys: dict[str, list[str]] = {}
        """[shard] -> keys in row order."""

    # -- shards

    def snapshot(self) -> Snapshot:
        """What makes up the ledger now."""
        try:
            return ledger_manifest.snapshot(self.storage)
        except (ManifestError, StorageError) as error:
            raise LedgerError(f"{self.storage.uri}: {error}") from error

    def shards(self) -> list[str]:
        """Names of the result shards in the order of reading: those of the last compaction, then the others sorted."""
        return self.snapshot().shards(SHARDS)

    def new_shards(self, seen: Iterable[str] = ()) -> list[str]:
        """Names of the result shards that are not in `seen`, sorted; costs a few listings.

        One that a compaction made counts as new too, whatever its rows: tell them by key.
        """
        return sorted(set(self.shards()).difference(seen))

    def read(self, shard: str) -> list[Trajectory]:
        """The rows of one shard, as named by `shards`, `new_shards` or `LedgerWriter.append`."""
        try:
            return [each for table in ledger_shards.tables(self.storage, shard) for each in from_table(table)]
        except READ_ERRORS as error:
            raise ledger_shards.damaged(self.storage, shard, error) from error

    # -- results

    def keys(self) -> set[str]:
        """Keys of all results: what need not be run again. Reads the key column only."""
        return {key for keys in self._all_keys() for key in keys}

    def count(self) -> int:
        """Distinct keys."""
        return len(self.keys())

    def duplicates(self) -> int:
        """Rows that `trajectories` leaves out because an earlier one has their key."""
        shards = self._all_keys()
        return sum(map(len, shards)) - len({key for keys in shards for key in keys})

    def trajectories(self) -> Iterator[Trajectory]:
        """Every result once, in order of shard and row; of rows that share a key the first wins.

        The order is the same for the same folder, not for two runs of the same work: sort by key where that matters.
        """
        for table in self.scan():
            yield from from_table(table)

    def scan(self, columns: Sequence[str] | None = None) -> Iterator[pa.Table]:
        """Every result once as Arrow tables of some hundred rows, without making trajectories of them: for statistics.

        `columns` names columns of `rollout.records.SCHEMA`, in the order in which they shall come; None: all.
        Raises `ValueError` for one that there is not.
        """
        _check(columns)
        wanted = None if columns is None else list(dict.fromkeys([*columns, "key"]))
        seen: set[str] = set()
        for table in self._result_tables(wanted):
            keys = table.column("key").to_pylist()
            fresh = [key not in seen and not seen.add(key) for key in keys]
            if not all(fresh):
                table = table.filter(pa.array(fresh, pa.bool_()))
            if table.num_rows:
                yield table if columns is None or "key" in columns else table.drop_columns(["key"])

    # -- failures

    def failures(self) -> Iterator[Trajectory]:
        """Every recorded failure, repeated attempts included, in order of shard and row."""
        for table in self.scan_failures():
            yield from from_table(table)

    def scan_failures(self, columns: Sequence[str] | None = None) -> list[pa.Table]:
        """Every recorded failure as Arrow tables; `columns` as in `scan`."""
        _check(columns)
        return [
            table
            for tables in self._whole(FAILURES, lambda shard: list(ledger_shards.tables(self.storage, shard, columns)))
            for table in tables
        ]

    def attempts(self) -> dict[str, Attempts]:
        """What is recorded of the failures of each key, whether or not it has a result now."""
        counts: dict[str, Counter[FailureClass]] = {}
        last: dict[str, tuple[float, FailureClass, str]] = {}
        for table in self.scan_failures(["key", "failure", "started_at_s", "duration_s"]):
            columns = (table.column(name).to_pylist() for name in ("key", "failure", "started_at_s", "duration_s"))
            for key, failure, started_at_s, duration_s in zip(*columns, strict=True):
                failure_class = FailureClass(failure["failure_class"])
                counts.setdefault(key, Counter())[failure_class] += 1
                ended = (started_at_s + duration_s, failure_class, failure["message"])
                if key not in last or ended[0] >= last[key][0]:
                    last[key] = ended
        return {
            key: Attempts(
                by_class=dict(count), last_at_s=last[key][0], last_class=last[key][1], last_message=last[key][2]
            )
            for key, count in counts.items()
        }

    def settled(self, rule: RetryRule = _DEFAULT_RULE, *, retry_quarantined: bool = False) -> Settled:
        """What a resumed run leaves alone: keys with a result, and keys that `rule` does not try again.

        With `retry_quarantined` the latter have one more attempt.
        """
        return settle(self.keys(), self.attempts(), rule, retry_quarantined=retry_quarantined)

    # -- the whole

    def validate(self) -> LedgerReport:
        """Read everything once and report; raises nothing for a damaged shard and repairs nothing."""
        from rollout.ledger_checks import validate

        return validate(self)

    def compact(self) -> CompactionReport:
        """Merge small shards into large ones and drop rows whose key an earlier row has; see
        `rollout.ledger_compaction`."""
        from rollout.ledger_compaction import compact

        return compact(self)

    def compact_if_needed(self) -> CompactionReport | None:
        """`compact` for a few seconds at most when small shards have piled up, as at the start of a run. None when
        nothing needed to be done.

        A store that is full or read-only costs only the tidying: the report says so."""
        from rollout.ledger_compaction import compact_if_needed

        return compact_if_needed(self)

    # -- reading beside compactions

    def _all_keys(self) -> list[list[str]]:
        return self._whole(SHARDS, self._shard_keys)

    def _shard_keys(self, shard: str) -> list[str]:
        if shard not in self._keys:
            self._keys[shard] = ledger_shards.keys(self.storage, shard)
        return self._keys[shard]

    def _whole(self, kind: str, read: Callable[[str], T]) -> list[T]:
        """`read` of every shard of one snapshot; begun again when a compaction takes shards away meanwhile."""
        for _ in range(_REFRESHES):
            snapshot = self.snapshot()
            shards = snapshot.shards(kind)
            found: list[T] = []
            try:
                for each in ahead(read, shards, self.storage.width):
                    found.append(each)
                return found
            except READ_ERRORS as error:
                self._expect_newer(snapshot, shards[len(found)], error)
        raise self._restless()

    def _result_tables(self, columns: Sequence[str] | None) -> Iterator[pa.Table]:
        """Rows of all result shards; after a compaction that took some away, those of the new shards again."""
        read: set[str] = set()
        for _ in range(_REFRESHES):
            snapshot = self.snapshot()
            shards = [shard for shard in snapshot.shards(SHARDS) if shard not in read]
            done = 0
            try:
                for tables in ledger_shards.one_by_one(self.storage, shards, columns):
                    yield from tables
                    read.add(shards[done])
                    done += 1
                return
            except READ_ERRORS as error:
                self._expect_newer(snapshot, shards[done], error)
        raise self._restless()

    def _restless(self) -> LedgerError:
        return LedgerError(f"{self.storage.uri} was compacted {_REFRESHES} times while it was read")

    def _expect_newer(self, snapshot: Snapshot, shard: str, error: Exception) -> None:
        """Returns when a compaction took the shard away; raises `LedgerError` when it is damaged or lost."""
        gone = isinstance(error, FileNotFoundError)
        if not gone or self.snapshot().manifest.generation == snapshot.manifest.generation:
            raise ledger_shards.damaged(self.storage, shard, error) from error


def _check(columns: Sequence[str] | None) -> None:
    for name in columns or ():
        if name not in SCHEMA.names:
            raise ValueError(f"trajectories have no column {name!r}; there are {', '.join(SCHEMA.names)}")
