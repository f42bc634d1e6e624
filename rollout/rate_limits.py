"""How fast one client may ask: `RateLimits` and the `RateLimiter` that keeps them; `Retries` and their `RetryBudget`.

A limiter is a pair of token buckets (requests and tokens a minute) with little room for bursts, and a pause that a
server asked for: it holds every call of the client, not only the one that was told. After a pause calls are let go one
by one, since all at once would be refused again.

A retry budget is what ends a hopeless endpoint: over a sliding window retries may be only a share of the requests
(Google SRE book, chapter 21). While most requests succeed it is never felt.

Example::

    limiter = RateLimiter(RateLimits(requests_per_minute=600, tokens_per_minute=1_000_000))
    await limiter.admit(1500)                  # waits for its turn; 1500 tokens at most
    limiter.used(1500, 700)                    # the rest is given back
"""

from __future__ import annotations

import asyncio
import math
import time
from collections import deque
from collections.abc import Awaitable, Callable
from dataclasses import dataclass

_SLICE_S = 0.5
"""Longest nap: tokens that were given back shorten a wait."""
_SHORTEST_S = 0.001
"""A wait that rounding left over would move no clock."""
_SPACING_S = 0.02
"""Between two calls that a pause held back."""
_LONGEST_RAMP_S = 5.0


@dataclass(frozen=True, slots=True, kw_only=True)
class RateLimits:
    """Of one client, which is one worker; None: no limit. Raises `ValueError` for a limit that allows nothing."""

    requests_per_minute: float | None = None
    tokens_per_minute: float | None = None
    """Prompt tokens and those that may be sampled, as providers count them; the unused part is given back."""

    def __post_init__(self) -> None:
        for name in ("requests_per_minute", "tokens_per_minute"):
            value = getattr(self, name)
            if value is not None and not (math.isfinite(value) and value > 0):
                raise ValueError(f"{name}={value} allows nothing; give more than 0, or None for no limit")

    def shared_by(self, clients: int) -> RateLimits:
        """Each client's part of limits that hold for all of them together."""

        def part(limit: float | None) -> float | None:
            return None if limit is None else limit / clients

        return RateLimits(
            requests_per_minute=part(self.requests_per_minute), tokens_per_minute=part(self.tokens_per_minute)
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Retries:
    """When a failed request is tried again. Raises `ValueError` for impossible values."""

    per_call: int = 6
    """Tries after the first one, of one call. A wait that the server asked for (429 with Retry-After) is none."""
    share: float = 0.5
    """Retries among all requests of the last `window_s`; beyond it a call that fails is given up at once."""
    spare: int = 20
    """Retries within `window_s` that are always allowed."""
    window_s: float = 60.0
    """Also how long an endpoint may answer nothing at all before it is given up for all calls."""

    def __post_init__(self) -> None:
        if self.per_call < 0 or self.spare < 0 or not 0 <= self.share <= 1 or not self.window_s > 0:
            raise ValueError(
                "retries need per_call and spare of at least 0, a share within 0 and 1 and a window_s above 0, not "
                f"per_call={self.per_call}, spare={self.spare}, share={self.share}, window_s={self.window_s}"
            )


class RetryBudget:
    """Counts requests and retries of a client over a sliding window."""

    def __init__(self, retries: Retries, *, clock: Callable[[], float] = time.monotonic) -> None:
        self._retries, self._clock = retries, clock
        self._requests: deque[float] = deque()
        self._again: deque[float] = deque()

    def request(self) -> None:
        """A request, a repeated one included, goes out now."""
        self._requests.append(self._clock())

    def allow_retry(self) -> bool:
        """Whether one more retry is within the budget; if so, it is counted."""
        requests, again = self._now()
        if again >= max(self._retries.spare, self._retries.share * requests):
            return False
        self._again.append(self._clock())
        return True

    def __str__(self) -> str:
        requests, again = self._now()
        return (
            f"{again} of the last {requests} requests were retries, more than retries.share={self._retries.share:g} "
            f"within {self._retries.window_s:g} s"
        )

    def _now(self) -> tuple[int, int]:
        since = self._clock() - self._retries.window_s
        for times in (self._requests, self._again):
            while times and times[0] < since:
                times.popleft()
        return len(self._requests), len(self._again)


class _Bucket:
    def __init__(self, per_minute: float, now_s: float) -> None:
        self.rate = per_minute / 60.0
        self.room = max(1.0, self.rate)
        self._level, self._at_s = self.room, now_s

    def wait_s(self, amount: float, now_s: float) -> float:
        """Until `amount` may be taken; one that is larger than the bucket needs a full one, and leaves a debt."""
        self._level = min(self.room, self._level + (now_s - self._at_s) * self.rate)
        self._at_s = now_s
        return max(0.0, (min(amount, self.room) - self._level) / self.rate)

    def take(self, amount: float) -> None:
        self._level -= amount


class RateLimiter:
    """Lets calls go in the order in which they came. For one event loop."""

    def __init__(
        self,
        limits: RateLimits,
        *,
        clock: Callable[[], float] = time.monotonic,
        sleep: Callable[[float], Awaitable[None]] = asyncio.sleep,
    ) -> None:
        self._clock, self._sleep = clock, sleep
        now_s = clock()
        self._requests = _Bucket(limits.requests_per_minute, now_s) if limits.requests_per_minute else None
        self._tokens = _Bucket(limits.tokens_per_minute, now_s) if limits.tokens_per_minute else None
        self._turn = asyncio.Lock()
        self._paused_until_s = self._ramp_until_s = self._last_s = -math.inf

    async def admit(self, tokens: int) -> None:
        """Wait until a request of at most `tokens` may go out; the caller limits the wait."""
        async with self._turn:
            while (wait_s := self._wait_s(tokens)) > 0:
                await self._sleep(min(max(wait_s, _SHORTEST_S), _SLICE_S))
            self._last_s = self._clock()
            if self._requests:
                self._requests.take(1)
            if self._tokens:
                self._tokens.take(tokens)

    def used(self, admitted_tokens: int, tokens: int) -> None:
        """A call that was admitted with `admitted_tokens` took `tokens`."""
        if self._tokens:
            self._tokens.take(tokens - admitted_tokens)

    def pause(self, wait_s: float) -> None:
        """Nobody goes within `wait_s`; those who waited go one by one."""
        until_s = self._clock() + wait_s
        self._paused_until_s = max(self._paused_until_s, until_s)
        self._ramp_until_s = max(self._ramp_until_s, until_s + min(wait_s, _LONGEST_RAMP_S))

    @property
    def paused_s(self) -> float:
        """What is left of a pause."""
        return max(0.0, self._paused_until_s - self._clock())

    def _wait_s(self, tokens: int) -> float:
        now_s = self._clock()
        waits = [self._paused_until_s - now_s]
        if now_s < self._ramp_until_s:
            waits.append(self._last_s + _SPACING_S - now_s)
        if self._requests:
            waits.append(self._requests.wait_s(1, now_s))
        if self._tokens:
            waits.append(self._tokens.wait_s(tokens, now_s))
        return max(waits)
