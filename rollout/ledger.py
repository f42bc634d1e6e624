"""The ledger: the durable, append-only Parquet record of every finished trajectory, the source of truth of a run.

It is a folder that any number of writers and readers on any number of machines share without locks::

    ledger.json                        what this folder is, its schema version, when it was made; nothing of one run
    shards/<writer>-<number>.parquet   results: rows of `rollout.records.SCHEMA`
    failures/<writer>-<number>.parquet what failed through our own fault, to be looked at and run again

A shard appears whole or not at all (temporary file, fsync, link, fsync of the folder) and never changes, so a process
that is killed at any instant leaves a ledger that can be read. It is no queue and no index: nothing is ever removed,
and rows are found by reading the key column.

Example::

    LedgerWriter(folder, writer="worker-0").append(trajectories)
    Ledger(folder).keys()                        # what is done already
    for trajectory in Ledger(folder).trajectories(): ...
"""

from __future__ import annotations

import json
import os
import re
import time
import uuid
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from rollout.records import SCHEMA_VERSION, from_table, to_table
from rollout.trajectory import FailureClass, Trajectory

_FORMAT = "trajectory-ledger"
_MARK = "ledger.json"
_SHARDS = "shards"
_FAILURES = "failures"
_WRITER = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]*")
_LEFTOVER_AGE_S = 3600.0
"""A temporary file of another writer is its append in flight until it is this old."""
_READ_ERRORS = (pa.ArrowException, OSError, ValueError)


class LedgerError(RuntimeError):
    """A folder that is no ledger, or one that cannot be read; the message names the file and what is wrong."""


@dataclass(frozen=True, slots=True, kw_only=True)
class LedgerReport:
    """What `Ledger.validate` found."""

    rows: int
    """Readable result rows, duplicates included."""
    failures: int
    duplicate_keys: tuple[str, ...]
    """Keys that more than one result row has, sorted."""
    unreadable: tuple[str, ...]
    """Shards that cannot be read, with the reason, as 'shards/w-000001.parquet: ...'."""
    leftovers: tuple[str, ...]
    """Temporary files of appends that are in flight or were killed; they hold nothing that was promised to be kept."""

    @property
    def ok(self) -> bool:
        """Every shard can be read."""
        return not self.unreadable


def is_result(trajectory: Trajectory) -> bool:
    """It counts as done: no failure, or one that is the model's own or a limit's and would only happen again."""
    failure = trajectory.failure
    return failure is None or failure.failure_class in (FailureClass.MODEL, FailureClass.LIMIT)


