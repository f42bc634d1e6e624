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
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from typing import TYPE_CHECKING, TypeVar

import pyarrow as pa

from rollout import ledger_manifest
from rollout.ledger_manifest import COMPACTED, FAILURES, SHARDS, Manifest, ShardEntry, Snapshot
from rollout.ledger_shards import READ_ERRORS, damaged, encode, keys, tables
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


def compact_if_needed(ledger: Ledger) -> CompactionReport | None:
    """Compacts when there are at least `MANY` small shards of a kind, or leftovers of a compaction that was killed."""
    snapshot = ledger.snapshot()
    stale = any(map(snapshot.is_replaced, (each.name for each in snapshot.listed))) or snapshot.orphans()
    if not stale and all(len(_sources(snapshot, kind)) < MANY for kind in (SHARDS, FAILURES)):
        return None
    try:
        return compact(ledger)
    except OSError as error:
        return CompactionReport(skipped=f"the store took no larger shards ({error}); the ledger is as it was")


def compact(ledger: Ledger, *, target_bytes: int = TARGET_BYTES, full_bytes: int = FULL_BYTES) -> CompactionReport:
    """Raises `LedgerError` for a shard that cannot be read (nothing is changed then), `OSError` when the store takes no
    more."""
    started, storage, before = time.monotonic(), ledger.storage, ledger.snapshot()
    _tidy(storage, before)
    sources = {kind: _sources(before, kind, full_bytes) for kind in (SHARDS, FAILURES)}
    if all(len(names) < 2 for names in sources.values()):
        return CompactionReport(skipped="there are no small shards to merge", generation=before.manifest.generation)
    job = _Job(storage, before, target_bytes)
    try:
        made = {kind: job.merge(kind, names) for kind, names in sources.items()}
        manifest = _next(before, sources, made, job.generation)
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
        merged=sum(len(names) for names in sources.values() if len(names) > 1),
        made=len(job.written),
        rows=job.rows,
        duplicates=job.duplicates,
        generation=job.generation,
        seconds=time.monotonic() - started,
    )


class _Gone(Exception):
    """A shard went away while it was merged: another compaction has won."""


class _Job:
    """Writes the merged shards of one compaction, and can take them back."""

    def __init__(self, storage: Storage, before: Snapshot, target_bytes: int) -> None:
        self._storage, self._before, self._target_bytes = storage, before, target_bytes
        self.generation = before.manifest.generation + 1
        self._stem = f"{COMPACTED}{self.generation:06d}-{os.urandom(4).hex()}"
        self.written: list[str] = []
        self.rows = self.duplicates = 0

    def merge(self, kind: str, sources: list[str]) -> list[ShardEntry]:
        if len(sources) < 2:
            return []
        entries: list[ShardEntry] = []
        held: list[pa.Table] = []
        held_bytes = 0
        for table in self._fresh(kind, sources):
            held.append(table)
            held_bytes += table.nbytes
            if held_bytes >= self._target_bytes:
                entries.append(self._write(kind, held))
                held, held_bytes = [], 0
        if held:
            entries.append(self._write(kind, held))
        return entries

    def _fresh(self, kind: str, sources: list[str]) -> Iterator[pa.Table]:
        """Rows of the sources in order; of results only those whose key is new."""
        seen: set[str] = set()
        for entry in self._before.manifest.entries(kind):
            if kind == SHARDS and entry.name not in sources:
                seen.update(self._read(entry.name, lambda name: keys(self._storage, name)))
        for shard in sources:
            for table in self._read(shard, lambda name: list(tables(self._storage, name))):
                if kind == SHARDS:
                    fresh = [key not in seen and not seen.add(key) for key in table.column("key").to_pylist()]
                    self.duplicates += fresh.count(False)
                    if not all(fresh):
                        table = table.filter(pa.array(fresh, pa.bool_()))
                if table.num_rows:
                    yield table

    def _read(self, shard: str, read: Callable[[str], T]) -> T:
        try:
            return read(shard)
        except FileNotFoundError as error:
            if ledger_manifest.latest(self._storage).generation == self._before.manifest.generation:
                raise damaged(self._storage, shard, error) from error
            raise _Gone from error
        except READ_ERRORS as error:
            raise damaged(self._storage, shard, error) from error

    def _write(self, kind: str, held: list[pa.Table]) -> ShardEntry:
        table = pa.concat_tables(held)
        data = encode(table.combine_chunks())
        name = f"{kind}/{self._stem}-{len(self.written) + 1:04d}.parquet"
        self._storage.publish({name: data}, by="compaction")
        self.written.append(name)
        self.rows += table.num_rows
        return ShardEntry(name=name, rows=table.num_rows, size_bytes=data.size, sha256=hashlib.sha256(data).hexdigest())

    def undo(self) -> None:
        for name in self.written:
            try:
                self._storage.remove(name)
            except OSError:
                pass  # no manifest names it, so it is ignored, and removed by the next compaction


def _sources(snapshot: Snapshot, kind: str, full_bytes: int = FULL_BYTES) -> list[str]:
    """What is worth merging, in order of reading: compacted shards that are small, and all that writers left."""
    small = [entry.name for entry in snapshot.manifest.entries(kind) if entry.size_bytes < full_bytes]
    return small + [each.name for each in snapshot.loose(kind)]


def _next(
    before: Snapshot, sources: dict[str, list[str]], made: dict[str, list[ShardEntry]], generation: int
) -> Manifest:
    merged = {kind: set(names) if len(names) > 1 else set() for kind, names in sources.items()}
    entries = {
        kind: tuple(each for each in before.manifest.entries(kind) if each.name not in merged[kind]) + tuple(made[kind])
        for kind in (SHARDS, FAILURES)
    }
    listed = {each.name for each in before.listed}
    return Manifest(
        generation=generation,
        results=entries[SHARDS],
        failures=entries[FAILURES],
        # Those of before whose removal was cut short stay replaced for as long as they are there.
        replaced=frozenset((before.manifest.replaced & listed).union(*merged.values())),
        created=datetime.now(UTC).isoformat(),
    )


def _tidy(storage: Storage, snapshot: Snapshot) -> None:
    """Remove what the manifest replaces, and what compactions left that were killed or lost."""
    old = time.time() - _ORPHAN_AGE_S
    for each in snapshot.listed:
        dead = is_abandoned(each.name, snapshot) and each.modified_s < old
        if snapshot.is_replaced(each.name) or dead:
            storage.remove(each.name)
    for each in snapshot.orphans():
        storage.remove(each.name)


def is_abandoned(name: str, snapshot: Snapshot) -> bool:
    """A merged shard that no manifest names; it may be one in flight."""
    return ledger_manifest.is_compacted(name) and name not in snapshot.manifest.names
