"""`rollout.spend`: caps that hold with hundreds of calls in flight, and what is known after a crash."""

from __future__ import annotations

import asyncio
import os
import pickle
import random
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from rollout.policy import PolicyError
from rollout.spend import BudgetExceeded, Charge, Prices, SpendCap, SpendMeter
from rollout.spend_meters import LocalMeter, RemoteMeter
from rollout.trajectory import FailureClass


def charge(usd: float | None = 0.01, prompt: int = 100, completion: int = 50, model: str = "m") -> Charge:
    return Charge(model=model, prompt_tokens=prompt, completion_tokens=completion, usd=usd)


# -- prices


def test_a_request_costs_its_prompt_its_completion_and_less_for_what_was_cached() -> None:
    prices = Prices(prompt_usd_per_million=2.0, completion_usd_per_million=10.0, cached_prompt_usd_per_million=0.5)
    assert prices.usd(1_000_000, 500_000) == pytest.approx(2.0 + 5.0)
    assert prices.usd(1_000_000, 0, cached_prompt_tokens=400_000) == pytest.approx(1.2 + 0.2)


def test_the_most_that_a_request_can_cost_does_not_count_on_the_providers_cache() -> None:
    dear = Prices(prompt_usd_per_million=1.0, completion_usd_per_million=0.0, cached_prompt_usd_per_million=3.0)
    assert dear.most_usd(1_000_000, 0) == pytest.approx(3.0)


@pytest.mark.parametrize("price", [-1.0, float("nan"), float("inf")])
def test_a_price_below_zero_is_refused_by_value(price: float) -> None:
    with pytest.raises(ValueError, match="prompt_usd_per_million=.* is no price"):
        Prices(prompt_usd_per_million=price, completion_usd_per_million=1.0)


def test_a_cap_that_allows_nothing_is_refused() -> None:
    with pytest.raises(ValueError, match="usd=0 allows nothing; give more than 0, or None"):
        SpendCap(usd=0)


# -- the cap


@pytest.mark.parametrize("cap", [SpendCap(usd=1.0), SpendCap(tokens=15_000)], ids=["usd", "tokens"])
def test_a_cap_holds_with_hundreds_of_calls_in_flight_and_is_used_well(cap: SpendCap) -> None:
    meter = LocalMeter(SpendMeter(cap))
    rng = random.Random(0)
    stopped = 0

    async def call() -> None:
        nonlocal stopped
        most = charge(usd=0.05, prompt=500, completion=250)
        try:
            reservation = await meter.reserve(most)
        except BudgetExceeded:
            stopped += 1
            return
        await asyncio.sleep(rng.uniform(0, 0.003))
        share = rng.uniform(0.05, 0.3)
        await meter.settle(reservation, charge(usd=0.05 * share, prompt=int(500 * share), completion=int(250 * share)))
        spent = await meter.snapshot()
        assert cap.usd is None or spent.spent_usd + spent.reserved_usd <= cap.usd + 1e-6
        assert cap.tokens is None or spent.tokens + spent.reserved_tokens <= cap.tokens

    async def scenario() -> None:
        async with asyncio.timeout(60):
            await asyncio.gather(*(call() for _ in range(400)))
        spent = await meter.snapshot()
        # It stopped because of what was spent, not because of what others held at that moment.
        assert stopped > 0
        assert cap.usd is None or spent.spent_usd > cap.usd - 0.05
        assert cap.tokens is None or spent.tokens > cap.tokens - 750

    asyncio.run(scenario())


def test_a_budget_that_is_used_up_says_so_and_is_a_limit() -> None:
    meter = SpendMeter(SpendCap(usd=0.05))
    assert meter.try_reserve("a", charge(usd=0.04))
    meter.settle("a", charge(usd=0.04))
    with pytest.raises(BudgetExceeded, match=r"cap of 0.05 USD is used up: 0.0400 USD spent") as caught:
        meter.try_reserve("b", charge(usd=0.02))
    assert caught.value.failure_class is FailureClass.LIMIT
    again = pickle.loads(pickle.dumps(caught.value))
    assert (type(again), str(again), again.failure_class) == (BudgetExceeded, str(caught.value), FailureClass.LIMIT)


def test_a_call_that_failed_gives_its_reservation_back() -> None:
    meter = SpendMeter(SpendCap(usd=0.05))
    assert meter.try_reserve("a", charge(usd=0.05))
    assert not meter.try_reserve("b", charge(usd=0.05))
    meter.release("a")
    assert meter.try_reserve("b", charge(usd=0.05))
    assert meter.snapshot().lost_requests == 0


