"""The meters that clients hold: `LocalMeter` around a `SpendMeter` of this process, `RemoteMeter` around a Ray actor.

Example::

    meter = LocalMeter(SpendMeter(SpendCap(usd=20.0), path="runs/r/spend.jsonl"))
    reservation = await meter.reserve(Charge(model="m", prompt_tokens=900, completion_tokens=512, usd=0.01))
    await meter.settle(reservation, Charge(model="m", prompt_tokens=610, completion_tokens=80, usd=0.002))
"""

from __future__ import annotations

import asyncio
import random
import time
import uuid
from collections.abc import Awaitable, Callable
from typing import Any

from rollout.policy import PolicyError
from rollout.spend import LEASE_S, SpendMeter, SpendSnapshot
from rollout.spend_log import Charge

_FIRST_WAIT_S, _LONGEST_WAIT_S = 0.02, 1.0


class LocalMeter:
    """A `Meter` around a `SpendMeter` of this process."""

    def __init__(self, meter: SpendMeter | None = None) -> None:
        self._meter = meter or SpendMeter()
        self._queue = asyncio.Lock()

    async def reserve(self, most: Charge, *, lease_s: float = LEASE_S) -> str:
        async def ask(reservation: str) -> bool:
            return self._meter.try_reserve(reservation, most, lease_s)

        return await _reserve(ask, self._queue, uuid.uuid4().hex)

    async def settle(self, reservation: str, charge: Charge) -> None:
        self._meter.settle(reservation, charge)

    async def release(self, reservation: str, *, lost: bool = False) -> None:
        self._meter.release(reservation, lost)

    async def snapshot(self) -> SpendSnapshot:
        return self._meter.snapshot()


class RemoteMeter:
    """A `Meter` around a Ray actor of `SpendMeter`; picklable, so that each worker is given one.

    A meter that cannot be asked stops the spending: `reserve` then raises `PolicyError` (ENGINE) once `timeout_s` have
    passed, and so does `settle`, so that no answer is used that was not counted.
    """

    def __init__(self, handle: Any, *, timeout_s: float = 60.0) -> None:
        self._handle, self._timeout_s = handle, timeout_s
        self._queue: asyncio.Lock | None = None

    def __reduce__(self) -> tuple[Any, ...]:
        return _remote_meter, (self._handle, self._timeout_s)

    async def reserve(self, most: Charge, *, lease_s: float = LEASE_S) -> str:
        async def ask(reservation: str) -> bool:
            return await self._call("try_reserve", reservation, most, lease_s)

        if self._queue is None:
            self._queue = asyncio.Lock()
        reservation = uuid.uuid4().hex
        try:
            return await _reserve(ask, self._queue, reservation)
        except asyncio.CancelledError:
            # It may have been given in the meantime. The actor takes our calls in their order.
            self._handle.release.remote(reservation)
            raise

    async def settle(self, reservation: str, charge: Charge) -> None:
        await self._call("settle", reservation, charge)

    async def release(self, reservation: str, *, lost: bool = False) -> None:
        await self._call("release", reservation, lost)

    async def snapshot(self) -> SpendSnapshot:
        return await self._call("snapshot")

    async def _call(self, method: str, *arguments: Any) -> Any:
        """One call of the actor, repeated while it is being restarted: every method may be told twice."""
        from ray.exceptions import ActorUnavailableError, RayActorError, RayTaskError

        ends_s, wait_s = time.monotonic() + self._timeout_s, 0.1
        while True:
            try:
                async with asyncio.timeout(self._timeout_s):
                    return await getattr(self._handle, method).remote(*arguments)
            except PolicyError as error:  # Ray's own mixture of its error and ours: only ours goes on
                cause = getattr(error, "cause", error)
                trouble: Exception = cause if isinstance(cause, PolicyError) else error
                break
            except ActorUnavailableError as error:
                trouble = PolicyError(f"the spend meter does not answer: {type(error).__name__}")
                if time.monotonic() + wait_s > ends_s:
                    break
            except (RayActorError, RayTaskError, TimeoutError) as error:
                trouble = PolicyError(f"the spend meter does not answer: {type(error).__name__}")
                break
            await asyncio.sleep(wait_s)
            wait_s *= 2
        raise trouble


def _remote_meter(handle: Any, timeout_s: float) -> RemoteMeter:
    return RemoteMeter(handle, timeout_s=timeout_s)


async def _reserve(ask: Callable[[str], Awaitable[bool]], queue: asyncio.Lock, reservation: str) -> str:
    """Ask until there is room. Whoever waits stands in line, so that one of a client asks at a time and large calls
    get their turn."""
    if not queue.locked() and await ask(reservation):
        return reservation
    async with queue:
        wait_s = _FIRST_WAIT_S
        while not await ask(reservation):
            await asyncio.sleep(wait_s * random.uniform(0.5, 1.0))
            wait_s = min(2 * wait_s, _LONGEST_WAIT_S)
    return reservation
