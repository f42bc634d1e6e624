"""The picture of the learning curve that a run leaves beside its results: a PNG, for READMEs and chats."""

from __future__ import annotations

from pathlib import Path

from launch.patient_lines import lines_of


def draw_learning_curve(metrics: Path, picture: Path, *, title: str) -> None:
    """Loss (all and by span type) and collection over time, as a PNG.

    `metrics` holds one JSON object a line with at least `minutes`, `loss`, `loss_by_span`, `recorded`, `total`; torn
    lines are passed over.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    rows = [row for row in lines_of(metrics) if row["step"] > 0]
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
