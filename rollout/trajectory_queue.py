"""The bounded queue of trajectories between rollout and learner, in Ray's object store. It blocks; it never drops.

`TrajectoryBuffer` is the queue itself: plain asyncio, no Ray. `TrajectoryQueue` is the small picklable handle that
rollout workers and the learner hold; behind it one Ray actor runs the buffer. The queue is not durable and need not
be: whatever goes in is in the ledger already, so a queue that dies costs no trajectory, only the time to read the
ledger again. Ray starts its actor again, empty and open; producers and consumers wait for it, and consumers are told by
`QueueRestartedError` that they must read the ledger. Whoever had closed it must close it again.

Tables travel as Arrow streams (`rollout.records`). The actor puts every table into the object store itself and so owns
it: a producer that dies takes nothing with it (objects of a dead owner are lost in Ray).

Example::

    queue = TrajectoryQueue.create(capacity=512)
    await queue.aput(trajectories)                             # in a worker; waits while the queue is full
    while (batch := queue.get(64, timeout_s=60)) is not None:  # in the learner; [] when nothing came in time
        ...
    queue.close()                                              # anywhere: consumers drain what is left, then get None
"""

from __future__ import annotations

import asyncio
import time
import uuid
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import pyarrow as pa

from rollout.records import from_table, to_table
from rollout.trajectory import Trajectory

PUT_TIMEOUT_S = 3600.0
"""How long a full queue may hold a producer back by default: a learner may be in a long step."""
_GRACE_S = 30.0
"""What a remote call may take beyond the wait that it was asked for."""
RESTART_S = 180.0
"""How long a queue that is started again, or that the network has cut off, is waited for."""
_AWAY_S = 0.5
"""Between two calls to a queue that is away."""


class QueueFullError(TimeoutError):
    """The queue stayed full for as long as the producer would wait; nothing of the refused table went in."""


class QueueError(RuntimeError):
    """The queue's actor is gone or does not answer. What was in it is in the ledger."""


