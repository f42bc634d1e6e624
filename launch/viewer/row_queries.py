"""A selection as SQL, over the rows of all ledgers as one (the view `everything`): which rows, where a page of them
begins, how many have each value.

Example::

    queries = RowQueries(indices)
    rows, more = queries.rows(cursor, Selection(outcome=("wrong",)), "", backwards=False, limit=50)
"""

from __future__ import annotations

import threading
from collections import Counter, OrderedDict
from collections.abc import Sequence
from typing import Any

import numpy as np
import pyarrow as pa

from launch.viewer import word_query
from launch.viewer.answers import Row
from launch.viewer.ledger_index import LedgerIndex
from launch.viewer.selection import FACETS, OUTCOMES, Selection, SelectionError

LEDGER_BITS = 40
"""A row's number over all ledgers: the ledger's, then so many bits of its own."""
_KEPT_HITS = 4

ROW = ", ".join(
    {"number": "number", "identity": "printf('%016x', identity) as identity"}.get(name, f'"{name}"')
    for name in Row.__dataclass_fields__
)
"""What is selected for a `Row`."""
_FACET_SQL = {
    "outcome": "case when failed then 'failed' when success then 'success' else 'wrong' end",
    "kind": "kind",
    "policy": "policy",
    "ledger": "ledger::varchar",
    "failure": "coalesce(failure_class, '')",
    "stop": "stop_reason",
}
assert set(_FACET_SQL) == set(FACETS) and OUTCOMES


def row_of(values: Sequence[Any]) -> Row:
    """Of what `ROW` selects."""
    return Row(**dict(zip(Row.__dataclass_fields__, values, strict=True)))


class RowQueries:
    """Asks with the cursor that it is given, which is one thread's; it keeps the hits of the last words that were
    looked for, for all threads."""

    def __init__(self, indices: Sequence[LedgerIndex]) -> None:
        self._indices = indices
        self._hits: OrderedDict[tuple[str, tuple[int, ...]], np.ndarray] = OrderedDict()
        self._hits_lock = threading.Lock()

    def where(self, cursor: Any, selection: Selection, *, facets: bool) -> tuple[str, list[Any]]:
        """A condition on `everything`, and its values; with what the facets ask for, too, or without. The cursor is
        given what the condition reads. Raises `SelectionError`."""
        parts: list[str] = []
        values: list[Any] = []

        def add(sql: str, *given: Any) -> None:
            parts.append(sql)
            values.extend(given)

        if selection.q:
            hits = self._word_hits(selection.q)
            if hits is not None:
                cursor.register("hits", pa.table({"hit": hits}))
                add("number in (select hit from hits)")
        if selection.task:
            add("contains(task_id, ?)", selection.task)
        for name, column in (("steps", "step_count"), ("score", "reward")):
            least, most = getattr(selection, f"{name}_min"), getattr(selection, f"{name}_max")
            if least is not None:
                add(f"{column} >= ?", least)
            if most is not None:
                add(f"{column} <= ?", most)
        if facets:
            for name in FACETS:
                wanted = getattr(selection, name)
                if wanted:
                    add(f"{_FACET_SQL[name]} in ({', '.join('?' * len(wanted))})", *wanted)
        return " and ".join(parts) or "true", values

    def _word_hits(self, text: str) -> np.ndarray | None:
        """Numbers of rows over all ledgers; None: nothing is asked for."""
        try:
            match = word_query.parse(text).match
        except word_query.QueryError as error:
            raise SelectionError(str(error)) from None
        if not match:
            return None
        key = (match, tuple(index.words_to for index in self._indices))
        with self._hits_lock:
            if key in self._hits:
                self._hits.move_to_end(key)
                return self._hits[key]
        found = np.concatenate(
            [index.words_hits(match) + (number << LEDGER_BITS) for number, index in enumerate(self._indices)]
        )
        with self._hits_lock:
            self._hits[key] = found
            while len(self._hits) > _KEPT_HITS:
                self._hits.popitem(last=False)
        return found

    def rows(
        self, cursor: Any, selection: Selection, edge: str, *, backwards: bool, limit: int
    ) -> tuple[list[Row], bool]:
        """(rows in the selection's order, whether there are more in this direction)."""
        where, values = self.where(cursor, selection, facets=True)
        column = selection.order.column
        down = selection.descending != backwards
        if edge:
            value, number = self._read_edge(edge, selection)
            sign = "<" if down else ">"
            where += f" and ({column} {sign} ? or ({column} = ? and number {sign} ?))"
            values += [value, value, number]
        way = "desc" if down else "asc"
        numbers = cursor.execute(
            f"select number from everything where {where} order by {column} {way}, number {way} limit ?",
            [*values, limit + 1],
        ).fetchall()
        more = len(numbers) > limit
        wanted = [each[0] for each in numbers[:limit]]
        if not wanted:
            return [], False
        found = cursor.execute(
            f"select {ROW} from everything where number in ({', '.join('?' * len(wanted))})", wanted
        ).fetchall()
        made = [row_of(each) for each in found]
        place = {number: i for i, number in enumerate(wanted)}
        made.sort(key=lambda row: place[row.number], reverse=backwards)
        return made, more

    def edge(self, row: Row, selection: Selection) -> str:
        """Where the row is in the selection's order, to go on from there."""
        value = getattr(row, selection.order.column)
        return f"{row.number}~{value}"

    def _read_edge(self, edge: str, selection: Selection) -> tuple[Any, int]:
        number, _, value = edge.partition("~")
        try:
            return (value if selection.order.column == "task_id" else float(value)), int(number)
        except ValueError:
            raise SelectionError(f"after={edge!r} is no place in this list; leave it out") from None

    def cube(self, cursor: Any, selection: Selection) -> Counter[tuple[str, ...]]:
        """Rows by the values of all facets."""
        where, values = self.where(cursor, selection, facets=False)
        columns = ", ".join(_FACET_SQL[name] for name in FACETS)
        found = cursor.execute(f"select {columns}, count(*) from everything where {where} group by all", values)
        return Counter({tuple(each[:-1]): each[-1] for each in found.fetchall()})
