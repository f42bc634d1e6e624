"""One shard of a ledger: a Parquet file of `rollout.records` rows, written whole and read in parts.

Compression is zstd; dictionaries are off, since they cost more than they save on text and token ids. Row groups are
small, so that reading a large shard holds few trajectories in memory at once.

Example::

    storage.publish({"shards/w-1.parquet": encode(to_table(trajectories))}, by="w")
    for table in tables(storage, "shards/w-1.parquet", ["key", "kind"]): ...
"""

from __future__ import annotations

from collections.abc import Generator, Iterable, Iterator, Sequence

import pyarrow as pa
import pyarrow.parquet as pq

from rollout.records import SCHEMA, SCHEMA_VERSION, current, schema_version
from rollout.storage import Storage, StorageError, ahead

ROW_GROUP = 512
"""Rows."""
_AHEAD = 4
"""Shards that are in memory at once, whole, when they are fetched ahead."""
_FILTERED = [field.name for field in SCHEMA if not pa.types.is_nested(field.type)]
"""Columns with statistics, which let tools skip row groups; in nested ones they help nobody and cost a third of the
footer."""
READ_ERRORS = (pa.ArrowException, OSError, ValueError)
"""What reading a damaged shard raises; `FileNotFoundError`, one that is gone, is among them."""


class LedgerError(RuntimeError):
    """A folder that is no ledger, or one that cannot be read; the message names the file and what is wrong."""


def encode(table: pa.Table) -> pa.Buffer:
    """The bytes of a shard."""
    sink = pa.BufferOutputStream()
    pq.write_table(table, sink, compression="zstd", compression_level=1, use_dictionary=False, row_group_size=ROW_GROUP)
    return sink.getvalue()


def tables(storage: Storage, shard: str, columns: Sequence[str] | None = None) -> Iterator[pa.Table]:
    """The shard's row groups with `SCHEMA`, or those `columns` of it in that order. Raises one of `READ_ERRORS`."""
    with storage.open(shard) as file, pq.ParquetFile(file, pre_buffer=storage.width > 1) as parquet:
        old = schema_version(parquet.schema_arrow) != SCHEMA_VERSION
        # What an older version lacks is worked out from its whole rows; steps are kept otherwise now.
        known = set(parquet.schema_arrow.names) - {"steps"}
        lacking = old and (columns is None or not known.issuperset(columns))
        wanted = None if columns is None or lacking else list(columns)
        for group in range(parquet.num_row_groups):
            table = parquet.read_row_group(group, columns=wanted, use_threads=False)
            if lacking:
                table = current(table)
            yield table if columns is None else table.select(list(columns))


def one_by_one(
    storage: Storage, shards: Sequence[str], columns: Sequence[str] | None = None
) -> Generator[Iterable[pa.Table]]:
    """`tables` of one shard after the other. Over a network some shards are fetched ahead."""
    if storage.width == 1:
        yield from (tables(storage, shard, columns) for shard in shards)
    else:
        yield from ahead(lambda shard: list(tables(storage, shard, columns)), shards, min(_AHEAD, storage.width))


def keys(storage: Storage, shard: str) -> list[str]:
    """In row order, reading the key column only. Raises one of `READ_ERRORS`."""
    with storage.open(shard) as file, pq.ParquetFile(file) as parquet:
        return parquet.read(columns=["key"], use_threads=False).column(0).to_pylist()


def damaged(storage: Storage, shard: str, error: Exception) -> LedgerError:
    """What to say of a shard that cannot be read."""
    if isinstance(error, StorageError):
        return LedgerError(str(error))
    trouble = "Try again; if that does not help: " if storage.width > 1 else ""
    return LedgerError(
        f"{storage.uri}/{shard} cannot be read ({error}). {trouble}Shards are written whole, so it was damaged later: "
        "restore it, or move it away and run again what it held"
    )
