"""The figures of one ledger, in one pass over a few of its columns: counts by policy and kind, by steps, by difficulty,
over time; stop reasons, failures, cost; and which trajectories to show.

Rows are summed by Arrow some ten thousand at a time, so that a million take seconds and no text is held. What grows
with the ledger is eight bytes a row for each of three numbers: when it ended, its tokens, how long it took.

Example::

    figures = read_figures(Ledger("runs/a/ledger"))
    figures.tallies["qwen", "math"].rate            # Score
    figures.stops["qwen"]["max_steps"]
"""

from __future__ import annotations

import heapq
import json
import zlib
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute

from launch.evaluation.intervals import Score, score
from rollout.ledger import Ledger

pc: Any = pyarrow.compute  # its functions are made at run time

_COLUMNS = (
    "key", "task_id", "kind", "policy", "success", "trainable", "stop_reason", "step_count", "tool_calls",
    "parse_errors", "completion_tokens", "usage", "started_at_s", "duration_s", "task",
)  # fmt: skip
_BATCH = 16_384
"""Rows that are summed at once."""
SAMPLES_EACH = 3
"""Candidates for being shown, of each policy, kind and outcome."""
_MOST_GROUPS = 2_000
"""Of (policy, kind, outcome): beyond them none are sampled."""
_LEVEL = '"(?:level|difficulty|hops)"'
_LENGTHS = (100, 200, 400, 800)
"""Characters of a question; where a task tells no difficulty, longer is taken for harder."""
_MOST_LEVELS = 12
_EXAMPLE_CHARS = 600
NAME_CHARS = 120
"""Of a policy's or a kind's name, so many are shown."""

Cell = list[int]
"""[trajectories, successes]."""


@dataclass(slots=True)
class Tally:
    """Sums over trajectories."""

    n: int = 0
    succeeded: int = 0
    accepted: int = 0
    """A student may learn from it: right, every turn parsed, no guide given away."""
    steps: int = 0
    tool_calls: int = 0
    parse_errors: int = 0
    requests: int = 0
    prompt_tokens: int = 0
    completion_tokens: int = 0
    """All that was sampled, candidates that lost included, where the policy tells."""
    cost_usd: float = 0.0
    duration_s: float = 0.0

    @property
    def rate(self) -> Score | None:
        return score(self.succeeded, self.n) if self.n else None

    def __add__(self, other: Tally) -> Tally:
        return Tally(*(getattr(self, name) + getattr(other, name) for name in Tally.__slots__))


@dataclass(slots=True)
class FailureFigures:
    """Attempts that came to no result, of one class."""

    attempts: int = 0
    example: str = ""
    """The message that came most often, of the first few thousand."""
    cost_usd: float = 0.0
    messages: Counter[str] = field(default_factory=Counter)


@dataclass(slots=True)
class LedgerFigures:
    """What one ledger holds."""

    tallies: dict[tuple[str, str], Tally] = field(default_factory=lambda: defaultdict(Tally))
    """(policy, kind) -> sums."""
    by_steps: dict[str, dict[int, Cell]] = field(default_factory=dict)
    """policy -> number of steps -> cell."""
    by_level: dict[str, dict[str, Cell]] = field(default_factory=dict)
    """policy -> what the tasks say of their difficulty -> cell."""
    by_length: dict[str, dict[int, Cell]] = field(default_factory=dict)
    """policy -> index into `LENGTH_LABELS` -> cell."""
    by_reference: dict[str, dict[int, Cell]] = field(default_factory=dict)
    """policy -> steps that the reference took for the same task -> cell."""
    stops: dict[str, Counter[str]] = field(default_factory=lambda: defaultdict(Counter))
    """policy -> reason -> trajectories."""
    failures: dict[str, FailureFigures] = field(default_factory=dict)
    """class -> attempts."""
    ended_s: np.ndarray = field(default_factory=lambda: np.empty(0))
    """[n] Unix time."""
    tokens: np.ndarray = field(default_factory=lambda: np.empty(0))
    """[n] completion tokens."""
    durations_s: np.ndarray = field(default_factory=lambda: np.empty(0))
    """[n]"""
    samples: dict[tuple[str, str, bool], list[str]] = field(default_factory=dict)
    """(policy, kind, success) -> keys, the same ones for the same rows in any order."""

    @property
    def total(self) -> Tally:
        return sum(self.tallies.values(), Tally())

    @property
    def policies(self) -> list[str]:
        return list(dict.fromkeys(policy for policy, _ in self.tallies))

    @property
    def kinds(self) -> list[str]:
        return sorted({kind for _, kind in self.tallies})

    def of_policy(self, policy: str) -> Tally:
        return sum((tally for (name, _), tally in self.tallies.items() if name == policy), Tally())

    def of_kind(self, kind: str) -> Tally:
        return sum((tally for (_, name), tally in self.tallies.items() if name == kind), Tally())

    @property
    def failed_cost_usd(self) -> float:
        return sum(each.cost_usd for each in self.failures.values())

    def to_json(self) -> dict[str, Any]:
        """Without the arrays and the samples."""
        return {
            "groups": [
                {"policy": policy, "kind": kind, **{name: getattr(tally, name) for name in Tally.__slots__}}
                for (policy, kind), tally in sorted(self.tallies.items())
            ],
            "by_steps": self.by_steps,
            "by_level": self.by_level,
            "by_reference_steps": self.by_reference,
            "by_question_length": {
                policy: {LENGTH_LABELS[at]: cell for at, cell in sorted(cells.items())}
                for policy, cells in self.by_length.items()
            },
            "stop_reasons": {policy: dict(counts.most_common()) for policy, counts in self.stops.items()},
            "failures": {
                name: {"attempts": each.attempts, "cost_usd": each.cost_usd, "example": each.example}
                for name, each in sorted(self.failures.items())
            },
        }


