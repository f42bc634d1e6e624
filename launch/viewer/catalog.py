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

import hashlib
import shutil
import tempfile
import threading
import time
from collections import Counter, OrderedDict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import numpy as np
import pyarrow as pa

from launch.viewer import shards, word_query
from launch.viewer.ledger_index import IndexInUse, LedgerIndex
from launch.viewer.selection import FACETS, OUTCOMES, Selection, SelectionError
from rollout.ledger import Ledger, LedgerError
from rollout.ledger_shards import READ_ERRORS
from rollout.trajectory import Trajectory

PAGE_ROWS = 50
_MEMORY_LIMIT = "128MB"
_THREADS = 2
_LEDGER_BITS = 40
"""A row's number over all ledgers: the ledger's, then so many bits of its own."""
_LOOK_EVERY_S = 1.0
_LOOK_SHARE = 0.05
"""At most this share of the time goes into listing folders."""
_KEPT_HITS = 4
_REMOTE_LOOK_EVERY_S = 10.0
_TROUBLE_EVERY_S = 5.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """What the list shows of a trajectory."""

    number: int
    identity: str
    """16 hexadecimal digits, the same as long as the ledger lies where it does."""
    ledger: int
    key: str
    task_id: str
    kind: str
    policy: str
    weights_version: str
    sample_index: int
    reward: float
    success: bool
    failed: bool
    stop_reason: str
    failure_class: str | None
    started_at_s: float
    duration_s: float
    trainable: bool
    step_count: int
    tool_calls: int
    completion_tokens: int
    cost_usd: float
    question: str
    """Its beginning, as are those below."""
    answer: str
    prediction: str | None
    failure: str | None

    @property
    def outcome(self) -> str:
        return "failed" if self.failed else "success" if self.success else "wrong"


