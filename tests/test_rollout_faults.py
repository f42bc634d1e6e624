"""A collection under fire: what is killed, full, late or malformed costs time, and no trajectory."""

from __future__ import annotations

import asyncio
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
from fault_injection import Faults, SmallDisk
from fault_server import FAULTS, FaultServer
from job_processes import MARK, assert_nothing_left, start_marked

from envs.starter import StarterWorld
from launch.config import CollectConfig
from launch.config_reading import load_config
from launch.events import read_events
from launch.world import load_world
from learner.base_student import BASE_STUDENT_FOLDER
from rollout.expert import ExpertPolicy
from rollout.ledger import Ledger
from rollout.policy import Sampling
from rollout.trajectory import FailureClass, Message

KEY = "sk-faults-0f9e8d7c6b5a49382716"
TOOL_S = 3.0
HANGING_SERVER = """
import json, sys, time

hung = False
for line in sys.stdin:
    message = json.loads(line)
    method, number = message.get("method"), message.get("id")
    if method == "initialize":
        result = {"protocolVersion": "2025-06-18", "capabilities": {"tools": {}},
                  "serverInfo": {"name": "hanging", "version": "1"}}
    elif method == "tools/list":
        schema = {"type": "object", "properties": {"what": {"type": "string"}}, "required": ["what"]}
        result = {"tools": [{"name": "look_up", "inputSchema": schema}]}
    elif method == "tools/call":
        hung = True
        continue
    else:
        continue
    print(json.dumps({"jsonrpc": "2.0", "id": number, "result": result}), flush=True)
if hung:
    time.sleep(600)
"""
"""An MCP server whose tool never answers, and that does not end with its input then."""


class Teacher:
    """The expert behind an API. Asked some questions, it first calls a tool that hangs: each time, or but once."""

    def __init__(self, *, always: set[str], once: set[str]) -> None:
        self._expert, self._always, self._once = ExpertPolicy(), always, set(once)

    def __call__(self, request: Mapping[str, Any]) -> str:
        messages = [Message(role=each["role"], content=each["content"]) for each in request["messages"]]
        question = messages[1].content
        if len(messages) == 2 and (question in self._always or question in self._once):
            self._once.discard(question)
            return "Thought: Look it up.\nCode:\n```py\nprint(look_up('it'))\n```<end_code>"
        turn = self._expert.complete(messages, Sampling())
        try:
            turn.send(None)
        except StopIteration as ended:  # it waits for nothing
            return ended.value[0].text
        raise AssertionError


