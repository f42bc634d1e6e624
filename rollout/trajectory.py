"""What an episode leaves behind: `Message`, `Span`, `Completion`, `Candidate`, `Step`, `Trajectory`.

Data only: no Ray, no tokenizer, no I/O. `rollout.records` turns trajectories into Arrow rows, `rollout.ledger` keeps
them, `rollout.rendering` turns their messages into token ids.

Example::

    trajectory.messages()      # system, user (the question), assistant, user (observation), assistant, ...
    trajectory.shown()         # the same as the policy saw it: with its own system prompt and guide
    trajectory.trainable       # False for failures, wrong answers and what leaks its guide
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any, Literal

from envs.base import ObservationKind, Task

Role = Literal["system", "user", "assistant"]

PrefixBy = Literal["", "tokens", "continue", "message", "asked"]
"""How a turn's given beginning reached the policy: there was none; its ids ended the prompt (vLLM in process, or a
server that takes ids); the server was told to continue the last message (vLLM); it does so unasked; it was asked for in
words (an endpoint without prefill) and put in front where the answer did not begin so."""


class SpanType(StrEnum):
    """What a stretch of text is; assistant text is one of THOUGHT, CODE, ANSWER, FORMAT (arXiv 2505.13820's spans,
    refined)."""

    THOUGHT = "thought"
    CODE = "code"
    ANSWER = "answer"
    FORMAT = "format"
    OBSERVATION = "observation"
    SYSTEM = "system"
    USER = "user"


@dataclass(frozen=True, slots=True, kw_only=True)
class Span:
    """Characters [start, end) of one message's content."""

    type: SpanType
    start: int
    end: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Message:
    """One turn of the conversation that a policy sees."""

    role: Role
    content: str
    spans: tuple[Span, ...] = ()
    """Cover `content` without gap or overlap when present; absent means one span of the role's own type."""
    token_ids: tuple[int, ...] | None = None
    """Assistant turns only: the ids exactly as sampled (stop token included if it was sampled); None: text is all we
    have."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Completion:
    """One sampled assistant turn, whole: a prefix that was given to the policy is part of `text` and `token_ids`."""

    text: str
    """Without the stop token's own text."""
    token_ids: tuple[int, ...] | None = None
    """[n] ids of prefix + sampled tokens, the stop token included when sampled; None when the policy does not tell."""
    logprobs: tuple[float, ...] | None = None
    """[n_sampled] natural-log probabilities of the sampled tokens, the last of `token_ids`."""
    top_ids: tuple[int, ...] | None = None
    """[n_sampled * k] the k likeliest tokens in the place of each sampled one, likeliest first; None when not asked."""
    top_logprobs: tuple[float, ...] | None = None
    """[n_sampled * k] theirs."""
    finish_reason: Literal["stop", "length", "abort"] = "stop"
    weights_version: str = ""
    prompt_tokens: int = 0
    completion_tokens: int = 0
    """Sampled tokens: without those of a prefix."""
    prompt_ids: tuple[int, ...] | None = None
    """[n] ids exactly as sent to the engine, the prefix's included; None when the policy does not tell."""
    prefix_by: PrefixBy = ""
    cost_usd: float = 0.0
    """This completion's share of what its request cost; 0 where nothing is paid or the answer came from a cache."""
    cached: bool = False
    """It came from the cache of identical requests."""
    shared_tokens: int = field(default=0, compare=False)
    """How many of the sampled tokens were decoded for another candidate of the same request; not kept in records."""

    @property
    def sampled_ids(self) -> tuple[int, ...] | None:
        """[completion_tokens] the ids that were sampled, those of a prefix left out; None when unknown."""
        if self.token_ids is None:
            return None
        return self.token_ids[len(self.token_ids) - self.completion_tokens :]


