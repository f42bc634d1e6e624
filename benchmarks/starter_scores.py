"""Do finished runs of the embedded default keep what is promised? Reads their `results.json`; runs nothing itself.

make distill ARGS="seed=0"; make distill ARGS="seed=1"; make distill ARGS="seed=2"
python benchmarks/starter_scores.py runs/starter-seed* --check
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

if not __package__:  # run as a file: imports come from the repository's root
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

from benchmarks import scoreboard
from benchmarks.scoreboard import Row

GOALS = {"arithmetic": 0.90, "two_hop": 0.85, "arithmetic_unseen": 0.70, "two_hop_unseen": 0.70}
UNTRAINED_BELOW = 0.02
FIRST_STEP_BEFORE = 0.30
MINUTES_BELOW = 20.0


def rows_of(run: str, results: dict[str, Any]) -> Iterator[Row]:
    """Everything that is promised of one run."""

    def row(what: str, measured: float | str, goal: str, kept: bool) -> Row:
        return Row(group=run, what=what, measured=measured, goal=goal, kept=kept)

    scores = results["scores"]
    for kind, goal in GOALS.items():
        score = scores["student"][kind]
        yield row(f"greedy, {kind}", _interval(score), f">= {goal:.2f}", score["mean"] >= goal)
    for kind in GOALS:
        score = scores["untrained"][kind]
        yield row(f"untrained, {kind}", _interval(score), f"< {UNTRAINED_BELOW}", score["mean"] < UNTRAINED_BELOW)
    for kind in GOALS:
        greedy, voting = scores["student"][kind], scores["student_self_consistent"][kind]
        kept = voting["high"] >= greedy["mean"]
        yield row(f"voting, {kind}", _interval(voting), f"interval reaches {greedy['mean']:.3f}", kept)
    share = results["learner"]["collected_share_at_first_step"]
    yield row("collected at first step", share, f"< {FIRST_STEP_BEFORE}", share < FIRST_STEP_BEFORE)
    minutes = results["minutes"]
    yield row("minutes of the last job", minutes, f"< {MINUTES_BELOW:g}", minutes < MINUTES_BELOW)


def _interval(score: dict[str, float]) -> str:
    return f"{score['mean']:.3f} [{score['low']:.3f}, {score['high']:.3f}] n={score['n']}"


def main(arguments: Sequence[str] | None = None) -> int:
    parser = scoreboard.arguments(__doc__)
    parser.add_argument("runs", nargs="+", type=Path, help="folders of finished runs")
    options = parser.parse_args(arguments)
    rows: list[Row] = []
    for run in options.runs:
        path = run / "results.json"
        if not path.is_file():
            print(f"error: {run} is no finished run: it holds no results.json", file=sys.stderr)
            return 2
        rows += rows_of(run.name, json.loads(path.read_text()))
    return scoreboard.publish(rows, options)


if __name__ == "__main__":
    sys.exit(main())
