"""Parts of one shard of a ledger: the columns that rows are filtered by, their text, and single rows.

Nothing is read whole: of a Parquet row group only the leaf columns that are asked for, so many rows at a time that a
few megabytes are in memory, however long the texts are.

Example::

    for table in columns(storage, "shards/w-1.parquet"): ...      # `COLUMNS`, in row order
    trajectory = next(rows(storage, "shards/w-1.parquet", [17]))
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import pyarrow as pa
import pyarrow.compute
import pyarrow.parquet as pq

from rollout import ledger_shards
from rollout.records import SCHEMA, current, from_table, schema_version
from rollout.storage import Storage
from rollout.trajectory import Trajectory

pc: Any = pyarrow.compute
"""Its functions are made when it is imported, so no type checker knows them."""

_FLAT = (
    "key",
    "task_id",
    "kind",
    "policy",
    "weights_version",
    "sample_index",
    "reward",
    "success",
    "stop_reason",
    "failure_class",
    "started_at_s",
    "duration_s",
    "trainable",
    "step_count",
    "tool_calls",
    "completion_tokens",
    "cost_usd",
)
_SHORT = {"question": ("task", "question"), "answer": ("task", "answer"), "failure": ("failure", "message")}
"""Column -> where it is; the beginning of it is kept."""
_SHORT_CHARACTERS = 240
_NAMES = frozenset({"kind", "policy", "weights_version", "stop_reason", "failure_class"})
"""Cut there as well: they are filters to choose from, whoever wrote them."""
COLUMNS = pa.schema(
    [
        *(pa.field(name, SCHEMA.field(name).type) for name in _FLAT),
        *(pa.field(name, pa.string()) for name in (*_SHORT, "prediction")),
        pa.field("row", pa.int32()),
    ]
)
"""What `columns` yields; `row` counts from the shard's first."""
_BATCH_BYTES = 8 * 2**20
_BATCH_ROWS = 512
_TEXT_CHARACTERS = 1_000_000
"""Of one trajectory, the part that words are looked for in."""


def columns(storage: Storage, shard: str) -> Iterator[pa.Table]:
    """Tables of `COLUMNS`. Raises one of `rollout.ledger_shards.READ_ERRORS`."""
    wanted = [*_FLAT, "prediction", *(".".join(path) for path in _SHORT.values())]
    first = 0
    for table in _parts(storage, shard, wanted):
        short = {
            name: pc.struct_field(table.column(path[0]).combine_chunks(), path[1]) for name, path in _SHORT.items()
        }
        short["prediction"] = table.column("prediction")
        made = [_cut(table.column(name)) if name in _NAMES else table.column(name) for name in _FLAT]
        made += [_cut(each) for each in short.values()]
        made.append(pa.array(range(first, first + table.num_rows), pa.int32()))
        first += table.num_rows
        yield pa.Table.from_arrays(made, schema=COLUMNS)


def texts(storage: Storage, shard: str, wanted: Sequence[int]) -> Iterator[tuple[int, str]]:
    """(row, its question, answers, turns and observations as one text) of the rows `wanted`, which ascend.

    Raises one of `READ_ERRORS`."""
    leaves = ["task.question", "task.answer", "prediction", "failure.message"]
    leaves += ["steps.list.element.completion.text", "steps.list.element.observation"]
    for rows_, table in _wanted_parts(storage, shard, wanted, leaves):
        task, failure = (table.column(name).combine_chunks() for name in ("task", "failure"))
        steps = table.column("steps").combine_chunks()
        if isinstance(steps, pa.ChunkedArray):
            steps = pa.concat_arrays(steps.chunks)
        inside, offsets = steps.flatten(), _offsets(steps)
        turns = pc.struct_field(inside, ["completion", "text"])
        joined = [
            pc.binary_join(pa.ListArray.from_arrays(offsets, each), "\n")
            for each in (turns, pc.struct_field(inside, "observation"))
        ]
        said = [pc.struct_field(task, "question"), pc.struct_field(task, "answer")]
        said += [pc.fill_null(table.column("prediction").combine_chunks(), "")]
        said += [pc.fill_null(pc.struct_field(failure, "message"), "")]
        text = pc.binary_join_element_wise(*said, *joined, "\n")
        yield from zip(rows_, pc.utf8_slice_codeunits(text, 0, _TEXT_CHARACTERS).to_pylist(), strict=True)


