"""Compaction: many small shards become few large ones, rows whose key an earlier row has are dropped.

Safe to be killed at any instant, and beside any number of writers, readers and other compactors:

1. Merged shards are written under new names. Readers leave them alone, since no manifest names them.
2. A manifest of the next generation is created that names them and what they replace. Only one of several compactors
   can create it; the others remove what they wrote and say so. From here on readers read the merged shards.
3. The replaced shards are removed. Whoever was reading one finds it gone and looks at the new manifest. What a killed
   compaction left is ignored by readers and removed by the next one.

Tools that read `shards/*.parquet` directly may see rows twice between steps 1 and 3; `key` tells them apart.

Example::

    report = Ledger(folder).compact()
    print(report.merged, "shards became", report.made)
"""

from __future__ import annotations

import hashlib
import os
import time
from collections.abc import Callable
from contextlib import closing
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from functools import partial
from typing import TYPE_CHECKING, TypeVar

import pyarrow as pa

from rollout import ledger_manifest, ledger_mark
from rollout.ledger_manifest import COMPACTED, FAILURES, SHARDS, Manifest, ShardEntry, Snapshot, is_compacted
from rollout.ledger_shards import READ_ERRORS, damaged, encode, keys, one_by_one
from rollout.storage import Storage

if TYPE_CHECKING:
    from rollout.ledger import Ledger

T = TypeVar("T")

TARGET_BYTES = 64 * 2**20
"""Uncompressed rows of one merged shard, about."""
FULL_BYTES = 16 * 2**20
"""A compacted shard of this file size is left as it is."""
MANY = 64
"""So many small shards are compacted at the start of a run."""
LIMIT_S = 1.0
"""What compaction may take at the start of a run; later starts, or its end, go on with what is left."""
_ORPHAN_AGE_S = 6 * 3600.0
"""A merged shard that no manifest names is a compaction in flight until it is this old, or its number is taken."""


@dataclass(frozen=True, slots=True, kw_only=True)
class CompactionReport:
    """What one compaction did."""

    merged: int = 0
    """Shards that were read, of results and failures."""
    made: int = 0
    """Shards that hold their rows now."""
    rows: int = 0
    duplicates: int = 0
    """Result rows that were dropped because an earlier one has their key."""
    generation: int = 0
    seconds: float = 0.0
    skipped: str = ""
    """Why nothing was changed; empty when something was."""


def compact_if_needed(ledger: Ledger, *, limit_s: float | None = LIMIT_S) -> CompactionReport | None:
    """Compacts when there are at least `MANY` small shards of a kind, or leftovers of a compaction that was killed."""
    snapshot = ledger.snapshot()
    stale = any(map(snapshot.is_replaced, (each.name for each in snapshot.listed))) or snapshot.orphans()
    if not stale and all(len(_sources(snapshot, kind, FULL_BYTES)) < MANY for kind in (SHARDS, FAILURES)):
        return None
    try:
        return compact(ledger, limit_s=limit_s)
    except OSError as error:
        return CompactionReport(skipped=f"the store took no larger shards ({error}); the ledger is as it was")


def compact(
    ledger: Ledger,
    *,
    target_bytes: int = TARGET_BYTES,
    full_bytes: int = FULL_BYTES,
    limit_s: float | None = None,
) -> CompactionReport:
    """Takes up no further shard after `limit_s`, about; what it has merged until then counts.

    Raises `LedgerError` for a shard that cannot be read (nothing is changed then), `OSError` when the store takes no
    more.
    """
    started, storage = time.monotonic(), ledger.storage
    if ledger_mark.version(storage) is None:
        return CompactionReport(skipped="there is no ledger yet")
    ledger_mark.make(storage)  # one of an earlier version becomes one of this, as its merged shards are
    before = ledger.snapshot()
    _tidy(storage, before)
    ends = started + limit_s if limit_s is not None else float("inf")
    job = _Job(storage, before, target_bytes, ends)
    try:
        merged = {kind: job.merge(kind, _sources(before, kind, full_bytes)) for kind in (SHARDS, FAILURES)}
        if not any(each.sources for each in merged.values()):
            return CompactionReport(skipped="there are no small shards to merge", generation=before.manifest.generation)
        manifest = _next(before, merged, job.generation)
        won = ledger_manifest.claim(storage, manifest)
    except _Gone:
        won = False
    except BaseException:
        job.undo()
        raise
    if not won:
        job.undo()
        return CompactionReport(
            skipped="another compaction of this ledger was faster", generation=before.manifest.generation
        )
    _tidy(storage, replace(before, manifest=manifest))
    return CompactionReport(
        merged=sum(len(each.sources) for each in merged.values()),
        made=len(job.written),
        rows=job.rows,
        duplicates=job.duplicates,
        generation=job.generation,
        seconds=time.monotonic() - started,
    )


