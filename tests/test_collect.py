"""Collection: leases, resuming, a worker that records before it reports, and the expert on the real envs through
Ray."""

import asyncio

import pytest

from envs.base import EnvError, Observation, ObservationKind, StepResult, Task
from rollout.async_env import ThreadedEnv
from rollout.collector import missing_requests
from rollout.episode import EpisodeSettings
from rollout.ledger import Ledger, LedgerWriter
from rollout.policy import ScriptedPolicy
from rollout.task_feed import EpisodeRequest, EpisodeSummary, TaskFeed
from rollout.worker import RolloutWorker


def task(i: int) -> Task:
    return Task(id=f"t{i}", question=f"say {i}", answer=str(i), kind="echo")


def request(i: int, settings=None) -> EpisodeRequest:
    settings = settings or EpisodeSettings()
    return EpisodeRequest(key=settings.key(task(i), "scripted", 0), task=task(i), sample_index=0)


def summary(key: str) -> EpisodeSummary:
    return EpisodeSummary(
        key=key,
        kind="echo",
        success=True,
        stop_reason="final",
        failed=False,
        steps=1,
        completion_tokens=3,
        tool_calls=0,
    )


class EchoEnv:
    """The action is the answer; fails by our own fault as often as `failures` says."""

    can_preview = False

    def __init__(self, failures: dict[str, int] | None = None) -> None:
        self.failures = failures if failures is not None else {}

    def reset(self, task, seed):
        self.task = task
        return Observation(text=task.question), {}

    def step(self, action):
        if self.failures.get(self.task.id, 0) > 0:
            self.failures[self.task.id] -= 1
            raise EnvError("no sandbox")
        final = Observation(text=action, kind=ObservationKind.FINAL)
        return StepResult(final, float(action == self.task.answer), True, False, {"final_answer": action})

    def preview(self, actions):
        raise NotImplementedError

    def commit(self, index):
        raise NotImplementedError

    def close(self):
        pass


class LocalFeed:
    def __init__(self, feed: TaskFeed) -> None:
        self.feed = feed

    async def next(self, worker, count):
        return self.feed.next(worker, count)

    async def done(self, worker, summaries):
        self.feed.done(worker, summaries)

    async def report(self, worker, state):
        self.feed.report(worker, state)

    async def stop(self, reason):
        self.feed.stop(reason)

    async def give_back(self, worker, keys):
        self.feed.give_back(worker, keys)


class ListSink:
    def __init__(self, ledger) -> None:
        self.keys, self.ledger = [], ledger

    async def aput(self, trajectories):
        recorded = Ledger(self.ledger).keys()
        assert all(trajectory.key in recorded for trajectory in trajectories), "consumed before it was recorded"
        self.keys += [trajectory.key for trajectory in trajectories]


def answer(messages, i):
    return f"Thought: echo\nCode:\n```py\n{messages[1].content.removeprefix('say ')}\n```<end_code>"


def work(folder, requests, failures=None, slots=4):
    feed, sink = TaskFeed(requests), ListSink(folder)
    worker = RolloutWorker(
        name="w0", policy=ScriptedPolicy(answer), envs=[ThreadedEnv(EchoEnv(failures)) for _ in range(slots)],
        settings=EpisodeSettings(), feed=LocalFeed(feed), ledger=LedgerWriter(folder, writer="w0"), sink=sink,
    )  # fmt: skip
    return asyncio.run(asyncio.wait_for(worker.run(), 60)), feed, sink


def test_every_episode_is_recorded_once_before_it_is_consumed(tmp_path):
    requests = [request(i) for i in range(150)]
    recorded, feed, sink = work(tmp_path / "ledger", requests)
    assert recorded == 150
    assert Ledger(tmp_path / "ledger").keys() == {r.key for r in requests} == set(sink.keys) and len(sink.keys) == 150
    assert (feed.progress().recorded, feed.progress().succeeded, feed.progress().running) == (150, 150, 0)


def test_a_collection_run_again_does_only_what_is_missing(tmp_path):
    tasks = [task(i) for i in range(20)]
    work(tmp_path / "ledger", [request(i) for i in range(12)])
    missing, found = missing_requests(
        tasks, policy="scripted", settings=EpisodeSettings(), ledger=Ledger(tmp_path / "ledger")
    )
    assert found == 12 and [r.task.id for r in missing] == [f"t{i}" for i in range(12, 20)]
    changed, found = missing_requests(
        tasks, policy="scripted", settings=EpisodeSettings(max_steps=2), ledger=Ledger(tmp_path / "ledger")
    )
    assert found == 0 and len(changed) == 20


