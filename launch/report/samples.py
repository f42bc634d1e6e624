"""Trajectories to look at, read whole by their keys, and the rows around them for the span composition.

Only the key column of a ledger is gone through, and only the row groups that hold one of the keys are read.

Example::

    found = read_samples(ledger, ["task-1|qwen|0|ab12"])
    found.trajectories["task-1|qwen|0|ab12"].steps
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, field
from typing import Any

import pyarrow as pa
import pyarrow.compute
import pyarrow.parquet as pq

from rollout.ledger import Ledger, LedgerError
from rollout.ledger_shards import READ_ERRORS
from rollout.records import RecordsError, current, from_table
from rollout.trajectory import Trajectory

pc: Any = pyarrow.compute  # its functions are made at run time

AROUND = 400
"""Rows that are kept for the composition of what is trained."""
_OF_A_GROUP = 100
"""At most, of one row group: neighbours are alike."""


@dataclass(slots=True)
class Samples:
    """What was found."""

    trajectories: dict[str, Trajectory] = field(default_factory=dict)
    """key -> the trajectory."""
    around: list[Trajectory] = field(default_factory=list)
    """Others of the same row groups that a student may learn from: up to `AROUND`."""


def read_samples(ledger: Ledger, keys: Collection[str], *, around: bool = False) -> Samples:
    """What is gone by now, since a compaction took its shard away, is left out. Raises `LedgerError`."""
    found, wanted = Samples(), set(keys)
    for shard in ledger.shards():
        if not wanted:
            break
        try:
            _read_shard(found, ledger, shard, wanted, around=around)
        except FileNotFoundError:
            continue
        except (*READ_ERRORS, RecordsError) as error:
            raise LedgerError(f"{ledger.storage.uri}/{shard} cannot be read ({error})") from error
    return found


def failed_samples(ledger: Ledger, *, most: int = 1) -> list[Trajectory]:
    """Of the recorded failures, `most` of each class: those that came furthest among the first few thousand."""
    best: dict[str, list[tuple[int, str]]] = {}
    seen = 0
    for table in ledger.scan_failures(["key", "failure_class", "step_count"]):
        for name, steps, key in zip(
            *(table.column(each).to_pylist() for each in ("failure_class", "step_count", "key")), strict=True
        ):
            best[name or ""] = sorted([*best.get(name or "", []), (-steps, key)])[:most]
        seen += table.num_rows
        if seen > 5_000:
            break
    wanted = {key for group in best.values() for _, key in group}
    found: dict[str, Trajectory] = {}
    if wanted:
        for trajectory in ledger.failures():
            if trajectory.key in wanted and trajectory.key not in found:
                found[trajectory.key] = trajectory
                if len(found) == len(wanted):
                    break
    return list(found.values())


def _read_shard(found: Samples, ledger: Ledger, shard: str, wanted: set[str], *, around: bool) -> None:
    with ledger.storage.open(shard) as file, pq.ParquetFile(file) as parquet:
        for group in range(parquet.num_row_groups):
            keys = parquet.read_row_group(group, columns=["key"], use_threads=False).column(0).to_pylist()
            hits = wanted.intersection(keys)
            if not hits:
                continue
            table = current(parquet.read_row_group(group, use_threads=False))
            for trajectory in from_table(
                table.filter(pc.is_in(table.column("key"), pa.array(list(hits), pa.string())))
            ):
                found.trajectories.setdefault(trajectory.key, trajectory)
            wanted -= hits
            if around and (room := min(_OF_A_GROUP, AROUND - len(found.around))) > 0:
                found.around += from_table(table.filter(table.column("trainable")).slice(0, room))
            if not wanted:
                return
