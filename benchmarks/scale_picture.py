"""The picture of `benchmarks/scale.py`: episodes a second over workers, what the delays allow, the machine's cores."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True, slots=True, kw_only=True)
class Point:
    """One size."""

    workers: int
    rate: float
    """Episodes a second in the steady window."""
    limit: float
    """The same if nothing but the delays took time."""
    ours: float
    """Share of all cores that the simulation took, in [0, 1]."""
    machine: float
    """Share of all cores that was busy with anything."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Series:
    """One kind of delays, smallest size first."""

    title: str
    points: tuple[Point, ...]


def draw(series: Sequence[Series], path: Path, *, title: str) -> None:
    """A panel for each, as PNG, SVG or PDF by the file's ending."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(5.6 * len(series), 4.4), layout="constrained")
    FigureCanvasAgg(figure)
    for i, each in enumerate(series):
        axes = figure.add_subplot(1, len(series), i + 1)
        workers = [point.workers for point in each.points]
        axes.plot(workers, [point.limit for point in each.points], "--", color="0.6", label="what the delays allow")
        axes.plot(workers, [point.rate for point in each.points], "o-", color="C0", label="episodes a second")
        axes.set(xscale="log", yscale="log", xlabel="workers, 1 process each", ylabel="episodes a second")
        axes.set_xticks(workers, map(str, workers), minor=False)
        axes.set_xticks([], minor=True)
        rates = [point.rate for point in each.points]
        axes.set_yticks(rates, [f"{rate:.0f}" for rate in rates])
        axes.set_yticks([], minor=True)
        axes.set_title(each.title, fontsize=9)
        cores = axes.twinx()
        cores.fill_between(
            workers, [100 * p.machine for p in each.points], color="C1", alpha=0.15, label="cores: all that runs"
        )
        cores.plot(workers, [100 * p.ours for p in each.points], ":", color="C1", label="cores: the simulation")
        cores.set(ylim=(0, 100), ylabel="busy cores, %")
        lines = [*axes.get_legend_handles_labels()[0], *cores.get_legend_handles_labels()[0]]
        axes.legend(lines, [str(line.get_label()) for line in lines], loc="upper left", fontsize=8)
    figure.suptitle(title, fontsize=10)
    figure.savefig(path, dpi=120)