class LedgerWriter:
    """Appends to a ledger; makes the folder when it is missing or empty.

    `writer` names the shards: letters, digits, `_`, `.`, `-`. Two writers of one name lose nothing (a shard is never
    overwritten), but one name per process tells who wrote what. One thread at a time may append.
    Raises `LedgerError` for a folder that is something else or of another schema version.
    """

    def __init__(self, folder: Path | str, writer: str) -> None:
        if not _WRITER.fullmatch(writer):
            raise ValueError(f"ledger writer {writer!r}: use letters, digits, '_', '.' and '-' only, as in 'worker-0'")
        self._folder, self._writer = Path(folder), writer
        if not _is_ledger(self._folder):
            _make(self._folder)
        for kind in (_SHARDS, _FAILURES):
            (self._folder / kind).mkdir(exist_ok=True)
        self._clean()
        self._numbers = {kind: self._first_number(kind) for kind in (_SHARDS, _FAILURES)}

    def append(self, trajectories: Sequence[Trajectory]) -> list[str]:
        """One atomic, durable shard of all results, and one of all failures; returns their names ('shards/...').

        When it returns the rows are on disk. Raises `OSError` (disk full, folder gone) or `RecordsError`; of a shard
        that failed nothing is in the ledger then.
        """
        results = [trajectory for trajectory in trajectories if is_result(trajectory)]
        failures = [trajectory for trajectory in trajectories if not is_result(trajectory)]
        return [self._publish(kind, rows) for kind, rows in ((_SHARDS, results), (_FAILURES, failures)) if rows]

    def _publish(self, kind: str, rows: Sequence[Trajectory]) -> str:
        folder = self._folder / kind
        table = to_table(rows)
        temporary = folder / f".{self._writer}-{uuid.uuid4().hex}.tmp"
        try:
            with open(temporary, "xb") as file:
                pq.write_table(table, file, compression="zstd")
                file.flush()
                os.fsync(file.fileno())
            name = self._link(kind, temporary)
        finally:
            temporary.unlink(missing_ok=True)
        _sync_folder(folder)
        return f"{kind}/{name}"

    def _link(self, kind: str, temporary: Path) -> str:
        """Give the finished file the next free name; unlike a rename this can never replace a shard."""
        while True:
            self._numbers[kind] += 1
            name = f"{self._writer}-{self._numbers[kind]:06d}.parquet"
            target = self._folder / kind / name
            try:
                os.link(temporary, target)
            except FileExistsError:
                continue
            except OSError:  # no hard links here (some network file systems)
                if target.exists():
                    continue
                os.rename(temporary, target)
            return name

    def _first_number(self, kind: str) -> int:
        pattern = re.compile(rf"{re.escape(self._writer)}-(\d+)\.parquet")
        names = (pattern.fullmatch(name) for name in os.listdir(self._folder / kind))
        return max((int(match[1]) for match in names if match), default=0)

    def _clean(self) -> None:
        """Remove what killed appends left behind: this writer's, and any that is too old to be in flight."""
        for path in _leftovers(self._folder):
            try:
                own = path.name.rpartition("-")[0] == f".{self._writer}"
                if own or time.time() - path.stat().st_mtime > _LEFTOVER_AGE_S:
                    path.unlink(missing_ok=True)
            except FileNotFoundError:
                pass  # its writer finished, or another one cleaned it


class Ledger:
    """Reads a ledger while others write it. A folder that is missing or empty is a ledger without rows.

    What was read of a shard's keys is remembered, so asking again costs only the new shards.
    Raises `LedgerError` for a folder that is something else or of another schema version, and from any reading method
    when a shard cannot be read (`validate` lists all such shards instead).
    """

    def __init__(self, folder: Path | str) -> None:
        self._folder = Path(folder)
        _is_ledger(self._folder)
        self._keys: dict[str, list[str]] = {}
        """[shard] -> keys in row order."""

    def shards(self) -> list[str]:
        """Names of the result shards, sorted."""
        return _names(self._folder, _SHARDS)

    def new_shards(self, seen: Iterable[str] = ()) -> list[str]:
        """Names of the result shards that are not in `seen`, sorted; costs one directory listing."""
        return sorted(set(self.shards()).difference(seen))

    def read(self, shard: str) -> list[Trajectory]:
        """The rows of one shard, as named by `shards`, `new_shards` or `LedgerWriter.append`."""
        try:
            return from_table(_read_table(self._folder / shard))
        except _READ_ERRORS as error:
            raise self._unreadable(shard, error) from error

    def keys(self) -> set[str]:
        """Keys of all results: what need not be run again. Reads the key column only."""
        return {key for shard in self.shards() for key in self._shard_keys(shard)}

    def count(self) -> int:
        """Distinct keys."""
        return len(self.keys())

    def duplicates(self) -> int:
        """Rows that `trajectories` leaves out because an earlier one has their key."""
        return sum(len(self._shard_keys(shard)) for shard in self.shards()) - self.count()

    def trajectories(self) -> Iterator[Trajectory]:
        """Every result once, in order of shard name and row; of rows that share a key the first wins.

        The order is the same for the same folder, not for two runs of the same work: sort by key where that matters.
        """
        seen: set[str] = set()
        for shard in self.shards():
            for trajectory in self.read(shard):
                if trajectory.key not in seen:
                    seen.add(trajectory.key)
                    yield trajectory

    def failures(self) -> Iterator[Trajectory]:
        """Every recorded failure, repeated attempts included, in order of shard name and row."""
        for shard in _names(self._folder, _FAILURES):
            yield from self.read(shard)

    def validate(self) -> LedgerReport:
        """Read everything once and report; raises nothing for a damaged shard and repairs nothing."""
        rows = failures = 0
        seen: set[str] = set()
        twice: set[str] = set()
        unreadable: list[str] = []
        for shard in self.shards() + _names(self._folder, _FAILURES):
            try:
                trajectories = from_table(_read_table(self._folder / shard))
            except _READ_ERRORS as error:
                unreadable.append(f"{shard}: {error}")
                continue
            if shard.startswith(_FAILURES):
                failures += len(trajectories)
                continue
            rows += len(trajectories)
            for trajectory in trajectories:
                (twice if trajectory.key in seen else seen).add(trajectory.key)
        return LedgerReport(
            rows=rows,
            failures=failures,
            duplicate_keys=tuple(sorted(twice)),
            unreadable=tuple(unreadable),
            leftovers=tuple(str(path.relative_to(self._folder)) for path in _leftovers(self._folder)),
        )

    def _shard_keys(self, shard: str) -> list[str]:
        if shard not in self._keys:
            try:
                column = _read_table(self._folder / shard, columns=["key"]).column(0)
            except _READ_ERRORS as error:
                raise self._unreadable(shard, error) from error
            self._keys[shard] = column.to_pylist()
        return self._keys[shard]

    def _unreadable(self, shard: str, error: Exception) -> LedgerError:
        return LedgerError(
            f"{self._folder / shard} cannot be read ({error}). Shards are written whole, so it was damaged later: "
            "restore it, or move it away and run again what it held"
        )