@dataclass(frozen=True, slots=True, kw_only=True)
class Usage:
    """What an episode took of its policy: every request of it, candidates that lost and the first thought included."""

    requests: int = 0
    prompt_tokens: int = 0
    """Once a request, however many candidates shared it."""
    completion_tokens: int = 0
    cost_usd: float = 0.0

    def __add__(self, other: Usage) -> Usage:
        return Usage(
            requests=self.requests + other.requests,
            prompt_tokens=self.prompt_tokens + other.prompt_tokens,
            completion_tokens=self.completion_tokens + other.completion_tokens,
            cost_usd=self.cost_usd + other.cost_usd,
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Candidate:
    """One of the k actions sampled at a step by self-consistent action generation."""

    text: str
    observation: str
    kind: ObservationKind
    votes: int
    """How many candidates share its ballot: its normalised observation, or its action where the env cannot preview; 0
    when it was dropped, or not run though the env can preview."""
    ran: bool = True
    """False: its observation is empty, since the vote was decided without it."""
    token_ids: tuple[int, ...] | None = None
    """[n] as in `Completion`: losers are negatives of later objectives."""
    logprobs: tuple[float, ...] | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Step:
    """One turn of the agent and what came back."""

    completion: Completion
    spans: tuple[Span, ...]
    action: str | None
    """What was parsed and given to the env; None when nothing could be parsed."""
    observation: str
    """Message text as the dialect shows it to the model (the final answer for the last step)."""
    observation_kind: ObservationKind
    candidates: tuple[Candidate, ...] = ()
    """All k of them in sampling order when k > 1, the chosen one included."""
    chosen: int = 0
    tool_calls: int = 0
    policy_s: float = 0.0
    env_s: float = 0.0

    @property
    def agreement(self) -> float:
        """Share of the candidates that voted as the chosen one did, in [0, 1]; 1 where there was one candidate. A lower
        bound when the vote was decided before all had run."""
        return self.candidates[self.chosen].votes / len(self.candidates) if self.candidates else 1.0


class StopReason(StrEnum):
    """Why an episode ended; all but `FINAL` and `FAILED` cut it off (`Trajectory.truncated`)."""

    FINAL = "final"
    MAX_STEPS = "max_steps"
    LENGTH = "length"
    DEADLINE = "deadline"
    FRUITLESS = "fruitless"
    """It got nowhere: see `Trajectory.stop_detail`."""
    FAILED = "failed"


class FailureClass(StrEnum):
    """Whose fault it was that no result came."""

    MODEL = "model"
    """The model's own, such as an answer that its provider withheld; it would only happen again."""
    ENVIRONMENT = "environment"
    """Sandbox, tools, retrieval, judge: tried again."""
    ENGINE = "engine"
    """vLLM or the endpoint: tried again."""
    LIMIT = "limit"
    """A budget that is used up: run again when there is more of it."""
    INPUT = "input"
    """The task or the settings cannot be used: tried again only when told to."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Failure:
    """Why a trajectory is no result."""

    failure_class: FailureClass
    message: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Trajectory:
    """All steps of one episode."""

    key: str
    """Deterministic: see `trajectory_key`."""
    task: Task
    dialect: str
    """Name of the dialect that rendered and parsed it ("code", "cot")."""
    system_prompt: str
    """What a student is trained and run with; the policy may have been shown another one: `shown_system_prompt`."""
    steps: tuple[Step, ...]
    policy: str
    weights_version: str = ""
    sample_index: int = 0
    seed: int = 0
    reward: float = 0.0
    """Return of the episode in [0, 1]."""
    success: bool = False
    prediction: str | None = None
    stop_reason: StopReason = StopReason.FINAL
    failure: Failure | None = None
    stop_detail: str = ""
    """The reason in words, such as "the same action 3 times"."""
    first_thought: str | None = None
    """The first-thought prefix (arXiv 2505.17612 section 3.1) that seeded the first step, when one did."""
    shown_system_prompt: str | None = None
    """The system prompt that the policy saw, when it was not `system_prompt`."""
    user_prompt: str | None = None
    """The first user message, when it was more than the question (retrieved passages in front of it)."""
    guide: str | None = None
    """What only the policy saw behind that message: a reference solution or a tutorial; no part of `messages`."""
    leaks: tuple[str, ...] = ()
    """Where the turns speak of a guide that a student will not see; such a trajectory is not trained on."""
    usage: Usage = Usage()
    started_at_s: float = 0.0
    """Unix time."""
    duration_s: float = 0.0

    @property
    def trainable(self) -> bool:
        """A student may learn from it: it succeeded, every turn of it could be parsed, and it leaks no guide."""
        return (
            self.success
            and self.failure is None
            and not self.leaks
            and all(step.observation_kind is not ObservationKind.PARSE_ERROR for step in self.steps)
        )

    @property
    def truncated(self) -> bool:
        """It was cut off by a limit; `stop_reason` and `stop_detail` say by which."""
        return self.stop_reason not in (StopReason.FINAL, StopReason.FAILED)

    @property
    def completion_tokens(self) -> int:
        """Of the turns that were kept; `usage` counts all that was sampled."""
        return sum(step.completion.completion_tokens for step in self.steps)

    @property
    def tool_calls(self) -> int:
        return sum(step.tool_calls for step in self.steps)

    @property
    def tokens(self) -> Literal["sampled", "text"]:
        """Where a student's ids come from: "sampled" when every turn has those that the policy sampled, else "text"."""
        known = bool(self.steps) and all(step.completion.token_ids is not None for step in self.steps)
        return "sampled" if known else "text"

    def messages(self) -> list[Message]:
        """The conversation as a student learns it, the last turn included: its own system prompt, no guide."""
        return self._conversation(self.system_prompt, self.user_prompt or self.task.question)

    def shown(self) -> list[Message]:
        """The conversation as the policy saw it, its last turn included."""
        question = self.user_prompt or self.task.question
        system = self.system_prompt if self.shown_system_prompt is None else self.shown_system_prompt
        return self._conversation(system, question if self.guide is None else f"{question}\n\n{self.guide}")

    def _conversation(self, system_prompt: str, question: str) -> list[Message]:
        messages = [Message(role="system", content=system_prompt)] if system_prompt else []
        messages.append(Message(role="user", content=question))
        for i, step in enumerate(self.steps):
            completion = step.completion
            messages.append(
                Message(role="assistant", content=completion.text, spans=step.spans, token_ids=completion.token_ids)
            )
            if i + 1 < len(self.steps):
                messages.append(observation_message(step.observation))
        return messages


def observation_message(text: str) -> Message:
    """The env's reply as the policy sees it: a user turn that is one observation span."""
    return Message(role="user", content=text, spans=(Span(type=SpanType.OBSERVATION, start=0, end=len(text)),))


def trajectory_key(*, task_id: str, policy: str, sample_index: int, settings: Mapping[str, Any]) -> str:
    """The same (task, policy, sample, settings) always has the same key, so that a resumed run knows what is there.

    `settings` must be JSON-able and hold everything that changes what is sampled (dialect, k, temperature, seed, ...).
    """
    digest = hashlib.sha256(json.dumps(dict(settings), sort_keys=True).encode()).hexdigest()[:12]
    return f"{task_id}|{policy}|{sample_index}|{digest}"
