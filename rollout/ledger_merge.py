"""`merge`: brings the rows of several ledgers into one, each result and each failed attempt once.

The sources stay as they are. Run again, or after it was killed, it adds only what is missing.

Example::

    merge(["runs/a/ledger", "s3://bucket/b/ledger"], into="runs/all/ledger")
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Container, Sequence
from dataclasses import dataclass
from pathlib import Path

import pyarrow as pa

from rollout import ledger_mark
from rollout.ledger import Ledger, LedgerWriter
from rollout.ledger_shards import LedgerError

BATCH_BYTES = 64 * 2**20
"""Uncompressed rows of one new shard, about."""
_ATTEMPT = ["key", "failure", "started_at_s", "duration_s"]


@dataclass(frozen=True, slots=True, kw_only=True)
class MergeReport:
    """What `merge` added."""

    results: int = 0
    repeated: int = 0
    """Results of the sources that were there already, or that an earlier source had."""
    failures: int = 0


def merge(
    sources: Sequence[Path | str], into: Path | str, *, writer: str = "merge", only: Container[str] | None = None
) -> MergeReport:
    """Of results that share a key the first counts: what `into` has, then the sources in the order given.

    `only`: the keys that are wanted; None takes all.
    Raises `LedgerError` for a source that is missing or cannot be read; what was added until then stays.
    """
    ledgers = [Ledger(source) for source in sources]
    for each in ledgers:
        if ledger_mark.version(each.storage) is None:
            raise LedgerError(f"there is no ledger at {each.storage.uri}")
        if _place(each.storage.uri) == _place(Ledger(into).storage.uri):
            raise LedgerError(f"{each.storage.uri} cannot be merged into itself; name another ledger")
    target = LedgerWriter(into, writer=writer)
    held = Ledger(into)
    have = held.keys()
    attempts = Counter(_attempts(held.scan_failures(_ATTEMPT)))
    results = repeated = failures = 0
    for ledger in ledgers:
        batch = _Batch(target)
        for table in ledger.scan():
            keys = table.column("key").to_pylist()
            wanted = [only is None or key in only for key in keys]
            fresh = [want and key not in have and not have.add(key) for key, want in zip(keys, wanted, strict=True)]
            repeated += wanted.count(True) - fresh.count(True)
            results += batch.add(table, fresh)
        batch.flush()
        batch = _Batch(target, failures=True)
        met: Counter[tuple[str, str, float, float]] = Counter()
        for table in ledger.scan_failures():
            missing = []
            for attempt in _attempts([table]):
                met[attempt] += 1
                missing.append((only is None or attempt[0] in only) and met[attempt] > attempts[attempt])
            failures += batch.add(table, missing)
        batch.flush()
        attempts |= met
    return MergeReport(results=results, repeated=repeated, failures=failures)


class _Batch:
    """Rows on their way into shards of a good size."""

    def __init__(self, target: LedgerWriter, *, failures: bool = False) -> None:
        self._target, self._failures = target, failures
        self._held: list[pa.Table] = []
        self._held_bytes = 0

    def add(self, table: pa.Table, wanted: list[bool]) -> int:
        """Returns how many rows that were."""
        if not all(wanted):
            table = table.filter(pa.array(wanted, pa.bool_()))
        if table.num_rows:
            self._held.append(table)
            self._held_bytes += table.nbytes
        if self._held_bytes >= BATCH_BYTES:
            self.flush()
        return table.num_rows

    def flush(self) -> None:
        if self._held:
            rows = pa.concat_tables(self._held).combine_chunks()
            self._target.append_tables(**{"failures" if self._failures else "results": rows})
            self._held, self._held_bytes = [], 0


def _place(uri: str) -> str:
    return uri if "://" in uri else os.path.realpath(uri)


def _attempts(tables: Sequence[pa.Table]) -> list[tuple[str, str, float, float]]:
    """What tells one recorded attempt from another."""
    return [
        (key, failure["message"], started_at_s, duration_s)
        for table in tables
        for key, failure, started_at_s, duration_s in zip(
            *(table.column(name).to_pylist() for name in _ATTEMPT), strict=True
        )
    ]
