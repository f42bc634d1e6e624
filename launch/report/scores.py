"""Scores of policies on kinds of tasks: a table for the terminal, and plain data for `results.json`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

from rich import box
from rich.table import Table

from launch.evaluation.intervals import Score

Scores = Mapping[str, Mapping[str, Score]]
"""policy row -> kind of task -> score."""

ROW_TITLES = {
    "untrained": "untrained",
    "student": "distilled, greedy",
    "student_self_consistent": "distilled, voting",
    "teacher": "teacher",
}


def score_table(scores: Scores, kinds: Sequence[str], *, title: str) -> Table:
    """One row a policy, one column a kind: mean and 95% interval, in percent."""
    table = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD, pad_edge=False)
    table.add_column("policy", no_wrap=True)
    for kind in kinds:
        header = kind.replace("_unseen", "\nunseen").replace("_", " ")
        table.add_column(header, justify="right", no_wrap=True)
    for name, by_kind in scores.items():
        cells = [_cell(by_kind[kind]) if kind in by_kind else "-" for kind in kinds]
        table.add_row(ROW_TITLES.get(name, name), *cells)
    return table


def scores_to_json(scores: Scores) -> dict[str, Any]:
    return {name: {kind: asdict(score) for kind, score in by_kind.items()} for name, by_kind in scores.items()}


def _cell(score: Score) -> str:
    return f"{100 * score.mean:.0f} [{100 * score.low:.0f}, {100 * score.high:.0f}]"
