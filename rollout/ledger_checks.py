"""`validate`: reads a ledger once, whole, and reports what is wrong with it. It repairs nothing.

Example::

    report = Ledger(folder).validate()
    assert report.ok, report.unreadable
"""

from __future__ import annotations

import hashlib
import re
from dataclasses import dataclass
from typing import TYPE_CHECKING

from rollout.ledger_manifest import FAILURES, MANIFESTS, SHARDS, ShardEntry
from rollout.ledger_shards import READ_ERRORS, tables
from rollout.records import from_table
from rollout.storage import Storage

if TYPE_CHECKING:
    from rollout.ledger import Ledger

_DIGEST = re.compile(r"[0-9a-f]{12}")


@dataclass(frozen=True, slots=True, kw_only=True)
class LedgerReport:
    """What `validate` found."""

    rows: int
    """Readable result rows, duplicates included."""
    failures: int
    duplicate_keys: tuple[str, ...]
    """Keys that more than one result row has, sorted."""
    unreadable: tuple[str, ...]
    """Shards that cannot be read, with the reason, as 'shards/w-000001.parquet: ...'."""
    leftovers: tuple[str, ...]
    """Files of appends and compactions that are in flight or were killed; they hold nothing that is not elsewhere or
    was promised to be kept."""
    disagreements: tuple[str, ...] = ()
    """Where the manifest says otherwise than the files, one line each."""
    unlike_keys: tuple[str, ...] = ()
    """Keys that are not made as `trajectory_key` makes them of their row, sorted: a resumed run never asks for them."""

    @property
    def ok(self) -> bool:
        """Every shard can be read, and is what the manifest says."""
        return not self.unreadable and not self.disagreements


def validate(ledger: Ledger) -> LedgerReport:
    """Raises `LedgerError` only where there is nothing to read at all (a damaged manifest)."""
    storage, snapshot = ledger.storage, ledger.snapshot()
    counts = {SHARDS: 0, FAILURES: 0}
    seen: set[str] = set()
    twice: set[str] = set()
    unlike: set[str] = set()
    unreadable: list[str] = []
    disagreements: list[str] = []
    entries = {entry.name: entry for kind in (SHARDS, FAILURES) for entry in snapshot.manifest.entries(kind)}
    for kind in (SHARDS, FAILURES):
        for shard in snapshot.shards(kind):
            try:
                if shard in entries:
                    disagreements += _disagreements(entries[shard], storage.read(shard))
                keys, odd = _read(storage, shard)
            except READ_ERRORS as error:
                unreadable.append(f"{shard}: {error}")
                continue
            if shard in entries and entries[shard].rows != len(keys):
                disagreements.append(f"{shard}: {len(keys)} rows, {entries[shard].rows} by the manifest")
            counts[kind] += len(keys)
            unlike.update(odd)
            if kind == SHARDS:
                for key in keys:
                    (twice if key in seen else seen).add(key)
    stale = [each.name for each in snapshot.listed if snapshot.is_replaced(each.name)]
    leftovers = [each.name for each in storage.leftovers("", SHARDS, FAILURES, MANIFESTS)]
    return LedgerReport(
        rows=counts[SHARDS],
        failures=counts[FAILURES],
        duplicate_keys=tuple(sorted(twice)),
        unreadable=tuple(unreadable),
        leftovers=tuple(sorted(leftovers + stale + [each.name for each in snapshot.orphans()])),
        disagreements=tuple(disagreements),
        unlike_keys=tuple(sorted(unlike)),
    )


def _read(storage: Storage, shard: str) -> tuple[list[str], list[str]]:
    """Every row whole; returns the keys, and those that are not made of their row."""
    keys: list[str] = []
    unlike: list[str] = []
    for table in tables(storage, shard):
        for each in from_table(table):
            start = f"{each.task.id}|{each.policy}|{each.sample_index}|"
            if not each.key.startswith(start) or not _DIGEST.fullmatch(each.key[len(start) :]):
                unlike.append(each.key)
            keys.append(each.key)
    return keys, unlike


def _disagreements(entry: ShardEntry, data: bytes) -> list[str]:
    if len(data) != entry.size_bytes:
        return [f"{entry.name}: {len(data)} bytes, {entry.size_bytes} by the manifest"]
    if hashlib.sha256(data).hexdigest() != entry.sha256:
        return [f"{entry.name}: its checksum is not the manifest's"]
    return []
