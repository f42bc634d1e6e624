"""The service behind the endpoint: what state it is in, and the episodes under way; no HTTP in here.

loading -> ready -> draining, or failed when the agent cannot be started or its engine dies. An `Episode` is one answer
in the making, whose steps can be waited for; abandoning it frees its place.

Example::

    episode = service.begin(question)              # ApiError 503 unless ready
    while (step := await episode.next(timeout_s=15)) is not None: ...
    trajectory = episode.result()                  # or ApiError
"""

from __future__ import annotations

import asyncio
import logging
import time
from dataclasses import dataclass, field, replace
from enum import StrEnum
from typing import Any

from launch.serving import api_errors
from launch.serving.agent import Agent, Question
from launch.serving.api_errors import ApiError, invalid
from launch.serving.chat_request import ChatRequest, StepsIn
from launch.serving.places import NoPlace
from launch.serving.plan import AgentPlan
from launch.serving.recorder import Recorder
from launch.serving.service_metrics import ServiceMetrics
from rollout.policy import EngineDiedError, PolicyError
from rollout.redaction import Redactor
from rollout.trajectory import Step, Trajectory

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class ServiceSettings:
    """Limits and defaults of a service."""

    model: str
    """What clients call it."""
    candidates: int = 1
    """Candidate actions a step where a request names no number."""
    history: int = 0
    """Earlier messages of a conversation that are put in front of the question."""
    steps: StepsIn = "reasoning"
    """Where steps are told when a request does not say."""
    places: int = 16
    """Episodes at a time."""
    line: int = 64
    """Requests that may wait for a place."""
    wait_s: float = 30.0
    """How long each of them does."""
    deadline_s: float = 300.0
    """Of an episode."""
    keep_alive_s: float = 15.0
    """A stream in which nothing happens gets a comment so often."""
    body_s: float = 30.0
    """A request's body has to be there by then."""
    max_body_bytes: int = 1 << 20
    key: str = field(default="", repr=False)
    """Wanted as `Authorization: Bearer <key>` when it is not empty."""
    hosts: tuple[str, ...] = ()
    """Names by which it may be called (the Host header, without a port); empty: any."""
    origins: tuple[str, ...] = ()
    """Web pages of other origins that may call it from a browser."""

    def __post_init__(self) -> None:
        for name in ("candidates", "places", "wait_s", "deadline_s", "keep_alive_s", "body_s", "max_body_bytes"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name} must be above 0, not {getattr(self, name)}")
        for name in ("history", "line"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name} must not be negative, as {getattr(self, name)} is")


class State(StrEnum):
    LOADING = "loading"
    READY = "ready"
    DRAINING = "draining"
    FAILED = "failed"


