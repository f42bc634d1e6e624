"""`launch.ledger show`: what is in a ledger, what it cost, and how much of it a curation accepts.

Reads a few flat columns only, unless a curation is named: the default one asks for what the column `trainable` says.
"""

from __future__ import annotations

import argparse
from collections import Counter
from dataclasses import asdict
from typing import Any

from launch.evaluation.intervals import Score, score
from launch.ledger.output import Output
from launch.ledger.sources import PAPER, Sources, load_curation
from rollout.curation import Curation
from rollout.retries import RetryRule

_COLUMNS = ("key", "task_id", "kind", "policy", "success", "trainable", "stop_reason", "step_count", "tool_calls",
            "parse_errors", "completion_tokens", "usage", "duration_s")  # fmt: skip
_SUMS = ("step_count", "tool_calls", "parse_errors", "duration_s")
_USAGE = ("requests", "prompt_tokens", "completion_tokens", "cost_usd")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--curation",
        help="what counts as accepted: a name in configs/curation or a YAML file (default: right, every turn parsed)",
    )


def run(options: argparse.Namespace, output: Output) -> int:
    sources = Sources(options.ledgers)
    data = describe(sources, load_curation(options.curation) if options.curation else None, options.curation, output)
    _show(data, output)
    output.data(data)
    return 0


def describe(sources: Sources, curation: Curation | None, named: str | None, output: Output) -> dict[str, Any]:
    """All figures, JSON-able."""
    groups: dict[tuple[str, str], Counter[str]] = {}
    stops: Counter[str] = Counter()
    tasks: set[str] = set()
    tables = output.progress("reading", sources.scan(_COLUMNS), total=None)
    for table in tables:
        for row in table.to_pylist():
            counts = groups.setdefault((row["kind"], row["policy"]), Counter())
            counts.update(n=1, right=row["success"], accepted=row["trainable"])
            counts.update({name: row[name] for name in _SUMS})
            counts.update({f"usage_{name}": row["usage"][name] for name in _USAGE})
            counts.update(tokens=row["usage"]["completion_tokens"] or row["completion_tokens"])
            stops[row["stop_reason"]] += 1
            tasks.add(row["task_id"])
    if curation is not None:
        accepted = Counter((each.task.kind, each.policy) for each in curation.apply(sources.trajectories).kept)
        for group, counts in groups.items():
            counts["accepted"] = accepted[group]
    total = sum(groups.values(), Counter())
    failures = _failures(sources)
    cost = total["usage_cost_usd"] + failures.pop("cost_usd")
    return {
        "ledgers": list(sources.names),
        "tasks": len(tasks),
        "curation": named or PAPER,
        "total": _figures(total),
        "groups": [
            {"kind": kind, "policy": policy, **_figures(groups[kind, policy])} for kind, policy in sorted(groups)
        ],
        "cost_usd": cost,
        "cost_per_accepted_usd": cost / total["accepted"] if total["accepted"] else None,
        "stop_reasons": dict(stops.most_common()),
        "duplicates": sources.duplicates(),
        **failures,
    }


def _figures(counts: Counter[str]) -> dict[str, Any]:
    n = counts["n"]
    mean = {f"{name}_mean": counts[name] / n if n else None for name in (*_SUMS, "tokens")}
    return {
        "results": n,
        "right": counts["right"],
        "success": asdict(score(counts["right"], n)) if n else None,
        "accepted": counts["accepted"],
        **mean,
        "usage": {name: counts[f"usage_{name}"] for name in _USAGE},
        "usd_per_accepted": counts["usage_cost_usd"] / counts["accepted"] if counts["accepted"] else None,
    }


