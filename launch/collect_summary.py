"""What came of a collection: each expected episode recorded once or its failure classified, and what was learned of the
teachers.

Example::

    summary = summarise(ledger, {"qwen": keys_of_qwen})
    summary.complete          # nothing is unaccounted for
    summary.to_json()
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Mapping, Set
from dataclasses import asdict, dataclass
from typing import Any

from rich import box
from rich.table import Table

from launch.intervals import score
from rollout.ledger import Ledger
from rollout.trajectory import Trajectory


@dataclass(slots=True)
class KindTally:
    """Trajectories of one kind of task by one teacher."""

    recorded: int = 0
    succeeded: int = 0
    trainable: int = 0
    steps: int = 0
    tool_calls: int = 0
    prompt_tokens: int = 0
    completion_tokens: int = 0
    cost_usd: float = 0.0

    def add(self, trajectory: Trajectory) -> None:
        self.recorded += 1
        self.succeeded += trajectory.success
        self.trainable += trajectory.trainable
        self.steps += len(trajectory.steps)
        self.tool_calls += trajectory.tool_calls
        self.prompt_tokens += trajectory.usage.prompt_tokens
        self.completion_tokens += trajectory.usage.completion_tokens or trajectory.completion_tokens
        self.cost_usd += trajectory.usage.cost_usd

    def __add__(self, other: KindTally) -> KindTally:
        return KindTally(*(a + b for a, b in zip(_values(self), _values(other), strict=True)))

    def to_json(self) -> dict[str, Any]:
        return {**asdict(self), "success": asdict(score(self.succeeded, self.recorded)) if self.recorded else None}


@dataclass(frozen=True, slots=True, kw_only=True)
class Summary:
    """Counts of episodes unless it says otherwise."""

    expected: int
    recorded: int
    """Of those expected, with a result."""
    failed: dict[str, int]
    """Of those without a result: by the class of their last failure."""
    missing: int
    """Neither: they were never run to an end."""
    duplicates: int
    """Rows of the ledger beyond the first of their key; readers leave them out."""
    beyond: int
    """Results in the ledger that this configuration does not ask for (fewer tasks or samples than before)."""
    tallies: dict[str, dict[str, KindTally]]
    """teacher -> kind -> tally."""
    stop_reasons: dict[str, int]

    @property
    def complete(self) -> bool:
        """Each expected episode is recorded, or has a failure of a known class."""
        return self.missing == 0

    @property
    def all(self) -> KindTally:
        return sum((tally for kinds in self.tallies.values() for tally in kinds.values()), KindTally())

    def to_json(self) -> dict[str, Any]:
        return {
            "expected": self.expected,
            "recorded": self.recorded,
            "failed": self.failed,
            "missing": self.missing,
            "duplicates": self.duplicates,
            "beyond": self.beyond,
            "complete": self.complete,
            "all": self.all.to_json(),
            "teachers": {
                name: {kind: tally.to_json() for kind, tally in kinds.items()} for name, kinds in self.tallies.items()
            },
            "stop_reasons": self.stop_reasons,
        }

    def closing_line(self) -> str:
        """The check, in words."""
        parts = [f"{self.recorded:,} recorded"]
        if self.failed:
            classes = ", ".join(f"{name} {count:,}" for name, count in self.failed.items())
            parts.append(f"{sum(self.failed.values()):,} failed ({classes})")
        if self.missing:
            parts.append(f"{self.missing:,} not run")
        verdict = "every episode is accounted for" if self.complete else "NOT COMPLETE"
        return f"{self.expected:,} episodes = {' + '.join(parts)}, each once: {verdict}"


def summarise(ledger: Ledger, expected: Mapping[str, Set[str]]) -> Summary:
    """`expected`: teacher -> keys of its episodes. Reads the ledger once."""
    owner = {key: teacher for teacher, keys in expected.items() for key in keys}
    tallies: dict[str, dict[str, KindTally]] = {teacher: defaultdict(KindTally) for teacher in expected}
    stops: Counter[str] = Counter()
    recorded: set[str] = set()
    beyond = 0
    for trajectory in ledger.trajectories():
        teacher = owner.get(trajectory.key)
        if teacher is None:
            beyond += 1
            continue
        recorded.add(trajectory.key)
        tallies[teacher][trajectory.task.kind].add(trajectory)
        stops[trajectory.stop_reason.value] += 1
    failed = {
        failure.key: failure.failure.failure_class.value
        for failure in ledger.failures()
        if failure.failure is not None and failure.key in owner and failure.key not in recorded
    }
    return Summary(
        expected=len(owner),
        recorded=len(recorded),
        failed=dict(sorted(Counter(failed.values()).items())),
        missing=len(owner) - len(recorded) - len(failed),
        duplicates=ledger.duplicates(),
        beyond=beyond,
        tallies={teacher: dict(sorted(kinds.items())) for teacher, kinds in tallies.items()},
        stop_reasons=dict(stops.most_common()),
    )


def summary_table(summary: Summary) -> Table:
    """A row for each kind and teacher, with 95% intervals, and one for all."""
    table = Table(title="collected; success with 95% intervals, steps and tool calls in the mean", title_justify="left", box=box.SIMPLE_HEAD, pad_edge=False)
    table.add_column("teacher", no_wrap=True)
    table.add_column("kind", no_wrap=True)
    for column in ("number", "success, %", "steps", "calls", "tokens", "US$", "US$/success"):
        table.add_column(column, justify="right", no_wrap=True)
    rows = [(name, kind, tally) for name, kinds in summary.tallies.items() for kind, tally in kinds.items()]
    if len(rows) > 1:
        rows.append(("all", "", summary.all))
    for name, kind, tally in rows:
        if not tally.recorded:
            continue
        rate = score(tally.succeeded, tally.recorded)
        table.add_row(
            name,
            kind,
            f"{tally.recorded:,}",
            f"{100 * rate.mean:.0f} [{100 * rate.low:.0f}, {100 * rate.high:.0f}]",
            f"{tally.steps / tally.recorded:.1f}",
            f"{tally.tool_calls / tally.recorded:.1f}",
            f"{tally.completion_tokens:,}",
            f"{tally.cost_usd:.4f}" if tally.cost_usd else "-",
            f"{tally.cost_usd / tally.succeeded:.5f}" if tally.cost_usd and tally.succeeded else "-",
        )
    return table


def _values(tally: KindTally) -> list[Any]:
    return list(asdict(tally).values())
