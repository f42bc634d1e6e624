"""`rollout.rate_limits` by a clock of its own, which runs when somebody sleeps."""

from __future__ import annotations

import asyncio

import pytest

from rollout.rate_limits import RateLimiter, RateLimits, Retries, RetryBudget


class Clock:
    def __init__(self) -> None:
        self.now_s = 0.0

    def __call__(self) -> float:
        return self.now_s

    async def sleep(self, wait_s: float) -> None:
        self.now_s += wait_s


def admitted(limits: RateLimits, calls: int, *, tokens: int = 1, pause_s: float = 0.0) -> list[float]:
    """When each of so many calls was let go."""
    clock = Clock()
    limiter = RateLimiter(limits, clock=clock, sleep=clock.sleep)

    async def scenario() -> list[float]:
        if pause_s:
            limiter.pause(pause_s)
        times = []
        for _ in range(calls):
            await limiter.admit(tokens)
            times.append(clock.now_s)
        return times

    return asyncio.run(scenario())


def most_in_a_minute(times: list[float]) -> int:
    return max(sum(1 for time in times if start <= time < start + 60) for start in times)


@pytest.mark.parametrize("per_minute", [6, 60, 600])
def test_no_minute_has_many_more_requests_than_allowed_and_none_is_wasted(per_minute: int) -> None:
    times = admitted(RateLimits(requests_per_minute=per_minute), 3 * per_minute)
    assert most_in_a_minute(times) <= per_minute + max(1, per_minute / 60)
    assert times[-1] <= 180.0


def test_tokens_are_limited_too() -> None:
    times = admitted(RateLimits(tokens_per_minute=6000), 60, tokens=300)
    assert most_in_a_minute(times) <= 21
    assert times[-1] <= 180.0


def test_a_call_larger_than_the_bucket_goes_and_the_next_ones_wait_for_it() -> None:
    first, second = admitted(RateLimits(tokens_per_minute=60), 2, tokens=60)
    assert first == 0.0
    assert second == pytest.approx(60.0, abs=1.0)


def test_what_a_call_did_not_take_is_given_back() -> None:
    clock = Clock()
    limiter = RateLimiter(RateLimits(tokens_per_minute=60), clock=clock, sleep=clock.sleep)

    async def scenario() -> None:
        for _ in range(5):
            await limiter.admit(60)
            limiter.used(60, 1)

    asyncio.run(scenario())
    assert clock.now_s < 6.0


def test_a_pause_holds_everybody_and_lets_them_go_one_by_one() -> None:
    times = admitted(RateLimits(), 10, pause_s=7.0)
    assert times[0] >= 7.0
    assert all(later > earlier for earlier, later in zip(times, times[1:], strict=False))


def test_a_shorter_pause_does_not_shorten_a_longer_one() -> None:
    clock = Clock()
    limiter = RateLimiter(RateLimits(), clock=clock, sleep=clock.sleep)
    limiter.pause(10.0)
    limiter.pause(1.0)
    assert limiter.paused_s == 10.0


def test_limits_of_a_cluster_are_shared_out() -> None:
    limits = RateLimits(requests_per_minute=600, tokens_per_minute=None).shared_by(4)
    assert (limits.requests_per_minute, limits.tokens_per_minute) == (150, None)


@pytest.mark.parametrize("value", [0, -1, float("nan")])
def test_a_limit_that_allows_nothing_is_refused(value: float) -> None:
    with pytest.raises(ValueError, match="requests_per_minute=.* allows nothing; give more than 0, or None"):
        RateLimits(requests_per_minute=value)


# -- retries


def test_retries_are_at_most_a_share_of_the_requests() -> None:
    budget = RetryBudget(Retries(share=0.25, spare=0), clock=Clock())
    allowed = 0
    for _ in range(100):
        budget.request()
        allowed += budget.allow_retry()
    assert allowed == 25


def test_a_few_retries_are_always_allowed() -> None:
    budget = RetryBudget(Retries(share=0.0, spare=3), clock=Clock())
    budget.request()
    assert [budget.allow_retry() for _ in range(5)] == [True] * 3 + [False] * 2


def test_old_retries_are_forgotten() -> None:
    clock = Clock()
    budget = RetryBudget(Retries(share=0.0, spare=1, window_s=60), clock=clock)
    assert budget.allow_retry()
    assert not budget.allow_retry()
    clock.now_s = 61.0
    assert budget.allow_retry()


@pytest.mark.parametrize("wrong", [{"per_call": -1}, {"share": 1.5}, {"spare": -1}, {"window_s": 0}])
def test_impossible_retries_are_refused(wrong: dict[str, float]) -> None:
    with pytest.raises(ValueError, match="retries need per_call and spare of at least 0"):
        Retries(**wrong)  # type: ignore[arg-type]