LENGTH_LABELS = (
    f"under {_LENGTHS[0]}",
    *(f"{low} to {high - 1}" for low, high in zip(_LENGTHS, _LENGTHS[1:], strict=False)),
    f"{_LENGTHS[-1]} or more",
)


def read_figures(ledger: Ledger, *, reference: Mapping[str, int] | None = None) -> LedgerFigures:
    """`reference`: task id -> steps that it took somebody else. Raises `rollout.ledger.LedgerError`."""
    figures = LedgerFigures()
    arrays: list[tuple[np.ndarray, np.ndarray, np.ndarray]] = []
    chosen: dict[tuple[str, str, bool], list[tuple[int, str]]] = {}
    for batch in _batches(ledger.scan(_COLUMNS)):
        arrays.append(_add(figures, batch, reference or {}))
        _choose(chosen, batch)
    if arrays:
        figures.ended_s, figures.tokens, figures.durations_s = (
            np.concatenate(parts) for parts in zip(*arrays, strict=True)
        )
    figures.samples = {group: [key for _, key in sorted(best, reverse=True)] for group, best in sorted(chosen.items())}
    _add_failures(figures, ledger)
    return figures


def steps_by_task(ledger: Ledger, *, most: int = 200_000) -> dict[str, int]:
    """Task id -> steps of its first successful trajectory."""
    steps: dict[str, int] = {}
    for table in ledger.scan(["task_id", "step_count", "success"]):
        table = table.filter(table.column("success"))
        for task, count in zip(table.column(0).to_pylist(), table.column(1).to_pylist(), strict=True):
            steps.setdefault(task, count)
        if len(steps) >= most:
            break
    return steps


def _batches(tables: Iterator[pa.Table]) -> Iterator[pa.Table]:
    waiting: list[pa.Table] = []
    rows = 0
    for table in tables:
        waiting.append(table)
        rows += table.num_rows
        if rows >= _BATCH:
            yield _named(pa.concat_tables(waiting))
            waiting, rows = [], 0
    if waiting:
        yield _named(pa.concat_tables(waiting))


def _named(batch: pa.Table) -> pa.Table:
    """Names cut to what can be shown: they come from files, and may be anything."""
    for name in ("policy", "kind"):
        cut = pc.utf8_slice_codeunits(batch.column(name), 0, NAME_CHARS)
        batch = batch.set_column(batch.schema.get_field_index(name), name, cut)
    return batch


