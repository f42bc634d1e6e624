"""How hard a row is, larger is harder: by its turns, its tokens, or how rarely its task was solved.

A `Difficulty` sees every trajectory before anything is refused, rates each row when it is made, and may know better
later, when more has arrived. Where the order of a pass comes from is `learner.row_order`; who asks is
`learner.curriculum`.

Example::

    difficulty = make_difficulty("student_success", rates="runs/a/evaluation/student/greedy")
    difficulty.of(trajectory, tokens=812)          # 0.25: three of four runs of its task succeeded; None: unknown task
"""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from learner.config import ConfigError
from rollout.trajectory import Trajectory

if TYPE_CHECKING:
    from learner.examples import Example


class Difficulty(Protocol):
    """One measure. `observe` and `of` are called by one thread, `latest` by another."""

    def observe(self, trajectory: Trajectory) -> None:
        """A trajectory has arrived; it may be refused for training."""
        ...

    def of(self, trajectory: Trajectory, tokens: int) -> float | None:
        """Of its row of `tokens`, as far as is known when the row is made; None: unknown."""
        ...

    def latest(self, example: Example) -> float | None:
        """What is known now."""
        ...


class Steps:
    """The number of turns: the longer an agent has to keep on, the harder."""

    def observe(self, trajectory: Trajectory) -> None:
        pass

    def of(self, trajectory: Trajectory, tokens: int) -> float | None:
        return float(len(trajectory.steps))

    def latest(self, example: Example) -> float | None:
        return example.difficulty


class Length:
    """The number of tokens of the row."""

    def observe(self, trajectory: Trajectory) -> None:
        pass

    def of(self, trajectory: Trajectory, tokens: int) -> float | None:
        return float(tokens)

    def latest(self, example: Example) -> float | None:
        return example.difficulty


class FailureRate:
    """1 - the success rate of the row's task in a given table."""

    def __init__(self, rates: Mapping[str, float]) -> None:
        self._rates = rates

    def observe(self, trajectory: Trajectory) -> None:
        pass

    def of(self, trajectory: Trajectory, tokens: int) -> float | None:
        rate = self._rates.get(trajectory.task.id)
        return None if rate is None else 1.0 - rate

    def latest(self, example: Example) -> float | None:
        return example.difficulty


class StreamFailureRate:
    """1 - the success rate of the row's task over all that has arrived: the teacher's own, when it tries a task more
    than once. A stream of successes alone says nothing."""

    def __init__(self) -> None:
        self._runs: dict[str, dict[str, bool]] = defaultdict(dict)
        """[task id][trajectory key] -> whether it succeeded."""

    def observe(self, trajectory: Trajectory) -> None:
        if trajectory.failure is None:  # what our own machinery failed at says nothing of the task
            self._runs[trajectory.task.id][trajectory.key] = trajectory.success

    def of(self, trajectory: Trajectory, tokens: int) -> float | None:
        return None

    def latest(self, example: Example) -> float | None:
        runs = self._runs.get(example.task_id)
        return 1.0 - sum(runs.values()) / len(runs) if runs else None


def make_difficulty(by: str, *, rates: str = "") -> Difficulty:
    """The measure named `by` in the configuration. Raises `ConfigError`."""
    if by == "steps":
        return Steps()
    if by == "length":
        return Length()
    if by in ("teacher_success", "student_success"):
        return FailureRate(read_success_rates(Path(rates))) if rates else StreamFailureRate()
    raise ConfigError(f"no difficulty {by!r}; use steps, length, teacher_success or student_success")


def read_success_rates(path: Path) -> dict[str, float]:
    """Task id -> success rate in [0, 1].

    `path` is a ledger (a folder with `shards/`; of rows that share a key one counts), a Parquet file with the columns
    task_id and success, a JSON file {"task id": rate}, or JSON lines {"task_id": ..., "success": ...}, one a run.
    Raises `ConfigError`.
    """
    try:
        if path.is_dir():
            shards = sorted((path / "shards").glob("*.parquet"))
            if not shards:
                raise ConfigError(f"{path} has no shards/*.parquet; name a ledger, or a JSON file of success rates")
            return _means(_runs_of(shards))
        if path.suffix == ".parquet":
            return _means(_runs_of([path]))
        text = path.read_text(encoding="utf-8")
        if path.suffix == ".jsonl":
            lines = [json.loads(line) for line in text.splitlines() if line.strip()]
            return _means((str(line["task_id"]), float(line["success"])) for line in lines)
        return _checked({str(task): float(rate) for task, rate in json.loads(text).items()}, path)
    except ConfigError:
        raise
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ConfigError(
            f"no success rates in {path} ({error!r}); name a ledger, a JSON file of task id -> rate, or JSON lines "
            "with task_id and success"
        ) from error


def _runs_of(files: Iterable[Path]) -> Iterable[tuple[str, float]]:
    """(task id, success) of every run. Compaction leaves rows twice for a while, so keys tell them apart."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    seen: set[Any] = set()
    for file in files:
        try:
            names = pq.read_schema(file).names
            columns = [name for name in ("key", "task_id", "success") if name in names]
            rows = pq.read_table(file, columns=columns).to_pylist()
        except pa.ArrowException as error:
            raise ConfigError(f"{file} cannot be read as Parquet: {error}") from error
        for i, row in enumerate(rows):
            key = row.get("key", (file, i))
            if key not in seen:
                seen.add(key)
                yield row["task_id"], float(row["success"])


def _means(runs: Iterable[tuple[str, float]]) -> dict[str, float]:
    by_task: dict[str, list[float]] = defaultdict(list)
    for task, success in runs:
        by_task[task].append(success)
    return {task: sum(each) / len(each) for task, each in by_task.items()}


def _checked(rates: dict[str, float], path: Path) -> dict[str, float]:
    for task, rate in rates.items():
        if not 0 <= rate <= 1:
            raise ConfigError(f"{path}: the success rate of {task!r} is {rate}; it must be in [0, 1]")
    return rates
