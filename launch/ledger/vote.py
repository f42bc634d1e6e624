"""`launch.ledger vote`: what whole-run voting (arXiv 2402.05120) would have given, from the samples that are recorded.

Each policy's samples of a task are one vote. With `--out` the chosen run of each task becomes a new ledger.
"""

from __future__ import annotations

import argparse
from collections import defaultdict
from dataclasses import asdict
from typing import Any

from launch.evaluation.intervals import Score, score
from launch.ledger.output import Output, new_ledger
from launch.ledger.sources import Sources, UsageError
from rollout.run_vote import RunVote, vote_runs
from rollout.trajectory import Trajectory


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--policy", help="this one's samples alone")
    parser.add_argument("--out", help="a new ledger of the chosen runs")


def run(options: argparse.Namespace, output: Output) -> int:
    sources = Sources(options.ledgers)
    runs: dict[str, list[Trajectory]] = defaultdict(list)
    for trajectory in output.progress("reading", sources.trajectories(), total=sources.count()):
        runs[trajectory.policy].append(trajectory)
    if options.policy is not None:
        if options.policy not in runs:
            there = ", ".join(sorted(runs)) or "none"
            raise UsageError(f"no result is of policy {options.policy!r}; there are {there}")
        runs = {options.policy: runs[options.policy]}
    groups: list[dict[str, Any]] = []
    chosen: set[str] = set()
    for policy in sorted(runs):
        votes = vote_runs(runs[policy])
        chosen.update(vote.key for vote in votes)
        for kind in sorted({vote.task.kind for vote in votes}):
            groups.append(_group(policy, kind, votes, runs[policy]))
    if options.out:
        with new_ledger(options.out, writer="vote") as fill:
            for each in (trajectory for policy in sorted(runs) for trajectory in runs[policy]):
                if each.key in chosen:
                    fill(each)
    _show(groups, output)
    if options.out:
        output.say(f"{len(chosen):,} chosen runs are in {options.out}")
    output.data({"out": options.out, "chosen": len(chosen), "groups": groups})
    return 0


def _group(policy: str, kind: str, votes: list[RunVote], runs: list[Trajectory]) -> dict[str, Any]:
    of_kind = [vote for vote in votes if vote.task.kind == kind]
    ours = [run for run in runs if run.task.kind == kind]
    solved = {run.task.id for run in ours if run.success}
    return {
        "policy": policy,
        "kind": kind,
        "tasks": len(of_kind),
        "runs": len(ours),
        "single": asdict(score(sum(run.success for run in ours), len(ours))),
        "voted": asdict(score(sum(vote.success for vote in of_kind), len(of_kind))),
        "any": asdict(score(len(solved), len(of_kind))),
        "agreement": sum(vote.agreement for vote in of_kind) / len(of_kind),
    }


def _show(groups: list[dict[str, Any]], output: Output) -> None:
    from rich import box
    from rich.table import Table
    from rich.text import Text

    table = Table(title="Success, %", title_justify="left", box=box.SIMPLE_HEAD, pad_edge=False)
    table.add_column("policy")
    table.add_column("kind")
    for name in ("tasks", "runs", "single run", "majority", "any run", "agreement"):
        table.add_column(name, justify="right", no_wrap=True)
    for each in groups:
        cells = [_percent(Score(**each[name])) for name in ("single", "voted", "any")]
        table.add_row(
            Text(each["policy"]), Text(each["kind"]), f"{each['tasks']:,}", f"{each['runs']:,}", *cells,
            f"{each['agreement']:.2f}",
        )  # fmt: skip
    output.show(table)


def _percent(rate: Score) -> str:
    return f"{100 * rate.mean:.0f} [{100 * rate.low:.0f}, {100 * rate.high:.0f}]"
