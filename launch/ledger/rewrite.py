"""`launch.ledger filter`, `merge` and `compose`: new ledgers made of recorded trajectories; their inputs stay as they
are.
"""

from __future__ import annotations

import argparse
from collections import Counter
from dataclasses import asdict
from typing import Any

from launch.ledger.output import Output, new_ledger, staged
from launch.ledger.sources import Sources, UsageError, load_curation
from rollout.composition import RefusalReason, Refused, compose_policies
from rollout.ledger_merge import merge


def add_filter_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--curation", required=True, help="a name in configs/curation, or a YAML file")
    parser.add_argument("--out", help="the new ledger; without it the table is all that is made")


def run_filter(options: argparse.Namespace, output: Output) -> int:
    """What the curation keeps; failures are no results and stay behind."""
    sources, curation = Sources(options.ledgers), load_curation(options.curation)
    curated = curation.apply(sources.trajectories)
    kept = output.progress("filtering", curated.kept, total=None)
    if options.out:
        with new_ledger(options.out, writer="filter") as fill:
            for trajectory in kept:
                fill(trajectory)
    else:
        for _ in kept:
            pass
    report = curated.report
    output.show(report.table(f"Curation {options.curation}"))
    if options.out:
        output.say(f"{report.kept:,} of {report.seen:,} trajectories are in {options.out}")
    output.data({"out": options.out, "curation": options.curation, **report.to_json()})
    return 0


def add_merge_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--out", required=True, help="the new ledger")


def run_merge(options: argparse.Namespace, output: Output) -> int:
    """All results of all ledgers, each key once; and every failed attempt once."""
    sources = Sources(options.ledgers)
    with staged(options.out, writer="merge") as folder:
        report = merge(options.ledgers, folder)
    output.say(
        f"{report.results:,} results and {report.failures:,} failures of {len(sources.names)} ledgers are in "
        f"{options.out}; {report.repeated:,} results of a ledger were left out because an earlier one has their key"
    )
    output.data({"out": options.out, "ledgers": list(sources.names), **asdict(report)})
    return 0


def add_compose_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--first", required=True, help="policy whose attempt comes first")
    parser.add_argument("--second", required=True, help="policy whose solution comes second")
    parser.add_argument(
        "--either-order", action="store_true", help="where only the first is right, let the second come first"
    )
    parser.add_argument(
        "--with-singles", action="store_true", help="take the first alone, as it is, where only it is right"
    )
    parser.add_argument("--out", required=True, help="the new ledger")


def run_compose(options: argparse.Namespace, output: Output) -> int:
    """Two teachers' trajectories on a task as one; see `rollout.composition`."""
    from rich import box
    from rich.table import Table

    sources = Sources(options.ledgers)
    reasons: Counter[str] = Counter()
    examples: dict[str, str] = {}
    alone: set[str] = set()
    composed = singles = 0
    pairs = compose_policies(sources.trajectories(), options.first, options.second, either_order=options.either_order)
    with new_ledger(options.out, writer="compose") as fill:
        for each in output.progress("composing", pairs, total=None):
            if isinstance(each, Refused):
                reasons[each.reason.value] += 1
                examples.setdefault(each.reason.value, f"{each.keys[0]}: {each.detail}")
                if each.reason is RefusalReason.SECOND_WRONG:
                    alone.add(each.keys[0])
            else:
                composed += 1
                fill(each)
        if options.with_singles and alone:
            for trajectory in sources.trajectories():
                if trajectory.key in alone:
                    singles += 1
                    fill(trajectory)
        if not composed + singles:
            told = ", ".join(f"{name} {n}" for name, n in reasons.most_common()) or "no task has both"
            raise UsageError(f"nothing could be composed of {options.first!r} and {options.second!r}: {told}")
    data: dict[str, Any] = {
        "out": options.out,
        "composed": composed,
        "singles": singles,
        "refused": {name: {"count": n, "example": examples[name]} for name, n in reasons.most_common()},
    }
    output.say(f"{composed:,} composed" + (f" and {singles:,} single" if singles else "") + f" are in {options.out}")
    if reasons:
        table = Table("not composed", "pairs", "for example", box=box.SIMPLE_HEAD, pad_edge=False)
        for name, n in reasons.most_common():
            table.add_row(name, f"{n:,}", examples[name])
        output.show(table)
    output.data(data)
    return 0
