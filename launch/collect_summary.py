"""What came of a collection: each expected episode recorded once or its failure classified, and what was learned of the
teachers.

Example::

    summary = summarise(ledger, {"qwen": keys_of_qwen}, settled, Curation.from_config(["correct"]))
    summary.complete          # nothing is unaccounted for
    print(summary.closing_line())
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Mapping, Set
from dataclasses import asdict, dataclass
from typing import Any

from rich import box
from rich.table import Table
from rich.text import Text

from launch.evaluation.intervals import score
from rollout.curation import Curation, CurationReport
from rollout.ledger import Ledger
from rollout.retries import RetryRule

_COLUMNS = ["key", "kind", "success", "stop_reason", "step_count", "tool_calls", "usage", "completion_tokens"]


@dataclass(slots=True)
class KindTally:
    """Trajectories of one kind of task by one teacher."""

    recorded: int = 0
    succeeded: int = 0
    accepted: int = 0
    """Curation keeps them."""
    steps: int = 0
    tool_calls: int = 0
    requests: int = 0
    prompt_tokens: int = 0
    completion_tokens: int = 0
    """All that was sampled, candidates that lost included, where the teacher tells."""
    cost_usd: float = 0.0

    def add(self, row: Mapping[str, Any]) -> None:
        """A row of `_COLUMNS`."""
        usage = row["usage"]
        self.recorded += 1
        self.succeeded += row["success"]
        self.steps += row["step_count"]
        self.tool_calls += row["tool_calls"]
        self.requests += usage["requests"]
        self.prompt_tokens += usage["prompt_tokens"]
        self.completion_tokens += usage["completion_tokens"] or row["completion_tokens"]
        self.cost_usd += usage["cost_usd"]

    def __add__(self, other: KindTally) -> KindTally:
        return KindTally(*(a + b for a, b in zip(asdict(self).values(), asdict(other).values(), strict=True)))

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
    quarantined: int
    """Of those failed: not tried again unless told to."""
    missing: int
    """Neither: they were not run to an end."""
    duplicates: int
    """Rows of the ledger beyond the first of their key; readers leave them out."""
    beyond: int
    """Results in the ledger that this configuration does not ask for (fewer tasks or samples than before)."""
    tallies: dict[str, dict[str, KindTally]]
    """teacher -> kind -> tally."""
    stop_reasons: dict[str, int]
    failed_cost_usd: float
    """Of attempts that came to no result."""
    curation: CurationReport

    @property
    def complete(self) -> bool:
        """Each expected episode is recorded, or has a failure of a known class."""
        return self.missing == 0

    @property
    def all(self) -> KindTally:
        return sum((tally for kinds in self.tallies.values() for tally in kinds.values()), KindTally())

    @property
    def cost_usd(self) -> float:
        return self.all.cost_usd + self.failed_cost_usd

    def to_json(self) -> dict[str, Any]:
        accepted = self.all.accepted
        return {
            "expected": self.expected,
            "recorded": self.recorded,
            "failed": self.failed,
            "quarantined": self.quarantined,
            "missing": self.missing,
            "duplicates": self.duplicates,
            "beyond": self.beyond,
            "complete": self.complete,
            "cost_usd": self.cost_usd,
            "cost_per_accepted_usd": self.cost_usd / accepted if accepted else None,
            "all": self.all.to_json(),
            "teachers": {
                name: {kind: tally.to_json() for kind, tally in kinds.items()} for name, kinds in self.tallies.items()
            },
            "stop_reasons": self.stop_reasons,
            "curation": self.curation.to_json(),
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


def summarise(ledger: Ledger, expected: Mapping[str, Set[str]], *, rule: RetryRule, curation: Curation) -> Summary:
    """`expected`: teacher -> keys of its episodes. Reads a few columns, and for the curation the trajectories."""
    owner = {key: teacher for teacher, keys in expected.items() for key in keys}
    tallies: dict[str, dict[str, KindTally]] = {teacher: defaultdict(KindTally) for teacher in expected}
    stops: Counter[str] = Counter()
    recorded: set[str] = set()
    beyond = 0
    for table in ledger.scan(_COLUMNS):
        for row in table.to_pylist():
            teacher = owner.get(row["key"])
            if teacher is None:
                beyond += 1
                continue
            recorded.add(row["key"])
            tallies[teacher][row["kind"]].add(row)
            stops[row["stop_reason"]] += 1
    attempts = {key: each for key, each in ledger.attempts().items() if key in owner and key not in recorded}
    curated = curation.apply(ledger.trajectories)
    for trajectory in curated.kept:
        if trajectory.key in owner:
            tallies[owner[trajectory.key]][trajectory.task.kind].accepted += 1
    return Summary(
        expected=len(owner),
        recorded=len(recorded),
        failed=dict(sorted(Counter(each.last_class.value for each in attempts.values()).items())),
        quarantined=sum(rule.exhausted(each) is not None for each in attempts.values()),
        missing=len(owner) - len(recorded) - len(attempts),
        duplicates=ledger.duplicates(),
        beyond=beyond,
        tallies={teacher: dict(sorted(kinds.items())) for teacher, kinds in tallies.items()},
        stop_reasons=dict(stops.most_common()),
        failed_cost_usd=sum(
            row["cost_usd"] for table in ledger.scan_failures(["cost_usd"]) for row in table.to_pylist()
        ),
        curation=curated.report,
    )


def summary_table(summary: Summary) -> Table:
    """A row for each kind and teacher, with 95% intervals, and one for all."""
    table = Table(
        title="collected (success with 95% intervals; kept by curation; mean steps and tool calls)",
        title_justify="left",
        box=box.SIMPLE_HEAD,
        pad_edge=False,
        collapse_padding=True,
    )
    table.add_column("teacher", overflow="fold", min_width=12)
    table.add_column("kind", overflow="fold", min_width=10)
    paid = ("US$", "US$ an\naccepted") if summary.cost_usd else ()
    for column in ("number", "success, %", "kept", "steps", "calls", "tokens", *paid):
        table.add_column(column, justify="right", no_wrap=True)
    rows = [(name, kind, tally) for name, kinds in summary.tallies.items() for kind, tally in kinds.items()]
    if len(rows) != 1:
        rows.append(("all", "", summary.all))
    for name, kind, tally in rows:
        rate = score(tally.succeeded, tally.recorded) if tally.recorded else None
        n = max(tally.recorded, 1)
        cells = [
            f"{tally.recorded:,}",
            f"{100 * rate.mean:.0f} [{100 * rate.low:.0f}, {100 * rate.high:.0f}]" if rate else "-",
            f"{tally.accepted:,}",
            f"{tally.steps / n:.1f}",
            f"{tally.tool_calls / n:.1f}",
            f"{tally.completion_tokens:,}",
        ]
        if paid:
            cells += [
                f"{tally.cost_usd:.4f}",
                f"{tally.cost_usd / tally.accepted:.5f}" if tally.accepted else "-",
            ]
        table.add_row(Text(name), Text(kind), *cells)
    return table
