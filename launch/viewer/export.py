"""A selection as a file, written while it is downloaded: nothing of it is held but one batch.

`jsonl` and `parquet` are a ledger's own rows, as `launch.ledger export` writes them; the Parquet file is a shard that
can be put into a ledger's `shards/`. `ids` is one key a line. A ledger keeps failures apart from results, so the
Parquet file has the results alone; `failures` is that file of the failed attempts.

Example::

    body = export(catalog, Selection(outcome=("wrong",)), "jsonl")      # an iterator of bytes
"""

from __future__ import annotations

import io
import json
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from launch.viewer import shards
from launch.viewer.catalog import Catalog
from launch.viewer.selection import Selection

if TYPE_CHECKING:
    import pyarrow as pa


@dataclass(frozen=True, slots=True, kw_only=True)
class Format:
    """A kind of file."""

    title: str
    suffix: str
    media_type: str


FORMATS = {
    "jsonl": Format(title="JSON lines, whole trajectories", suffix="jsonl", media_type="application/x-ndjson"),
    "parquet": Format(title="Parquet, a ledger shard", suffix="parquet", media_type="application/vnd.apache.parquet"),
    "failures": Format(
        title="Parquet, the failed attempts", suffix="failures.parquet", media_type="application/vnd.apache.parquet"
    ),
    "ids": Format(title="keys, one a line", suffix="txt", media_type="text/plain; charset=utf-8"),
}
_ROWS_AT_A_TIME = 4096
"""Places that are looked up together; rows are read some hundred at a time."""


def export(catalog: Catalog, selection: Selection, name: str) -> Iterator[bytes]:
    """The file. Raises `LedgerError` or `NotThere` in the middle when a shard cannot be read any more: the download
    breaks off then, so that nobody takes a part for the whole."""
    if name == "ids":
        return _ids(catalog, selection)
    if name == "jsonl":
        return _jsonl(catalog, selection)
    outcome = ("failed",) if name == "failures" else ("success", "wrong")
    wanted = tuple(each for each in outcome if each in selection.outcome) if selection.outcome else outcome
    return _parquet(catalog, replace(selection, outcome=wanted) if wanted else None)


def _ids(catalog: Catalog, selection: Selection) -> Iterator[bytes]:
    held: list[str] = []
    for _, _, _, key in catalog.places(selection):
        held.append(key.replace("\n", "\\n") + "\n")
        if len(held) == _ROWS_AT_A_TIME:
            yield "".join(held).encode()
            held = []
    yield "".join(held).encode()


def _jsonl(catalog: Catalog, selection: Selection) -> Iterator[bytes]:
    for table in _tables(catalog, selection):
        yield "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in table.to_pylist()).encode()


def _parquet(catalog: Catalog, selection: Selection | None) -> Iterator[bytes]:
    import pyarrow.parquet as pq

    from rollout.records import SCHEMA

    sink = _Sink()
    with pq.ParquetWriter(sink, SCHEMA, compression="zstd", compression_level=1, use_dictionary=False) as writer:
        for table in _tables(catalog, selection) if selection is not None else ():
            writer.write_table(table)
            yield sink.taken()
    yield sink.taken()


def _tables(catalog: Catalog, selection: Selection) -> Iterator[pa.Table]:
    """The rows, shard by shard."""
    held: dict[int, list[int]] = {}
    count, of = 0, -1
    for ledger, shard, row, _ in catalog.places(selection):
        if count == _ROWS_AT_A_TIME or (held and ledger != of):
            yield from _read(catalog, of, held)
            held, count = {}, 0
        of = ledger
        held.setdefault(shard, []).append(row)
        count += 1
    yield from _read(catalog, of, held)


def _read(catalog: Catalog, ledger: int, held: dict[int, list[int]]) -> Iterator[pa.Table]:
    for shard, rows in held.items():
        name = catalog.shard_name(ledger, shard)
        yield from shards.tables(catalog.indices[ledger].ledger.storage, name, rows)


class _Sink(io.RawIOBase):
    """Where a writer leaves bytes until they are taken."""

    def __init__(self) -> None:
        self._held: list[bytes] = []
        self._at = 0

    def writable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._at

    def write(self, data: object, /) -> int:
        piece = bytes(data)  # type: ignore[call-overload]
        self._held.append(piece)
        self._at += len(piece)
        return len(piece)

    def taken(self) -> bytes:
        held, self._held = b"".join(self._held), []
        return held
