"""The index of one ledger: its columns in DuckDB, its words in SQLite's FTS5, filled from the shards bit by bit.

It lies in a folder of the cache, `columns.duckdb` and `words.sqlite`, and may be removed at any time; a viewer that is
opened again only reads what is new. Rows are numbered as they come; the number is the one of the words' index too. A
row of a shard that a compaction has replaced is found again by its identity: 64 bits of MD5 over ledger and key (of a
failed attempt, over its time as well). Of results that share a key the first counts, as in `rollout.ledger`.

One writer at a time: DuckDB locks its file. `LedgerIndex.attach` raises `IndexInUse` where another viewer has it.

Example::

    index = LedgerIndex(Ledger(folder), folder=cache, name="l0")
    index.attach(connection)
    while index.read_columns(connection, stop): pass      # a batch of shards at a time
    while index.read_words(connection, stop): pass
"""

from __future__ import annotations

import hashlib
import sqlite3
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pyarrow as pa

from launch.viewer import shards
from launch.viewer.word_query import spaced
from rollout.ledger import Ledger
from rollout.ledger_manifest import FAILURES, SHARDS
from rollout.ledger_shards import READ_ERRORS

if TYPE_CHECKING:
    import duckdb

FORMAT = 1
"""Goes up when an index of before cannot be used; it is then made anew beside it."""
_BATCH_ROWS = 32_768
"""Rows whose columns, or words, are taken in together."""
_BATCH_SHARDS = 256
_WORDS_CACHE_KIB = 16_000
_WORDS_HASH_BYTES = 24 * 2**20
"""What FTS5 collects before it writes: fewer pieces, fewer merges."""

_TABLES = """
create table if not exists {0}.rows (
    id bigint, identity ubigint, failed boolean, shard integer, "row" integer,
    "key" varchar, task_id varchar, kind varchar, policy varchar, weights_version varchar, sample_index bigint,
    reward double, success boolean, stop_reason varchar, failure_class varchar, started_at_s double, duration_s double,
    trainable boolean, step_count integer, tool_calls bigint, completion_tokens bigint, cost_usd double,
    question varchar, answer varchar, failure varchar, prediction varchar);
create table if not exists {0}.shards (shard integer, name varchar, problem varchar);
"""
_COLUMNS = ", ".join(f'f."{name}"' for name in shards.COLUMNS.names if name != "row")


