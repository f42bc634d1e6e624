"""All ledgers of a viewer as one: pages of rows, counts, single trajectories. Filled in the background.

One DuckDB instance in memory, with a limit, to which the index of each ledger is attached; one thread looks for new
shards and reads them. Any thread may ask. Columns come first, then words; how far the words have got is said beside
each answer.

Example::

    with Catalog(["runs/a/ledger"], cache=folder) as catalog:
        found = catalog.page(Selection(outcome=("wrong",)))
        found.rows[0].question, found.total
"""

from __future__ import annotations

import shutil
import tempfile
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import closing
from pathlib import Path
from typing import Self

from launch.viewer import meetings, shards
from launch.viewer.answers import Found, NotThere, Progress, Row
from launch.viewer.filling import Filling
from launch.viewer.ledger_index import IndexInUse, LedgerIndex
from launch.viewer.meetings import Group, Meeting, MetTask
from launch.viewer.row_queries import LEDGER_BITS, ROW, RowQueries, row_of
from launch.viewer.selection import FACETS, Selection
from rollout.ledger import Ledger, LedgerError
from rollout.ledger_shards import READ_ERRORS
from rollout.trajectory import Trajectory

PAGE_ROWS = 50
_MEMORY_LIMIT = "128MB"
_THREADS = 2