def test_a_call_without_an_answer_is_told_beside_what_was_spent() -> None:
    meter = SpendMeter()
    meter.try_reserve("a", charge(usd=0.05))
    meter.release("a", lost=True)
    spent = meter.snapshot()
    assert (spent.spent_usd, spent.requests, spent.lost_requests, spent.lost_usd) == (0.0, 0, 1, 0.05)
    assert "1 more without an answer, at most $0.0500 if billed" in str(spent)


def test_what_a_dead_worker_held_is_free_again_after_its_lease() -> None:
    now = 0.0
    meter = SpendMeter(SpendCap(usd=0.05), clock=lambda: now)
    assert meter.try_reserve("dead", charge(usd=0.05), 10.0)
    assert not meter.try_reserve("next", charge(usd=0.05), 10.0)
    now = 11.0
    assert meter.try_reserve("next", charge(usd=0.05), 10.0)
    assert meter.snapshot().lost_requests == 1


def test_a_charge_that_is_told_twice_counts_once_also_over_a_restart(tmp_path: Path) -> None:
    first = SpendMeter(path=tmp_path / "spend.jsonl")
    first.settle("a", charge())
    first.settle("a", charge())
    first.close()
    second = SpendMeter(path=tmp_path / "spend.jsonl")
    second.settle("a", charge())
    assert second.snapshot().requests == 1


def test_a_cap_in_money_needs_prices() -> None:
    with pytest.raises(PolicyError, match="model 'm' has no prices") as caught:
        SpendMeter(SpendCap(usd=1.0)).try_reserve("a", charge(usd=None))
    assert caught.value.failure_class is FailureClass.INPUT


def test_without_a_cap_nothing_waits_and_models_are_told_apart() -> None:
    meter = SpendMeter()
    for i in range(100):
        assert meter.try_reserve(str(i), charge(usd=1e9))
    meter.settle("0", charge(usd=0.5, model="a"))
    meter.settle("1", charge(usd=None, model="b"))
    spent = meter.snapshot()
    assert (spent.by_model["a"].usd, spent.by_model["b"].usd) == (0.5, 0.0)
    assert spent.tokens == 300


# -- what outlives a process


def test_a_resumed_job_counts_what_was_spent_before(tmp_path: Path) -> None:
    path = tmp_path / "run" / "spend.jsonl"
    for _ in range(3):
        meter = SpendMeter(SpendCap(usd=0.05), path)
        meter.settle(os.urandom(4).hex(), charge(usd=0.015))
        meter.try_reserve("lost", charge(usd=0.005))
        meter.release("lost", lost=True)
        meter.close()
    meter = SpendMeter(SpendCap(usd=0.05), path)
    spent = meter.snapshot()
    assert (round(spent.spent_usd, 9), spent.requests, spent.lost_requests) == (0.045, 3, 3)
    with pytest.raises(BudgetExceeded):
        meter.try_reserve("x", charge(usd=0.015))


def test_what_was_settled_is_there_after_kill_9(tmp_path: Path) -> None:
    path = tmp_path / "spend.jsonl"
    script = (
        "import sys; from rollout.spend import *\n"
        f"meter = SpendMeter(path={str(path)!r})\n"
        "for i in range(1000):\n"
        "    meter.settle(str(i), Charge(model='m', prompt_tokens=1, completion_tokens=0, usd=0.001))\n"
        "print('settled', flush=True); sys.stdin.read()\n"
    )
    with subprocess.Popen(
        [sys.executable, "-c", script], stdin=subprocess.PIPE, stdout=subprocess.PIPE, cwd=Path(__file__).parent.parent
    ) as process:
        assert process.stdout.readline() == b"settled\n"
        process.send_signal(signal.SIGKILL)
    with path.open("ab") as file:
        file.write(b'{"id":"torn","model":"m","prom')
    meter = SpendMeter(path=path)
    assert meter.snapshot().requests == 1000
    meter.settle("after", charge())
    meter.close()
    again = SpendMeter(path=path)
    assert again.snapshot().requests == 1001
    again.close()


def test_a_log_is_of_one_meter_at_a_time(tmp_path: Path) -> None:
    meter = SpendMeter(path=tmp_path / "spend.jsonl")
    with pytest.raises(ValueError, match="in use by another process: one meter serves a whole cluster"):
        SpendMeter(path=tmp_path / "spend.jsonl")
    meter.close()
    SpendMeter(path=tmp_path / "spend.jsonl").close()


def test_a_file_that_is_something_else_is_refused_and_left_alone(tmp_path: Path) -> None:
    path = tmp_path / "notes.txt"
    path.write_text("dear diary\ntoday\n")
    with pytest.raises(ValueError, match="is no spend log"):
        SpendMeter(path=path)
    assert path.read_text() == "dear diary\ntoday\n"