def rows(storage: Storage, shard: str, wanted: Sequence[int]) -> Iterator[Trajectory]:
    """The rows `wanted`, which ascend. Raises one of `READ_ERRORS`."""
    for _, table in _wanted_parts(storage, shard, wanted, None):
        yield from from_table(table)


def tables(storage: Storage, shard: str, wanted: Sequence[int]) -> Iterator[pa.Table]:
    """The same as tables of `rollout.records.SCHEMA`. Raises one of `READ_ERRORS`."""
    for _, table in _wanted_parts(storage, shard, wanted, None):
        yield current(table)


def _cut(texts: Any) -> Any:
    return pc.utf8_slice_codeunits(texts, 0, _SHORT_CHARACTERS)


def _offsets(steps: pa.ListArray) -> pa.Array:
    """Of the flattened items, which begin at 0 also where the list is a slice."""
    lengths = pc.list_value_length(steps)
    return pa.concat_arrays([pa.array([0], pa.int32()), pc.cumulative_sum(lengths).cast(pa.int32())])


def _parts(storage: Storage, shard: str, leaves: Sequence[str]) -> Iterator[pa.Table]:
    with storage.open(shard) as file, pq.ParquetFile(file) as parquet:
        if not set(_FLAT) <= set(parquet.schema_arrow.names):  # of before there were columns to filter by
            tops = list(dict.fromkeys(leaf.partition(".")[0] for leaf in leaves))
            yield from ledger_shards.tables(storage, shard, tops)
            return
        for group in range(parquet.num_row_groups):
            yield from _batches(parquet, group, leaves)


def _wanted_parts(
    storage: Storage, shard: str, wanted: Sequence[int], leaves: Sequence[str] | None
) -> Iterator[tuple[list[int], pa.Table]]:
    """(rows, their table) of the row groups that hold any."""
    with storage.open(shard) as file, pq.ParquetFile(file) as parquet:
        schema_version(parquet.schema_arrow)
        left, at, first = list(wanted), 0, 0
        for group in range(parquet.num_row_groups):
            end = first + parquet.metadata.row_group(group).num_rows
            if at < len(left) and left[at] < end:
                for table in _batches(parquet, group, leaves):
                    mine: list[int] = []
                    while at < len(left) and left[at] < first + table.num_rows:
                        mine.append(left[at])
                        at += 1
                    if mine:
                        whole = len(mine) == table.num_rows
                        yield mine, table if whole else table.take(pa.array([row - first for row in mine]))
                    first += table.num_rows
                    if at == len(left) or left[at] >= end:
                        break
            first = end


def _batches(parquet: pq.ParquetFile, group: int, leaves: Sequence[str] | None) -> Iterator[pa.Table]:
    """A row group, so many rows at once as keep memory small."""
    facts = parquet.metadata.row_group(group)
    names = None if leaves is None else set(leaves)
    size = sum(
        column.total_uncompressed_size
        for column in map(facts.column, range(facts.num_columns))
        if names is None or column.path_in_schema in names
    )
    at_once = max(1, min(_BATCH_ROWS, int(_BATCH_BYTES / max(1.0, size / max(1, facts.num_rows)))))
    for batch in parquet.iter_batches(
        batch_size=at_once, row_groups=[group], columns=None if leaves is None else list(leaves), use_threads=False
    ):
        table = pa.Table.from_batches([batch])
        yield table.replace_schema_metadata(parquet.schema_arrow.metadata)