class Catalog:
    """See the module. `cache` is where indices are kept; None: in a folder that goes with the viewer.

    Raises `LedgerError` for a ledger that cannot be read.
    """

    def __init__(self, ledgers: Sequence[Ledger], *, cache: Path | None) -> None:
        import duckdb

        self._temporary = Path(tempfile.mkdtemp(prefix="ledger-viewer-"))
        self._connection = duckdb.connect(
            ":memory:",
            config={
                "memory_limit": _MEMORY_LIMIT,
                "threads": _THREADS,
                "temp_directory": str(self._temporary / "spill"),
                "autoinstall_known_extensions": False,
                "autoload_known_extensions": False,
            },
        )
        self.indices: list[LedgerIndex] = []
        self.notes: list[str] = []
        for number, ledger in enumerate(ledgers):
            self.indices.append(self._attached(ledger, f"l{number}", cache))
        union = " union all by name ".join(
            f"select {number}::smallint as ledger, ({number}::bigint << {LEDGER_BITS}) + id as number, * "
            f"from {index.name}.rows"
            for number, index in enumerate(self.indices)
        )
        self._connection.execute(f"create view everything as {union}")
        self._queries = RowQueries(self.indices)
        self._filling = Filling(self.indices, self._connection)

    def _attached(self, ledger: Ledger, name: str, cache: Path | None) -> LedgerIndex:
        own = self._temporary / name
        if cache is not None:
            index = LedgerIndex(ledger, cache=cache, name=name)
            try:
                index.attach(self._connection)
                return index
            except IndexInUse:
                self.notes.append(f"another viewer has the index of {index.uri} open; this one makes its own")
            except OSError as error:
                self.notes.append(f"no index can be kept in {cache} ({error}); this one goes with the viewer")
        index = LedgerIndex(ledger, cache=own, name=name)
        index.attach(self._connection)
        return index

    def __enter__(self) -> Self:
        self._filling.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Stop reading, close the index."""
        self._filling.stop()
        self._connection.close()
        shutil.rmtree(self._temporary, ignore_errors=True)

    # -- filling: see `launch.viewer.filling`

    def wait_words(self, timeout_s: float) -> bool:
        """Until the words of what is there are read."""
        return self._filling.wait_words(timeout_s)

    def refresh(self) -> None:
        """Look for new shards now."""
        self._filling.refresh()

    def progress(self) -> Progress:
        return self._filling.progress()

    # -- asking

    def page(
        self, selection: Selection, *, after: str = "", before: str = "", limit: int = PAGE_ROWS, facets: bool = True
    ) -> Found:
        """`limit` rows behind `after` or in front of `before`, as `Found` names them. Raises `SelectionError`."""
        cursor = self._connection.cursor()
        try:
            rows, more = self._queries.rows(cursor, selection, after or before, backwards=bool(before), limit=limit)
            counts = self._queries.cube(cursor, selection) if facets else Counter()
        finally:
            cursor.close()
        total = solved = 0
        shown: dict[str, Counter[str]] = {name: Counter() for name in FACETS}
        chosen = [set(getattr(selection, name)) for name in FACETS]
        for values, n in counts.items():
            missed = [i for i, wanted in enumerate(chosen) if wanted and values[i] not in wanted]
            if not missed:
                total += n
                solved += n * (values[0] == "success")
            for i, name in enumerate(FACETS):
                if missed in ([], [i]):
                    shown[name][values[i]] += n
        for name, wanted in zip(FACETS, chosen, strict=True):
            for value in wanted:
                shown[name].setdefault(value, 0)
            shown[name].pop("", None)
        edges = [self._queries.edge(row, selection) for row in (rows[0], rows[-1])] if rows else [None, None]
        return Found(
            rows=rows,
            total=total,
            solved=solved,
            all_rows=sum(index.rows for index in self.indices),
            facets={name: each.most_common() for name, each in shown.items()},
            after=edges[1] if (more or before) else None,
            before=edges[0] if (after or (before and more)) else None,
        )

    def places(self, selection: Selection) -> Iterator[tuple[int, int, int, str]]:
        """(ledger, shard, row in it, key) of every row of the selection, shard by shard."""
        cursor = self._connection.cursor()
        try:
            where, values = self._queries.where(cursor, selection, facets=True)
            cursor.execute(f'select ledger, shard, "row", "key" from everything where {where} order by 1, 2, 3', values)
            while batch := cursor.fetchmany(2048):
                yield from batch
        finally:
            cursor.close()

    def shard_name(self, ledger: int, shard: int) -> str:
        """Raises `NotThere` for a shard that a compaction has taken away."""
        cursor = self._connection.cursor()
        try:
            found = cursor.execute(f"select name from l{ledger}.shards where shard = ?", [shard]).fetchone()
        finally:
            cursor.close()
        if found is None:
            raise NotThere(f"a shard of {self.indices[ledger].uri} is gone: it was compacted meanwhile; try again")
        return found[0]

    def row(self, identity: str) -> Row:
        """Raises `NotThere`."""
        cursor = self._connection.cursor()
        try:
            number = int(identity, 16)
            found = cursor.execute(f"select {ROW} from everything where identity = ?", [number]).fetchone()
        except ValueError:
            found = None
        finally:
            cursor.close()
        if found is None:
            raise NotThere(f"no trajectory {identity!r} in these ledgers")
        return row_of(found)

    def rows_of_task(self, task_id: str, limit: int = 200) -> list[Row]:
        """Of every policy and ledger, by policy and sample."""
        cursor = self._connection.cursor()
        try:
            found = cursor.execute(
                f"select {ROW} from everything where task_id = ? order by ledger, policy, sample_index, number limit ?",
                [task_id, limit],
            ).fetchall()
        finally:
            cursor.close()
        return [row_of(each) for each in found]

    def beside(self, row: Row, selection: Selection) -> tuple[Row | None, Row | None]:
        """The rows before and behind it in the selection."""
        edge = self._queries.edge(row, selection)
        cursor = self._connection.cursor()
        try:
            sides = [self._queries.rows(cursor, selection, edge, backwards=back, limit=1)[0] for back in (True, False)]
        finally:
            cursor.close()
        return (sides[0][0] if sides[0] else None, sides[1][0] if sides[1] else None)

    def trajectory(self, row: Row) -> Trajectory:
        """Read it from its shard. Raises `NotThere` when that is gone, `LedgerError` when it cannot be read."""
        index = self.indices[row.ledger]
        for attempt in range(20):
            cursor = self._connection.cursor()
            try:
                place = cursor.execute(
                    f'select s.name, r."row" from {index.name}.rows r join {index.name}.shards s on s.shard = r.shard '
                    "where r.id = ?",
                    [row.number & ((1 << LEDGER_BITS) - 1)],
                ).fetchone()
            finally:
                cursor.close()
            if place is None:
                raise NotThere(f"trajectory {row.identity} is no longer in {index.uri}")
            try:
                return next(shards.rows(index.ledger.storage, place[0], [place[1]]))
            except FileNotFoundError:  # a compaction has just taken the shard: the index is told soon
                self.refresh()
                time.sleep(0.05 * (attempt + 1))
            except (*READ_ERRORS, StopIteration) as error:
                raise LedgerError(f"{index.uri}/{place[0]} cannot be read: {error}") from error
        raise NotThere(f"the shard of trajectory {row.identity} is gone from {index.uri}")

    # -- policies beside one another: see `launch.viewer.meetings`

    def policies(self) -> list[Group]:
        """Every policy of every ledger that has results, those with the most tasks first within a ledger."""
        with closing(self._connection.cursor()) as cursor:
            return meetings.policies(cursor)

    def meet(self, a: Group, b: Group) -> Meeting:
        """How they compare."""
        with closing(self._connection.cursor()) as cursor:
            return meetings.meet(cursor, a, b)

    def met_tasks(self, a: Group, b: Group, which: str, page: int, limit: int = PAGE_ROWS) -> list[MetTask]:
        """Those that count as `which`, by task."""
        with closing(self._connection.cursor()) as cursor:
            return meetings.met_tasks(cursor, a, b, which, page, limit)