_ROW = ", ".join(
    {"number": "number", "identity": "printf('%016x', identity) as identity"}.get(name, f'"{name}"')
    for name in Row.__dataclass_fields__
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Found:
    """A page of rows, and what there is of the whole."""

    rows: list[Row]
    total: int
    """Rows of the selection."""
    all_rows: int
    facets: dict[str, list[tuple[str, int]]]
    """Facet -> (value, rows it has when the facet itself filters nothing), the most frequent first."""
    after: str | None
    """Where the next page begins; None: this is the last."""
    before: str | None
    solved: int = 0
    """Of `total`."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Progress:
    """How far the index is."""

    rows: int
    words: int
    """Rows whose text is in the index."""
    unread_shards: int
    version: int
    """Goes up whenever rows come or go."""
    problems: tuple[str, ...] = ()
    reading: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Group:
    """A policy's rows in one ledger."""

    id: str
    """The ledger's number and a digest of the policy's name."""
    ledger: int
    policy: str
    rows: int
    tasks: int
    solved: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Meeting:
    """Two groups on the tasks that both have results of; a task with several samples counts by its share of
    successes."""

    tasks: int
    counts: dict[str, int]
    """"a", "b": which of them solves it more often; "both", "neither": as often, and ever or never."""
    rates: tuple[float, float]
    """Mean success of each on these tasks, in [0, 1]."""


@dataclass(frozen=True, slots=True, kw_only=True)
class MetTask:
    """One task of a `Meeting`."""

    task_id: str
    kind: str
    question: str
    identities: tuple[str, str]
    """Of each side's first sample."""
    rates: tuple[float, float]
    samples: tuple[int, int]


class NotThere(LookupError):
    """No such trajectory in these ledgers."""


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
            f"select {number}::smallint as ledger, ({number}::bigint << {_LEDGER_BITS}) + id as number, * "
            f"from {index.name}.rows"
            for number, index in enumerate(self.indices)
        )
        self._connection.execute(f"create view everything as {union}")
        self._hits: OrderedDict[tuple[str, tuple[int, ...]], np.ndarray] = OrderedDict()
        self._hits_lock = threading.Lock()
        self._stopping = threading.Event()
        self._wake = threading.Event()
        self._looked = threading.Event()
        self._version = 0
        self._trouble = ""
        self._thread = threading.Thread(target=self._fill, name="index", daemon=True)

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
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Stop reading, close the index."""
        self._stopping.set()
        self._wake.set()
        if self._thread.is_alive():
            self._thread.join(timeout=30.0)
        self._connection.close()
        shutil.rmtree(self._temporary, ignore_errors=True)

    # -- filling

    def _fill(self) -> None:
        connection = self._connection.cursor()
        try:
            while not self._stopping.is_set():
                started, looking_s = time.monotonic(), 0.0
                # New columns are looked for between two batches of words: they are what a person waits for.
                trouble, words = "", False
                for read in (self._read_columns, self._read_words):
                    for index in self.indices:
                        try:
                            words = read(index, connection) or words
                        except Exception as error:  # a store that is away, a full disk: said on every page, tried again
                            trouble = f"{index.uri}: {' '.join(str(error).split())}"
                    if read == self._read_columns:
                        self._looked.set()
                        looking_s = time.monotonic() - started
                self._trouble = trouble
                if trouble or not words:
                    every = _TROUBLE_EVERY_S if trouble else _REMOTE_LOOK_EVERY_S if self._remote else _LOOK_EVERY_S
                    self._wake.wait(max(every, looking_s / _LOOK_SHARE))
                    self._wake.clear()
        finally:
            connection.close()

    def _read_columns(self, index: LedgerIndex, connection: Any) -> bool:
        """All that is new; nothing is left to come back for."""
        stop = self._stopping.is_set
        before = (index.rows, index.next_id)
        if index.look(connection):
            while index.read_columns(connection, stop) and not stop():
                self._version += 1
        if (index.rows, index.next_id) != before:
            self._version += 1
        return False

    def _read_words(self, index: LedgerIndex, connection: Any) -> bool:
        return index.read_words(connection, self._stopping.is_set)

    @property
    def _remote(self) -> bool:
        return any(index.ledger.storage.width > 1 for index in self.indices)

    def wait_words(self, timeout_s: float) -> bool:
        """Until the words of what is there are read."""
        deadline = time.monotonic() + timeout_s
        while time.monotonic() < deadline:
            progress = self.progress()
            if self._looked.is_set() and not progress.reading:
                return True
            time.sleep(0.02)
        return False

    def refresh(self) -> None:
        """Look for new shards now."""
        self._wake.set()

    def progress(self) -> Progress:
        problems = [f"{index.uri}/{shard}: {why}" for index in self.indices for shard, why in index.problems.items()]
        rows, unread = sum(each.rows for each in self.indices), sum(each.unread for each in self.indices)
        reading = unread > 0 or any(each.words_to < each.next_id for each in self.indices)
        words = sum(
            each.rows if each.words_to >= each.next_id else min(each.words_to, each.rows) for each in self.indices
        )
        return Progress(
            rows=rows,
            words=words,
            unread_shards=unread,
            version=self._version,
            problems=tuple([self._trouble] * bool(self._trouble) + problems),
            reading=reading or not self._looked.is_set(),
        )

    # -- asking

    def page(
        self, selection: Selection, *, after: str = "", before: str = "", limit: int = PAGE_ROWS, facets: bool = True
    ) -> Found:
        """`limit` rows behind `after` or in front of `before`, as `Found` names them. Raises `SelectionError`."""
        cursor = self._connection.cursor()
        try:
            rows, more = self._rows(cursor, selection, after or before, backwards=bool(before), limit=limit)
            counts = self._cube(cursor, selection) if facets else Counter()
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
        edges = [self._edge(row, selection) for row in (rows[0], rows[-1])] if rows else [None, None]
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
            where, values = self._where(cursor, selection, facets=True)
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
            found = cursor.execute(f"select {_ROW} from everything where identity = ?", [number]).fetchone()
        except ValueError:
            found = None
        finally:
            cursor.close()
        if found is None:
            raise NotThere(f"no trajectory {identity!r} in these ledgers")
        return Row(**dict(zip(Row.__dataclass_fields__, found, strict=True)))

    def rows_of_task(self, task_id: str, limit: int = 200) -> list[Row]:
        """Of every policy and ledger, by policy and sample."""
        cursor = self._connection.cursor()
        try:
            found = cursor.execute(
                f"select {_ROW} from everything where task_id = ? "
                "order by ledger, policy, sample_index, number limit ?",
                [task_id, limit],
            ).fetchall()
        finally:
            cursor.close()
        return [Row(**dict(zip(Row.__dataclass_fields__, each, strict=True))) for each in found]

    def beside(self, row: Row, selection: Selection) -> tuple[Row | None, Row | None]:
        """The rows before and behind it in the selection."""
        edge = self._edge(row, selection)
        cursor = self._connection.cursor()
        try:
            sides = [self._rows(cursor, selection, edge, backwards=back, limit=1)[0] for back in (True, False)]
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
                    [row.number & ((1 << _LEDGER_BITS) - 1)],
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

    # -- policies beside one another

    def policies(self) -> list[Group]:
        """Every policy of every ledger that has results, those with the most tasks first within a ledger."""
        cursor = self._connection.cursor()
        try:
            found = cursor.execute(
                "select ledger, policy, count(*), count(distinct task_id), sum(success::int) from everything "
                "where not failed group by all order by ledger, 3 desc, policy limit 500"
            ).fetchall()
        finally:
            cursor.close()
        return [
            Group(
                id=f"{ledger}-{_digest(policy)}",
                ledger=ledger,
                policy=policy,
                rows=rows,
                tasks=tasks,
                solved=int(solved),
            )
            for ledger, policy, rows, tasks, solved in found
        ]

    def meet(self, a: Group, b: Group) -> Meeting:
        """How they compare."""
        cursor = self._connection.cursor()
        try:
            found = cursor.execute(
                f"select {_WHICH}, count(*), sum(a_rate), sum(b_rate) from ({_MET}) group by 1", _sides(a, b)
            ).fetchall()
        finally:
            cursor.close()
        counts = {name: 0 for name in ("a", "b", "both", "neither")} | {name: n for name, n, _, _ in found}
        tasks = sum(counts.values())
        return Meeting(
            tasks=tasks,
            counts=counts,
            rates=(sum(each[2] for each in found) / max(1, tasks), sum(each[3] for each in found) / max(1, tasks)),
        )

    def met_tasks(self, a: Group, b: Group, which: str, page: int, limit: int = PAGE_ROWS) -> list[MetTask]:
        """Those that count as `which`, by task."""
        cursor = self._connection.cursor()
        try:
            found = cursor.execute(
                "select task_id, kind, question, printf('%016x', a_first), printf('%016x', b_first), a_rate, b_rate, "
                f"a_n, b_n from ({_MET}) where {_WHICH} = ? order by task_id limit ? offset ?",
                [*_sides(a, b), which, limit, page * limit],
            ).fetchall()
        finally:
            cursor.close()
        return [
            MetTask(
                task_id=each[0],
                kind=each[1],
                question=each[2],
                identities=(each[3], each[4]),
                rates=(each[5], each[6]),
                samples=(each[7], each[8]),
            )
            for each in found
        ]

    # -- how it is asked

    def _where(self, cursor: Any, selection: Selection, *, facets: bool) -> tuple[str, list[Any]]:
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
        key = (match, tuple(index.words_to for index in self.indices))
        with self._hits_lock:
            if key in self._hits:
                self._hits.move_to_end(key)
                return self._hits[key]
        found = np.concatenate(
            [index.words_hits(match) + (number << _LEDGER_BITS) for number, index in enumerate(self.indices)]
        )
        with self._hits_lock:
            self._hits[key] = found
            while len(self._hits) > _KEPT_HITS:
                self._hits.popitem(last=False)
        return found

    def _rows(
        self, cursor: Any, selection: Selection, edge: str, *, backwards: bool, limit: int
    ) -> tuple[list[Row], bool]:
        """(rows in the selection's order, whether there are more in this direction)."""
        where, values = self._where(cursor, selection, facets=True)
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
            f"select {_ROW} from everything where number in ({', '.join('?' * len(wanted))})", wanted
        ).fetchall()
        made = [Row(**dict(zip(Row.__dataclass_fields__, each, strict=True))) for each in found]
        place = {number: i for i, number in enumerate(wanted)}
        made.sort(key=lambda row: place[row.number], reverse=backwards)
        return made, more

    def _edge(self, row: Row, selection: Selection) -> str:
        value = getattr(row, selection.order.column)
        return f"{row.number}~{value}"

    def _read_edge(self, edge: str, selection: Selection) -> tuple[Any, int]:
        number, _, value = edge.partition("~")
        try:
            return (value if selection.order.column == "task_id" else float(value)), int(number)
        except ValueError:
            raise SelectionError(f"after={edge!r} is no place in this list; leave it out") from None

    def _cube(self, cursor: Any, selection: Selection) -> Counter[tuple[str, ...]]:
        """Rows by the values of all facets."""
        where, values = self._where(cursor, selection, facets=False)
        columns = ", ".join(_FACET_SQL[name] for name in FACETS)
        found = cursor.execute(f"select {columns}, count(*) from everything where {where} group by all", values)
        return Counter({tuple(each[:-1]): each[-1] for each in found.fetchall()})


_SIDE = (
    "select task_id, avg(success::int) as {0}_rate, count(*) as {0}_n, arg_min(identity, sample_index) as {0}_first, "
    "any_value(kind) as {0}_kind, any_value(question) as {0}_question "
    "from everything where ledger = ? and policy = ? and not failed group by task_id"
)
_MET = (
    f"select *, a_kind as kind, a_question as question from ({_SIDE.format('a')}) "
    f"join ({_SIDE.format('b')}) using (task_id)"
)
_WHICH = (
    "case when a_rate > b_rate then 'a' when b_rate > a_rate then 'b' when a_rate > 0 then 'both' else 'neither' end"
)


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:10]


def _sides(a: Group, b: Group) -> list[Any]:
    return [a.ledger, a.policy, b.ledger, b.policy]


_FACET_SQL = {
    "outcome": "case when failed then 'failed' when success then 'success' else 'wrong' end",
    "kind": "kind",
    "policy": "policy",
    "ledger": "ledger::varchar",
    "failure": "coalesce(failure_class, '')",
    "stop": "stop_reason",
}
assert set(_FACET_SQL) == set(FACETS) and OUTCOMES
