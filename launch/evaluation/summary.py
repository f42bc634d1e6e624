"""What a ledger says of those who acted in it: success, effort, cost, latency, failures; by kind of task and in all.

It reads columns and never makes trajectories, and holds counts: memory does not grow with what trajectories hold, only
by some bytes a task and a key. Quantiles are read off histograms whose bins are 2% wide. It does not say who is better:
`launch.evaluation.significance` does.

Example::

    summary = summarize(Ledger("runs/a/evaluation/student"))
    summary.all.success.mean, summary.all.latency.p95_s
    json.dumps(summary.to_json())
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Collection, Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from launch.evaluation.intervals import Score, mean_score, score
from rollout.ledger import Ledger

_COLUMNS = [
    "key", "task_id", "kind", "success", "reward", "stop_reason", "step_count", "tool_calls", "parse_errors", "usage",
    "completion_tokens", "duration_s",
]  # fmt: skip
_BIN = math.log(1.02)
_SHORTEST_S = 1e-4


@dataclass(frozen=True, slots=True, kw_only=True)
class Latency:
    """Seconds; of whole episodes, and of single steps (policy and env together)."""

    p50_s: float
    p95_s: float
    step_p50_s: float
    step_p95_s: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Figures:
    """Of some episodes. Means are over episodes."""

    n: int
    """Episodes with a result."""
    tasks: int
    """Distinct ones; fewer than `n` where tasks were run several times."""
    success: Score | None
    """Share of episodes that succeeded; of a task with several, the share of its own. None for no episode."""
    mean_reward: float
    """Differs from the success rate where graders give parts of the whole (F1)."""
    mean_steps: float
    mean_tool_calls: float
    mean_prompt_tokens: float
    mean_completion_tokens: float
    """All that was sampled, candidates that lost included, where the policy tells."""
    prompt_tokens: int
    completion_tokens: int
    cost_usd: float
    """0 where nothing is paid."""
    parse_errors: int
    """Turns that could not be read."""
    stop_reasons: dict[str, int]
    latency: Latency | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Summary:
    """Of a ledger."""

    all: Figures
    kinds: dict[str, Figures]
    failures: dict[str, int]
    """Class -> attempts that came to no result, those that were tried again with success included."""
    unresolved: dict[str, int]
    """Class of the last attempt -> episodes that have no result."""
    failed_cost_usd: float
    """Of those attempts."""

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


def summarize(ledger: Ledger, *, keys: Collection[str] | None = None, step_times: bool = True) -> Summary:
    """Of all episodes, or of those with these `keys`. `step_times=False` reads no steps, which is faster by far; their
    quantiles are then 0. Raises `LedgerError`."""
    tallies: dict[str, _Tally] = {}
    for table in ledger.scan([*_COLUMNS, *(["steps"] if step_times else [])]):
        step_s = _step_seconds(table.column("steps").combine_chunks()) if step_times else None
        for i, row in enumerate(table.select(_COLUMNS).to_pylist()):
            if keys is None or row["key"] in keys:
                tallies.setdefault(row["kind"], _Tally()).add(row, step_s[i] if step_s is not None else ())
    found: set[str] = set()
    failures: Counter[str] = Counter()
    failed_cost_usd = 0.0
    for table in ledger.scan_failures(["key", "failure_class", "cost_usd"]):
        for row in table.to_pylist():
            if keys is None or row["key"] in keys:
                found.add(row["key"])
                failures[row["failure_class"]] += 1
                failed_cost_usd += row["cost_usd"]
    unresolved: Counter[str] = Counter()
    if found:
        found -= ledger.keys()
        attempts = ledger.attempts()
        unresolved.update(attempts[key].last_class.value for key in found)
    everything = _Tally()
    for tally in tallies.values():
        everything.merge(tally)
    kinds = {kind: tally.figures() for kind, tally in tallies.items()}
    return Summary(
        all=everything.figures(),
        kinds=kinds,
        failures=dict(failures.most_common()),
        unresolved=dict(unresolved.most_common()),
        failed_cost_usd=failed_cost_usd,
    )


@dataclass(slots=True)
class _Histogram:
    """Counts of positive numbers by order of magnitude, in steps of 2%."""

    counts: Counter[int] = field(default_factory=Counter)

    def add(self, seconds: float) -> None:
        self.counts[round(math.log(max(seconds, _SHORTEST_S)) / _BIN)] += 1

    def quantile(self, share: float) -> float:
        """Within 1%; 0 for no number."""
        wanted = max(1, math.ceil(share * self.counts.total()))
        seen = 0
        for place in sorted(self.counts):
            seen += self.counts[place]
            if seen >= wanted:
                return math.exp(place * _BIN)
        return 0.0


@dataclass(slots=True)
class _Tally:
    n: int = 0
    succeeded: int = 0
    reward: float = 0.0
    steps: int = 0
    tool_calls: int = 0
    prompt_tokens: int = 0
    completion_tokens: int = 0
    cost_usd: float = 0.0
    parse_errors: int = 0
    stops: Counter[str] = field(default_factory=Counter)
    runs: dict[int, tuple[int, int]] = field(default_factory=dict)
    """Hash of a task's id -> its episodes, and those of them that succeeded."""
    episode_s: _Histogram = field(default_factory=_Histogram)
    step_s: _Histogram = field(default_factory=_Histogram)

    def add(self, row: Mapping[str, Any], step_s: Any) -> None:
        usage = row["usage"]
        self.n += 1
        self.succeeded += row["success"]
        self.reward += row["reward"]
        self.steps += row["step_count"]
        self.tool_calls += row["tool_calls"]
        self.prompt_tokens += usage["prompt_tokens"]
        self.completion_tokens += usage["completion_tokens"] or row["completion_tokens"]
        self.cost_usd += usage["cost_usd"]
        self.parse_errors += row["parse_errors"]
        self.stops[row["stop_reason"]] += 1
        task = hash(row["task_id"])
        n, right = self.runs.get(task, (0, 0))
        self.runs[task] = (n + 1, right + row["success"])
        self.episode_s.add(row["duration_s"])
        for seconds in step_s:
            self.step_s.add(seconds)

    def merge(self, other: _Tally) -> None:
        for name in (
            "n", "succeeded", "reward", "steps", "tool_calls", "prompt_tokens", "completion_tokens", "cost_usd",
            "parse_errors",
        ):  # fmt: skip
            setattr(self, name, getattr(self, name) + getattr(other, name))
        self.stops.update(other.stops)
        for task, (n, right) in other.runs.items():
            before = self.runs.get(task, (0, 0))
            self.runs[task] = (before[0] + n, before[1] + right)
        self.episode_s.counts.update(other.episode_s.counts)
        self.step_s.counts.update(other.step_s.counts)

    def success(self) -> Score | None:
        if not self.n:
            return None
        if len(self.runs) == self.n:
            return score(self.succeeded, self.n)
        return mean_score([right / n for n, right in self.runs.values()])

    def figures(self) -> Figures:
        n = max(self.n, 1)
        quantiles = [each.quantile(q) for each in (self.episode_s, self.step_s) for q in (0.5, 0.95)]
        return Figures(
            n=self.n,
            tasks=len(self.runs),
            success=self.success(),
            mean_reward=self.reward / n,
            mean_steps=self.steps / n,
            mean_tool_calls=self.tool_calls / n,
            mean_prompt_tokens=self.prompt_tokens / n,
            mean_completion_tokens=self.completion_tokens / n,
            prompt_tokens=self.prompt_tokens,
            completion_tokens=self.completion_tokens,
            cost_usd=self.cost_usd,
            parse_errors=self.parse_errors,
            stop_reasons=dict(self.stops.most_common()),
            latency=Latency(
                p50_s=quantiles[0], p95_s=quantiles[1], step_p50_s=quantiles[2], step_p95_s=quantiles[3]
            ) if self.n else None,
        )  # fmt: skip


def _step_seconds(steps: Any) -> list[list[float]]:
    """[n] the seconds of each step of each row, from a list column, without making Python objects of the rest."""
    import numpy

    lengths = steps.value_lengths().fill_null(0).to_numpy(zero_copy_only=False)
    inside = steps.flatten()
    seconds = numpy.zeros(len(inside))
    for name in ("policy_s", "env_s"):
        seconds = seconds + inside.field(name).fill_null(0.0).to_numpy(zero_copy_only=False)
    ends = numpy.cumsum(lengths)
    return [seconds[end - length : end].tolist() for end, length in zip(ends, lengths, strict=True)]
