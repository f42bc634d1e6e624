"""How many episodes run at a time: the rule, and the gate."""

import asyncio

import pytest

from rollout.concurrency import AdaptiveConcurrency, Gate, Pressure

EASY = Pressure(kv_usage=0.3, waiting=0)
FULL = Pressure(kv_usage=0.97, waiting=9)


def test_it_doubles_until_the_engine_is_full_and_then_grows_by_steps_and_shrinks_by_a_share():
    limit = AdaptiveConcurrency(least=8, most=100, start=20)
    assert [limit.observe(EASY, running=limit.limit) for _ in range(2)] == [40, 80]
    assert [limit.observe(FULL, running=80) for _ in range(2)] == [60, 45]
    assert [limit.observe(EASY, running=limit.limit) for _ in range(3)] == [49, 53, 57]


def test_it_stays_between_its_bounds():
    limit = AdaptiveConcurrency(least=8, most=41, start=40)
    assert limit.observe(EASY, running=40) == 41
    for _ in range(20):
        limit.observe(FULL, running=limit.limit)
    assert limit.limit == 8


def test_it_does_not_grow_when_the_limit_is_not_what_holds_back():
    limit = AdaptiveConcurrency(least=1, most=100, start=40)
    assert limit.observe(EASY, running=39) == 40  # fewer run than may
    assert limit.observe(Pressure(kv_usage=0.2, waiting=3), running=40) == 40  # the engine takes no more at a time
    assert limit.observe(Pressure(kv_usage=0.85, waiting=0), running=40) == 40  # between room and full


def test_it_finds_the_number_that_fits_the_cache():
    """An engine whose cache holds 60 episodes: the limit comes to swing below that from either side."""
    for start in (4, 200):
        limit, seen = AdaptiveConcurrency(least=4, most=200, start=start), []
        for _ in range(120):
            usage = min(1.0, limit.limit / 60)
            limit.observe(Pressure(kv_usage=usage, waiting=max(0, limit.limit - 60)), running=limit.limit)
            seen.append(limit.limit)
        assert 30 <= min(seen[-40:]) and max(seen[-40:]) <= 64


def test_impossible_bounds_are_refused():
    with pytest.raises(ValueError, match="least=5, most=4"):
        AdaptiveConcurrency(least=5, most=4)


def test_the_gate_never_lets_more_in_than_its_limit_and_a_lower_limit_holds_as_they_leave():
    async def scenario():
        gate, inside, most = Gate(5), 0, 0

        async def visit():
            nonlocal inside, most
            await gate.enter()
            inside += 1
            most = max(most, inside)
            await asyncio.sleep(0.001)
            inside -= 1
            await gate.leave()

        await asyncio.gather(*(visit() for _ in range(40)))
        assert most == 5
        for _ in range(5):
            await gate.enter()
        await gate.set(2)
        late = asyncio.create_task(gate.enter())
        for _ in range(3):
            await gate.leave()
        await asyncio.sleep(0.01)
        assert not late.done() and gate.inside == 2
        await gate.leave()
        await asyncio.wait_for(late, 5)

    asyncio.run(asyncio.wait_for(scenario(), 30))