def _failures(sources: Sources) -> dict[str, Any]:
    """Attempts that failed, by class; what they cost; keys that have no result."""
    classes: dict[str, dict[str, Any]] = {}
    cost = 0.0
    for table in sources.failure_tables(["failure", "usage"]):
        for failure, usage in zip(table.column("failure").to_pylist(), table.column("usage").to_pylist(), strict=True):
            each = classes.setdefault(failure["failure_class"], {"attempts": 0, "example": ""})
            each["attempts"] += 1
            each["example"] = each["example"] or failure["message"]
            cost += usage["cost_usd"]
    done = {key for ledger in sources.ledgers for key in ledger.keys()} if classes else set()
    attempts = [item for ledger in sources.ledgers for item in ledger.attempts().items()] if classes else []
    rule = RetryRule()
    unresolved = {key: rule.exhausted(each) for key, each in attempts if key not in done}
    return {
        "failures": dict(sorted(classes.items())),
        "without_result": len(unresolved),
        "quarantined": sum(each is not None for each in unresolved.values()),
        "cost_usd": cost,
    }


def _show(data: dict[str, Any], output: Output) -> None:
    from rich import box
    from rich.table import Table
    from rich.text import Text

    total = data["total"]
    output.say(f"{', '.join(data['ledgers'])}: {total['results']:,} results of {data['tasks']:,} tasks")
    output.say("success with 95% intervals; steps, tool calls and tokens in the mean")
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    table.add_column("kind")
    table.add_column("policy", overflow="fold")
    paid = ("USD", "USD per\naccepted") if data["cost_usd"] else ()
    for name in ("results", "success, %", "accepted", "steps", "tool\ncalls", "tokens", *paid):
        table.add_column(name, justify="right", no_wrap=True)
    rows = [(each["kind"], each["policy"], each) for each in data["groups"]]
    if len(rows) != 1:
        rows.append(("all", "", total))
    for kind, policy, each in rows:
        style = "bold" if each is total else ""
        table.add_row(Text(kind), Text(policy), *_cells(each, paid=bool(paid)), style=style)
    output.show(table)
    usage = total["usage"]
    output.say(
        f"accepted by {data['curation']}: {total['accepted']:,}; cost {_usd(data['cost_usd'])} USD, "
        f"{_usd(data['cost_per_accepted_usd'])} an accepted trajectory, failed attempts included"
    )
    output.say(
        f"asked of policies: {usage['requests']:,} requests, {usage['prompt_tokens']:,} prompt tokens, "
        f"{usage['completion_tokens']:,} completion tokens"
    )
    output.say("ended by: " + (", ".join(f"{name} {n:,}" for name, n in data["stop_reasons"].items()) or "-"))
    output.say(f"duplicate rows: {data['duplicates']:,}")
    if not data["failures"]:
        output.say("failures: none")
        return
    output.say(f"failures: {data['without_result']:,} keys have no result, {data['quarantined']:,} of them quarantined")
    failed = Table("class", "attempts", "for example", box=box.SIMPLE_HEAD, pad_edge=False)
    for name, each in data["failures"].items():
        failed.add_row(name, f"{each['attempts']:,}", Text(each["example"][:200]))
    output.show(failed)


def _cells(each: dict[str, Any], *, paid: bool) -> list[str]:
    if not each["results"]:
        return ["0", *["-"] * (7 if paid else 5)]
    rate = Score(**each["success"])
    digits = 1 if rate.n >= 1000 else 0
    cells = [
        f"{each['results']:,}",
        f"{100 * rate.mean:.{digits}f} [{100 * rate.low:.{digits}f}, {100 * rate.high:.{digits}f}]",
        f"{each['accepted']:,}",
        f"{each['step_count_mean']:.1f}",
        f"{each['tool_calls_mean']:.1f}",
        f"{each['tokens_mean']:,.0f}",
    ]
    return [*cells, _usd(each["usage"]["cost_usd"]), _usd(each["usd_per_accepted"])] if paid else cells


def _usd(value: float | None) -> str:
    if value is None:
        return "-"
    return f"{value:,.2f}" if value >= 100 or value == 0 else f"{value:.4f}"
