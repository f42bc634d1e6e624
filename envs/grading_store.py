"""`JudgeStore`: verdicts that were paid for, and the pace of asking, in one SQLite file that processes may share.

SQLite's own locks make it safe under several processes of one machine (https://sqlite.org/lockingv3.html); each
operation opens the file anew, so that threads and forks share nothing. Not for a file on a network disk that two
machines write.

Example::

    store = JudgeStore("judge.sqlite")
    store.put(key, "gpt-4o-mini", Reply(correct=True, text="Verdict: correct", prompt_tokens=90, completion_tokens=5))
    store.get(key)
"""

from __future__ import annotations

import contextlib
import sqlite3
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from envs.base import EnvError

_BUSY_S = 30.0
_SCHEMA = """
CREATE TABLE IF NOT EXISTS verdicts (
    key TEXT PRIMARY KEY, model TEXT NOT NULL, correct INTEGER, text TEXT NOT NULL,
    prompt_tokens INTEGER NOT NULL, completion_tokens INTEGER NOT NULL, asked_at REAL NOT NULL
);
CREATE TABLE IF NOT EXISTS pace (one INTEGER PRIMARY KEY CHECK (one = 1), next_at REAL NOT NULL);
INSERT OR IGNORE INTO pace VALUES (1, 0);
"""


@dataclass(frozen=True, slots=True, kw_only=True)
class Reply:
    """A judge's reply and what it took."""

    correct: bool | None
    """None: no verdict could be read."""
    text: str
    prompt_tokens: int
    completion_tokens: int


class JudgeStore:
    """`path` None keeps everything in memory, for this process. Raises `EnvError` for a file that cannot be used."""

    def __init__(self, path: str | None) -> None:
        self._path = path
        self._memory: sqlite3.Connection | None = None
        self._lock = threading.Lock()
        if path is None:
            self._memory = sqlite3.connect(":memory:", check_same_thread=False, isolation_level=None)
        else:
            Path(path).parent.mkdir(parents=True, exist_ok=True)
        with self._connected() as connection:
            connection.executescript(_SCHEMA)

    def get(self, key: str) -> Reply | None:
        with self._connected() as connection:
            row = connection.execute(
                "SELECT correct, text, prompt_tokens, completion_tokens FROM verdicts WHERE key = ?", (key,)
            ).fetchone()
        if row is None:
            return None
        correct = None if row[0] is None else bool(row[0])
        return Reply(correct=correct, text=row[1], prompt_tokens=row[2], completion_tokens=row[3])

    def put(self, key: str, model: str, reply: Reply) -> None:
        """Keep a reply; of two for one key the first stays."""
        text = reply.text.encode("utf-8", "replace").decode()
        row = (key, model, reply.correct, text, reply.prompt_tokens, reply.completion_tokens, time.time())
        with self._connected() as connection:
            connection.execute("INSERT OR IGNORE INTO verdicts VALUES (?, ?, ?, ?, ?, ?, ?)", row)

    def totals(self, model: str) -> dict[str, int]:
        """verdicts, prompt_tokens and completion_tokens kept for `model`."""
        with self._connected() as connection:
            row = connection.execute(
                "SELECT COUNT(*), COALESCE(SUM(prompt_tokens), 0), COALESCE(SUM(completion_tokens), 0) "
                "FROM verdicts WHERE model = ?",
                (model,),
            ).fetchone()
        return {"verdicts": row[0], "prompt_tokens": row[1], "completion_tokens": row[2]}

    def reserve(self, interval_s: float) -> float:
        """Take the next free moment, moments being `interval_s` apart; returns how long to wait for it."""
        with self._connected() as connection:
            connection.execute("BEGIN IMMEDIATE")
            (next_at,) = connection.execute("SELECT next_at FROM pace").fetchone()
            now = time.time()
            at = max(now, next_at)
            connection.execute("UPDATE pace SET next_at = ?", (at + interval_s,))
            connection.execute("COMMIT")
        return at - now

    def hold_off(self, delay_s: float) -> None:
        """No moment before `delay_s` from now: the endpoint said that it is asked too often."""
        with self._connected() as connection:
            connection.execute("UPDATE pace SET next_at = MAX(next_at, ?)", (time.time() + delay_s,))

    @contextlib.contextmanager
    def _connected(self) -> Iterator[sqlite3.Connection]:
        try:
            if self._memory is not None:
                with self._lock:
                    yield self._memory
                return
            assert self._path is not None
            with contextlib.closing(sqlite3.connect(self._path, timeout=_BUSY_S, isolation_level=None)) as connection:
                yield connection
        except sqlite3.Error as error:
            raise EnvError(f"the judge's cache {self._path or 'in memory'} cannot be used: {error}") from error
