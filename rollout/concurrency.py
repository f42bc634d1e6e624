"""How many episodes a worker runs at a time.

`AdaptiveConcurrency` is additive increase and multiplicative decrease (Chiu and Jain 1989) by the pressure on the
engine's KV cache, with a slow start as TCP has it; `Gate` holds episodes to that number.

A cache that overflows makes an engine preempt requests and compute their prefixes again; one that is half empty leaves
the engine idle. The right number depends on the length of conversations, which nobody knows before. It knows nothing
of engines: a policy that can be asked has a method `pressure()`.

Example::

    limit = AdaptiveConcurrency(least=8, most=256)
    limit.observe(Pressure(kv_usage=0.97, waiting=12), running=64)     # 48: a quarter less
"""

from __future__ import annotations

import asyncio
from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class Pressure:
    """How full an engine is."""

    kv_usage: float
    """Share of the KV cache that running requests hold, in [0, 1]."""
    waiting: int
    """Requests that the engine has taken but does not run yet."""


class AdaptiveConcurrency:
    """A limit between `least` and `most`, started at `start` (by default `most` or 32, whichever is less).

    Until the engine is full for the first time it doubles, from then on it grows by a few.
    """

    def __init__(self, *, least: int, most: int, start: int | None = None) -> None:
        if not 1 <= least <= most:
            raise ValueError(f"concurrency must be 1 <= least <= most, not least={least}, most={most}")
        self.least, self.most = least, most
        self.limit = min(max(start if start is not None else 32, least), most)
        self._slow_start = True

    def observe(self, pressure: Pressure, *, running: int) -> int:
        """The new limit, after `running` episodes put the engine under `pressure`."""
        if pressure.waiting and pressure.kv_usage >= FULL:
            self._slow_start = False
            self.limit = max(self.least, int(min(self.limit, max(running, self.least)) * DECREASE))
        elif not pressure.waiting and pressure.kv_usage < ROOM and running >= self.limit:
            self.limit = min(self.most, 2 * self.limit if self._slow_start else self.limit + INCREASE)
        return self.limit


FULL = 0.9
"""From here on a request that waits does so for want of cache."""
ROOM = 0.75
"""Up to here there is room for more."""
DECREASE = 0.75
INCREASE = 4
"""Episodes an observation; the worker observes once a second."""


class Gate:
    """Lets at most `limit` pass at a time; one that falls takes effect as those inside leave. For one event loop."""

    def __init__(self, limit: int) -> None:
        self._limit, self.inside = limit, 0
        self._changed = asyncio.Condition()

    @property
    def limit(self) -> int:
        return self._limit

    async def enter(self) -> None:
        async with self._changed:
            await self._changed.wait_for(lambda: self.inside < self._limit)
            self.inside += 1

    async def leave(self) -> None:
        async with self._changed:
            self.inside -= 1
            self._changed.notify()

    async def set(self, limit: int) -> None:
        async with self._changed:
            self._limit = limit
            self._changed.notify_all()
