"""What an episode leaves behind: `Message`, `Span`, `Completion`, `Candidate`, `Step`, `Trajectory`.

Data only: no Ray, no tokenizer, no I/O. `rollout.records` turns trajectories into Arrow rows, `rollout.ledger` keeps
them, `rollout.rendering` turns their messages into token ids.

Example::

    trajectory.messages()      # system, user (the question), assistant, user (observation), assistant, ...
    trajectory.trainable       # False for failures and wrong answers
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum
from typing import Any, Literal

from envs.base import ObservationKind, Task

Role = Literal["system", "user", "assistant"]


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
    finish_reason: Literal["stop", "length", "abort"] = "stop"
    weights_version: str = ""
    prompt_tokens: int = 0
    completion_tokens: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Candidate:
    """One of the k actions sampled at a step by self-consistent action generation."""

    text: str
    observation: str
    kind: ObservationKind
    votes: int
    """How many candidates share its normalised observation; 0 when it was dropped."""


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


class StopReason(StrEnum):
    """Why an episode ended."""

    FINAL = "final"
    MAX_STEPS = "max_steps"
    LENGTH = "length"
    DEADLINE = "deadline"
    FRUITLESS = "fruitless"
    FAILED = "failed"


class FailureClass(StrEnum):
    """Whose fault it was that no result came; `MODEL` and `LIMIT` are results, the others are retried."""

    MODEL = "model"
    ENVIRONMENT = "environment"
    ENGINE = "engine"
    LIMIT = "limit"
    INPUT = "input"


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
    first_thought: str | None = None
    """The first-thought prefix (arXiv 2505.17612 section 3.1) that seeded the first step, when one did."""
    started_at_s: float = 0.0
    """Unix time."""
    duration_s: float = 0.0

    @property
    def trainable(self) -> bool:
        """A student may learn from it: it succeeded and every turn of it could be parsed."""
        return (
            self.success
            and self.failure is None
            and all(step.observation_kind is not ObservationKind.PARSE_ERROR for step in self.steps)
        )

    @property
    def completion_tokens(self) -> int:
        return sum(step.completion.completion_tokens for step in self.steps)

    def messages(self) -> list[Message]:
        """The conversation as the policy saw it, its last turn included."""
        messages = [Message(role="system", content=self.system_prompt)] if self.system_prompt else []
        messages.append(Message(role="user", content=self.task.question))
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
