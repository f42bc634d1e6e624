"""A collection under fire: what is killed, full, late or malformed costs time, and no trajectory."""

from __future__ import annotations

import asyncio

import pytest

from envs.starter import StarterWorld
from rollout.ledger import Ledger


@pytest.mark.timeout(120)
def test_a_worker_that_is_slow_to_come_back_is_waited_for(ray_cluster, tmp_path):
    import ray

    from envs.pool import EnvSpec, start_env_hosts
    from rollout.collector import Collection, RolloutActor, missing_requests
    from rollout.episode import EpisodeSettings
    from rollout.policy_spec import PolicySpec

    class Mortal(RolloutActor):
        """Dies in its first collection, and takes its time to come back."""

        def __init__(self, spec, folder):
            import time

            if (folder / "died").exists():
                time.sleep(8)  # Ray itself bridges some seconds
            super().__init__(spec)
            self._folder = folder

        async def run(self, *arguments):
            import os

            if not (self._folder / "died").exists():
                (self._folder / "died").touch()
                os._exit(1)
            return await super().run(*arguments)

    spec, settings, ledger = PolicySpec(kind="expert"), EpisodeSettings(), tmp_path / "ledger"
    hosts = start_env_hosts(EnvSpec(), count=1, slots_per_host=4, search=None)
    actor = ray.remote(Mortal).options(num_cpus=0, max_concurrency=4, max_restarts=-1).remote(spec, tmp_path)
    tasks = StarterWorld(0).train_tasks(6, seed=0, arithmetic_share=1.0)
    requests, _ = missing_requests(tasks, policy=spec.policy_name, settings=settings, ledger=Ledger(ledger))
    collection = Collection([actor], hosts, requests, settings=settings, ledger=ledger, concurrency=4)
    try:
        while not collection.poll(timeout_s=0.05):
            pass
    finally:
        collection.close()
        for each in (actor, *hosts):
            ray.kill(each)
    assert Ledger(ledger).keys() == {request.key for request in requests}


@pytest.mark.timeout(120)
def test_an_episode_waits_for_a_host_that_is_slow_to_come_back(ray_cluster, tmp_path):
    import ray

    from envs.base import EnvError
    from envs.pool import EnvHost, EnvSpec, RemoteEnv

    class Mortal(EnvHost):
        """Dies in its first step, and takes its time to come back."""

        def __init__(self, folder):
            import time

            if (folder / "died").exists():
                time.sleep(8)
            super().__init__(EnvSpec())
            self._folder = folder

        def step(self, slot, action):
            import os

            if not (self._folder / "died").exists():
                (self._folder / "died").touch()
                os._exit(1)
            return super().step(slot, action)

    [task] = StarterWorld(0).train_tasks(1, seed=0, arithmetic_share=1.0)
    host = ray.remote(Mortal).options(num_cpus=0, max_restarts=-1).remote(tmp_path)
    env = RemoteEnv(host, 0, can_preview=True, timeout_s=60)

    async def episode():
        await env.reset(task, 0)
        with pytest.raises(EnvError, match="env host died during step"):
            await env.step("1")
        await env.reset(task, 0)
        return await env.step(f"final_answer({task.answer})")

    try:
        assert asyncio.run(episode()).reward == 1.0
    finally:
        ray.kill(host)