class QueueRestartedError(QueueError):
    """The queue was started again, or what it held can no longer be had: read the ledger, then go on with it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class QueueStats:
    """Counted in trajectories unless it says otherwise."""

    capacity: int
    depth: int
    """In the queue now."""
    put: int
    """Accepted since the start."""
    got: int
    """Handed out since the start."""
    put_waits: int
    """Calls of `put` that found no room at once: the learner is the slower side."""
    get_waits: int
    """Calls of `get` that found nothing at once: rollout is the slower side."""
    waiting_puts: int
    """Calls of `put` that wait now."""
    closed: bool


@dataclass(slots=True)
class _Entry:
    stored: Any
    """What `store` made of the table: in the actor, an object reference."""
    start: int
    stop: int
    """Rows [start, stop) are still to be handed out."""


class TrajectoryBuffer:
    """A bounded first-in-first-out buffer of tables, counted in rows; for one event loop.

    `store` keeps a table and returns what stands for it (`ray.put`; by default the table itself). Producers wait in the
    order of arrival while there is no room, consumers while there is nothing; `close` wakes both.
    """

    def __init__(self, capacity: int, store: Callable[[Any], Any] = lambda table: table) -> None:
        if capacity < 1:
            raise ValueError(f"a queue needs room for at least one trajectory, not capacity={capacity}")
        self._capacity, self._store = capacity, store
        self._entries: deque[_Entry] = deque()
        self._turn = asyncio.Lock()  # first come, first served: a large table is not overtaken by small ones for ever
        self._changed = asyncio.Condition()
        self._closed = False
        self._depth = self._put = self._got = self._put_waits = self._get_waits = self._waiting_puts = 0

    async def put(self, table: pa.Table | _Packed, timeout_s: float = PUT_TIMEOUT_S) -> bool:
        """Wait for room for all rows, then take them at once. False, and nothing taken, when the queue is closed.

        Raises `QueueFullError` after `timeout_s`, `ValueError` for a table that can never fit.
        """
        rows = table.num_rows
        if rows > self._capacity:
            raise ValueError(f"{rows} trajectories never fit a queue of capacity {self._capacity}; put fewer at once")
        self._put_waits += self._turn.locked() or not self._fits(rows)
        self._waiting_puts += 1
        try:
            async with asyncio.timeout(timeout_s), self._turn, self._changed:
                await self._changed.wait_for(lambda: self._fits(rows))
                if not self._closed and rows:
                    self._entries.append(_Entry(self._store(table), 0, rows))
                    self._depth += rows
                    self._put += rows
                    self._changed.notify_all()
                return not self._closed
        except TimeoutError:
            raise QueueFullError(
                f"no room for {rows} trajectories within {timeout_s:g} s: {self._depth} of {self._capacity} wait to be "
                "read; is the learner alive?"
            ) from None
        finally:
            self._waiting_puts -= 1

    def _fits(self, rows: int) -> bool:
        return self._closed or self._depth + rows <= self._capacity

    async def get(self, max_trajectories: int, timeout_s: float) -> list[tuple[Any, int, int]] | None:
        """(stored table, start, stop) row ranges, oldest first, `max_trajectories` rows in all at most.

        Waits for the first row only. Empty when none came within `timeout_s`; None when the queue is closed and
        drained.
        """
        if max_trajectories < 1:
            raise ValueError(f"get at least one trajectory, not {max_trajectories}")
        self._get_waits += not (self._entries or self._closed)
        try:
            async with asyncio.timeout(timeout_s), self._changed:
                await self._changed.wait_for(lambda: self._closed or self._entries)
                taken = self._take(max_trajectories)
                self._changed.notify_all()
                return taken or None
        except TimeoutError:
            return []

    def _take(self, rows: int) -> list[tuple[Any, int, int]]:
        taken: list[tuple[Any, int, int]] = []
        while rows and self._entries:
            entry = self._entries[0]
            stop = min(entry.stop, entry.start + rows)
            taken.append((entry.stored, entry.start, stop))
            count = stop - entry.start
            rows -= count
            self._depth -= count
            self._got += count
            entry.start = stop
            if stop == entry.stop:
                self._entries.popleft()
        return taken

    async def close(self) -> None:
        """No more puts, waiting ones included; consumers drain what is there. May be called twice."""
        async with self._changed:
            self._closed = True
            self._changed.notify_all()

    def stats(self) -> QueueStats:
        return QueueStats(
            capacity=self._capacity,
            depth=self._depth,
            put=self._put,
            got=self._got,
            put_waits=self._put_waits,
            get_waits=self._get_waits,
            waiting_puts=self._waiting_puts,
            closed=self._closed,
        )


class _BufferActor:
    """`TrajectoryBuffer` as a Ray actor: consumes tables, produces references to them, waits for room or rows.

    Unblocked by: consumers (puts), producers (gets), `close` (both), and every call's own time limit.
    """

    def __init__(self, capacity: int) -> None:
        import ray

        self._life = uuid.uuid4().hex  # another one after each start
        # ray.put here, and not in the producer: the owner of an object takes it along when it dies.
        self._buffer = TrajectoryBuffer(capacity, store=ray.put)

    async def put(self, table: pa.Table | _Packed, timeout_s: float) -> bool:
        return await self._buffer.put(table, timeout_s)

    async def get(
        self, max_trajectories: int, timeout_s: float, life: str
    ) -> tuple[str, list[tuple[Any, int, int]] | None]:
        """Which life of the queue answers, and what there is; nothing is taken by one who knows another life."""
        taken = await self._buffer.get(max_trajectories, timeout_s) if life in ("", self._life) else []
        return self._life, taken

    async def close(self) -> None:
        await self._buffer.close()

    async def stats(self) -> QueueStats:
        return self._buffer.stats()


class TrajectoryQueue:
    """Client handle of one queue; picklable, any number of producers and consumers. Make one with `create`.

    Every method has an async twin (`aput`, `aget`, ...) that does the same without blocking the event loop. All raise
    `QueueError` when the actor is gone.
    """

    def __init__(self, actor: Any, capacity: int) -> None:
        self._actor, self.capacity = actor, capacity
        self._life = ""
        """Of the queue that this handle has got from."""

    @classmethod
    def create(
        cls, capacity: int, *, name: str | None = None, options: Mapping[str, Any] | None = None
    ) -> TrajectoryQueue:
        """Start the actor (it lives as long as its creator or any handle of it). `capacity` counts trajectories;
        `options` are Ray's, such as where it is."""
        if capacity < 1:
            raise ValueError(f"a queue needs room for at least one trajectory, not capacity={capacity}")
        import ray

        actor = ray.remote(_BufferActor).options(  # type: ignore[attr-defined]
            **{"num_cpus": 0, "max_concurrency": 1000, "max_restarts": -1, "name": name, **(options or {})}
        )
        return cls(actor.remote(capacity), capacity)

    # -- producers

    def put(self, trajectories: Any, timeout_s: float = PUT_TIMEOUT_S) -> bool:
        """Put a sequence of trajectories, an Arrow table of them, or a Ray reference to such a table, in order.

        Blocks while the queue is full, each piece for `timeout_s` at most; sequences and tables of any size are put in
        pieces that fit. True when all is in the queue, False when it is closed (what did not go in is in the ledger).
        Raises `QueueFullError`; pieces that went in before it stay in.
        """
        for piece in self._pieces(trajectories):
            if not self._call("put", piece, timeout_s, wait_s=timeout_s):
                return False
        return True

    async def aput(self, trajectories: Any, timeout_s: float = PUT_TIMEOUT_S) -> bool:
        for piece in self._pieces(trajectories):
            if not await self._acall("put", piece, timeout_s, wait_s=timeout_s):
                return False
        return True

    def _pieces(self, trajectories: Any) -> list[Any]:
        if isinstance(trajectories, pa.Table):
            table = trajectories
        elif isinstance(trajectories, Sequence):
            table = to_table(trajectories)
        else:
            return [trajectories]
        return [_packed(table.slice(start, self.capacity)) for start in range(0, table.num_rows, self.capacity)]

    # -- consumers

    def get(self, max_trajectories: int, timeout_s: float) -> list[Trajectory] | None:
        """What is there, oldest first, `max_trajectories` at most; waits for the first one only.

        [] when none came within `timeout_s`; None when the queue is closed and drained: the end. Raises
        `QueueRestartedError` once after each restart.
        """
        import ray

        taken = self._same(self._call("get", max_trajectories, timeout_s, self._life, wait_s=timeout_s))
        if not taken:
            return None if taken is None else []
        try:
            return _rows(taken, ray.get([stored for stored, _, _ in taken], timeout=_GRACE_S))
        except Exception as error:
            raise _unfetched(error) from error

    async def aget(self, max_trajectories: int, timeout_s: float) -> list[Trajectory] | None:
        taken = self._same(await self._acall("get", max_trajectories, timeout_s, self._life, wait_s=timeout_s))
        if not taken:
            return None if taken is None else []
        try:
            return _rows(taken, [await asyncio.wait_for(stored, _GRACE_S) for stored, _, _ in taken])
        except Exception as error:
            raise _unfetched(error) from error

    def _same(self, answer: tuple[str, list[tuple[Any, int, int]] | None]) -> list[tuple[Any, int, int]] | None:
        life, taken = answer
        known, self._life = self._life, life
        if known not in ("", life):
            raise QueueRestartedError("the trajectory queue was started again; what was in it is in the ledger")
        return taken

    # -- both

    def close(self) -> None:
        """No more puts; consumers drain what is left, then get None. May be called twice."""
        self._call("close")

    async def aclose(self) -> None:
        await self._acall("close")

    def stats(self) -> QueueStats:
        return self._call("stats")

    async def astats(self) -> QueueStats:
        return await self._acall("stats")

    def kill(self) -> None:
        """End the actor at once; what is in the queue is gone from memory (the ledger has it)."""
        import ray

        ray.kill(self._actor)

    def _call(self, method: str, *arguments: Any, wait_s: float = 0.0) -> Any:
        """Made again while the actor is away. A put may then go in twice: consumers know what they have by its key."""
        import ray

        deadline_s = time.monotonic() + RESTART_S
        while True:
            try:
                return ray.get(getattr(self._actor, method).remote(*arguments), timeout=wait_s + _GRACE_S)
            except Exception as error:
                if not _is_away(error) or time.monotonic() > deadline_s:
                    raise _translated(error) from error
            time.sleep(_AWAY_S)

    async def _acall(self, method: str, *arguments: Any, wait_s: float = 0.0) -> Any:
        deadline_s = time.monotonic() + RESTART_S
        while True:
            try:
                return await asyncio.wait_for(getattr(self._actor, method).remote(*arguments), wait_s + _GRACE_S)
            except Exception as error:
                if not _is_away(error) or time.monotonic() > deadline_s:
                    raise _translated(error) from error
            await asyncio.sleep(_AWAY_S)


