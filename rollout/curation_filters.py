"""Filters that judge one trajectory by itself: usable on a stream, while a collection still runs.

Each is a frozen dataclass whose fields are its parameters in YAML and whose `keeps` is a pure function. Filters that
compare trajectories with one another are in `rollout.curation_sets`; `rollout.curation` composes both.

Example::

    Length(max_steps=5).keeps(trajectory)
"""

from __future__ import annotations

import ast
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from fnmatch import fnmatchcase
from typing import ClassVar, Literal, Protocol, runtime_checkable

from envs.base import ObservationKind, Task
from envs.grading import number
from rollout.trajectory import Step, StopReason, Trajectory

_CHARS_PER_TOKEN = 4
"""Where a policy does not tell its tokens: about what English and code take."""
_NO_WORK = {"print", "final_answer", "str", "int", "float", "repr"}
"""Calls that show or wrap a value and compute none."""


@runtime_checkable
class Filter(Protocol):
    """Judges one trajectory; no state, no order."""

    name: ClassVar[str]

    def keeps(self, trajectory: Trajectory) -> bool: ...


@dataclass(frozen=True, slots=True, kw_only=True)
class NoFailure:
    """It is a result: nothing of ours, of an engine or of an endpoint failed."""

    name: ClassVar[str] = "no_failure"

    def keeps(self, trajectory: Trajectory) -> bool:
        return trajectory.failure is None


@dataclass(frozen=True, slots=True, kw_only=True)
class Correct:
    """Its answer is right."""

    name: ClassVar[str] = "correct"
    at_least: float | None = None
    """Reward in [0, 1] that is enough; None asks for success."""

    def __post_init__(self) -> None:
        _share("at_least", self.at_least)

    def keeps(self, trajectory: Trajectory) -> bool:
        return trajectory.success if self.at_least is None else trajectory.reward >= self.at_least


@dataclass(frozen=True, slots=True, kw_only=True)
class Finished:
    """It ended with an answer of its own; no limit cut it off."""

    name: ClassVar[str] = "finished"

    def keeps(self, trajectory: Trajectory) -> bool:
        return trajectory.stop_reason is StopReason.FINAL


@dataclass(frozen=True, slots=True, kw_only=True)
class NoParseError:
    """Every turn could be parsed. Code that failed and was repaired stays, as in arXiv 2505.17612: it teaches repair,
    while a turn that could not be read teaches a broken format."""

    name: ClassVar[str] = "no_parse_error"

    def keeps(self, trajectory: Trajectory) -> bool:
        return all(step.observation_kind is not ObservationKind.PARSE_ERROR for step in trajectory.steps)


@dataclass(frozen=True, slots=True, kw_only=True)
class Repaired:
    """Every step that failed was followed by one that worked, before the final answer: failed-then-repaired is kept,
    and dropped is what answers right after an error (or ends in one), since its answer owes nothing to the code."""

    name: ClassVar[str] = "repaired"
    max_errors: int | None = None
    """Failed steps that are borne all in all; None bears any number, 0 none."""
    errors: tuple[Literal["code_error", "parse_error", "limit"], ...] = ("code_error", "parse_error", "limit")
    """Kinds of observations that count as failed."""

    def __post_init__(self) -> None:
        _not_negative("max_errors", self.max_errors)

    def keeps(self, trajectory: Trajectory) -> bool:
        worked = [step.observation_kind.value not in self.errors for step in _before_answer(trajectory)]
        enough = self.max_errors is None or worked.count(False) <= self.max_errors
        return enough and (not worked or worked[-1])


@dataclass(frozen=True, slots=True, kw_only=True)
class UsedTools:
    """It found its answer out with its tools (arXiv 2604.04651: a student of answers known by heart learns to guess).

    Kept is what called a tool in a step that worked and answered in a later step, so that the result had been read;
    and, for tasks that can be computed, what computed in code that ran. A task can be computed when its answer is a
    number or its grader is one of numbers, unless `look_up` says otherwise.
    """

    name: ClassVar[str] = "used_tools"
    at_least: int = 1
    """Tool calls that were read before the answer."""
    by_kind: Mapping[str, int] = field(default_factory=dict)
    """Pattern of kinds -> `at_least` for them, such as {"two_hop*": 2}; the first that matches counts. 0 asks
    nothing of a kind."""
    look_up: tuple[str, ...] | None = None
    """Patterns of the kinds that must be looked up ("hotpotqa", "two_hop*"), all others may be computed; None goes by
    the answer."""

    def __post_init__(self) -> None:
        _not_negative("at_least", self.at_least)
        for pattern, calls in self.by_kind.items():
            _not_negative(f"by_kind {pattern!r}", calls)

    def keeps(self, trajectory: Trajectory) -> bool:
        kind = trajectory.task.kind
        needed = next((n for pattern, n in self.by_kind.items() if fnmatchcase(kind, pattern)), self.at_least)
        read = sum(step.tool_calls for step in _before_answer(trajectory) if _worked(step))
        return read >= needed or (self._may_compute(trajectory.task) and _computed(trajectory))

    def _may_compute(self, task: Task) -> bool:
        if self.look_up is not None:
            return not any(fnmatchcase(task.kind, pattern) for pattern in self.look_up)
        return task.grader in ("math", "numeric") or number(task.answer) is not None


