"""The one episode loop: a policy acts in an env until it answers or a limit ends it. No Ray in here.

A model's mistake (nothing to parse, code that fails, a limit) becomes an observation and the loop goes on. Our own
failure (`EnvError`, `PolicyError`) ends the episode with a `Failure` on the trajectory, which is retried later and
never trained on.

Example::

    trajectory = await run_episode(task, policy=policy, env=ThreadedEnv(env), settings=EpisodeSettings())
"""

from __future__ import annotations

import asyncio
import hashlib
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

from envs.base import EnvError, Observation, ObservationKind, StepResult, Task
from rollout.async_env import AsyncEnv
from rollout.dialects import COT, DIALECTS, Dialect, ParsedTurn
from rollout.early_exit import EarlyExit, fruitless
from rollout.first_thought import first_thought
from rollout.guidance import GUIDES, GuideKind
from rollout.policy import Policy, PolicyError, Sampling
from rollout.self_consistency import action_ballot, ballot, likelihoods, vote
from rollout.trajectory import (
    Candidate,
    Completion,
    Failure,
    FailureClass,
    Message,
    Step,
    StopReason,
    Trajectory,
    observation_message,
    trajectory_key,
)

_ALWAYS_IN_KEY = (
    "dialect", "max_steps", "max_tokens", "temperature", "top_p", "candidates", "first_thought", "seed"
)  # fmt: skip


@dataclass(frozen=True, slots=True, kw_only=True)
class EpisodeSettings:
    """Everything that changes what an episode samples; it is part of the trajectory's key."""

    dialect: str = "code"
    max_steps: int = 5
    max_tokens: int = 256
    """Per turn."""
    temperature: float = 0.0
    top_p: float = 1.0
    candidates: int = 1
    """k of self-consistent action generation; 1 samples one action a step."""
    first_thought: bool = False
    deadline_s: float = 300.0
    seed: int = 0
    early_exit: EarlyExit = EarlyExit()
    """When to give up an episode that gets nowhere."""
    guide: GuideKind = "none"
    """What of the task's metadata the policy is shown behind the question, and a student is not."""
    prompt: Literal["student", "teacher"] = "student"
    """Which system prompt the policy is shown: the student's short one, or one with the tools and worked examples. The
    trajectory is trained with the student's either way."""
    logprobs: bool = True
    """Ask for the log-probabilities of what is sampled, where a policy has them."""

    def __post_init__(self) -> None:
        if self.dialect not in DIALECTS:
            raise ValueError(f"dialect {self.dialect!r} is unknown; there are {sorted(DIALECTS)}")
        if self.guide not in GUIDES:
            raise ValueError(f"guide {self.guide!r} is unknown; there are {', '.join(GUIDES)}")
        if self.prompt not in ("student", "teacher"):
            raise ValueError(f"prompt {self.prompt!r} is unknown; there are student, teacher")
        if self.candidates > 1 and self.temperature <= 0:
            raise ValueError(
                f"candidates={self.candidates} need a temperature above 0, not {self.temperature}: "
                "greedy candidates are all the same"
            )

    def key(self, task: Task, policy: str, sample_index: int) -> str:
        # Left out: what changes nothing in what is sampled, and later knobs at their defaults, which must therefore
        # stay what they are: ledgers of before a knob was there keep their keys.
        settings: dict[str, Any] = {name: getattr(self, name) for name in _ALWAYS_IN_KEY}
        settings["fruitless_steps"] = self.early_exit.unparsed_turns  # its name before there were other reasons
        exits = {name: n for name, n in asdict(self.early_exit).items() if n and name != "unparsed_turns"}
        later = {"early_exit": exits, "guide": self.guide, "prompt": self.prompt}
        settings |= {name: value for name, value in later.items() if value not in ({}, "none", "student")}
        return trajectory_key(task_id=task.id, policy=policy, sample_index=sample_index, settings=settings)


@dataclass(frozen=True, slots=True)
class _Turn:
    """A step and what it led to."""

    step: Step
    reward: float
    stop: StopReason | None
    prediction: str | None


async def run_episode(
    task: Task, *, policy: Policy, env: AsyncEnv, settings: EpisodeSettings, sample_index: int = 0
) -> Trajectory:
    """One trajectory; never raises for what goes wrong inside the episode (cancellation aside)."""
    episode = _Episode(task, policy, env, settings, sample_index)
    failure: Failure | None = None
    try:
        async with asyncio.timeout(settings.deadline_s):
            stop = await episode.run()
    except EnvError as error:
        stop, failure = StopReason.FAILED, Failure(failure_class=FailureClass.ENVIRONMENT, message=str(error))
    except PolicyError as error:
        if error.failure_class is FailureClass.LIMIT:  # the conversation outgrew the model: a result, not a failure
            stop = StopReason.LENGTH
        else:
            stop, failure = StopReason.FAILED, Failure(failure_class=error.failure_class, message=str(error))
    except TimeoutError:
        stop = StopReason.DEADLINE
    return episode.trajectory(stop, failure)