@dataclass(frozen=True, slots=True)
class _Packed:
    """A table as it travels: Pickle would handle each of its hundred and more buffers by itself, at every stop."""

    num_rows: int
    stream: pa.Buffer
    """Arrow's IPC stream."""


def _packed(table: pa.Table) -> _Packed:
    sink = pa.BufferOutputStream()
    with pa.ipc.new_stream(sink, table.schema) as stream:
        stream.write_table(table)
    return _Packed(table.num_rows, sink.getvalue())


def _unpacked(stored: pa.Table | _Packed) -> pa.Table:
    """Tables that came by reference are as they were."""
    return stored if isinstance(stored, pa.Table) else pa.ipc.open_stream(stored.stream).read_all()


def _rows(taken: Sequence[tuple[Any, int, int]], tables: Sequence[pa.Table | _Packed]) -> list[Trajectory]:
    return [
        trajectory
        for (_, start, stop), table in zip(taken, tables, strict=True)
        for trajectory in from_table(_unpacked(table).slice(start, stop - start))
    ]


def _is_away(error: Exception) -> bool:
    """It may answer later: its actor is being started again, or nothing comes through."""
    from ray.exceptions import ActorUnavailableError, RayTaskError

    return isinstance(error, ActorUnavailableError | TimeoutError) and not isinstance(error, RayTaskError)


def _unfetched(error: Exception) -> Exception:
    """Rows that were handed out and cannot be had: their owner has died meanwhile, or is cut off."""
    from ray.exceptions import RayError

    if isinstance(error, RayError | TimeoutError):
        return QueueRestartedError(f"rows of the trajectory queue are lost, and in the ledger: {error}")
    return error


def _translated(error: Exception) -> Exception:
    """Ours in place of Ray's: errors of the buffer as they were raised there, and `QueueError` for a lost actor."""
    from ray.exceptions import RayError, RayTaskError

    if isinstance(error, RayTaskError):
        return error.cause if isinstance(error.cause, QueueFullError | ValueError) else error
    if isinstance(error, RayError | TimeoutError):
        return QueueError(f"the trajectory queue is gone or does not answer: {error}")
    return error
