"""Where a `SpendMeter` keeps what was spent: `Charge`, and logs of them in memory, in a local file or in an object
store.

The local file is JSON lines, one for each answered call, written at once and never changed: a killed process loses at
most the line that it was writing, which is skipped when the file is read. Opening it again replaces the lines by one
sum for each model. An object store cannot append: there the sums are written anew every `SAVE_EVERY_S`, which is what
a killed process can lose.

It holds names of models and numbers: no prompt, no answer, no key.

Example::

    log = open_spend_log("runs/r/spend.jsonl")
    for reservation, charge in log.load(): ...
    log.append("1f3a", Charge(model="m", prompt_tokens=610, completion_tokens=80, usd=0.002))
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import threading
from collections.abc import Iterable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import IO, Protocol

SAVE_EVERY_S = 2.0
_ELSEWHERE = re.compile(r"[a-z0-9]+:/+")


@dataclass(frozen=True, slots=True, kw_only=True)
class Charge:
    """What one call costs, or can cost at most."""

    model: str
    prompt_tokens: int
    completion_tokens: int
    usd: float | None = None
    """None: nobody knows, since the model has no prices."""
    requests: int = 1
    lost: bool = False
    """No answer came; it may have been billed."""

    @property
    def tokens(self) -> int:
        return self.prompt_tokens + self.completion_tokens

    def as_lost(self) -> Charge:
        return replace(self, lost=True)


class SpendLog(Protocol):
    """Charges with the reservations that they settle ("" for sums)."""

    def load(self) -> list[tuple[str, Charge]]: ...

    def append(self, reservation: str, charge: Charge) -> None: ...

    def flush(self) -> bool:
        """Write what could not be written when it was appended; False: it cannot be written now either."""
        ...

    def close(self) -> None: ...


def open_spend_log(path: str | Path | None) -> SpendLog:
    """Raises `ValueError` for a path that cannot be used."""
    if path is None:
        return MemoryLog()
    if _ELSEWHERE.match(str(path)):
        return ObjectLog(str(path))
    return FileLog(Path(path))


class MemoryLog:
    """Nothing outlives the process."""

    def load(self) -> list[tuple[str, Charge]]:
        return []

    def append(self, reservation: str, charge: Charge) -> None:
        pass

    def flush(self) -> bool:
        return True

    def close(self) -> None:
        pass


class FileLog:
    """JSON lines in a local file, of one process at a time. Raises `ValueError` when another one has it open."""

    def __init__(self, path: Path) -> None:
        self._path = path
        if path.is_dir():
            raise ValueError(f"the spend log {path} is a folder; name a file")
        path.parent.mkdir(parents=True, exist_ok=True)
        self._lock: IO[bytes] = path.with_name(path.name + ".lock").open("ab")
        if not _locked(self._lock):
            self._lock.close()
            raise ValueError(f"the spend log {path} is in use by another process: one meter serves a whole cluster")
        self._file: IO[bytes] | None = None
        self._pending = b""
        """What a full disk did not take."""

    def load(self) -> list[tuple[str, Charge]]:
        found = _parsed(self._path.read_bytes() if self._path.exists() else b"", self._path)
        sums: dict[tuple[str, bool], Charge] = {}
        _add(sums, (charge for _, charge in found))
        fresh = self._path.with_name(self._path.name + ".new")
        with fresh.open("wb") as file:
            file.write(b"".join(_line("", charge) for charge in sums.values()))
            file.flush()
            os.fsync(file.fileno())
        os.replace(fresh, self._path)
        self._file = self._path.open("ab", buffering=0)
        return found

    def append(self, reservation: str, charge: Charge) -> None:
        if self._file is None:
            raise ValueError(f"the spend log {self._path} is closed")
        self._pending += _line(reservation, charge)
        self.flush()

    def flush(self) -> bool:
        assert self._file is not None
        try:
            while self._pending:
                self._pending = self._pending[self._file.write(self._pending) :]
        except OSError:
            return False
        return True

    def close(self) -> None:
        if self._file is not None:
            self.flush()
            self._file.close()
            self._file = None
        self._lock.close()


class ObjectLog:
    """One object of sums in an `s3://` or `gs://` store, of one process at a time, written by a thread of its own.
    Raises `ValueError` for a URI that cannot be used."""

    def __init__(self, uri: str) -> None:
        from rollout.storage import open_storage

        self._uri = uri
        place, mark, options = uri.partition("?")
        folder, _, self._name = place.rpartition("/")
        self._storage = open_storage(folder + mark + options)
        self._sums: dict[tuple[str, bool], Charge] = {}
        self._changed = False
        self._lock = threading.Lock()
        self._closed = threading.Event()
        self._thread: threading.Thread | None = None

    def load(self) -> list[tuple[str, Charge]]:
        try:
            data = self._storage.read(self._name)
        except FileNotFoundError:
            data = b""
        except OSError as error:
            raise ValueError(f"the spend log {self._uri} cannot be read: {error}") from error
        found = _parsed(data, self._uri)
        _add(self._sums, (charge for _, charge in found))
        self._save()  # a store that cannot be written to is an error now, not later
        self._thread = threading.Thread(target=self._run, name="spend-log", daemon=True)
        self._thread.start()
        return found

    def append(self, reservation: str, charge: Charge) -> None:
        with self._lock:
            if self._closed.is_set():
                raise ValueError(f"the spend log {self._uri} is closed")
            _add(self._sums, [charge])
            self._changed = True

    def flush(self) -> bool:
        """Its thread writes, and tries again by itself."""
        return True

    def close(self) -> None:
        if not self._closed.is_set():
            self._closed.set()
            if self._thread is not None:
                self._thread.join()
                self._save()

    def _run(self) -> None:
        while not self._closed.wait(SAVE_EVERY_S):
            with contextlib.suppress(OSError, ValueError):  # it is tried again, and `close` says so if it stays
                self._save()

    def _save(self) -> None:
        with self._lock:
            if not self._changed and self._thread is not None:
                return
            data = b"".join(_line("", charge) for charge in self._sums.values())
            self._changed = False
        try:
            self._storage.replace(self._name, data)
        except OSError as error:
            with self._lock:
                self._changed = True
            raise ValueError(f"the spend log {self._uri} cannot be written: {error}") from error


def _locked(file: IO[bytes]) -> bool:
    """False when another process holds the lock. Where the file system has no locks there is nothing to hold."""
    try:
        import fcntl
    except ImportError:
        return True
    try:
        fcntl.flock(file.fileno(), fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:
        return True
    return True


def _line(reservation: str, charge: Charge) -> bytes:
    fields = {name: value for name, value in asdict(charge).items() if value is not False}
    return json.dumps({"id": reservation, **fields}, separators=(",", ":")).encode() + b"\n"


def _parsed(data: bytes, path: str | Path) -> list[tuple[str, Charge]]:
    lines = data.splitlines()
    found: list[tuple[str, Charge]] = []
    for line in lines:
        with contextlib.suppress(ValueError, TypeError, KeyError):  # the line that a killed process was writing
            fields = json.loads(line)
            found.append((str(fields.pop("id")), _checked(Charge(**fields))))
    if len(lines) > 1 and not found:
        raise ValueError(f"{path} is no spend log; name another file")
    return found


def _checked(charge: Charge) -> Charge:
    counts = (charge.prompt_tokens, charge.completion_tokens, charge.requests, charge.usd or 0.0)
    if any(isinstance(each, bool) or not isinstance(each, int | float) or not each >= 0 for each in counts):
        raise ValueError(f"not a charge: {charge}")
    return charge


def _add(sums: dict[tuple[str, bool], Charge], charges: Iterable[Charge]) -> None:
    """One sum for each model, and one for its lost calls."""
    for charge in charges:
        key = (charge.model, charge.lost)
        before = sums.get(key)
        sums[key] = charge if before is None else _added(before, charge)


def _added(one: Charge, other: Charge) -> Charge:
    return replace(
        one,
        prompt_tokens=one.prompt_tokens + other.prompt_tokens,
        completion_tokens=one.completion_tokens + other.completion_tokens,
        usd=None if one.usd is None and other.usd is None else (one.usd or 0.0) + (other.usd or 0.0),
        requests=one.requests + other.requests,
    )
