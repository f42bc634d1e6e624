"""Filters that compare trajectories: duplicates, balance, a cap per task. They need all rows, seen before they choose.

Of each trajectory only its key and a `feature` of a few bytes are kept, so millions fit. What they choose depends on
the set of rows alone, never on their order: ties are broken by key, chance by a hash of seed and key.

Example::

    Deduplicate(by="question", keep="fewest_tokens")
"""

from __future__ import annotations

import ast
import hashlib
import math
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, Protocol, runtime_checkable

from rollout.curation_filters import agreement, conversation_tokens
from rollout.trajectory import Trajectory

Keep = Literal["fewest_tokens", "fewest_steps", "highest_agreement", "first", "random"]
"""Which of several trajectories is the better one: `first` goes by sample index, `random` by a seeded hash."""


class SuccessRates:
    """Per task, how many of its results were right; seen over all rows, those that other filters remove included."""

    def __init__(self) -> None:
        self._counts: dict[str, list[int]] = {}

    def see(self, trajectory: Trajectory) -> None:
        if trajectory.failure is None:
            counts = self._counts.setdefault(trajectory.task.id, [0, 0])
            counts[0] += trajectory.success
            counts[1] += 1

    def of(self, task_id: str) -> float:
        """0 for a task without results."""
        right, all_ = self._counts.get(task_id, (0, 0))
        return right / all_ if all_ else 0.0


@runtime_checkable
class SetFilter(Protocol):
    """Chooses among all rows by a small feature of each."""

    name: ClassVar[str]
    needs_rates: ClassVar[bool]
    """It asks for the tasks' success rates."""

    def feature(self, trajectory: Trajectory) -> Any:
        """A few bytes: all that is remembered of the row."""
        ...

    def choose(self, features: Mapping[str, Any], rates: SuccessRates) -> set[str]:
        """Keys to keep, of `features` by key."""
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class Deduplicate:
    """One of those that are the same."""

    name: ClassVar[str] = "deduplicate"
    needs_rates: ClassVar[bool] = False
    by: Literal["question", "actions", "both"] = "both"
    """What is the same: the question, whatever its case and spacing; all actions, as code without its comments and
    spacing; or both."""
    keep: Keep = "fewest_tokens"
    seed: int = 0

    def feature(self, trajectory: Trajectory) -> tuple[Any, bytes]:
        parts = []
        if self.by in ("question", "both"):
            parts.append(same_question(trajectory.task.question))
        if self.by in ("actions", "both"):
            parts += [_normal_action(trajectory.dialect, step.action) for step in trajectory.steps]
        group = hashlib.sha256("\0".join(parts).encode("utf-8", "replace")).digest()[:16]
        return _rank(trajectory, self.keep, self.seed), group

    def choose(self, features: Mapping[str, Any], rates: SuccessRates) -> set[str]:
        return _best(((key, group, rank) for key, (rank, group) in features.items()), 1)


@dataclass(frozen=True, slots=True, kw_only=True)
class PerTask:
    """At most so many trajectories of one task."""

    name: ClassVar[str] = "per_task"
    needs_rates: ClassVar[bool] = False
    at_most: int = 1
    keep: Keep = "fewest_tokens"
    seed: int = 0

    def __post_init__(self) -> None:
        if self.at_most < 1:
            raise ValueError(f"at_most must be at least 1, not {self.at_most}")

    def feature(self, trajectory: Trajectory) -> tuple[Any, str]:
        return _rank(trajectory, self.keep, self.seed), trajectory.task.id

    def choose(self, features: Mapping[str, Any], rates: SuccessRates) -> set[str]:
        return _best(((key, task, rank) for key, (rank, task) in features.items()), self.at_most)


@dataclass(frozen=True, slots=True, kw_only=True)
class Balance:
    """No group is larger than `ratio` times the smallest one; what is too much is left out by chance."""

    name: ClassVar[str] = "balance"
    needs_rates: ClassVar[bool] = True
    by: Literal["kind", "policy", "level", "steps", "success_rate"] = "kind"
    """The groups: kind of task, policy, or difficulty, which is the task's `level` or `difficulty` as its file tells,
    the number of steps, or how many of the task's results were right (a third or fewer, two thirds or fewer, more)."""
    ratio: float = 1.0
    """At least 1."""
    seed: int = 0

    def __post_init__(self) -> None:
        if not 1 <= self.ratio < math.inf:
            raise ValueError(f"ratio must be at least 1, not {self.ratio}")

    def feature(self, trajectory: Trajectory) -> str:
        task = trajectory.task
        match self.by:
            case "kind":
                return task.kind
            case "policy":
                return trajectory.policy
            case "steps":
                return str(len(trajectory.steps))
            case "level":
                return str(task.metadata.get("level", task.metadata.get("difficulty", "unknown")))
            case "success_rate":
                return task.id

    def choose(self, features: Mapping[str, Any], rates: SuccessRates) -> set[str]:
        def group(feature: str) -> str:
            return _third(rates.of(feature)) if self.by == "success_rate" else feature

        sizes = Counter(group(feature) for feature in features.values())
        if not sizes:
            return set()
        at_most = math.floor(self.ratio * min(sizes.values()))
        return _best(((key, group(feature), _chance(self.seed, key)) for key, feature in features.items()), at_most)


SET_FILTERS: tuple[type[SetFilter], ...] = (Deduplicate, PerTask, Balance)


def same_question(question: str) -> str:
    """What is equal for questions that differ in case and spacing alone; signs count, they may be operators."""
    return " ".join(question.split()).casefold()


def _best(rows: Iterable[tuple[str, Any, Any]], at_most: int) -> set[str]:
    """Of (key, group, rank), the keys of the `at_most` lowest ranks of each group; equal ranks go by key."""
    groups: dict[Any, list[tuple[Any, str]]] = defaultdict(list)
    for key, group, rank in rows:
        groups[group].append((rank, key))
    return {key for ranked in groups.values() for _, key in sorted(ranked)[:at_most]}


def _rank(trajectory: Trajectory, keep: Keep, seed: int) -> Any:
    """Lowest is best."""
    match keep:
        case "fewest_tokens":
            return trajectory.completion_tokens or conversation_tokens(trajectory)
        case "fewest_steps":
            return len(trajectory.steps)
        case "highest_agreement":
            return -agreement(trajectory)
        case "first":
            return trajectory.sample_index
        case "random":
            return _chance(seed, trajectory.key)


def _chance(seed: int, key: str) -> bytes:
    return hashlib.sha256(f"{seed}|{key}".encode("utf-8", "replace")).digest()[:8]


def _third(rate: float) -> str:
    return "hard" if rate <= 1 / 3 else "medium" if rate <= 2 / 3 else "easy"


def _normal_action(dialect: str, action: str | None) -> str:
    """What is equal for actions that differ in comments, spacing and quotes alone."""
    if action is None:
        return ""
    if dialect == "code":
        try:
            return ast.unparse(ast.parse(action))
        except (SyntaxError, ValueError, RecursionError, MemoryError):
            pass
    return " ".join(action.split())
