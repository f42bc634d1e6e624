"""What the commands of `launch.ledger` leave: tables or JSON on the standard output, progress on the standard error,
and new ledgers and files that appear whole or not at all.

Example::

    output = Output(as_json=False)
    with new_ledger("runs/filtered", writer="filter") as fill:
        for trajectory in output.progress("filtering", trajectories, total=1000): fill(trajectory)
"""

from __future__ import annotations

import json
import os
import shutil
import sys
import tempfile
import uuid
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from launch.ledger.sources import UsageError
from rollout import ledger_mark
from rollout.ledger import LedgerWriter
from rollout.ledger_merge import BATCH_BYTES
from rollout.storage import FolderStorage, Storage, open_storage
from rollout.trajectory import Trajectory

if TYPE_CHECKING:
    import pyarrow as pa
    from rich.console import RenderableType

T = TypeVar("T")

_ROWS_AT_A_TIME = 256
_WIDTH = 110
"""Columns where there is no terminal to ask."""


class Output:
    """Says things to people, or one JSON document to a machine."""

    def __init__(self, *, as_json: bool) -> None:
        from rich.console import Console

        self.as_json = as_json
        self._console = Console(file=sys.stdout, highlight=False, soft_wrap=False)
        if not self._console.is_terminal:
            self._console.width = _WIDTH

    def show(self, what: RenderableType) -> None:
        """A table."""
        if not self.as_json:
            self._console.print(what)

    def say(self, line: str) -> None:
        """A line as it is."""
        if not self.as_json:
            self._console.print(line, markup=False, soft_wrap=True)

    def data(self, data: Mapping[str, Any]) -> None:
        """The same for machines; called once, last."""
        if self.as_json:
            print(json.dumps(data, indent=2, ensure_ascii=False))

    def progress(self, title: str, items: Iterable[T], *, total: int | None) -> Iterator[T]:
        """The items, with a bar on the standard error where that is a terminal."""
        if not sys.stderr.isatty():
            yield from items
            return
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
        with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
            task = bar.add_task(title, total=total)
            for item in items:
                yield item
                bar.advance(task)


class Fill:
    """Appends to a new ledger, so many bytes a shard."""

    def __init__(self, writer: LedgerWriter, *, shard_bytes: int = BATCH_BYTES) -> None:
        self._writer, self._shard_bytes = writer, shard_bytes
        self._rows: list[Trajectory] = []
        self._tables: dict[str, list[pa.Table]] = {"results": [], "failures": []}

    def __call__(self, trajectory: Trajectory) -> None:
        self._rows.append(trajectory)
        if len(self._rows) >= _ROWS_AT_A_TIME:
            self._pack()

    def failures(self, table: pa.Table) -> None:
        """Rows of `rollout.records.SCHEMA`, all of them failures."""
        self._add("failures", table)

    def flush(self) -> None:
        self._pack()
        for kind in self._tables:
            self._write(kind)

    def _pack(self) -> None:
        from rollout.records import to_table

        for kind, failed in (("results", False), ("failures", True)):
            rows = [each for each in self._rows if (each.failure is not None) is failed]
            if rows:
                self._add(kind, to_table(rows))
        self._rows = []

    def _add(self, kind: str, table: pa.Table) -> None:
        if table.num_rows:
            self._tables[kind].append(table)
        if sum(each.nbytes for each in self._tables[kind]) >= self._shard_bytes:
            self._write(kind)

    def _write(self, kind: str) -> None:
        import pyarrow as pa

        if self._tables[kind]:
            rows = pa.concat_tables(self._tables[kind]).combine_chunks()
            self._writer.append_tables(**{kind: rows})
            self._tables[kind] = []


@contextmanager
def new_ledger(out: str, *, writer: str) -> Iterator[Fill]:
    """A ledger that is at `out` when the block ends well, and not at all when it does not.

    Raises `UsageError` when something is there already.
    """
    with staged(out, writer=writer) as folder:
        fill = Fill(LedgerWriter(folder, writer=writer))
        yield fill
        fill.flush()


@contextmanager
def staged(out: str, *, writer: str) -> Iterator[Path]:
    """A local folder to make a ledger in; it becomes `out` when the block ends well. Raises `UsageError` when `out` is
    not empty."""
    storage = _vacant(out)
    if isinstance(storage, FolderStorage):
        target = Path(storage.uri).absolute()
        target.parent.mkdir(parents=True, exist_ok=True)
        staging = target.with_name(f".{target.name}-{uuid.uuid4().hex[:12]}.tmp")
        try:
            yield staging
            _vacant(out)  # meanwhile another command may have been quicker
            os.rename(staging, target)
        finally:
            shutil.rmtree(staging, ignore_errors=True)
        return
    with tempfile.TemporaryDirectory() as folder:
        yield Path(folder) / "ledger"
        _upload(Path(folder) / "ledger", _vacant(out), writer)


@contextmanager
def new_file(out: str) -> Iterator[Path]:
    """A path to write to; it becomes `out` when the block ends well. Raises `UsageError` when `out` exists."""
    target = Path(out)
    if "://" in out:
        raise UsageError(f"{out}: name a local file")
    if target.exists():
        raise UsageError(f"{out} exists; name a new file")
    target.parent.mkdir(parents=True, exist_ok=True)
    temporary = target.with_name(f".{uuid.uuid4().hex[:12]}.tmp-{target.name}")
    try:
        yield temporary
        os.replace(temporary, target)
    finally:
        temporary.unlink(missing_ok=True)


def _vacant(out: str) -> Storage:
    storage = open_storage(out)
    try:
        vacant = storage.empty()
    except NotADirectoryError:
        vacant = False
    if not vacant:
        raise UsageError(f"{out} exists and is not empty; name a new ledger")
    return storage


def _upload(staging: Path, storage: Storage, writer: str) -> None:
    """The mark last: until it is there, nobody takes the rest for a ledger."""
    names = [path.relative_to(staging).as_posix() for path in sorted(staging.rglob("*")) if path.is_file()]
    storage.prepare("")
    for name in names:
        if name != ledger_mark.MARK:
            storage.publish({name: (staging / name).read_bytes()}, by=writer)
    storage.replace(ledger_mark.MARK, (staging / ledger_mark.MARK).read_bytes())