@dataclass(frozen=True, slots=True, kw_only=True)
class Length:
    """Its length is within bounds; None is no bound."""

    name: ClassVar[str] = "length"
    max_tokens: int | None = None
    """Of the whole conversation as the policy counted it; a fourth of the characters where it did not."""
    max_steps: int | None = None
    max_chars: int | None = None
    """Of all messages."""
    min_steps: int | None = None
    min_tokens: int | None = None

    def __post_init__(self) -> None:
        bounds = {spec.name: getattr(self, spec.name) for spec in fields(self)}
        for name, bound in bounds.items():
            _not_negative(name, bound)
        if all(bound is None for bound in bounds.values()):
            raise ValueError(f"give at least one of {', '.join(bounds)}")

    def keeps(self, trajectory: Trajectory) -> bool:
        if not _within(len(trajectory.steps), self.min_steps, self.max_steps):
            return False
        if (self.min_tokens, self.max_tokens) != (None, None) and not _within(
            conversation_tokens(trajectory), self.min_tokens, self.max_tokens
        ):
            return False
        return self.max_chars is None or conversation_chars(trajectory) <= self.max_chars


@dataclass(frozen=True, slots=True, kw_only=True)
class Agreement:
    """Its self-consistent steps were agreed on; what was sampled one action a step is kept."""

    name: ClassVar[str] = "agreement"
    at_least: float = 0.5
    """Share of the candidates that voted as the chosen one did, in [0, 1]."""
    of: Literal["mean", "min"] = "mean"
    """Over the steps that had candidates."""

    def __post_init__(self) -> None:
        _share("at_least", self.at_least)

    def keeps(self, trajectory: Trajectory) -> bool:
        return agreement(trajectory, self.of) >= self.at_least


@dataclass(frozen=True, slots=True, kw_only=True)
class NoLeak:
    """It does not speak of a guide that only the teacher was shown."""

    name: ClassVar[str] = "no_leak"

    def keeps(self, trajectory: Trajectory) -> bool:
        return not trajectory.leaks


FILTERS: tuple[type[Filter], ...] = (
    NoFailure,
    Correct,
    Finished,
    NoParseError,
    Repaired,
    UsedTools,
    Length,
    Agreement,
    NoLeak,
)


def agreement(trajectory: Trajectory, of: Literal["mean", "min"] = "mean") -> float:
    """Of its self-consistent steps, in [0, 1]; 1 where there are none."""
    shares = [step.agreement for step in trajectory.steps if step.candidates]
    if not shares:
        return 1.0
    return min(shares) if of == "min" else sum(shares) / len(shares)


def conversation_chars(trajectory: Trajectory) -> int:
    """Characters of all messages as a student learns them."""
    return sum(len(message.content) for message in trajectory.messages())


def conversation_tokens(trajectory: Trajectory) -> int:
    """Tokens of the conversation as the policy counted them at its last turn, else estimated from the characters."""
    last = trajectory.steps[-1].completion if trajectory.steps else None
    if last is None or not last.prompt_tokens:
        return -(-conversation_chars(trajectory) // _CHARS_PER_TOKEN)
    return last.prompt_tokens + last.completion_tokens


def computes(code: str) -> bool:
    """The code works a value out: it has an operation, a loop, or a call that does more than show a value."""
    try:
        tree = ast.parse(code)
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return False
    return any(_is_work(node) for node in ast.walk(tree))


def _is_work(node: ast.AST) -> bool:
    if isinstance(node, ast.Call):
        return not (isinstance(node.func, ast.Name) and node.func.id in _NO_WORK)
    work = (ast.BinOp, ast.AugAssign, ast.For, ast.While, ast.ListComp, ast.SetComp, ast.DictComp, ast.GeneratorExp)
    return isinstance(node, work)


def _computed(trajectory: Trajectory) -> bool:
    """In code that ran, the last step's included: its answer may be the very computation."""
    return trajectory.dialect == "code" and any(
        step.action is not None and _worked(step) and computes(step.action) for step in trajectory.steps
    )


def _before_answer(trajectory: Trajectory) -> tuple[Step, ...]:
    """The steps before the one that answered; all of them where none did."""
    steps = trajectory.steps
    return steps[:-1] if steps and steps[-1].observation_kind is ObservationKind.FINAL else steps


def _worked(step: Step) -> bool:
    return step.observation_kind in (ObservationKind.OK, ObservationKind.FINAL)


def _within(value: int, low: int | None, high: int | None) -> bool:
    return (low is None or value >= low) and (high is None or value <= high)


def _share(name: str, value: float | None) -> None:
    if value is not None and not 0 <= value <= 1:
        raise ValueError(f"{name} must be in [0, 1], not {value}")


def _not_negative(name: str, value: float | None) -> None:
    if value is not None and value < 0:
        raise ValueError(f"{name} must be at least 0, not {value}")
