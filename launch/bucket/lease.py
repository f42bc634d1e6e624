"""A lease on a run in an object store: of all jobs that want it one has it, and a dead one's falls free by itself.

No lock of an operating system reaches over machines, and a store's client has no "create unless it exists"
(`rollout.object_storage`). So a lease is a row of numbered files, `lease/000001.json`, `lease/000002.json`, ...:

- the file with the highest number is the lease; its number is made by `Storage.claim`, which one at most gets;
- the owner writes its file anew every `BEAT_S`; the store's own clock says when that was;
- a file that says "released", or was not written for `TAKEOVER_S`, is free: whoever wants it claims the next number;
- an owner that sees a higher number, or could not write for `GIVE_UP_S`, has lost it and stops (`LeaseLost`). It gives
  up before others may take over.

An owner that hangs for longer and then wakes up may still write until its next look; whoever writes much looks first
(`Fence`). What it appends to a ledger does no harm: rows are counted once by their key.

Example::

    with Lease.acquire(storage, say=print) as lease:      # raises LeaseHeld where another one lives
        ...                                               # KeyboardInterrupt when it is lost: see lease.lost
"""

from __future__ import annotations

import json
import os
import signal
import socket
import threading
import time
import uuid
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

from rollout.storage import Storage, StorageError, open_storage

FOLDER = "lease"
BEAT_S = 10.0
GIVE_UP_S = 45.0
TAKEOVER_S = 60.0
_LOOK_S = 1.0


class LeaseHeld(ValueError):
    """Another job has it, and lives."""


class LeaseLost(OSError):
    """It was ours, and is no longer."""


@dataclass(frozen=True, slots=True, kw_only=True)
class LeaseTimes:
    """Seconds; see the module. `beat` < `give_up` < `takeover`."""

    beat: float = BEAT_S
    give_up: float = GIVE_UP_S
    takeover: float = TAKEOVER_S


@dataclass(frozen=True, slots=True)
class Fence:
    """What a process must know to see whether the job that it writes for still has the lease; picklable."""

    uri: str
    number: int

    def check(self) -> None:
        """Raises `LeaseLost`, or `StorageError` for a store that cannot be asked."""
        newest = _newest(open_storage(self.uri))
        if newest != self.number:
            raise LeaseLost(f"another job has taken {self.uri} over (lease {newest}, this job has {self.number})")


