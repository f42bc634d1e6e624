"""Where a `SpendMeter` keeps what was spent: `Charge`, and logs of them in memory or in a local file.

The local file is JSON lines, one for each answered call, written at once and never changed: a killed process loses at
most the line that it was writing, which is skipped when the file is read. Opening it again replaces the lines by one
sum for each model.

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
from collections.abc import Iterable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import IO, Protocol


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

    def close(self) -> None: ...


def open_spend_log(path: str | Path | None) -> SpendLog:
    """Raises `ValueError` for a path that cannot be used."""
    if path is None:
        return MemoryLog()
    if "://" in str(path):
        raise ValueError(f"the spend log {path} must be a local file")
    return FileLog(Path(path))


class MemoryLog:
    """Nothing outlives the process."""

    def load(self) -> list[tuple[str, Charge]]:
        return []

    def append(self, reservation: str, charge: Charge) -> None:
        pass

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

    def load(self) -> list[tuple[str, Charge]]:
        found = _parsed(self._path)
        sums = _sums(charge for _, charge in found)
        fresh = self._path.with_name(self._path.name + ".new")
        with fresh.open("wb") as file:
            file.write(b"".join(_line("", charge) for charge in sums))
            file.flush()
            os.fsync(file.fileno())
        os.replace(fresh, self._path)
        self._file = self._path.open("ab", buffering=0)
        return found

    def append(self, reservation: str, charge: Charge) -> None:
        if self._file is None:
            raise ValueError(f"the spend log {self._path} is closed")
        self._file.write(_line(reservation, charge))

    def close(self) -> None:
        if self._file is not None:
            self._file.close()
            self._file = None
        self._lock.close()


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


def _parsed(path: Path) -> list[tuple[str, Charge]]:
    lines = path.read_bytes().splitlines() if path.exists() else []
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


def _sums(charges: Iterable[Charge]) -> list[Charge]:
    """One for each model, and one for its lost calls."""
    sums: dict[tuple[str, bool], Charge] = {}
    for charge in charges:
        key = (charge.model, charge.lost)
        before = sums.get(key)
        sums[key] = charge if before is None else _added(before, charge)
    return list(sums.values())


def _added(one: Charge, other: Charge) -> Charge:
    return replace(
        one,
        prompt_tokens=one.prompt_tokens + other.prompt_tokens,
        completion_tokens=one.completion_tokens + other.completion_tokens,
        usd=None if one.usd is None and other.usd is None else (one.usd or 0.0) + (other.usd or 0.0),
        requests=one.requests + other.requests,
    )