class _Episode:
    def __init__(self, task: Task, policy: Policy, env: AsyncEnv, settings: EpisodeSettings, sample_index: int) -> None:
        self.task, self.policy, self.env, self.settings = task, policy, env, settings
        self.sample_index = sample_index
        self.key = settings.key(task, policy.name, sample_index)
        self.seed = _seed(self.key)
        self.dialect: Dialect = DIALECTS[settings.dialect]
        self.steps: list[Step] = []
        self.reward = 0.0
        self.prediction: str | None = None
        self.first_thought: str | None = None
        self.started_at_s = time.time()
        self._clock = time.monotonic()

    async def run(self) -> StopReason:
        await self.env.reset(self.task, self.seed)
        messages = [
            Message(role="system", content=self.dialect.system_prompt),
            Message(role="user", content=self.task.question),
        ]
        for index in range(self.settings.max_steps):
            prefix = ""
            if index == 0 and self.settings.first_thought:
                self.first_thought = await first_thought(
                    self.policy, self.task.question, COT, self._sampling(index, candidates=1)
                )
                prefix = self.dialect.opening(self.first_thought)
            turn = await self._turn(messages, index, prefix)
            self.steps.append(turn.step)
            if turn.stop is not None:
                self.reward, self.prediction = turn.reward, turn.prediction
                return turn.stop
            if fruitless(self.steps, self.settings.early_exit):
                return StopReason.FRUITLESS
            completion = turn.step.completion
            messages += [
                Message(
                    role="assistant", content=completion.text, spans=turn.step.spans, token_ids=completion.token_ids
                ),
                observation_message(turn.step.observation),
            ]
        return StopReason.MAX_STEPS

    async def _turn(self, messages: Sequence[Message], index: int, prefix: str) -> _Turn:
        asked = time.monotonic()
        sampling = self._sampling(index, candidates=self.settings.candidates)
        completions = await self.policy.complete(messages, sampling, prefix=prefix)
        answered = time.monotonic()
        turns = [self.dialect.parse(completion.text) for completion in completions]
        chosen, result, candidates = await self._act(completions, turns)
        done = time.monotonic()
        observation = result.observation
        final = observation.kind is ObservationKind.FINAL
        step = Step(
            completion=completions[chosen],
            spans=turns[chosen].spans,
            action=turns[chosen].action,
            observation=observation.text if final else self.dialect.observation(observation.text),
            observation_kind=observation.kind,
            candidates=candidates,
            chosen=chosen,
            tool_calls=int(result.info.get("tool_calls", 0)),
            policy_s=answered - asked,
            env_s=done - answered,
        )
        stop = StopReason.FINAL if result.terminated else StopReason.MAX_STEPS if result.truncated else None
        return _Turn(step, result.reward, stop, result.info.get("final_answer"))

    async def _act(
        self, completions: Sequence[Completion], turns: Sequence[ParsedTurn]
    ) -> tuple[int, StepResult, tuple[Candidate, ...]]:
        """The index of the chosen candidate, what its action led to, and all candidates with their votes."""
        if len(turns) == 1:
            return 0, await self._step(turns[0]), ()
        if not self.env.can_preview:
            ballots = [action_ballot(turn.action) for turn in turns]
            outcome = vote(ballots, likelihoods(completions))
            result = await self._step(turns[outcome.winner])
            observations = [result.observation if i == outcome.winner else None for i in range(len(turns))]
        else:
            runnable = [i for i, turn in enumerate(turns) if turn.action is not None]
            actions = [action for turn in turns if (action := turn.action) is not None]
            previews = dict(zip(runnable, await self.env.preview(actions), strict=True)) if actions else {}
            ballots = [ballot(previews[i].observation) if i in previews else None for i in range(len(turns))]
            outcome = vote(ballots, likelihoods(completions))
            winner = outcome.winner
            result = await self.env.commit(runnable.index(winner)) if winner in previews else _unparsed(turns[winner])
            observations = [previews[i].observation if i in previews else None for i in range(len(turns))]
        candidates = tuple(
            Candidate(
                text=completion.text,
                observation=observation.text if observation else (turn.error or ""),
                kind=observation.kind if observation else ObservationKind.PARSE_ERROR,
                votes=count,
            )
            for completion, turn, observation, count in zip(
                completions, turns, observations, outcome.counts, strict=True
            )
        )
        return outcome.winner, result, candidates

    async def _step(self, turn: ParsedTurn) -> StepResult:
        return _unparsed(turn) if turn.action is None else await self.env.step(turn.action)

    def _sampling(self, index: int, *, candidates: int) -> Sampling:
        settings = self.settings
        return Sampling(
            n=candidates,
            temperature=settings.temperature,
            top_p=settings.top_p,
            max_tokens=settings.max_tokens,
            stop=self.dialect.stop,
            seed=(self.seed + index) % 2**31,
            logprobs=settings.logprobs or candidates > 1,  # they decide between candidates that agree
            timeout_s=settings.deadline_s,
        )

    def trajectory(self, stop: StopReason, failure: Failure | None) -> Trajectory:
        return Trajectory(
            key=self.key,
            task=self.task,
            dialect=self.dialect.name,
            system_prompt=self.dialect.system_prompt,
            steps=tuple(self.steps),
            policy=self.policy.name,
            weights_version=self.policy.weights_version,
            sample_index=self.sample_index,
            seed=self.seed,
            reward=self.reward,
            success=self.reward >= 1.0,
            prediction=self.prediction,
            stop_reason=stop,
            failure=failure,
            first_thought=self.first_thought,
            started_at_s=self.started_at_s,
            duration_s=time.monotonic() - self._clock,
        )


def _unparsed(turn: ParsedTurn) -> StepResult:
    observation = Observation(text=turn.error or "", kind=ObservationKind.PARSE_ERROR)
    return StepResult(observation, 0.0, False, False, _no_info())


def _no_info() -> dict[str, Any]:
    return {"final_answer": None, "tool_calls": 0}


def _seed(key: str) -> int:
    """31 bits that depend on nothing but the key, so that an episode can be run again as it was."""
    return int.from_bytes(hashlib.sha256(key.encode()).digest()[:4], "big") >> 1