@dataclass(frozen=True, slots=True)
class _Merged:
    """What became of the shards of one kind."""

    sources: tuple[str, ...] = ()
    made: tuple[ShardEntry, ...] = ()


class _Gone(Exception):
    """A shard went away while it was merged: another compaction has won."""


class _Job:
    """Writes the merged shards of one compaction, and can take them back."""

    def __init__(self, storage: Storage, before: Snapshot, target_bytes: int, ends: float) -> None:
        self._storage, self._before, self._target_bytes, self._ends = storage, before, target_bytes, ends
        self.generation = before.manifest.generation + 1
        self._stem = f"{COMPACTED}{self.generation:06d}-{os.urandom(4).hex()}"
        self.written: list[str] = []
        self.rows = self.duplicates = 0

    def merge(self, kind: str, sources: list[str]) -> _Merged:
        """Merges the first of `sources`, two at least: as many as there is time for."""
        if len(sources) < 2:
            return _Merged()
        made: list[ShardEntry] = []
        held: list[pa.Table] = []
        held_bytes = count = 0
        seen: set[str] = set()  # results only: of failures every attempt counts
        for entry in self._before.manifest.entries(kind):
            if kind == SHARDS and entry.name not in sources:
                seen.update(self._read(entry.name, partial(keys, self._storage, entry.name)))
        with closing(one_by_one(self._storage, sources)) as reading:
            for shard in sources:
                if count >= 2 and time.monotonic() > self._ends:
                    break
                for table in self._read(shard, lambda: list(next(reading))):
                    held.append(self._fresh(table, seen) if kind == SHARDS else table)
                    held_bytes += held[-1].nbytes
                if held_bytes >= self._target_bytes:
                    made += self._write(kind, held)
                    held, held_bytes = [], 0
                count += 1
        return _Merged(tuple(sources[:count]), (*made, *self._write(kind, held)))

    def _fresh(self, table: pa.Table, seen: set[str]) -> pa.Table:
        """The rows whose key is new."""
        fresh = [key not in seen and not seen.add(key) for key in table.column("key").to_pylist()]
        self.duplicates += fresh.count(False)
        return table if all(fresh) else table.filter(pa.array(fresh, pa.bool_()))

    def _read(self, shard: str, read: Callable[[], T]) -> T:
        try:
            return read()
        except FileNotFoundError as error:
            if ledger_manifest.latest(self._storage).generation == self._before.manifest.generation:
                raise damaged(self._storage, shard, error) from error
            raise _Gone from error
        except READ_ERRORS as error:
            raise damaged(self._storage, shard, error) from error

    def _write(self, kind: str, held: list[pa.Table]) -> list[ShardEntry]:
        """One shard; none when nothing is left of the rows."""
        if not any(each.num_rows for each in held):
            return []
        table = pa.concat_tables(held).combine_chunks()
        data = encode(table)
        name = f"{kind}/{self._stem}-{len(self.written) + 1:04d}.parquet"
        self.written.append(name)
        self._storage.publish({name: data}, by="compaction")
        self.rows += table.num_rows
        digest = hashlib.sha256(data).hexdigest()
        return [ShardEntry(name=name, rows=table.num_rows, size_bytes=data.size, sha256=digest)]

    def undo(self) -> None:
        try:
            self._storage.remove(*self.written)
        except OSError:
            pass  # no manifest names them, so they are ignored, and removed by a later compaction


def _sources(snapshot: Snapshot, kind: str, full_bytes: int) -> list[str]:
    """What is worth merging, in order of reading: compacted shards that are small, and all that writers left."""
    small = [entry.name for entry in snapshot.manifest.entries(kind) if entry.size_bytes < full_bytes]
    return small + [each.name for each in snapshot.loose(kind)]


def _next(before: Snapshot, merged: dict[str, _Merged], generation: int) -> Manifest:
    gone = {name for each in merged.values() for name in each.sources}
    entries = {
        kind: (*(each for each in before.manifest.entries(kind) if each.name not in gone), *merged[kind].made)
        for kind in (SHARDS, FAILURES)
    }
    listed = {each.name for each in before.listed}
    return Manifest(
        generation=generation,
        results=entries[SHARDS],
        failures=entries[FAILURES],
        # Those of before whose removal was cut short stay replaced for as long as they are there.
        replaced=frozenset((before.manifest.replaced & listed) | gone),
        created=datetime.now(UTC).isoformat(),
    )


def _tidy(storage: Storage, snapshot: Snapshot) -> None:
    """Remove what the manifest replaces, and what compactions left that were killed or lost."""
    old = time.time() - _ORPHAN_AGE_S
    named = snapshot.manifest.names
    dead = {found.name for found in snapshot.orphans()}
    for found in snapshot.listed:
        abandoned = is_compacted(found.name) and found.name not in named and found.modified_s < old
        if abandoned or snapshot.is_replaced(found.name):
            dead.add(found.name)
    storage.remove(*sorted(dead))