def test_what_was_spent_is_kept_in_an_object_store(bucket: str) -> None:
    path = f"{bucket}/seven/spend.jsonl"
    for i in range(3):
        meter = SpendMeter(SpendCap(usd=0.05), path)
        assert meter.snapshot().requests == 10 * i
        for _ in range(10):
            meter.settle(os.urandom(4).hex(), charge(usd=0.001))
        meter.close()
    with pytest.raises(BudgetExceeded):
        SpendMeter(SpendCap(usd=0.03), path).try_reserve("x", charge(usd=0.001))


def test_a_store_that_cannot_be_used_is_an_error_at_once(bucket: str) -> None:
    with pytest.raises(ValueError, match="the spend log s3://nowhere/spend.jsonl cannot be"):
        SpendMeter(path="s3://nowhere/spend.jsonl")


# -- one meter for a cluster


def test_clients_in_other_processes_share_one_meter(ray_cluster: Any, tmp_path: Path) -> None:
    actor = ray_cluster.remote(SpendMeter).options(num_cpus=0).remote(SpendCap(usd=1.0), tmp_path / "spend.jsonl")

    @ray_cluster.remote(num_cpus=0)
    class Client:
        """Names nothing of this file, which its process cannot import."""

        def __init__(self, handle: Any) -> None:
            from rollout.spend_meters import RemoteMeter

            self._meter = RemoteMeter(handle)

        async def spend(self, calls: int) -> int:
            """How many calls were within the budget."""
            import asyncio

            from rollout.spend import BudgetExceeded, Charge

            async def call() -> int:
                try:
                    reservation = await self._meter.reserve(
                        Charge(model="m", prompt_tokens=2, completion_tokens=0, usd=0.02)
                    )
                except BudgetExceeded as error:
                    assert type(error) is BudgetExceeded
                    return 0
                await self._meter.settle(reservation, Charge(model="m", prompt_tokens=1, completion_tokens=0, usd=0.01))
                return 1

            return sum(await asyncio.gather(*(call() for _ in range(calls))))

    clients = [Client.remote(actor) for _ in range(2)]
    made = ray_cluster.get([client.spend.remote(80) for client in clients], timeout=60)
    spent = ray_cluster.get(actor.snapshot.remote(), timeout=60)
    for client in clients:
        ray_cluster.kill(client)
    assert spent.requests == sum(made)
    assert 0.98 <= spent.spent_usd <= 1.0 + 1e-9
    assert "of $1" in str(spent)
    ray_cluster.get(actor.close.remote(), timeout=60)
    ray_cluster.kill(actor)


def test_a_caller_that_is_cancelled_holds_nothing(ray_cluster: Any) -> None:
    actor = ray_cluster.remote(SpendMeter).options(num_cpus=0).remote(SpendCap(usd=0.05))
    meter = RemoteMeter(actor)

    async def scenario() -> None:
        async with asyncio.timeout(60):
            first = await meter.reserve(charge(usd=0.05))
            waiting = asyncio.create_task(meter.reserve(charge(usd=0.05)))
            await asyncio.sleep(0.1)
            waiting.cancel()
            await asyncio.gather(waiting, return_exceptions=True)
            await meter.release(first)
            assert (await meter.snapshot()).reserved_usd == 0.0

    asyncio.run(scenario())
    ray_cluster.kill(actor)


def test_a_meter_that_is_gone_stops_the_spending(ray_cluster: Any) -> None:
    actor = ray_cluster.remote(SpendMeter).options(num_cpus=0).remote()
    meter = pickle.loads(pickle.dumps(RemoteMeter(actor, timeout_s=20)))

    async def scenario() -> None:
        await meter.release(await meter.reserve(charge()))
        ray_cluster.kill(actor)
        with pytest.raises(PolicyError, match="the spend meter does not answer") as caught:
            async with asyncio.timeout(60):
                await meter.reserve(charge())
        assert caught.value.failure_class is FailureClass.ENGINE

    asyncio.run(scenario())


def test_a_full_disk_holds_spending_back_and_loses_no_charge(tmp_path):
    meter = SpendMeter(SpendCap(usd=1.0), tmp_path / "spend.jsonl")
    assert meter.try_reserve("a", Charge(model="m", prompt_tokens=10, completion_tokens=10, usd=0.1))
    log: Any = meter._log
    disk = log._file
    with open("/dev/full", "ab", buffering=0) as log._file:
        meter.settle("a", Charge(model="m", prompt_tokens=10, completion_tokens=5, usd=0.05))
        assert not meter.try_reserve("b", Charge(model="m", prompt_tokens=1, completion_tokens=1, usd=0.01))
    log._file = disk
    assert meter.try_reserve("b", Charge(model="m", prompt_tokens=1, completion_tokens=1, usd=0.01))
    meter.close()
    again = SpendMeter(SpendCap(usd=1.0), tmp_path / "spend.jsonl")
    assert again.snapshot().spent_usd == pytest.approx(0.05)
    again.close()