def _is_ledger(folder: Path) -> bool:
    """False when nothing is there yet; raises `LedgerError` for anything that is not a ledger of this version."""
    mark = folder / _MARK
    try:
        described = json.loads(mark.read_text(encoding="utf-8"))
        version = described["schema_version"]
        if described["format"] != _FORMAT:
            raise ValueError(f"format {described['format']!r} is not {_FORMAT!r}")
    except NotADirectoryError as error:
        raise LedgerError(f"{folder} is a file; a ledger is a folder") from error
    except FileNotFoundError as error:
        # The mark is looked for again: another writer may have made the ledger between the two looks.
        if folder.exists() and any(not _is_temporary(path) for path in folder.iterdir()) and not mark.exists():
            raise LedgerError(f"{folder} holds files but no {_MARK}, so it is no ledger; name a new folder") from error
        return mark.exists()
    except (ValueError, KeyError, TypeError) as error:
        raise LedgerError(f"{mark} does not describe a ledger ({error!r})") from error
    if version != SCHEMA_VERSION:
        raise LedgerError(f"ledger {folder} has schema version {version}; this code reads and writes {SCHEMA_VERSION}")
    return True


def _make(folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    described = {"format": _FORMAT, "schema_version": SCHEMA_VERSION, "created": datetime.now(UTC).isoformat()}
    temporary = folder / f".{_MARK}-{uuid.uuid4().hex}.tmp"
    with open(temporary, "x", encoding="utf-8") as file:
        file.write(json.dumps(described, indent=2) + "\n")
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, folder / _MARK)  # writers that start together all write the same
    _sync_folder(folder)


def _read_table(path: Path, columns: list[str] | None = None) -> pa.Table:
    with pq.ParquetFile(path) as file:
        return file.read(columns=columns, use_threads=False)


def _names(folder: Path, kind: str) -> list[str]:
    try:
        names = os.listdir(folder / kind)
    except FileNotFoundError:
        return []
    return sorted(f"{kind}/{name}" for name in names if name.endswith(".parquet") and not name.startswith("."))


def _is_temporary(path: Path) -> bool:
    return path.name.startswith(".") and path.name.endswith(".tmp")


def _leftovers(folder: Path) -> list[Path]:
    places = (folder, folder / _SHARDS, folder / _FAILURES)
    return sorted(path for place in places if place.is_dir() for path in place.iterdir() if _is_temporary(path))


def _sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
