"""The contract every environment keeps: the nouns `Task`, `Env`, `StepResult`, `Observation`, `EnvError`.

An `Env` holds one episode at a time and speaks Gymnasium's words in Gymnasium's order
(https://gymnasium.farama.org/api/env/), with text as action and observation. What it adds is `preview`/`commit`: run k
candidate actions from the same state without side effects on one another, then keep one of them without running it
again.

A model's mistake (bad code, an unknown tool, a limit) is an `Observation`; only our own failure raises `EnvError`.

Example::

    env = make_env("code", tools=[...])
    observation, info = env.reset(task, seed=0)
    result = env.step("print(6 * 7)")
    result.observation.text        # 'Execution logs:\\n42\\nLast output from code snippet:\\nNone'
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any, NamedTuple, Protocol, runtime_checkable


class EnvError(RuntimeError):
    """Our own failure (a dead sandbox, a retrieval service that is down): recorded, retried, never shown to a model."""


class TaskError(ValueError):
    """A task that cannot be used; the message names the file, the line and what is wrong."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Task:
    """One question with its reference answer."""

    id: str
    question: str
    answer: str
    kind: str
    """Family of the task ("arithmetic", "two_hop", "math", "factual"); scores are reported per kind."""
    grader: str = "exact"
    """Name of a grader in `envs.grading`."""
    aliases: tuple[str, ...] = ()
    """Other accepted answers."""
    metadata: Mapping[str, Any] = field(default_factory=dict)


class ObservationKind(StrEnum):
    """What an observation is about; everything but `OK` and `FINAL` tells of a mistake or a limit."""

    OK = "ok"
    CODE_ERROR = "code_error"
    PARSE_ERROR = "parse_error"
    LIMIT = "limit"
    FINAL = "final"


@dataclass(frozen=True, slots=True, kw_only=True)
class Observation:
    """The text that the env shows back."""

    text: str
    kind: ObservationKind = ObservationKind.OK

    @property
    def valid(self) -> bool:
        """True when the action ran: such a candidate may be voted for."""
        return self.kind in (ObservationKind.OK, ObservationKind.FINAL)


class StepResult(NamedTuple):
    """What `Env.step` returns: Gymnasium's five values, by name."""

    observation: Observation
    reward: float
    terminated: bool
    """The episode ended by itself: a final answer was given."""
    truncated: bool
    """The episode was cut off by a limit of the env."""
    info: dict[str, Any]
    """At least `final_answer` (str | None); `tool_calls` (int) and `wall_s` (float) where they mean something."""


@runtime_checkable
class Env(Protocol):
    """One episode at a time; see the module's docstring. All text is str; rewards are in [0, 1]."""

    can_preview: bool
    """False: the env cannot fork its state; self-consistency then votes on the parsed action."""

    def reset(self, task: Task, seed: int) -> tuple[Observation, dict[str, Any]]:
        """Start an episode. The first observation's text is the question, with what the env puts in front of it. Where
        the agent has tools, `info["tools"]` is the list of their JSON schemas. Raises `EnvError`."""
        ...

    def step(self, action: str) -> StepResult:
        """Do `action`. Raises `EnvError` for our failures, `RuntimeError` when no episode is running."""
        ...

    def preview(self, actions: Sequence[str]) -> list[StepResult]:
        """Run each action from the present state; no action sees another, and the state stays as it was.

        An env may have `preview_more(actions)` beside it: the same without forgetting the last preview, so that a vote
        can end before all candidates have run. It returns the results of these actions, and `commit` counts on.
        """
        ...

    def commit(self, index: int) -> StepResult:
        """Keep the state that previewed action `index` led to; its result is returned, the action is not run again."""
        ...

    def close(self) -> None:
        """End the episode and free everything; may be called twice."""
        ...