def test_our_failures_are_tried_again_and_then_kept_aside(tmp_path):
    recorded, feed, sink = work(tmp_path / "ledger", [request(0), request(1)], failures={"t0": 1, "t1": 99})
    ledger = Ledger(tmp_path / "ledger")
    assert recorded == 2 and ledger.keys() == {request(0).key}
    [failed] = list(ledger.failures())
    assert failed.task.id == "t1" and failed.failure is not None and failed.failure.message == "no sandbox"
    assert feed.progress().failed == 1 and sink.keys == [request(0).key]


def test_leases_of_a_dead_worker_go_back_to_the_front():
    feed = TaskFeed([request(i) for i in range(6)])
    held = feed.next("a", 3)
    assert held is not None
    feed.done("a", [summary(held[0].key)])
    assert feed.release("a", recorded_keys=[held[1].key]) == 2 and feed.progress().recorded == 2
    again = feed.next("b", 10)
    assert [r.key for r in again or []] == [held[2].key] + [request(i).key for i in range(3, 6)]


def test_a_worker_waits_while_another_may_still_give_back():
    feed = TaskFeed([request(0)])
    held = feed.next("a", 5)
    assert feed.next("b", 5) == []
    feed.done("a", [summary(held[0].key)])
    assert feed.next("b", 5) is None and feed.next("a", 5) is None


def test_a_repeated_report_counts_once():
    feed = TaskFeed([request(0)])
    feed.next("a", 1)
    feed.done("a", [summary(request(0).key)])
    feed.done("a", [summary(request(0).key)])
    assert feed.progress().recorded == 1


@pytest.mark.timeout(120)
def test_the_expert_solves_the_starter_world_through_ray_even_when_its_worker_is_killed(ray_cluster, tmp_path):
    import os
    import signal

    import ray

    from envs.pool import EnvSpec, start_env_hosts
    from envs.retrieval.corpus import Passage
    from envs.retrieval.ray_service import NamedSearch, start_retrieval_actor
    from envs.retrieval.spec import RetrieverSpec
    from envs.starter import StarterWorld
    from rollout.collector import Collection, start_rollout_actors
    from rollout.policy_spec import PolicySpec
    from rollout.trajectory_queue import TrajectoryQueue

    world = StarterWorld(0)
    passages = tuple(Passage(id=i, title=title, text=text) for i, title, text in world.passages())
    retrieval = start_retrieval_actor(RetrieverSpec(kind="bm25", passages=passages), name="collect-test")
    hosts = start_env_hosts(EnvSpec(), count=1, slots_per_host=16, search=NamedSearch("collect-test", 60))
    spec, settings = PolicySpec(kind="expert"), EpisodeSettings()
    workers = start_rollout_actors(spec, count=1)
    queue = TrajectoryQueue.create(50)
    tasks = world.train_tasks(300, seed=0)
    requests, _ = missing_requests(tasks, policy=spec.policy_name, settings=settings, ledger=Ledger(tmp_path))
    collection = Collection(workers, hosts, requests, settings=settings, ledger=tmp_path, queue=queue, concurrency=16)
    arrived, killed = [], False
    try:
        while not collection.poll(timeout_s=0.2):
            arrived += queue.get(100, 0.2) or []
            if not killed and 20 < collection.progress().recorded < 250:
                os.kill(ray.get(workers[0].pid.remote(), timeout=10), signal.SIGKILL)
                killed = True
        queue.close()
        while (more := queue.get(100, 5)) is not None:
            arrived += more
    finally:
        collection.close()
        for actor in (retrieval, *hosts, *workers):
            ray.kill(actor)
        queue.kill()
    assert killed
    trajectories = list(Ledger(tmp_path).trajectories())
    assert {t.key for t in trajectories} == {r.key for r in requests} and len(trajectories) == 300
    assert Ledger(tmp_path).duplicates() == 0
    assert sum(t.success for t in trajectories) >= 297
    # What the dead worker had recorded but not handed over is found in the ledger (launch.source looks there last).
    assert {t.key for t in arrived} <= {t.key for t in trajectories} and len({t.key for t in arrived}) == len(
        arrived
    ) >= 200