class Lease:
    """One that is held; `acquire` makes it. As a context manager it is given back at the end."""

    def __init__(self, storage: Storage, number: int, owner: dict[str, Any], times: LeaseTimes) -> None:
        self._storage, self._owner, self._times = storage, owner, times
        self.number = number
        self.lost: LeaseLost | None = None
        """Why it is ours no longer."""
        self._beat_at_s = time.monotonic()
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._keep, name="lease", daemon=True)

    @classmethod
    def acquire(
        cls, storage: Storage, *, say: Callable[[str], None] = lambda line: None, times: LeaseTimes | None = None
    ) -> Lease:
        """Returns at once where it is free. Where its owner was not heard of for long, waits until that was too long;
        `say` is told. Raises `LeaseHeld` as soon as the owner is heard of, and `StorageError`."""
        times = times or LeaseTimes()
        deadline_s = time.monotonic() + 2 * times.takeover
        first: tuple[int, float] | None = None
        while True:
            number = _newest(storage)
            record, modified_s = _read(storage, number)
            silent_s = 0.0
            free = not record or record.get("released", False)
            if not free:
                silent_s = max(0.0, _store_now_s(storage) - modified_s)
                free = silent_s > times.takeover
            if free:
                lease = cls._claim(storage, number + 1, times)
                if lease is not None:
                    return lease
                time.sleep(_LOOK_S)  # somebody else was faster, or as fast: look who
            elif first is None:
                first = (number, modified_s)
                say(
                    f"{storage.uri} is held by {_told(record)}, last heard of {silent_s:.0f} s ago; "
                    f"if that job is dead, this one goes on in {max(0.0, times.takeover - silent_s):.0f} s"
                )
            elif (number, modified_s) != first:
                raise LeaseHeld(f"another job is running in {storage.uri}: {_told(record)}; wait for it or end it")
            if time.monotonic() > deadline_s:
                raise LeaseHeld(f"{storage.uri} cannot be had: others want it, too; try again in some minutes")
            if not free:
                time.sleep(min(_LOOK_S, times.beat))

    @classmethod
    def _claim(cls, storage: Storage, number: int, times: LeaseTimes) -> Lease | None:
        owner = {
            "owner": uuid.uuid4().hex,
            "host": socket.gethostname(),
            "pid": os.getpid(),
            "job": _submission(),
            "since": datetime.now(UTC).isoformat(timespec="seconds"),
            "released": False,
        }
        storage.prepare(FOLDER)
        if not storage.claim(_name(number), _json(owner)):
            return None
        if _newest(storage) != number:  # we were so slow that others had it and are done
            storage.remove(_name(number))
            return None
        lease = cls(storage, number, owner, times)
        storage.remove(*[each.name for each in storage.list(FOLDER) if _number(each.name) < number])
        lease._thread.start()
        return lease

    @property
    def fence(self) -> Fence:
        return Fence(self._storage.uri, self.number)

    def check(self) -> None:
        """Raises `LeaseLost`."""
        if self.lost is not None:
            raise self.lost

    def release(self) -> None:
        """Give it back; a store that cannot be reached lets it fall free by itself. May be called twice."""
        if self._ended.is_set():
            return
        self._ended.set()
        self._thread.join(self._times.give_up)
        if self.lost is None:
            try:
                self._storage.replace(_name(self.number), _json({**self._owner, "released": True}))
            except OSError:
                pass

    def __enter__(self) -> Lease:
        return self

    def __exit__(self, *_: object) -> None:
        self.release()

    def _keep(self) -> None:
        while not self._ended.wait(self._times.beat):
            trouble = "it could not be written"
            try:
                newest = _newest(self._storage)
                if newest != self.number:
                    self._lose(f"another job has taken {self._storage.uri} over")
                    return
                self._storage.replace(_name(self.number), _json(self._owner))
                self._beat_at_s = time.monotonic()
            except OSError as error:
                trouble = str(error)
            silent_s = time.monotonic() - self._beat_at_s
            if silent_s > self._times.give_up:
                self._lose(f"the lease on {self._storage.uri} could not be renewed for {silent_s:.0f} s: {trouble}")
                return

    def _lose(self, why: str) -> None:
        self.lost = LeaseLost(why)
        if not self._ended.is_set():
            ident = threading.main_thread().ident
            if ident is not None:
                signal.pthread_kill(ident, signal.SIGINT)  # ends a sleep, too, as `_thread.interrupt_main` does not


def _newest(storage: Storage) -> int:
    return max((_number(each.name) for each in storage.list(FOLDER)), default=0)


def _read(storage: Storage, number: int) -> tuple[dict[str, Any], float]:
    """What is in it and when it was written; ({}, 0) for one that is gone."""
    written = {each.name: each.modified_s for each in storage.list(FOLDER)}
    try:
        return json.loads(storage.read(_name(number))), written.get(_name(number), 0.0)
    except FileNotFoundError:
        return {}, 0.0
    except ValueError as error:
        raise StorageError(f"{storage.uri}/{_name(number)} is no lease ({error}); remove it if no job runs") from None


def _store_now_s(storage: Storage) -> float:
    """The store's own clock: machines need not agree on the time."""
    probe = f"{FOLDER}/.now-{uuid.uuid4().hex}.tmp"
    storage.replace(probe, b"")
    try:
        return next((each.modified_s for each in storage.leftovers(FOLDER) if each.name == probe), time.time())
    finally:
        storage.remove(probe)


def _name(number: int) -> str:
    return f"{FOLDER}/{number:06d}.json"


def _number(name: str) -> int:
    stem = name.rpartition("/")[2].removesuffix(".json")
    return int(stem) if stem.isdigit() else 0


def _told(record: dict[str, Any]) -> str:
    job = f"job {record['job']} " if record.get("job") else "a job "
    return f"{job}on {record.get('host')} (process {record.get('pid')}, since {record.get('since')})"


def _submission() -> str:
    """What a submitted job is called on its cluster; "" for one that was started by hand."""
    try:
        told = json.loads(os.environ.get("RAY_JOB_CONFIG_JSON_ENV_VAR", "{}"))
        return str(told["metadata"]["job_submission_id"])
    except (ValueError, KeyError, TypeError):
        return ""


def _json(data: dict[str, Any]) -> bytes:
    return (json.dumps(data, indent=2) + "\n").encode()
