"""Answers of an endpoint on disk, so that a run that is run again pays for nothing twice.

One SQLite file, for several processes of a machine at once. A row is the hash of a request (endpoint, model, messages,
sampling, and which of several equal samples it is; never the key) and the `Reply`; the request itself is not stored.
Within a process equal requests that are out at the same time are asked once. A row that cannot be read is a miss, and
so is everything while the file cannot be used: a cache never fails a call.

It does not forget: delete the file to ask anew.

Example::

    cache = RequestCache("cache/teacher.sqlite")
    async with cache.entry(request_hash(request)) as entry:
        if entry.reply is None:
            await entry.store(await ask())
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import json
import sqlite3
import threading
from collections.abc import AsyncIterator, Mapping
from pathlib import Path
from typing import Any

from rollout.replies import Reply, from_json, to_json

_BUSY_S = 10.0
"""How long another process may hold the file."""
_VERSION = 1
"""Of the rows; raise it when the same hash would mean something else."""


def request_hash(request: Mapping[str, Any]) -> str:
    """64 hex digits; `request` must be JSON-able and hold all that changes the answer."""
    canonical = json.dumps({"version": _VERSION, **request}, sort_keys=True, separators=(",", ":"), ensure_ascii=True)
    return hashlib.sha256(canonical.encode()).hexdigest()


class CacheEntry:
    """One request's place in the cache while its caller holds it."""

    def __init__(self, cache: RequestCache, key: str, reply: Reply | None) -> None:
        self._cache, self._key = cache, key
        self.reply = reply
        """None: it must be asked."""

    async def store(self, reply: Reply) -> None:
        self.reply = reply
        await asyncio.to_thread(self._cache.put, self._key, reply)


class RequestCache:
    """The file. Raises `ValueError` for a path that holds something else, or cannot be written."""

    def __init__(self, path: str | Path) -> None:
        self._path = Path(path)
        self._lock = threading.Lock()
        self._turns: dict[str, tuple[asyncio.Lock, int]] = {}
        self.hits = self.misses = self.troubles = 0
        """`troubles`: reads and writes that failed."""
        try:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            self._connection = sqlite3.connect(
                self._path, timeout=_BUSY_S, check_same_thread=False, isolation_level=None
            )
            with contextlib.suppress(sqlite3.OperationalError):  # some file systems cannot; the default works there
                self._connection.execute("PRAGMA journal_mode=WAL")
            self._connection.execute("PRAGMA synchronous=NORMAL")
            self._connection.execute("CREATE TABLE IF NOT EXISTS replies (key TEXT PRIMARY KEY, reply TEXT NOT NULL)")
        except (sqlite3.Error, OSError) as error:
            raise ValueError(f"the request cache {self._path} cannot be used: {error}; name another file") from None

    @contextlib.asynccontextmanager
    async def entry(self, key: str) -> AsyncIterator[CacheEntry]:
        """Hold a request's entry: whoever comes with the same one waits, and finds what was stored."""
        lock, waiting = self._turns.get(key, (None, 0))
        lock = lock or asyncio.Lock()
        self._turns[key] = (lock, waiting + 1)
        try:
            async with lock:
                reply = await asyncio.to_thread(self.get, key)
                if reply is None:
                    self.misses += 1
                else:
                    self.hits += 1
                yield CacheEntry(self, key, reply)
        finally:
            lock, waiting = self._turns[key]
            if waiting > 1:
                self._turns[key] = (lock, waiting - 1)
            else:
                del self._turns[key]

    def get(self, key: str) -> Reply | None:
        try:
            with self._lock:
                row = self._connection.execute("SELECT reply FROM replies WHERE key = ?", (key,)).fetchone()
            return None if row is None else from_json(row[0])
        except (sqlite3.Error, ValueError, TypeError):
            self.troubles += 1
            return None

    def put(self, key: str, reply: Reply) -> None:
        try:
            with self._lock:
                self._connection.execute("INSERT OR REPLACE INTO replies VALUES (?, ?)", (key, to_json(reply)))
        except sqlite3.Error:
            self.troubles += 1

    def close(self) -> None:
        """May be called twice."""
        with self._lock:
            self._connection.close()
