"""What a run leaves for people: the table of scores and the picture of the learning curve; for machines,
`results.json`."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from rich import box
from rich.table import Table

from launch.intervals import Score

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


def draw_learning_curve(metrics: Path, picture: Path, *, title: str) -> None:
    """Loss (all and by span type) and collection over time, as a PNG.

    `metrics` holds one JSON object a line with at least `minutes`, `loss`, `loss_by_span`, `recorded`, `total`.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    rows = [json.loads(line) for line in metrics.read_text().splitlines()]
    rows = [row for row in rows if row["step"] > 0]
    figure, (left, right) = pyplot.subplots(1, 2, figsize=(11, 4.2), constrained_layout=True)
    left.set(title="loss over training", xlabel="million tokens", ylabel="cross-entropy, nats a token", yscale="log")
    if rows:
        tokens = [row["tokens"] / 1e6 for row in rows]
        for span in sorted({span for row in rows for span in row["loss_by_span"]}):
            points = [
                (x, row["loss_by_span"][span])
                for x, row in zip(tokens, rows, strict=True)
                if span in row["loss_by_span"]
            ]
            left.plot(*zip(*points, strict=True), linewidth=1, alpha=0.75, label=span)
        left.plot(tokens, [row["loss"] for row in rows], color="black", linewidth=1.8, label="all")
        left.legend(frameon=False)
        right.plot([row["minutes"] for row in rows], [row["recorded"] for row in rows], label="trajectories recorded")
        right.plot([row["minutes"] for row in rows], [row["rows"] for row in rows], label="rows trained on")
        right.legend(frameon=False)
    right.set(title="collection and learning", xlabel="minutes", ylabel="count")
    for axes in (left, right):
        axes.grid(alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
    figure.suptitle(title)
    temporary = picture.with_suffix(".tmp.png")
    figure.savefig(temporary, dpi=120)
    pyplot.close(figure)
    temporary.replace(picture)


def _cell(score: Score) -> str:
    return f"{100 * score.mean:.0f} [{100 * score.low:.0f}, {100 * score.high:.0f}]"