@pytest.mark.slow
@pytest.mark.timeout(400)
def test_a_collection_under_fire_ends_with_every_key_once(tmp_path):
    seed = int(os.environ.get("FAULT_SEED", "0"))
    script, output, scratch = tmp_path / "hanging.py", tmp_path / "output.txt", tmp_path / "scratch"
    script.write_text(HANGING_SERVER)
    disk = SmallDisk(tmp_path / "out", kept=tmp_path / "kept", megabytes=48)
    server_environment = f"{{{MARK}:'{tmp_path}'}}"
    overrides = [
        f"out={disk.folder}", f"scratch={scratch}", "tasks.train_count=520", "tasks.test_count=1",
        "retrieval.kind=bm25", "teacher=openai", "teacher.model=m", "teacher.api_key_env=FAULT_TEST_KEY",
        "teacher.timeout_s=4", "rollout.workers=2", "rollout.concurrency=24", "rollout.env_hosts=2",
        "rollout.env_timeout_s=60", f"env.limits.tool_s={TOOL_S}",
        f"env.mcp_servers=[{{command:['{sys.executable}','{script}'],env:{server_environment}}}]",
    ]  # fmt: skip
    config = load_config([*overrides, "teacher.base_url=http://127.0.0.1/v1"], CollectConfig)
    tasks = load_world(config, scratch).train
    expected = {config.episode.key(task, "m", 0): task for task in tasks}
    always, once = {task.question for task in tasks[::65]}, {task.question for task in tasks[1::40]}
    faults = Faults(seed, kills={"ray::EnvHost": 3, "ray::RolloutActor": 1})
    with (
        tempfile.TemporaryDirectory(prefix="ray-") as ray_folder,
        FaultServer(Teacher(always=always, once=once), share=0.3, seed=seed, slow_s=6.0, key=KEY) as server,
        open(output, "wb") as out,
    ):
        command = [sys.executable, "launch/collect.py", *overrides, f"teacher.base_url={server.base_url}"]
        environment = {"FAULT_TEST_KEY": KEY, "RAY_TMPDIR": ray_folder}
        job = start_marked(disk.command(command), tmp_path, output=out, environment=environment)
        ledger = disk.seen_from_outside(job) / "ledger"

        def done() -> float:
            try:
                return Ledger(ledger).count() / len(expected)
            except OSError:  # the job has ended, and its disk with it
                return 0.0

        try:
            faults.run(job, tmp_path, done=done, disk=disk)
        finally:
            job.kill()
            job.wait(10)
        assert_nothing_left(tmp_path)
        logs = {path: path.read_bytes() for path in Path(ray_folder).rglob("*") if path.is_file()}
    said = output.read_text()
    print(said, dict(faults.done), dict(server.faults_injected), f"{server.requests} requests")
    assert job.returncode == 0

    # What was injected really was.
    assert faults.done["ray::EnvHost"] >= 2 and faults.done["ray::RolloutActor"] >= 2 and faults.done["full disk"] == 1
    assert set(server.faults_injected) == set(FAULTS)

    # Exactly the expected keys, each once.
    ledger = Ledger(disk.kept / "ledger")
    assert ledger.validate().ok and ledger.duplicates() == 0
    results, failures = list(ledger.trajectories()), list(ledger.failures())
    keys, failed = {each.key for each in results}, {each.key for each in failures}
    assert keys | failed == set(expected) and not keys & failed and len(failures) == len(failed)
    assert sum(each.success for each in results) >= 0.99 * len(results)

    # Failures are classified, and name their cause.
    hopeless = {key for key, task in expected.items() if task.question in always}
    assert hopeless <= failed and len(failed - hopeless) <= 5
    for each in failures:
        assert each.failure is not None and each.failure.message
        if each.key in hopeless and "look_up" in each.failure.message:
            assert each.failure.failure_class is FailureClass.ENVIRONMENT
            assert f"tool look_up did not answer in {TOOL_S:g} s" in each.failure.message
    assert sum("look_up" in each.failure.message for each in failures if each.failure) >= len(hopeless) // 2

    # And it says so.
    assert {"rollout worker", "env host"} <= {event.what for event in read_events(disk.kept)}
    summary = json.loads((disk.kept / "summary.json").read_text())
    assert (summary["expected"], summary["recorded"], sum(summary["failed"].values())) == (
        len(expected), len(keys), len(failed)
    )  # fmt: skip
    assert (summary["missing"], summary["duplicates"], summary["complete"]) == (0, 0, True)
    assert f"{len(expected)} episodes = {len(keys)} recorded + {len(failed)} failed (" in said
    assert "each once: every episode is accounted for" in said

    # Nobody who reads a log learns what was asked, or with which key.
    logs |= {path: path.read_bytes() for path in scratch.rglob("*") if path.is_file()}
    logs |= {path: path.read_bytes() for path in (*disk.kept.glob("*.json*"), output)}
    assert any("worker" in path.name for path in logs) and disk.kept / "spend.jsonl" in logs
    secrets = [KEY[:12], KEY[-12:], results[0].system_prompt[:40], *(task.question[:24] for task in tasks)]
    for path, text in logs.items():
        assert not [secret for secret in secrets if secret.encode() in text], path