def _add(
    figures: LedgerFigures, batch: pa.Table, reference: Mapping[str, int]
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """When each row ended, its tokens, how long it took."""
    usage = {name: pc.struct_field(batch.column("usage"), name) for name in _USAGE}
    sampled = usage["completion_tokens"]
    tokens = pc.if_else(pc.greater(sampled, 0), sampled, batch.column("completion_tokens"))
    right = batch.column("success").cast(pa.int64())
    flat = pa.table(
        {
            "policy": batch.column("policy"),
            "kind": batch.column("kind"),
            "stop": batch.column("stop_reason"),
            "succeeded": right,
            "accepted": batch.column("trainable").cast(pa.int64()),
            "steps": batch.column("step_count").cast(pa.int64()),
            "tool_calls": batch.column("tool_calls"),
            "parse_errors": batch.column("parse_errors").cast(pa.int64()),
            "requests": usage["requests"],
            "prompt_tokens": usage["prompt_tokens"],
            "completion_tokens": tokens,
            "cost_usd": usage["cost_usd"],
            "duration_s": batch.column("duration_s"),
            "length": _length_index(batch.column("task")),
        }
    )
    sums = [name for name in Tally.__slots__ if name != "n"]
    grouped = flat.group_by(["policy", "kind"]).aggregate([*((name, "sum") for name in sums), ([], "count_all")])
    for row in grouped.to_pylist():
        figures.tallies[row["policy"], row["kind"]] += Tally(
            n=row["count_all"], **{name: row[f"{name}_sum"] for name in sums}
        )
    for row in flat.group_by(["policy", "stop"]).aggregate([([], "count_all")]).to_pylist():
        figures.stops[row["policy"]][row["stop"]] += row["count_all"]
    for column, cells in (("steps", figures.by_steps), ("length", figures.by_length)):
        for row in flat.group_by(["policy", column]).aggregate([("succeeded", "sum"), ([], "count_all")]).to_pylist():
            _add_cell(cells, row["policy"], row[column], row["count_all"], row["succeeded_sum"])
    _add_levels(figures, batch)
    if reference:
        columns = (batch.column(name).to_pylist() for name in ("policy", "task_id", "success"))
        for policy, task, success in zip(*columns, strict=True):
            if (steps := reference.get(task)) is not None:
                _add_cell(figures.by_reference, policy, steps, 1, success)
    ended = pc.add(batch.column("started_at_s"), batch.column("duration_s"))
    return ended.to_numpy(), tokens.to_numpy().astype(np.float64), batch.column("duration_s").to_numpy()


_USAGE = ("requests", "prompt_tokens", "completion_tokens", "cost_usd")


def _length_index(task: pa.ChunkedArray) -> pa.ChunkedArray:
    length = pc.utf8_length(pc.struct_field(task, "question"))
    index = pc.cast(pc.greater_equal(length, _LENGTHS[0]), pa.int64())
    for edge in _LENGTHS[1:]:
        index = pc.add(index, pc.cast(pc.greater_equal(length, edge), pa.int64()))
    return index


def _add_levels(figures: LedgerFigures, batch: pa.Table) -> None:
    """What some task sets say of their difficulty (MATH's level, the hops of a question)."""
    metadata = pc.struct_field(batch.column("task"), "metadata_json")
    told = pc.match_substring_regex(metadata, _LEVEL)
    if not pc.any(told).as_py():
        return
    rows = pa.table({name: batch.column(name) for name in ("policy", "success")})
    rows = rows.append_column("metadata", metadata).filter(told)
    for row in rows.to_pylist():
        found = json.loads(row["metadata"])
        for name in ("level", "difficulty", "hops"):
            value = found.get(name) if isinstance(found, dict) else None
            if isinstance(value, str | int | float) and str(value):
                label = str(value)[:40]
                label = label if name == "difficulty" or label.lower().startswith(name[:3]) else f"{name} {label}"
                known = figures.by_level.get(row["policy"], {})
                label = label if label in known or len(known) < _MOST_LEVELS else "others"
                _add_cell(figures.by_level, row["policy"], label, 1, row["success"])
                break


def _add_cell(cells: dict[str, dict[Any, Cell]], policy: str, value: Any, n: int, successes: int) -> None:
    cell = cells.setdefault(policy, {}).setdefault(value, [0, 0])
    cell[0] += n
    cell[1] += int(successes)


def _choose(chosen: dict[tuple[str, str, bool], list[tuple[int, str]]], batch: pa.Table) -> None:
    """The keys with the smallest hashes: as good as drawn by lot, and the same in every order of the rows."""
    columns = (batch.column(name).to_pylist() for name in ("policy", "kind", "success", "key"))
    for policy, kind, success, key in zip(*columns, strict=True):
        group = (policy, kind, success)
        best = chosen.get(group)
        if best is None:
            if len(chosen) >= _MOST_GROUPS:
                continue
            best = chosen[group] = []
        rank = -zlib.crc32(key.encode("utf-8", "surrogatepass"))  # a heap gives up its smallest
        if len(best) < SAMPLES_EACH:
            heapq.heappush(best, (rank, key))
        elif rank > best[0][0]:
            heapq.heapreplace(best, (rank, key))


def _add_failures(figures: LedgerFigures, ledger: Ledger) -> None:
    for table in ledger.scan_failures(["failure", "usage"]):
        columns = (table.column(name).to_pylist() for name in ("failure", "usage"))
        for failure, usage in zip(*columns, strict=True):
            each = figures.failures.setdefault(failure["failure_class"], FailureFigures())
            each.attempts += 1
            each.cost_usd += usage["cost_usd"]
            if each.attempts <= 5_000:
                each.messages[failure["message"][:_EXAMPLE_CHARS]] += 1
    for each in figures.failures.values():
        each.example = max(each.messages, key=lambda text: each.messages[text], default="")