class Service:
    """Answers questions with one agent, once `ready` was told which."""

    def __init__(self, plan: AgentPlan, settings: ServiceSettings, *, recorder: Recorder | None = None,
                 metrics: ServiceMetrics | None = None) -> None:  # fmt: skip
        self.plan, self.settings, self.recorder = plan, settings, recorder
        self.metrics = metrics or ServiceMetrics()
        self.state = State.LOADING
        self.failed = asyncio.Event()
        self.started_at_s = int(time.time())
        self._agent: Agent | None = None
        self._episodes: set[Episode] = set()
        self._idle = asyncio.Event()
        self._idle.set()
        gauge = self.metrics.gauge
        gauge("ready", "1 when it answers questions", lambda: float(self.state is State.READY))
        gauge("places", "episodes that may run at a time", lambda: float(settings.places))
        gauge("running", "episodes that hold a place", lambda: float(self.running))
        gauge("waiting", "requests that wait for a place", lambda: float(self.waiting))
        gauge("engine_kv_usage_ratio", "share of the engine's KV cache that is held", self._kv_usage)

    def ready(self, agent: Agent) -> None:
        self._agent, self.state = agent, State.READY

    @property
    def running(self) -> int:
        return self._agent.places.running if self._agent is not None else 0

    @property
    def waiting(self) -> int:
        return self._agent.places.waiting if self._agent is not None else 0

    def question(self, asked: ChatRequest) -> Question:
        """What a request asks of the agent. Raises `ApiError` of status 400 or 404."""
        plan = self.plan
        if asked.model not in (None, self.settings.model):
            message = f"the model {asked.model!r:.100} is not served here; there is {self.settings.model!r}"
            raise ApiError(404, message, param="model", code="model_not_found")
        text = asked.question(history=self.settings.history)
        if len(text) > plan.most_characters:
            message = f"the question has {len(text)} characters; {plan.most_characters} are the most that could fit"
            raise invalid(message, param="messages", code="context_length_exceeded")
        if asked.max_steps is not None and asked.max_steps > plan.greedy.max_steps:
            message = f"max_steps: this agent takes {plan.greedy.max_steps} steps at most, not {asked.max_steps}"
            raise invalid(message, param="max_steps")
        given = {"temperature": asked.temperature, "top_p": asked.top_p, "top_k": asked.top_k}
        given |= {"max_steps": asked.max_steps, "seed": asked.seed}
        changes = {name: value for name, value in given.items() if value is not None}
        try:
            settings = plan.settings(asked.candidates or self.settings.candidates)
            kept = self.recorder is not None  # a ledger keeps log-probabilities; nobody else asks for them
            settings = replace(settings, deadline_s=self.settings.deadline_s, logprobs=kept, **changes)
        except ValueError as error:
            raise invalid(str(error)) from None
        sample = None if asked.seed is None else 0
        return Question(text=text, settings=settings, most_tokens=asked.most_tokens, sample_index=sample)

    def begin(self, question: Question) -> Episode:
        """Raises `ApiError` of status 503 when it cannot be answered."""
        if self.state is State.DRAINING:
            raise api_errors.shutting_down()
        if self.state is State.LOADING or self._agent is None:
            raise ApiError(503, "the model is being loaded; try again in some seconds", code="loading", retry_s=5)
        if self.state is State.FAILED:
            raise ApiError(503, "the engine has died; the server must be started again", code="engine_died")
        episode = Episode(self, self._agent, question)
        self._episodes.add(episode)
        self._idle.clear()
        return episode

    def over(self, episode: Episode) -> None:
        """It has ended; called by the episode."""
        self._episodes.discard(episode)
        if not self._episodes:
            self._idle.set()

    def fail(self) -> None:
        if self.state is not State.FAILED:
            logger.error("the engine has died: the server ends")
        self.state = State.FAILED
        self.failed.set()

    async def drain(self, limit_s: float) -> int:
        """Take no more questions; wait for what is under way, then end it. Returns how many were cut off."""
        if self.state is not State.FAILED:
            self.state = State.DRAINING
        try:
            async with asyncio.timeout(limit_s):
                await self._idle.wait()
        except TimeoutError:
            pass
        cut = list(self._episodes)
        for episode in cut:
            episode.abandon(api_errors.shutting_down())
        return len(cut)

    async def close(self) -> None:
        """End the agent, and write what is to be recorded."""
        agent, self._agent = self._agent, None
        if agent is not None:
            await agent.close()
        if self.recorder is not None:
            await self.recorder.close()

    def _kv_usage(self) -> float:
        pressure = getattr(self._agent.policy, "pressure", None) if self._agent is not None else None
        return pressure().kv_usage if pressure is not None else 0.0


class Episode:
    """An answer in the making. Whoever begins it takes its steps until there are no more, or abandons it."""

    def __init__(self, service: Service, agent: Agent, question: Question) -> None:
        self._service = service
        self._events: asyncio.Queue[Step | None] = asyncio.Queue()
        self._why: ApiError | None = None
        self._agent = agent
        self.searches: list[list[dict[str, Any]]] = []
        """Of each step that has ended."""
        self._asked_s = time.monotonic()
        self._task = asyncio.create_task(agent.answer(question, on_step=self._on_step))
        self._task.add_done_callback(self._over)

    async def next(self, *, timeout_s: float) -> Step | None:
        """The next step; None when there are no more. Raises `TimeoutError`."""
        async with asyncio.timeout(timeout_s):
            return await self._events.get()

    async def finished(self) -> None:
        """Until there are no more steps."""
        await asyncio.wait([self._task])

    def abandon(self, why: ApiError | None = None) -> None:
        """Nobody waits for it any more, or it has to go; its place becomes free."""
        self._why = self._why or why
        self._task.cancel()

    def result(self) -> Trajectory:
        """Once there are no more steps. Raises `ApiError` when it has no answer to give."""
        if self._task.cancelled():
            raise self._why or api_errors.shutting_down()
        error = self._task.exception()
        if isinstance(error, NoPlace):
            raise api_errors.from_no_place(error)
        if isinstance(error, PolicyError):
            raise api_errors.from_policy(error)
        if error is not None:
            raise error
        trajectory = self._task.result()
        if (told := api_errors.from_trajectory(trajectory)) is not None:
            raise told
        return trajectory

    def _on_step(self, step: Step) -> None:
        self._service.metrics.step(step)
        self.searches.append(self._agent.searches(step))
        self._events.put_nowait(step)

    def _over(self, task: asyncio.Task[Trajectory]) -> None:
        self._events.put_nowait(None)
        self._service.over(self)
        if task.cancelled():
            return
        error = task.exception()
        if isinstance(error, EngineDiedError):
            self._service.fail()
        if error is None:
            trajectory = task.result()
            self._service.metrics.episode(trajectory)
            if (failure := trajectory.failure) is not None:
                reason = Redactor()(failure.message, [trajectory.task.question])
                logger.warning("an episode failed (%s): %s", failure.failure_class.value, reason)
            self._service.metrics.line_s.observe(max(time.monotonic() - self._asked_s - trajectory.duration_s, 0.0))
            if self._service.recorder is not None:
                self._service.recorder.put(trajectory)
