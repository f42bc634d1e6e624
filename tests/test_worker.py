"""What a worker does when something ends under it: a budget, an engine, the disk."""

import asyncio
import errno
import os

import pytest
from test_collect import EchoEnv, LocalFeed, answer, request

from rollout.async_env import ThreadedEnv
from rollout.concurrency import Pressure
from rollout.episode import EpisodeSettings
from rollout.ledger import Ledger, LedgerWriter
from rollout.policy import EngineDiedError, PolicyError, ScriptedPolicy
from rollout.spend import BudgetExceeded
from rollout.task_feed import ENGINE_FAILURES_IN_A_ROW, TaskFeed
from rollout.trajectory import FailureClass
from rollout.worker import RolloutWorker


class FailingPolicy(ScriptedPolicy):
    """Answers `good` times, then raises."""

    def __init__(self, good: int, error: PolicyError) -> None:
        super().__init__(answer)
        self.good, self.error = good, error

    async def complete(self, messages, sampling, *, prefix=""):
        if len(self.calls) >= self.good:
            raise self.error
        return await super().complete(messages, sampling, prefix=prefix)


class FullPolicy(ScriptedPolicy):
    """Says that its cache is full, and counts who is inside at a time."""

    def __init__(self) -> None:
        super().__init__(answer)
        self.inside, self.most = 0, []

    def pressure(self):
        return Pressure(kv_usage=0.99, waiting=5)

    async def complete(self, messages, sampling, *, prefix=""):
        self.inside += 1
        self.most.append(self.inside)
        await asyncio.sleep(0.02)
        self.inside -= 1
        return await super().complete(messages, sampling, prefix=prefix)


class FullDisk(LedgerWriter):
    """A disk that is full for the first `times` appends."""

    def __init__(self, folder, times: int) -> None:
        super().__init__(folder, writer="w0")
        self.times = times

    def append(self, trajectories):
        if self.times > 0:
            self.times -= 1
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return super().append(trajectories)


def worker(folder, feed, policy, *, slots=8, ledger=None, **more):
    return RolloutWorker(
        name="w0", policy=policy, envs=[ThreadedEnv(EchoEnv()) for _ in range(slots)], settings=EpisodeSettings(),
        feed=LocalFeed(feed), ledger=ledger or LedgerWriter(folder, writer="w0"), **more,
    )  # fmt: skip


def run(coroutine):
    return asyncio.run(asyncio.wait_for(coroutine, 60))


def test_a_spent_budget_stops_cleanly_and_blames_no_episode(tmp_path):
    feed = TaskFeed([request(i) for i in range(50)])
    recorded = run(worker(tmp_path, feed, FailingPolicy(20, BudgetExceeded("the cap of $1 is reached"))).run())
    ledger = Ledger(tmp_path)
    assert recorded == 20 == len(ledger.keys()) and not list(ledger.failures())
    progress = feed.progress()
    assert "cap of $1" in progress.stopped and feed.next("w1", 5) is None


def test_a_dead_engine_ends_the_worker_and_what_it_had_goes_back(tmp_path):
    feed = TaskFeed([request(i) for i in range(50)])
    with pytest.raises(EngineDiedError, match="gone"):
        run(worker(tmp_path, feed, FailingPolicy(20, EngineDiedError("gone"))).run())
    ledger = Ledger(tmp_path)
    assert len(ledger.keys()) == 20 and not list(ledger.failures())
    assert feed.release("w0", ledger.keys()) == 20
    assert len(feed.next("w1", 100) or []) == 30


def test_an_engine_that_fails_for_everybody_stops_the_feed(tmp_path):
    class Down(ScriptedPolicy):
        async def complete(self, messages, sampling, *, prefix=""):
            raise PolicyError("connection refused", FailureClass.INPUT)

    # INPUT is not tried again in place; the feed counts what it is told.
    feed = TaskFeed([request(i) for i in range(10)])
    run(worker(tmp_path, feed, Down(answer)).run())
    assert feed.progress().failures == {"input": 10} and not feed.progress().stopped
    from dataclasses import replace

    from test_collect import summary

    many = TaskFeed([request(i) for i in range(100)])
    many.next("w0", 100)
    down = [
        replace(summary(request(i).key), failed=True, failure_class=FailureClass.ENGINE, failure_message="refused")
        for i in range(ENGINE_FAILURES_IN_A_ROW)
    ]
    many.done("w0", down[:-1])
    assert not many.progress().stopped
    many.done("w0", down)
    assert "in a row" in many.progress().stopped and "refused" in many.progress().stopped


def test_a_full_disk_is_waited_for_and_nothing_is_lost(tmp_path):
    feed = TaskFeed([request(i) for i in range(30)])
    disk = FullDisk(tmp_path, times=2)
    assert run(worker(tmp_path, feed, ScriptedPolicy(answer), ledger=disk).run()) == 30
    assert len(Ledger(tmp_path).keys()) == 30 and Ledger(tmp_path).duplicates() == 0


def test_a_disk_that_stays_full_ends_the_worker_with_the_reason(tmp_path):
    feed = TaskFeed([request(i) for i in range(5)])
    full = FullDisk(tmp_path, times=10**6)
    with pytest.raises(OSError, match="No space left"):
        run(worker(tmp_path, feed, ScriptedPolicy(answer), ledger=full, ledger_patience_s=0.2).run())


def test_a_full_cache_lowers_the_limit_and_a_fixed_one_stays(tmp_path):
    policy = FullPolicy()
    feed = TaskFeed([request(i) for i in range(64)])
    run(worker(tmp_path / "a", feed, policy, slots=16).run())
    assert max(policy.most) <= 12  # from 16 by a quarter at the first look, before the first episode
    fixed = FullPolicy()
    run(worker(tmp_path / "b", TaskFeed([request(i) for i in range(64)]), fixed, slots=16, adaptive=False).run())
    assert max(fixed.most) == 16


def test_workers_tell_how_they_are(tmp_path):
    feed = TaskFeed([request(i) for i in range(8)])
    run(worker(tmp_path, feed, FullPolicy(), slots=4).run())
    [state] = feed.progress().workers.values()
    assert (state.limit, state.kv_usage, state.note) == (4, 0.99, "")
