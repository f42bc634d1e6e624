"""The one episode loop: a policy acts in an env until it answers or a limit ends it. No Ray in here.

A model's mistake (nothing to parse, code that fails, a limit) becomes an observation and the loop goes on. Our own
failure (`EnvError`, `PolicyError`) ends the episode with a `Failure` on the trajectory, which is retried later and
never trained on. Every way of ending is told in words (`Trajectory.stop_detail`).

Example::

    trajectory = await run_episode(task, policy=policy, env=ThreadedEnv(env), settings=EpisodeSettings())
"""

from __future__ import annotations

import asyncio
import functools
import hashlib
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, Literal

from envs.base import EnvError, Observation, ObservationKind, StepResult, Task, TaskError
from envs.bounds import check_bounds
from rollout.async_env import AsyncEnv
from rollout.dialects import COT, DIALECTS, Dialect, ParsedTurn
from rollout.early_exit import EarlyExit, fruitless
from rollout.first_thought import cot_messages, first_paragraph, first_thought_sampling
from rollout.guidance import GUIDES, GuideKind, guide_leaks, guide_text
from rollout.policy import Policy, PolicyError, Sampling
from rollout.self_consistency import action_ballot, ballot, is_decided, likelihoods, vote, waves
from rollout.shared_decoding import MOST_TOP_K
from rollout.teacher_prompts import teacher_prompt
from rollout.trajectory import (
    Candidate,
    Completion,
    Failure,
    FailureClass,
    Message,
    Step,
    StopReason,
    Trajectory,
    Usage,
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
    top_k: int = 0
    """Sample from the k likeliest tokens alone; 0: from all. Within 1 and 20 the candidates of a step share what they
    have in common on our own vLLM (`rollout.shared_decoding`), which is most of it."""
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
    top_logprobs: int = 0
    """Keep so many of the likeliest tokens at each place, 20 at most, with their log-probabilities: a teacher's scores
    for objectives such as span, from our own vLLM alone. A place takes 8 bytes for each."""

    def __post_init__(self) -> None:
        check_bounds(
            self,
            at_least_0=("temperature", "top_k", "top_logprobs"),
            at_least_1=("max_steps", "max_tokens", "candidates"),
            above_0=("deadline_s", "top_p"),
            shares=("top_p",),
        )
        if self.top_logprobs > MOST_TOP_K:
            raise ValueError(f"top_logprobs is {self.top_logprobs}; vLLM gives {MOST_TOP_K} at most")
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
        """`rollout.trajectory.trajectory_key` of an episode with these settings."""
        return f"{task.id}|{policy}|{sample_index}{_end_of_keys(self)}"

    def in_key(self) -> dict[str, Any]:
        """The settings that a key's digest is made of."""
        # Left out: what changes nothing in what is sampled, and later knobs at their defaults, which must therefore
        # stay what they are: ledgers of before a knob was there keep their keys.
        settings: dict[str, Any] = {name: getattr(self, name) for name in _ALWAYS_IN_KEY}
        settings |= {"temperature": float(self.temperature), "top_p": float(self.top_p)}  # 1 is 1.0
        settings["fruitless_steps"] = self.early_exit.unparsed_turns  # its name before there were other reasons
        exits = {name: n for name, n in asdict(self.early_exit).items() if n and name != "unparsed_turns"}
        later = {"early_exit": exits, "guide": self.guide, "prompt": self.prompt, "top_k": self.top_k}
        return settings | {name: value for name, value in later.items() if value not in ({}, "none", "student", 0)}


@functools.lru_cache(maxsize=256)
def _end_of_keys(settings: EpisodeSettings) -> str:
    """The digest, with the bar in front of it: made once, since a resumed run asks for the keys of all its tasks."""
    return trajectory_key(task_id="", policy="", sample_index=0, settings=settings.in_key()).removeprefix("||0")


async def run_episode(
    task: Task,
    *,
    policy: Policy,
    env: AsyncEnv,
    settings: EpisodeSettings,
    sample_index: int = 0,
    on_step: Callable[[Step], None] | None = None,
) -> Trajectory:
    """One trajectory; what goes wrong inside the episode is on it. `on_step` sees each step as it ends, the last one
    too; it must return at once.

    Raises a `PolicyError` that ends a whole collection (its `ends_collection` is true: no money is left), and is
    cancelled as any coroutine is.
    """
    episode = _Episode(task, policy, env, settings, sample_index, on_step)
    failure: Failure | None = None
    limit = asyncio.timeout(settings.deadline_s)
    try:
        async with limit:
            stop, detail = await episode.run()
    except EnvError as error:
        stop, failure = StopReason.FAILED, Failure(failure_class=FailureClass.ENVIRONMENT, message=str(error))
    except TaskError as error:
        stop, failure = StopReason.FAILED, Failure(failure_class=FailureClass.INPUT, message=str(error))
    except PolicyError as error:
        if getattr(error, "ends_collection", False):
            raise
        if error.failure_class is FailureClass.LIMIT:  # the conversation outgrew the model: a result, not a failure
            stop, detail = StopReason.LENGTH, str(error)
        else:
            stop, failure = StopReason.FAILED, Failure(failure_class=error.failure_class, message=str(error))
    except TimeoutError as error:
        where = f"in step {len(episode.steps) + 1}, {episode.doing}"
        if limit.expired():
            stop, detail = StopReason.DEADLINE, f"{settings.deadline_s:g} s had passed {where}"
        else:  # somebody else's limit, who should have said so in an error of ours
            message = f"a call timed out {where}: {error or 'no message'}"
            stop, failure = StopReason.FAILED, Failure(failure_class=episode.blame, message=message)
    return episode.trajectory(stop, failure.message if failure else detail, failure)


class _Episode:
    def __init__(
        self,
        task: Task,
        policy: Policy,
        env: AsyncEnv,
        settings: EpisodeSettings,
        sample_index: int,
        on_step: Callable[[Step], None] | None,
    ) -> None:
        self.task, self.policy, self.env, self.settings = task, policy, env, settings
        self.sample_index, self.on_step = sample_index, on_step
        self.key = settings.key(task, policy.name, sample_index)
        self.seed = _seed(self.key)
        self.dialect: Dialect = DIALECTS[settings.dialect]
        self.steps: list[Step] = []
        self.reward = 0.0
        self.prediction: str | None = None
        self.first_thought: str | None = None
        self.system_prompt = self.dialect.system_prompt
        """As shown to the policy."""
        self.user_prompt = task.question
        self.guide: str | None = None
        self.requests = self.prompt_tokens = self.completion_tokens = 0
        self.cost_usd = 0.0
        self.doing, self.blame = _RESETTING
        self.started_at_s = time.time()
        self._clock = time.monotonic()

    async def run(self) -> tuple[StopReason, str]:
        """Why it ended, and that in words. Raises `EnvError`, `PolicyError`, `TaskError`."""
        settings = self.settings
        self.guide = guide_text(self.task, settings.guide)
        observation, info = await self.env.reset(self.task, self.seed)
        self.user_prompt = observation.text or self.task.question
        if settings.prompt == "teacher":
            self.system_prompt = teacher_prompt(self.dialect.name, info.get("tools", ()), max_steps=settings.max_steps)
        question = self.user_prompt if self.guide is None else f"{self.user_prompt}\n\n{self.guide}"
        messages = [Message(role="system", content=self.system_prompt), Message(role="user", content=question)]
        prefix = await self._first_thought(question) if settings.first_thought else ""
        for index in range(settings.max_steps):
            result = await self._turn(messages, index, prefix if index == 0 else "")
            step = self.steps[-1]
            if result.terminated or result.truncated:
                self.reward, self.prediction = result.reward, result.info.get("final_answer")
                return (StopReason.FINAL, "") if result.terminated else (StopReason.MAX_STEPS, "the env's limit")
            if why := fruitless(self.steps, settings.early_exit):
                return StopReason.FRUITLESS, why
            messages += [
                Message(
                    role="assistant",
                    content=step.completion.text,
                    spans=step.spans,
                    token_ids=step.completion.token_ids,
                ),
                observation_message(step.observation),
            ]
        return StopReason.MAX_STEPS, f"no final answer in max_steps={settings.max_steps}"

    async def _first_thought(self, question: str) -> str:
        """The beginning of the first turn; "" when the policy's answer in words has no thought to begin with."""
        cot_prompt = COT.system_prompt
        if self.settings.prompt == "teacher":
            cot_prompt = teacher_prompt(COT.name, max_steps=1)
        sampling = first_thought_sampling(self._sampling(0, candidates=1))
        [completion] = await self._complete(cot_messages(cot_prompt, question), sampling, "")
        self.first_thought = first_paragraph(completion.text) or None
        return self.dialect.opening(self.first_thought) if self.first_thought else ""

    async def _complete(self, messages: Sequence[Message], sampling: Sampling, prefix: str) -> list[Completion]:
        self.doing, self.blame = _SAMPLING
        completions = await self.policy.complete(messages, sampling, prefix=prefix)
        self.requests += 1
        self.prompt_tokens += completions[0].prompt_tokens
        for completion in completions:
            self.completion_tokens += completion.completion_tokens - completion.shared_tokens
            self.cost_usd += completion.cost_usd
        return completions

    async def _turn(self, messages: Sequence[Message], index: int, prefix: str) -> StepResult:
        """Samples, acts, and records the step."""
        asked = time.monotonic()
        completions = await self._complete(messages, self._sampling(index, candidates=self.settings.candidates), prefix)
        answered = time.monotonic()
        turns = [self.dialect.parse(completion.text) for completion in completions]
        self.doing, self.blame = _ACTING
        if len(turns) == 1:
            chosen, result, candidates = 0, await self._step(turns[0]), ()
        else:
            chosen, result, candidates = await self._vote(completions, turns)
        observation = result.observation
        final = observation.kind is ObservationKind.FINAL
        self.steps.append(
            Step(
                completion=completions[chosen],
                spans=turns[chosen].spans,
                action=turns[chosen].action,
                observation=observation.text if final else self.dialect.observation(observation.text),
                observation_kind=observation.kind,
                candidates=candidates,
                chosen=chosen,
                tool_calls=int(result.info.get("tool_calls", 0)),
                policy_s=answered - asked,
                env_s=time.monotonic() - answered,
            )
        )
        if self.on_step is not None:
            self.on_step(self.steps[-1])
        return result

    async def _step(self, turn: ParsedTurn) -> StepResult:
        return _unparsed(turn) if turn.action is None else await self.env.step(turn.action)

    async def _vote(
        self, completions: Sequence[Completion], turns: Sequence[ParsedTurn]
    ) -> tuple[int, StepResult, tuple[Candidate, ...]]:
        """The index of the chosen candidate, what its action led to, and all candidates with their votes."""
        likely = likelihoods(completions)
        seen: dict[str, StepResult] = {}
        if self.env.can_preview:
            seen = await self._previews([turn.action for turn in turns], likely)
            ballots = [ballot(seen[turn.action].observation) if turn.action in seen else None for turn in turns]
            outcome = vote(ballots, likely)
            action = turns[outcome.winner].action
            if action in seen:
                result = await self.env.commit(list(seen).index(action))
            else:
                result = _unparsed(turns[outcome.winner])
        else:
            outcome = vote([action_ballot(turn.action) for turn in turns], likely)
            result = await self._step(turns[outcome.winner])
            if action := turns[outcome.winner].action:
                seen = {action: result}
        candidates = tuple(
            _candidate(completion, turn, seen, votes)
            for completion, turn, votes in zip(completions, turns, outcome.counts, strict=True)
        )
        return outcome.winner, result, candidates

    async def _previews(self, actions: Sequence[str | None], likely: Sequence[float] | None) -> dict[str, StepResult]:
        """What the distinct actions lead to, by action, in the order that `commit` counts in: all of them, or as many
        as decide the vote."""
        first, rest = waves(actions, likely)
        preview_more = getattr(self.env, "preview_more", None) if getattr(self.env, "can_preview_more", False) else None
        if preview_more is None:
            first, rest = list(dict.fromkeys(action for action in actions if action is not None)), []
        if not first:
            return {}
        seen = dict(zip(first, await self.env.preview(first), strict=True))
        if rest and preview_more is not None:
            ballots = [ballot(seen[action].observation) for action in actions if action in seen]
            waiting = sum(action is not None and action not in seen for action in actions)
            if not is_decided(ballots, waiting=waiting):
                seen |= zip(rest, await preview_more(rest), strict=True)
        return seen

    def _sampling(self, index: int, *, candidates: int) -> Sampling:
        settings = self.settings
        return Sampling(
            n=candidates,
            temperature=settings.temperature,
            top_p=settings.top_p,
            top_k=settings.top_k,
            max_tokens=settings.max_tokens,
            stop=self.dialect.stop,
            seed=(self.seed + index) % 2**31,
            logprobs=settings.logprobs or candidates > 1,  # they decide between candidates that agree
            top_logprobs=settings.top_logprobs,
            timeout_s=settings.deadline_s,
        )

    def trajectory(self, stop: StopReason, detail: str, failure: Failure | None) -> Trajectory:
        shown = self.system_prompt
        trajectory = Trajectory(
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
            stop_detail=detail,
            first_thought=self.first_thought,
            shown_system_prompt=shown if shown != self.dialect.system_prompt else None,
            user_prompt=self.user_prompt if self.user_prompt != self.task.question else None,
            guide=self.guide,
            usage=Usage(
                requests=self.requests,
                prompt_tokens=self.prompt_tokens,
                completion_tokens=self.completion_tokens,
                cost_usd=self.cost_usd,
            ),
            started_at_s=self.started_at_s,
            duration_s=time.monotonic() - self._clock,
        )
        return trajectory if self.guide is None else replace(trajectory, leaks=guide_leaks(trajectory))


# What an episode is doing, in words, and whose fault it is when that never ends.
_RESETTING = ("starting the env", FailureClass.ENVIRONMENT)
_SAMPLING = ("waiting for the policy", FailureClass.ENGINE)
_ACTING = ("waiting for the env", FailureClass.ENVIRONMENT)


def _candidate(completion: Completion, turn: ParsedTurn, seen: Mapping[str, StepResult], votes: int) -> Candidate:
    if turn.action is None:
        text, kind, ran = turn.error or "", ObservationKind.PARSE_ERROR, True
    elif turn.action in seen:
        observation = seen[turn.action].observation
        text, kind, ran = observation.text, observation.kind, True
    else:
        text, kind, ran = "", ObservationKind.OK, False
    return Candidate(
        text=completion.text,
        observation=text,
        kind=kind,
        votes=votes,
        ran=ran,
        token_ids=completion.token_ids,
        logprobs=completion.logprobs,
    )


def _unparsed(turn: ParsedTurn) -> StepResult:
    observation = Observation(text=turn.error or "", kind=ObservationKind.PARSE_ERROR)
    return StepResult(observation, 0.0, False, False, {"final_answer": None, "tool_calls": 0})


def _seed(key: str) -> int:
    """31 bits that depend on nothing but the key, so that an episode can be run again as it was."""
    return int.from_bytes(hashlib.sha256(key.encode()).digest()[:4], "big") >> 1