class IndexInUse(RuntimeError):
    """Another process writes this index."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Place:
    """Where a row is."""

    shard: str
    row: int


class LedgerIndex:
    """See the module. `name` is what the index is attached as. Not for several threads, but for `words_hits`."""

    def __init__(self, ledger: Ledger, *, cache: Path, name: str) -> None:
        self.ledger, self.name = ledger, name
        uri = ledger.storage.uri
        self.uri = uri if "://" in uri else str(Path(uri).resolve())
        digest = hashlib.sha256(self.uri.encode()).hexdigest()[:16]
        self.folder = cache / f"{Path(uri).name or 'ledger'}-{digest}-v{FORMAT}"
        self.rows = 0
        """Rows whose columns are there; their numbers are below `next_id`."""
        self.next_id = 0
        self.words_to = 0
        """Rows below this number have their words in the index."""
        self.unread = 0
        """Shards that are there and not read yet."""
        self.problems: dict[str, str] = {}
        """Shard -> why it cannot be read."""
        self._known: dict[str, int] = {}
        self._gone: set[int] = set()
        self._next_shard = 0
        self._new: list[str] = []
        self._waiting: list[pa.Table] = []

    # -- the files

    def attach(self, connection: duckdb.DuckDBPyConnection) -> None:
        """Open or make it. Raises `IndexInUse`."""
        import duckdb

        self.folder.mkdir(parents=True, exist_ok=True)
        file = self.folder / "columns.duckdb"
        try:
            connection.execute(f"attach '{_quoted(file)}' as {self.name}")
        except duckdb.Error as error:
            # Another process has the lock, or this one has it open already.
            if any(sign in str(error).lower() for sign in ("lock on file", "already attached", "in use")):
                raise IndexInUse(str(self.folder)) from error
            raise
        connection.execute(_TABLES.format(self.name))
        for number, shard, problem in connection.execute(
            f"select shard, name, problem from {self.name}.shards"
        ).fetchall():
            self._known[shard] = number
            if problem:
                self.problems[shard] = problem
        self._next_shard = max(self._known.values(), default=-1) + 1
        self._count(connection)
        with self._words() as words:
            words.executescript(
                "pragma journal_mode = wal;"
                "create virtual table if not exists words using fts5(text, content='', columnsize=0, detail=full, "
                "tokenize='unicode61 remove_diacritics 2');"
                "create table if not exists progress (words_to integer);"
            )
            words.execute("insert into words(words, rank) values ('hashsize', ?)", (_WORDS_HASH_BYTES,))
            found = words.execute("select words_to from progress").fetchone()
            self.words_to = min(found[0], self.next_id) if found else 0
            if found and found[0] > self.next_id:  # the columns were lost or removed: the words are of other rows
                words.execute("insert into words(words) values ('delete-all')")
                words.execute("delete from progress")
        words.close()

    def _words(self) -> sqlite3.Connection:
        connection = sqlite3.connect(self.folder / "words.sqlite", isolation_level=None, check_same_thread=False)
        connection.execute("pragma synchronous = normal")
        connection.execute(f"pragma cache_size = -{_WORDS_CACHE_KIB}")
        return connection

    # -- filling

    def look(self, connection: duckdb.DuckDBPyConnection) -> bool:
        """See which shards have come and gone; whether there is anything to read."""
        snapshot = self.ledger.snapshot()
        there = [*snapshot.shards(SHARDS), *snapshot.shards(FAILURES)]
        present = set(there)
        self._gone |= {number for name, number in self._known.items() if name not in present}
        self._new = [name for name in there if name not in self._known]
        self.unread = len(self._new)
        if self._gone and not self._new:
            self._drop_gone(connection)
        return bool(self._new)

    def read_columns(self, connection: duckdb.DuckDBPyConnection, stop: Callable[[], bool]) -> bool:
        """Take in a batch of the shards that `look` found; False when there are none left."""
        taken: list[tuple[int, str, str]] = []
        rows = 0
        connection.execute("begin")
        try:
            while self._new and rows < _BATCH_ROWS and len(taken) < _BATCH_SHARDS and not stop():
                shard, number = self._new.pop(0), self._next_shard
                self._next_shard += 1
                read = self._read_shard(connection, shard, number)
                if read is not None:
                    rows += read
                    taken.append((number, shard, self.problems.get(shard, "")))
            self._insert(connection)
            for each in taken:
                connection.execute(f"insert into {self.name}.shards values (?, ?, ?)", each)
            connection.execute("commit")
        except BaseException:
            connection.execute("rollback")
            self._waiting = []
            self._count(connection)
            raise
        pa.default_memory_pool().release_unused()
        self._known.update({shard: number for number, shard, _ in taken})
        self._count(connection)
        self.unread = len(self._new)
        if not self._new and self._gone:
            self._drop_gone(connection)
        return bool(self._new)

    def _read_shard(self, connection: duckdb.DuckDBPyConnection, shard: str, number: int) -> int | None:
        """The number of its rows; None when a compaction has taken it away: the next look finds them elsewhere."""
        rows = 0
        try:
            for table in shards.columns(self.ledger.storage, shard):
                of_shard = pa.array(np.full(table.num_rows, number, np.int32))
                failed = pa.array(np.full(table.num_rows, shard.startswith(FAILURES)), pa.bool_())
                self._waiting.append(table.append_column("shard", of_shard).append_column("failed", failed))
                rows += table.num_rows
                if sum(each.num_rows for each in self._waiting) >= _BATCH_ROWS:
                    self._insert(connection)
        except FileNotFoundError:
            return None
        except READ_ERRORS as error:
            self.problems[shard] = f"{type(error).__name__}: {error}"[:500]
        return rows

    def _insert(self, connection: duckdb.DuckDBPyConnection) -> None:
        """What waits, in the transaction that is open."""
        if not self._waiting:
            return
        name = self.name
        connection.register("fresh_arrow", pa.concat_tables(self._waiting))
        self._waiting = []
        connection.execute(
            "create or replace temp table fresh as select *, md5_number_lower(concat_ws(chr(10), ?, "
            "case when failed then 'failure' else 'result' end, \"key\", "
            "case when failed then concat_ws(' ', started_at_s, duration_s) end)) as identity from fresh_arrow",
            [self.uri],
        )
        connection.unregister("fresh_arrow")
        if self._gone:
            gone = ", ".join(map(str, sorted(self._gone)))
            connection.execute(
                f'update {name}.rows set shard = f.shard, "row" = f."row" from fresh f '
                f"where rows.identity = f.identity and rows.shard in ({gone})"
            )
        connection.execute(
            f'insert into {name}.rows select ? + row_number() over (order by f.shard, f."row") - 1, f.identity, '
            f'f.failed, f.shard, f."row", {_COLUMNS} from (select * from fresh qualify '
            'row_number() over (partition by identity order by shard, "row") = 1) f '
            f"anti join {name}.rows r on r.identity = f.identity",
            [self.next_id],
        )
        connection.execute("drop table fresh")
        self._count(connection)

    def _drop_gone(self, connection: duckdb.DuckDBPyConnection) -> None:
        """Rows of shards that are no more, and that no other shard holds."""
        gone = ", ".join(map(str, sorted(self._gone)))
        connection.execute(f"delete from {self.name}.rows where shard in ({gone})")
        connection.execute(f"delete from {self.name}.shards where shard in ({gone})")
        self._known = {name: number for name, number in self._known.items() if number not in self._gone}
        self.problems = {name: why for name, why in self.problems.items() if name in self._known}
        self._gone = set()
        self._count(connection)

    def _count(self, connection: duckdb.DuckDBPyConnection) -> None:
        found = connection.execute(f"select count(*), coalesce(max(id), -1) + 1 from {self.name}.rows").fetchall()[0]
        self.rows, self.next_id = found[0], max(self.next_id, found[1])

    def read_words(self, connection: duckdb.DuckDBPyConnection, stop: Callable[[], bool]) -> bool:
        """Take in the words of a batch of rows; False when those of all rows are there."""
        places = connection.execute(
            f'select r.id, s.name, r."row" from {self.name}.rows r join {self.name}.shards s on s.shard = r.shard '
            "where r.id >= ? order by r.id limit ?",
            [self.words_to, _BATCH_ROWS],
        ).fetchall()
        if not places:
            self.words_to = self.next_id
            return False
        by_shard: dict[str, dict[int, int]] = {}
        for number, shard, row in places:
            by_shard.setdefault(shard, {})[row] = number
        words = self._words()
        try:
            words.execute("begin")
            for shard, numbers in by_shard.items():
                try:
                    texts = shards.texts(self.ledger.storage, shard, sorted(numbers))
                    words.executemany(
                        "insert into words(rowid, text) values (?, ?)",
                        ((numbers[row], spaced(text)) for row, text in texts),
                    )
                except FileNotFoundError:
                    words.execute("rollback")
                    return False  # compacted meanwhile: again after the next look
                except READ_ERRORS as error:
                    self.problems[shard] = f"{type(error).__name__}: {error}"[:500]
                if stop():
                    words.execute("rollback")
                    return False
            done = places[-1][0] + 1
            words.execute("delete from progress")
            words.execute("insert into progress values (?)", (done,))
            words.execute("commit")
        finally:
            words.close()
        self.words_to = done
        pa.default_memory_pool().release_unused()
        return self.words_to < self.next_id

    # -- asking

    def words_hits(self, match: str) -> np.ndarray:
        """[n] int64 numbers of the rows that an FTS5 query finds, ascending. Any thread may ask."""
        words = self._words()
        try:
            # One string from C: ten times quicker than as many Python integers, and it holds no more memory.
            found = words.execute("select group_concat(rowid) from words where words match ?", (match,)).fetchone()[0]
        finally:
            words.close()
        return np.empty(0, np.int64) if not found else np.fromstring(found, dtype=np.int64, sep=",")


def _quoted(path: Path) -> str:
    return str(path).replace("'", "''")