@pytest.mark.slow
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
def test_an_engine_that_worked_before_is_loaded_again_when_that_fails_once(ray_cluster, tmp_path):
    import ray

    from envs.pool import EnvSpec, start_env_hosts
    from rollout.collector import Collection, CollectionError, RolloutActor, missing_requests
    from rollout.episode import EpisodeSettings
    from rollout.policy_spec import PolicySpec

    class Mortal(RolloutActor):
        """`fates`, one a process: "dies" once something is recorded, "fails" to load, "works"."""

        def __init__(self, spec, folder, fates):
            super().__init__(spec)
            (folder / "processes").mkdir(exist_ok=True)
            self._fate = fates[len(list((folder / "processes").iterdir()))]
            (folder / "processes" / str(os.getpid())).touch()

        def _build(self, weights):
            from rollout.policy import PolicyError
            from rollout.trajectory import FailureClass

            if self._fate == "fails":
                raise PolicyError("cannot load the model", FailureClass.INPUT)  # as `VllmPolicy` does
            return super()._build(weights)

        async def run(self, *arguments):
            running = asyncio.create_task(super().run(*arguments))
            while self._fate == "dies":
                await asyncio.sleep(0.02)
                if Ledger(arguments[4]).keys():
                    os._exit(1)
            return await running

    spec, settings = PolicySpec(kind="expert"), EpisodeSettings()
    hosts = start_env_hosts(EnvSpec(), count=1, slots_per_host=2, search=None)
    tasks = StarterWorld(0).train_tasks(200, seed=0, arithmetic_share=1.0)

    def collect(name, fates):
        (tmp_path / name).mkdir()
        ledger = tmp_path / name / "ledger"
        actor = ray.remote(Mortal).options(num_cpus=0, max_concurrency=4, max_restarts=-1).remote(
            spec, tmp_path / name, fates
        )  # fmt: skip
        requests, _ = missing_requests(tasks, policy=spec.policy_name, settings=settings, ledger=Ledger(ledger))
        collection = Collection([actor], hosts, requests, settings=settings, ledger=ledger, concurrency=2)
        try:
            while not collection.poll(timeout_s=0.05):
                pass
        finally:
            collection.close()
            ray.kill(actor)
        return Ledger(ledger).keys() == {request.key for request in requests}

    try:
        assert collect("again", ["dies", "fails", "works"])
        with pytest.raises(CollectionError, match="rollout worker 0: PolicyError: cannot load the model"):
            collect("never", ["fails", "works"])
    finally:
        ray.kill(hosts[0])


@pytest.mark.slow
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


class VllmJob:
    """`launch/collect.py` with the student as teacher, on vLLM: 500 short episodes."""

    def __init__(self, folder: Path, engine: str) -> None:
        self.folder, self.out = folder, folder / "out"
        self.overrides = [
            f"out={self.out}", "tasks.train_count=500", "tasks.test_count=1", "retrieval.kind=none",
            "teacher=vllm", f"teacher.model={BASE_STUDENT_FOLDER}", f"teacher.engine={engine}", "teacher.name=m",
            "teacher.max_model_len=1024", "teacher.kv_cache_bytes=67108864", "rollout.concurrency=16",
            "episode.max_steps=2", "episode.max_tokens=24",
        ]  # fmt: skip
        config = load_config(self.overrides, CollectConfig)
        tasks = load_world(config, folder).train
        self.expected = {config.episode.key(task, "m", 0) for task in tasks}
        self.output = folder / "output.txt"

    def start(self) -> subprocess.Popen[str]:
        with open(self.output, "wb") as output:
            return start_marked([sys.executable, "launch/collect.py", *self.overrides], self.folder, output=output)

    def share(self) -> float:
        return Ledger(self.out / "ledger").count() / len(self.expected)


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize(("engine", "dies"), [("own_process", "VLLM::"), ("in_process", "ray::RolloutActor")])
def test_engine_and_driver_are_killed_and_the_same_command_does_what_is_missing(tmp_path, engine, dies):
    pytest.importorskip("vllm")
    seed = int(os.environ.get("FAULT_SEED", "0"))
    job = VllmJob(tmp_path, engine)
    first = job.start()

    def until_half() -> float:
        share = job.share()
        if share >= 0.5:
            first.kill()
        return share

    faults = Faults(seed, kills={dies: 2}, latest=0.35)
    faults.run(first, tmp_path, done=until_half)
    print(job.output.read_text())
    assert first.returncode == -9 and faults.done[dies] == 2
    assert_nothing_left(tmp_path)
    ledger = Ledger(job.out / "ledger")
    before = ledger.keys()
    assert 0.5 <= len(before) / len(job.expected) < 1 and ledger.duplicates() == 0

    again = job.start()
    # A first engine that cannot be loaded ends the job, so it dies when it has shown that it can work.
    had = len(before) / len(job.expected)
    faults = Faults(seed + 1, kills={dies: 1}, earliest=had + 0.01, latest=(had + 1) / 2)
    faults.run(again, tmp_path, done=job.share)
    said = job.output.read_text()
    print(said)
    assert again.returncode == 0 and faults.done[dies] == 1
    assert_nothing_left(tmp_path)
    assert f"500 episodes, {len(before)} recorded by an earlier job" in said
    ledger = Ledger(job.out / "ledger")
    assert ledger.keys() == job.expected and before < job.expected
    assert ledger.duplicates() == 0 and not list(ledger.failures()) and ledger.validate().ok
    assert "500 episodes = 500 recorded, each once: every episode is accounted for" in said
