"""Fills the indices of a catalog in the background: one thread looks for new shards and reads them until it is stopped.

Columns come first, then words. What cannot be read is said beside every answer, and tried again.

Example::

    filling = Filling(indices, connection)
    filling.start()
    filling.wait_words(timeout_s=10.0), filling.progress().rows
    filling.stop()
"""

from __future__ import annotations

import threading
import time
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from launch.viewer.answers import Progress
from launch.viewer.ledger_index import LedgerIndex

if TYPE_CHECKING:
    import duckdb

_LOOK_EVERY_S = 1.0
_LOOK_SHARE = 0.05
"""At most this share of the time goes into listing folders."""
_REMOTE_LOOK_EVERY_S = 10.0
_TROUBLE_EVERY_S = 5.0


class Filling:
    """See the module. The thread has a cursor of its own; any thread may ask."""

    def __init__(self, indices: Sequence[LedgerIndex], connection: duckdb.DuckDBPyConnection) -> None:
        self._indices, self._connection = indices, connection
        self._stopping = threading.Event()
        self._wake = threading.Event()
        self._looked = threading.Event()
        self._version = 0
        self._trouble = ""
        self._thread = threading.Thread(target=self._fill, name="index", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def stop(self) -> None:
        """Returns when the thread has ended, or after half a minute."""
        self._stopping.set()
        self._wake.set()
        if self._thread.is_alive():
            self._thread.join(timeout=30.0)

    def _fill(self) -> None:
        connection = self._connection.cursor()
        try:
            while not self._stopping.is_set():
                started, looking_s = time.monotonic(), 0.0
                # New columns are looked for between two batches of words: they are what a person waits for.
                trouble, words = "", False
                for read in (self._read_columns, self._read_words):
                    for index in self._indices:
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
        return any(index.ledger.storage.width > 1 for index in self._indices)

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
        problems = [f"{index.uri}/{shard}: {why}" for index in self._indices for shard, why in index.problems.items()]
        rows, unread = sum(each.rows for each in self._indices), sum(each.unread for each in self._indices)
        reading = unread > 0 or any(each.words_to < each.next_id for each in self._indices)
        words = sum(
            each.rows if each.words_to >= each.next_id else min(each.words_to, each.rows) for each in self._indices
        )
        return Progress(
            rows=rows,
            words=words,
            unread_shards=unread,
            version=self._version,
            problems=tuple([self._trouble] * bool(self._trouble) + problems),
            reading=reading or not self._looked.is_set(),
        )
