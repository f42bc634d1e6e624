"""Workers that come and go while a collection runs: what the feed, a worker and a fleet do about it, and, in a program
of its own, a cluster of several nodes that join, die, and are drained."""

from __future__ import annotations

import asyncio
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import psutil
import pytest
from test_collect import EchoEnv, LocalFeed, answer, request, summary

from launch.config import RolloutConfig, TeacherShare
from rollout.async_env import ThreadedEnv
from rollout.episode import EpisodeSettings
from rollout.ledger import Ledger, LedgerWriter
from rollout.node_watch import changed
from rollout.placement_fit import Node
from rollout.policy import ScriptedPolicy
from rollout.policy_spec import PolicySpec
from rollout.task_feed import NotJoinedError, TaskFeed
from rollout.worker import RolloutWorker

ROOT = Path(__file__).resolve().parent.parent


class SlowPolicy(ScriptedPolicy):
    """Answers the first question at once, and holds back on the others until `go`."""

    def __init__(self) -> None:
        super().__init__(answer)
        self.go, self.asked = asyncio.Event(), 0

    async def complete(self, messages, sampling, *, prefix=""):
        self.asked += 1
        if messages[1].content != "say 0":
            await self.go.wait()
        return await super().complete(messages, sampling, prefix=prefix)


def worker(folder, feed, policy, *, slots, **more):
    return RolloutWorker(
        name="w0", policy=policy, envs=[ThreadedEnv(EchoEnv()) for _ in range(slots)], settings=EpisodeSettings(),
        feed=LocalFeed(feed), ledger=LedgerWriter(folder, writer="w0"), **more,
    )  # fmt: skip


def keys(requests):
    return [each.key for each in requests or []]


async def until(true):
    async with asyncio.timeout(30):
        while not true():
            await asyncio.sleep(0.01)


# -- a worker that is drained


def test_a_drained_worker_gives_back_at_once_what_it_has_not_begun(tmp_path):
    async def scene():
        policy, feed = SlowPolicy(), TaskFeed([request(i) for i in range(40)])
        drained = worker(tmp_path, feed, policy, slots=8)
        running = asyncio.create_task(drained.run())
        await until(lambda: policy.asked >= 8 and feed.progress().recorded == 1)
        begun = policy.asked
        await drained.drain(30)
        assert feed.held("w0") == begun - 1, "what has not begun is with the feed again"
        policy.go.set()
        assert await asyncio.wait_for(running, 30) == begun, "what had begun is recorded"
        assert len(feed.next("w1", 100) or []) == 40 - begun

    asyncio.run(scene())


def test_a_drained_worker_gives_up_what_does_not_end_in_time(tmp_path):
    async def scene():
        policy, feed = SlowPolicy(), TaskFeed([request(i) for i in range(12)])
        drained = worker(tmp_path, feed, policy, slots=4)
        running = asyncio.create_task(drained.run())
        await until(lambda: policy.asked >= 5 and feed.progress().recorded == 1)
        await drained.drain(0.05)
        assert await asyncio.wait_for(running, 30) == 1
        assert Ledger(tmp_path).keys() == {request(0).key}
        assert sorted(keys(feed.next("w1", 100))) == sorted(request(i).key for i in range(1, 12))

    asyncio.run(scene())


# -- a worker that was taken for dead


def test_a_worker_that_was_taken_for_dead_may_not_record_what_others_have():
    feed = TaskFeed([request(i) for i in range(3)])
    held = keys(feed.next("w0", 2))
    assert feed.may_record("w0", held[:1]) == []
    assert feed.retire("w0"), "it is recording: it may be in the ledger a moment later"
    feed.release("w0", recorded_keys=held[:1])
    assert feed.may_record("w0", held) == held
    assert feed.next("w0", 5) is None and keys(feed.next("w1", 5)) == [held[1], request(2).key]
    assert not feed.retire("w1")


def test_a_worker_records_only_what_is_still_its_own(tmp_path):
    async def but_the_first(trajectories):
        return [each for each in trajectories if each.key != request(0).key]

    feed = TaskFeed([request(i) for i in range(6)])
    each = worker(tmp_path, feed, ScriptedPolicy(answer), slots=2, still_ours=but_the_first)
    assert asyncio.run(asyncio.wait_for(each.run(), 30)) == 5
    assert Ledger(tmp_path).keys() == {request(i).key for i in range(1, 6)}


