"""Do finished runs of the embedded default keep what is promised? Reads their `results.json`; runs nothing itself.

make distill ARGS="seed=0"; make distill ARGS="seed=1"; make distill ARGS="seed=2"
python benchmarks/starter_scores.py runs/starter-seed* --check
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

GOALS = {"arithmetic": 0.90, "two_hop": 0.85, "arithmetic_unseen": 0.70, "two_hop_unseen": 0.70}
UNTRAINED_BELOW = 0.02
FIRST_STEP_BEFORE = 0.30
MINUTES_BELOW = 20.0


@dataclass(frozen=True, slots=True)
class Row:
    """One measured thing."""

    run: str
    what: str
    measured: str
    goal: str
    kept: bool


def rows_of(run: str, results: dict[str, Any]) -> Iterator[Row]:
    """Everything that is promised of one run."""
    scores = results["scores"]
    for kind, goal in GOALS.items():
        score = scores["student"][kind]
        yield Row(run, f"greedy, {kind}", _interval(score), f">= {goal:.2f}", score["mean"] >= goal)
    for kind in GOALS:
        score = scores["untrained"][kind]
        kept = score["mean"] < UNTRAINED_BELOW
        yield Row(run, f"untrained, {kind}", _interval(score), f"< {UNTRAINED_BELOW}", kept)
    for kind in GOALS:
        greedy, voting = scores["student"][kind], scores["student_self_consistent"][kind]
        kept = voting["high"] >= greedy["mean"]
        yield Row(run, f"voting, {kind}", _interval(voting), f"interval reaches {greedy['mean']:.3f}", kept)
    share = results["learner"]["collected_share_at_first_step"]
    yield Row(run, "collected at first step", f"{share:.3f}", f"< {FIRST_STEP_BEFORE}", share < FIRST_STEP_BEFORE)
    minutes = results["minutes"]
    yield Row(run, "minutes of the last job", f"{minutes:.1f}", f"< {MINUTES_BELOW:g}", minutes < MINUTES_BELOW)


def _interval(score: dict[str, float]) -> str:
    return f"{score['mean']:.3f} [{score['low']:.3f}, {score['high']:.3f}] n={score['n']}"


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("runs", nargs="+", type=Path, help="folders of finished runs")
    parser.add_argument("--json", type=Path, help="write the rows to this file")
    parser.add_argument("--check", action="store_true", help="exit with 1 when a goal is missed")
    options = parser.parse_args(arguments)
    rows: list[Row] = []
    for run in options.runs:
        path = run / "results.json"
        if not path.is_file():
            print(f"error: {run} is no finished run: it holds no results.json", file=sys.stderr)
            return 2
        rows += rows_of(run.name, json.loads(path.read_text()))
    table = Table()
    for name in ("run", "what", "measured", "goal", "kept"):
        table.add_column(name)
    for row in rows:
        table.add_row(row.run, row.what, row.measured, row.goal, "yes" if row.kept else "[red]NO[/red]")
    console = Console()
    if not console.is_terminal:
        console.width = 120
    console.print(table)
    if options.json:
        options.json.write_text(json.dumps([asdict(row) for row in rows], indent=2) + "\n")
    return int(options.check and not all(row.kept for row in rows))


if __name__ == "__main__":
    sys.exit(main())
