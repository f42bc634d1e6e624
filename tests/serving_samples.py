"""A real server on loopback around a scripted agent, for the tests of `launch.serving`."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Coroutine, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import httpx
from openai import AsyncOpenAI, DefaultAsyncHttpxClient

from envs.base import Task
from envs.pool import EnvHost, EnvSpec
from launch.config_reading import load_config, to_plain
from launch.run_folder import write_json
from launch.serving.agent import Agent
from launch.serving.lifecycle import listen, server_for, url_of
from launch.serving.plan import AgentPlan
from launch.serving.recorder import Recorder
from launch.serving.search_log import SearchLog
from launch.serving.service import Service, ServiceSettings
from launch.world import load_world
from rollout.async_env import ThreadedEnv
from rollout.episode import EpisodeSettings
from rollout.policy import Policy, Sampling, ScriptedPolicy
from rollout.policy_spec import PolicySpec
from rollout.trajectory import Completion, Message

T = TypeVar("T")
MODEL = "small"
ASKED = "What is 6 times 7?"


def code(body: str, thought: str = "think") -> str:
    return f"Thought: {thought}\nCode:\n```py\n{body}\n```<end_code>"


def in_order(*bodies: str) -> Callable[[Sequence[Message], int], str]:
    """Turn i says body i."""
    return lambda messages, i: code(bodies[sum(m.role == "assistant" for m in messages)])


TWO_STEPS = in_order("print(6 * 7)", "final_answer(42)")


class GatedPolicy(ScriptedPolicy):
    """Each turn waits until `gates` has one for it; `cancelled` counts turns that were given up."""

    def __init__(self, reply: Callable[[Sequence[Message], int], str] = TWO_STEPS) -> None:
        super().__init__(reply)
        self.gates = asyncio.Semaphore(0)
        self.asked = self.cancelled = 0

    async def complete(self, messages: Sequence[Message], sampling: Sampling, *, prefix: str = "") -> list[Completion]:
        self.asked += 1
        try:
            await self.gates.acquire()
        except asyncio.CancelledError:
            self.cancelled += 1
            raise
        return await super().complete(messages, sampling, prefix=prefix)


@dataclass(frozen=True, slots=True)
class Served:
    """A service that answers."""

    service: Service
    url: str
    client: AsyncOpenAI
    http: httpx.AsyncClient

    async def ask(self, text: str = ASKED, **changes: Any) -> Any:
        """Through the openai client; `changes` of ours go into the body."""
        ours = {
            name: changes.pop(name) for name in ("candidates", "max_steps", "trajectory", "steps") if name in changes
        }
        return await self.client.chat.completions.create(
            model=MODEL, messages=[{"role": "user", "content": text}], extra_body=ours or None, **changes
        )

    async def post(self, body: Any, **more: Any) -> httpx.Response:
        return await self.http.post("/v1/chat/completions", json=body, **more)

    async def until(self, holds: Callable[[], bool]) -> None:
        async with asyncio.timeout(100):
            while not holds():
                await asyncio.sleep(0.005)


def small_plan(**changes: Any) -> AgentPlan:
    greedy = EpisodeSettings(max_tokens=64)
    voting = EpisodeSettings(max_tokens=64, temperature=0.7, candidates=4)
    given = {"name": MODEL, "spec": PolicySpec(kind="expert"), "env": EnvSpec(), "retriever": None}
    return AgentPlan(**{**given, "greedy": greedy, "voting": voting, **changes})


@asynccontextmanager
async def serving(
    host: EnvHost,
    policy: Policy | Callable[[Sequence[Message], int], str] = TWO_STEPS,
    *,
    ready: bool = True,
    record: Callable[[Service], Recorder] | None = None,
    searches: SearchLog | None = None,
    **settings: Any,
) -> AsyncIterator[Served]:
    """A server on a free port of loopback until the block ends; `settings` are those of `ServiceSettings`."""
    chosen = ServiceSettings(**{"model": MODEL, "places": 2, "hosts": ("127.0.0.1",), **settings})
    service = Service(small_plan(), chosen)
    service.recorder = record(service) if record is not None else None
    if ready:
        acting = policy if isinstance(policy, Policy) else ScriptedPolicy(policy)
        envs = [ThreadedEnv(host.make()) for _ in range(chosen.places)]
        service.ready(Agent(acting, envs, line=chosen.line, wait_s=chosen.wait_s, searches=searches))
    server, bound = server_for(service), listen("127.0.0.1", 0)
    url = url_of(bound, "127.0.0.1")
    running = asyncio.create_task(server.serve(sockets=[bound]))
    try:
        plain = DefaultAsyncHttpxClient(verify=False)  # certificates take long to load and there are none
        async with (
            httpx.AsyncClient(base_url=url, timeout=20, verify=False) as http,
            AsyncOpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0, timeout=20, http_client=plain) as client,
        ):
            async with asyncio.timeout(30):
                while not server.started:
                    await asyncio.sleep(0.005)
            yield Served(service, url, client, http)
    finally:
        server.should_exit = True
        await asyncio.wait_for(running, 20)
        await service.close()
        bound.close()


def write_run(folder: Path) -> list[Task]:
    """A finished run's folder without a student, whose tasks need no search; returns its held-out tasks."""
    overrides = ["retrieval.kind=none", "tasks.train_count=1", "tasks.test_count=2", f"run_dir={folder}"]
    config = load_config([*overrides, "env.modules=[math]"])
    folder.mkdir(parents=True)
    write_json(folder / "config.json", to_plain(config))
    write_json(folder / "results.json", {})
    return load_world(config, folder / "index").test


def run(scenario: Coroutine[Any, Any, T], *, limit_s: float = 80.0) -> T:
    return asyncio.run(asyncio.wait_for(scenario, limit_s))