# -- a feed that was lost


def test_a_feed_that_is_made_again_gives_nothing_away_that_a_worker_holds():
    feed = TaskFeed([request(i) for i in range(1, 5)], recorded=[summary(request(0).key)], awaited=["w0", "w1"])
    assert feed.next("w9", 5) == [], "somebody may hold it"
    with pytest.raises(NotJoinedError):
        feed.next("w0", 5)
    assert feed.join("w0", [request(2).key, request(0).key]) == [request(0).key], "that is recorded already"
    feed.release("w1")
    assert keys(feed.next("w9", 5)) == [request(i).key for i in (1, 3, 4)]
    feed.done("w0", [summary(request(2).key)])
    progress = feed.progress()
    assert (progress.total, progress.recorded, progress.running, progress.waiting) == (5, 2, 3, 0)


def test_workers_that_do_not_come_back_to_a_feed_are_waited_for_no_longer_than_its_limit():
    feed = TaskFeed([request(0)], awaited=["w0"], join_s=0.0)
    assert keys(feed.next("w1", 5)) == [request(0).key]
    assert feed.join("w0", [request(0).key]) == [request(0).key], "another has it now"


# -- nodes


def test_what_became_of_the_nodes_is_told_once():
    a, b, c = (Node(name=name, key=name * 8, total={"CPU": 1}) for name in "abc")
    first = changed(None, [a, b], {})
    assert not first.joined and not first.lost
    then = changed(first, [b, c], {b.key: 20.0, "gone": 5.0})
    assert (then.joined, then.lost, then.notices, then.staying) == ((c,), (a,), (b,), (c,))
    later = changed(then, [b, c], {b.key: 10.0})
    assert not (later.joined or later.lost or later.notices) and later.draining == {b.key: 10.0}


# -- the configuration


@pytest.mark.parametrize(
    ("make", "told"),
    [
        (lambda: RolloutConfig(workers=3, max_workers=2), "max_workers=2 must not be less than workers=3"),
        (lambda: RolloutConfig(min_workers=2), "min_workers=2 must not be more than workers=1"),
        (lambda: RolloutConfig(min_workers=0), "min_workers=0 must be at least 1"),
        (
            lambda: TeacherShare(teacher=PolicySpec(kind="expert"), workers=4, max_workers=3),
            "max_workers=3 must not be less than workers=4",
        ),
    ],
)  # fmt: skip
def test_numbers_of_workers_that_cannot_be_are_refused(make, told):
    with pytest.raises(ValueError, match=told):
        make()


# -- all of it


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_nodes_join_die_and_leave_under_a_collection_and_every_episode_is_recorded_once(tmp_path):
    with tempfile.TemporaryDirectory(prefix="ray-") as ray_folder:
        environment = {**os.environ, "RAY_TMPDIR": ray_folder, "OMP_NUM_THREADS": "1"}
        command = [sys.executable, "tests/elastic_nodes.py", str(tmp_path)]
        program = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=580)
        print(program.stderr[-4000:])
        assert program.returncode == 0
        left = [each for each in psutil.process_iter(["pid"]) if _of(each, ray_folder)]
        _, left = psutil.wait_procs(left, timeout=20)
        assert not left
    found = json.loads(program.stdout.splitlines()[-1])
    print({name: value for name, value in found.items() if name.endswith("_s")})
    assert (found["missing"], found["duplicates"], found["failures"], found["valid"]) == (0, 0, 0, True)
    assert found["keys"] == found["expected"] == found["progress"]["recorded"]
    assert found["begun_after_the_notice_was_seen"] == 0 and not found["died_while_draining"]
    # Wide limits, since the machine may be busy: it must be far from the minutes that a dead worker is waited for.
    assert found["join_s"]["has_work"] < 60 and found["lost_s"] < 90 and found["drain_s"]["drained"] < 60


def _of(process, ray_folder):
    try:
        return process.environ().get("RAY_TMPDIR") == ray_folder
    except psutil.Error:
        return False
