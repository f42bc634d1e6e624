"""Places for episodes and the line in front of them: so many run at once, so many wait, and nobody waits for long.

A place is an env. It is given back as soon as its episode has ended or was cancelled, and is free again once the env
has closed what the episode left running. First come, first served.

Example::

    places = Places(envs, line=64, wait_s=30.0)
    env = await places.take()          # or LineFull, WaitedTooLong
    places.give_back(env)              # at once; the env is closed aside
"""

from __future__ import annotations

import asyncio
import math
from collections.abc import Sequence

from envs.base import EnvError
from rollout.async_env import AsyncEnv

_LONGEST_RETRY_S = 60.0
_CLOSING_S = 60.0
_WEIGHT = 0.2
"""Of the newest episode in the average of how long they take."""


class NoPlace(RuntimeError):
    """No episode can begin now; `retry_s` says when it is worth another try."""

    def __init__(self, message: str, retry_s: int) -> None:
        super().__init__(message)
        self.retry_s = retry_s


class LineFull(NoPlace):
    """Every place is taken and so is every place in the line."""


class WaitedTooLong(NoPlace):
    """No place became free in time."""


class Places:
    """`envs` as places; at most `line` callers wait for one, `wait_s` each. Belongs to one event loop."""

    def __init__(self, envs: Sequence[AsyncEnv], *, line: int, wait_s: float) -> None:
        self.count, self._line, self._wait_s = len(envs), line, wait_s
        self._free: asyncio.Queue[AsyncEnv] = asyncio.Queue()
        for env in envs:
            self._free.put_nowait(env)
        self._taken: dict[int, float] = {}
        """id of an env -> when it was taken, of the loop's clock."""
        self._closing: set[asyncio.Task[None]] = set()
        self._episode_s = 1.0
        self.waiting = 0

    @property
    def running(self) -> int:
        """Places that are not free: episodes, and envs that are being closed after one."""
        return self.count - self._free.qsize()

    async def take(self) -> AsyncEnv:
        """A free env, after waiting for it if need be. Raises `LineFull`, `WaitedTooLong`."""
        if self._free.qsize() <= self.waiting:  # those who wait are to get what is free
            if self.waiting >= self._line:
                raise LineFull(
                    f"all {self.count} places are taken and {self.waiting} requests wait: come again later",
                    self.retry_s(),
                )
        self.waiting += 1
        try:
            async with asyncio.timeout(self._wait_s):
                env = await self._free.get()
        except TimeoutError:
            raise WaitedTooLong(f"no place became free within {self._wait_s:g} s", self.retry_s()) from None
        finally:
            self.waiting -= 1
        self._taken[id(env)] = asyncio.get_running_loop().time()
        return env

    def give_back(self, env: AsyncEnv) -> None:
        """The episode is over, one way or the other."""
        took_s = asyncio.get_running_loop().time() - self._taken.pop(id(env))
        self._episode_s += _WEIGHT * (took_s - self._episode_s)
        task = asyncio.create_task(self._close(env))
        self._closing.add(task)
        task.add_done_callback(self._closing.discard)

    def retry_s(self) -> int:
        """Whole seconds until a place should be free for one more."""
        rounds = (self.waiting + 1) / max(self.count, 1)
        return math.ceil(min(max(rounds * self._episode_s, 1.0), _LONGEST_RETRY_S))

    async def settled(self) -> None:
        """Wait until all that was given back is closed, for a limited time."""
        if self._closing:
            await asyncio.wait(set(self._closing), timeout=_CLOSING_S)

    async def _close(self, env: AsyncEnv) -> None:
        try:
            async with asyncio.timeout(_CLOSING_S):
                await env.close()
        except (EnvError, TimeoutError):
            pass  # the next episode on it begins with a reset, which closes or replaces what is there
        finally:
            self._free.put_nowait(env)
