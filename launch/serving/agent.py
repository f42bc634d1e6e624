"""A running agent: one policy, envs as places, and `answer`, which runs one episode for one question.

Everything is in this process but the sandboxes and, where it has one of its own, the engine. Episodes are coroutines;
searches of all of them share one `RetrievalService`. A cancelled `answer` takes its request out of the engine and frees
its sandbox. Several agents of one process would share an in-process engine's process groups: start one.

Example::

    agent = await Agent.start(plan, places=16)
    trajectory = await agent.answer(Question(text="What is 6 * 7?", settings=plan.greedy), on_step=print)
    await agent.close()
"""

from __future__ import annotations

import asyncio
import hashlib
import os
import secrets
import signal
import time
import warnings
from collections.abc import Awaitable, Callable, Sequence
from contextlib import AsyncExitStack
from dataclasses import dataclass, replace
from multiprocessing import resource_tracker
from typing import Any

from envs.base import EnvError, Task
from envs.local_envs import LocalEnvs
from launch.cluster import QUIET
from launch.serving.budget import BudgetedPolicy
from launch.serving.places import Places
from launch.serving.plan import AgentPlan
from launch.serving.search_log import SearchLog
from rollout.async_env import AsyncEnv
from rollout.episode import EpisodeSettings, run_episode
from rollout.policy import EngineDiedError, Policy
from rollout.policy_spec import PolicySpec
from rollout.trajectory import Step, Trajectory

KIND = "asked"
"""Of the tasks that are made of questions."""
_SEARCH_GRACE_S = 5.0
_LATE_S = 0.5
"""Between the end of a step and the question what it was shown, at most."""
_QUIETER = {"PYTHONWARNINGS": "ignore::FutureWarning", "TORCH_CPP_LOG_LEVEL": "ERROR"}
"""What an engine's libraries say of each other, in a process of its own."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Question:
    """One question, and how it is to be answered."""

    text: str
    settings: EpisodeSettings
    most_tokens: int | None = None
    """That may be sampled in all, over steps and candidates."""
    answer: str = ""
    """The right one, where it is known."""
    task: Task | None = None
    """The task that it is, where it is one; else one is made of the text."""
    sample_index: int | None = None
    """With the text and the settings it decides what is sampled; None draws one."""

    def as_task(self) -> Task:
        """The same question is the same task, whoever asks it."""
        digest = hashlib.sha256(self.text.encode(errors="replace")).hexdigest()[:16]
        return self.task or Task(id=f"{KIND}-{digest}", question=self.text, answer=self.answer, kind=KIND)


class Agent:
    """`policy` on `envs`; `closing` is awaited when it is closed."""

    def __init__(
        self,
        policy: Policy,
        envs: Sequence[AsyncEnv],
        *,
        line: int = 0,
        wait_s: float = 30.0,
        closing: Callable[[], Awaitable[None]] | None = None,
        searches: SearchLog | None = None,
    ) -> None:
        self.policy, self.places = policy, Places(envs, line=line, wait_s=wait_s)
        self._closing, self._searches = closing, searches
        self.died = ""
        """Why it can answer nothing any more; empty while it can."""

    @classmethod
    async def start(cls, plan: AgentPlan, *, places: int = 1, line: int = 0, wait_s: float = 30.0) -> Agent:
        """Loads the index, starts the sandbox, loads the policy. Raises `EnvError`, `PolicyError`, `ValueError`."""
        os.environ.update({**QUIET, **_QUIETER, **plan.spec.environment()})
        async with AsyncExitStack() as started:
            search = await _start_search(plan, started) if plan.retriever is not None else None
            envs = LocalEnvs(plan.env, search, count=places, timeout_s=plan.env_timeout_s)
            started.push_async_callback(envs.close)
            connected = await envs.connect()
            policy = await asyncio.to_thread(_build, plan.spec)
            started.push_async_callback(policy.close)
            closing = started.pop_all().aclose
            return cls(policy, connected, line=line, wait_s=wait_s, closing=closing, searches=search)

    async def answer(self, question: Question, *, on_step: Callable[[Step], None] | None = None) -> Trajectory:
        """One episode, as soon as there is a place for it.

        Raises `LineFull`, `WaitedTooLong`, and a `PolicyError` that ends more than this episode (a dead engine, a
        budget that is used up).
        """
        policy: Policy = self.policy
        if question.most_tokens is not None:
            policy = BudgetedPolicy(policy, most_tokens=question.most_tokens)
        task = question.as_task()
        sample = secrets.randbits(31) if question.sample_index is None else question.sample_index
        env = await self.places.take()
        try:
            trajectory = await run_episode(
                task, policy=policy, env=env, settings=question.settings, sample_index=sample, on_step=on_step
            )
        except EngineDiedError as error:
            self.died = str(error)
            raise
        finally:
            self.places.give_back(env)
        if not task.answer and not task.aliases:  # nobody knows whether it is right
            trajectory = replace(trajectory, reward=0.0, success=False)
        return trajectory

    def searches(self, step: Step) -> list[dict[str, Any]]:
        """What `step`, which has just ended, found and was shown: see `SearchLog.shown`."""
        if self._searches is None or not step.tool_calls:
            return []
        return self._searches.shown(step.observation, since_s=time.monotonic() - step.env_s - _LATE_S)

    async def close(self) -> None:
        """Free everything; what is still being answered fails. May be called twice."""
        await self.places.settled()
        closing, self._closing = self._closing, None
        if closing is not None:
            await closing()


def _build(spec: PolicySpec) -> Policy:
    """What is started here does not hear a terminal's Ctrl-C, which goes to every process of a command: an engine in a
    process of its own would end at once, under the episodes that may still come to their end."""
    resource_tracker.ensure_running()  # when it starts it lets the signal through again
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})  # inherited by threads and processes
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)  # of the engine's libraries among themselves
            return spec.build()
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


@dataclass(slots=True)
class _Search:
    """What envs call in their threads; the search itself is on the event loop."""

    service: Any
    loop: asyncio.AbstractEventLoop
    timeout_s: float

    def __call__(self, query: str, k: int) -> list[Any]:
        asked = asyncio.run_coroutine_threadsafe(self.service.search(query, k), self.loop)
        try:
            return asked.result(self.timeout_s + _SEARCH_GRACE_S)
        except TimeoutError:
            asked.cancel()
            raise EnvError(f"the search did not answer within {self.timeout_s:g} s") from None


async def _start_search(plan: AgentPlan, started: AsyncExitStack) -> SearchLog:
    from envs.retrieval.service import RetrievalService, ServiceSettings

    assert plan.retriever is not None
    retriever = await asyncio.to_thread(plan.retriever.build)
    settings = ServiceSettings(timeout_s=plan.search_timeout_s)
    service = await started.enter_async_context(RetrievalService(retriever, settings))
    search = _Search(service, asyncio.get_running_loop(), plan.search_timeout_s)
    return SearchLog(search, formatter=plan.env.search_format)
