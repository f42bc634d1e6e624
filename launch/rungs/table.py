"""What a ladder's runs have shown: the scores of each row over all seeds, and whether each expected step holds.

Scores pool the held-out tasks of all seeds, with Wilson intervals; those of single seeds stand beside them, since an
interval over tasks says nothing of how much a student depends on its seed. A step compares two rows on the same tasks
of the same seeds by McNemar's exact test; it holds, or is reversed, when its p is below 0.05 after Holm's correction
for the number of steps.

Example::

    shown = measure(ladder)
    leave(shown, ladder, console, minutes=90.0)      # prints, and writes ladder.json, ladder.md, ladder.png
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table

from launch.evaluation.intervals import Score, score
from launch.evaluation.significance import PairedTest, holm, mcnemar
from launch.run_folder import RunFolder, write_json
from launch.rungs.config import LadderConfig, LadderRow
from rollout.ledger import Ledger

ALPHA = 0.05
PLAIN_WIDTH = 140
"""Columns of the tables where there is no terminal to ask."""
SMALLEST = 1e-99
"""Of the p-values that are printed as they are."""
Outcomes = Mapping[tuple[int, str], bool]
"""(seed, task id) -> solved."""


@dataclass(frozen=True, slots=True, kw_only=True)
class MeasuredRow:
    """A row of the table, over the seeds whose run is complete."""

    name: str
    title: str
    scores: dict[str, Score]
    """By kind of task."""
    all: Score
    by_seed: dict[int, float]
    """Success over all kinds."""
    tokens: dict[int, int]
    """Trained on, by seed; 0 for who was not trained."""
    trajectories: dict[int, int]
    """Different ones that it was trained on."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Step:
    """An expectation, and what was seen of it."""

    lower: str
    higher: str
    test: PairedTest
    """`higher` first."""
    p_corrected: float
    """After Holm, over all steps."""
    seeds_higher: int
    seeds: int

    @property
    def verdict(self) -> str:
        if self.p_corrected >= ALPHA:
            return "not shown"
        return "holds" if self.test.difference > 0 else "reversed"


@dataclass(frozen=True, slots=True, kw_only=True)
class Shown:
    """`missing`: run -> the seeds in which it is not complete."""

    kinds: tuple[str, ...]
    rows: tuple[MeasuredRow, ...]
    steps: tuple[Step, ...]
    missing: dict[str, list[int]]
    environment: dict[str, Any]


def measure(ladder: LadderConfig) -> Shown:
    """Reads the ledgers of what is complete. Raises `rollout.ledger.LedgerError`."""
    outcomes: dict[str, Outcomes] = {}
    rows: list[MeasuredRow] = []
    missing: dict[str, list[int]] = {
        run.name: seeds
        for run in ladder.runs
        if (seeds := [seed for seed in ladder.seeds if not RunFolder(ladder.folder(run.name, seed)).results.exists()])
    }
    kind_of: dict[str, str] = {}
    environment: dict[str, Any] = {}
    for row in ladder.table:
        found: dict[tuple[int, str], bool] = {}
        learned: dict[int, dict[str, Any]] = {}
        for seed in ladder.seeds:
            folder = RunFolder(ladder.folder(row.run, seed))
            if seed in missing.get(row.run, ()):
                continue
            results = json.loads(folder.results.read_text())
            environment = environment or results["environment"]
            learned[seed] = results["learner"] if row.row.startswith("student") else {}
            for table in Ledger(folder.scores / row.row).scan(["task_id", "kind", "success"]):
                for one in table.to_pylist():
                    found[seed, one["task_id"]] = one["success"]
                    kind_of[one["task_id"]] = one["kind"]
        if found:
            outcomes[row.name] = found
            rows.append(_measured(row, found, kind_of, learned))
    kinds = tuple(dict.fromkeys(kind for row in rows for kind in row.scores))
    steps = _steps(ladder, outcomes)
    return Shown(kinds=kinds, rows=tuple(rows), steps=steps, missing=missing, environment=environment)


def leave(shown: Shown, ladder: LadderConfig, console: Console, *, minutes: float) -> None:
    """Prints the table and the steps; writes them as `ladder.json`, `ladder.md` and `ladder.png`."""
    out = Path(ladder.out).absolute()
    if not shown.rows:
        console.print("no run is complete yet")
        return
    if not console.is_terminal:
        console.width = max(console.width, PLAIN_WIDTH)
    console.print(_score_table(shown))
    console.print(_step_table(shown))
    for name, seeds in shown.missing.items():
        console.print(f"not complete: {name}, seed {', '.join(map(str, seeds))}", style="yellow")
    steps = [{**asdict(step), "verdict": step.verdict} for step in shown.steps]
    record = {**asdict(shown), "steps": steps, "seeds": list(ladder.seeds), "minutes_of_this_command": minutes}
    write_json(out / "ladder.json", record)
    (out / "ladder.md").write_text(to_markdown(shown))
    draw(shown, out / "ladder.png")
    console.print(
        f"table: {out / 'ladder.md'}\npicture: {out / 'ladder.png'}\nnumbers: {out / 'ladder.json'}", markup=False
    )


def to_markdown(shown: Shown) -> str:
    """Both tables, as they can be pasted into a README."""
    head = ["", *(kind.replace("_", " ") for kind in shown.kinds), "all", "by seed", "M tokens", "trajectories"]
    lines = [_line(head), "|" + "---|" * len(head)]
    lines += [_line(_cells(row, shown.kinds)) for row in shown.rows]
    head = ["step", "difference, points [95%]", "won / lost", "p (McNemar, Holm)", "seeds", ""]
    lines += ["", _line(head), "|" + "---|" * len(head)]
    lines += [_line(_step_cells(step, shown)) for step in shown.steps]
    return "\n".join(lines) + "\n"


def draw(shown: Shown, picture: Path) -> None:
    """A panel for all tasks and one for each kind: rate and interval of each row, single seeds as small dots."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    panels = ["all", *shown.kinds]
    width = 3.2 + 2.1 * len(panels)
    figure, axes = pyplot.subplots(1, len(panels), figsize=(width, 0.7 + 0.42 * len(shown.rows)), sharey=True)
    places = range(len(shown.rows), 0, -1)
    for panel, ax in zip(panels, axes, strict=True):
        for place, row in zip(places, shown.rows, strict=True):
            rate = row.all if panel == "all" else row.scores.get(panel)
            if rate is None:
                continue
            colour = "tab:blue" if any(row.tokens.values()) else "dimgray"
            ax.plot([100 * rate.low, 100 * rate.high], [place, place], color=colour, linewidth=2.2)
            ax.plot(100 * rate.mean, place, "o", color=colour, markersize=6)
            if panel == "all":
                seeds = list(row.by_seed.values())
                ax.plot([100 * each for each in seeds], [place - 0.28] * len(seeds), ".", color="gray", markersize=4)
        ax.set(title=panel.replace("_", " "), xlim=(-4, 104), xticks=(0, 25, 50, 75, 100), xlabel="solved, %")
        ax.grid(axis="x", alpha=0.25)
        ax.spines[["top", "right", "left"]].set_visible(False)
        ax.tick_params(left=False)
    axes[0].set_yticks(list(places), [row.title for row in shown.rows])
    figure.tight_layout()
    temporary = picture.with_suffix(".tmp.png")
    figure.savefig(temporary, dpi=120)
    pyplot.close(figure)
    temporary.replace(picture)


def _measured(
    row: LadderRow, found: Outcomes, kind_of: Mapping[str, str], learned: Mapping[int, Mapping[str, Any]]
) -> MeasuredRow:
    by_kind: dict[str, list[bool]] = {}
    by_seed: dict[int, list[bool]] = {}
    for (seed, task), solved in found.items():
        by_kind.setdefault(kind_of[task], []).append(solved)
        by_seed.setdefault(seed, []).append(solved)
    return MeasuredRow(
        name=row.name,
        title=row.title,
        scores={kind: score(sum(solved), len(solved)) for kind, solved in by_kind.items()},
        all=score(sum(found.values()), len(found)),
        by_seed={seed: sum(solved) / len(solved) for seed, solved in by_seed.items()},
        tokens={seed: each.get("tokens", 0) for seed, each in learned.items()},
        trajectories={seed: each.get("examples", 0) for seed, each in learned.items()},
    )


def _steps(ladder: LadderConfig, outcomes: Mapping[str, Outcomes]) -> tuple[Step, ...]:
    expected = [each for each in ladder.expected if each.lower in outcomes and each.higher in outcomes]
    gains: list[dict[int, int]] = []
    tests: list[PairedTest] = []
    for each in expected:
        lower, higher = outcomes[each.lower], outcomes[each.higher]
        both = sorted(lower.keys() & higher.keys())
        tests.append(mcnemar([higher[key] for key in both], [lower[key] for key in both]))
        gains.append({seed: 0 for seed, _ in both})
        for key in both:
            gains[-1][key[0]] += higher[key] - lower[key]
    return tuple(
        Step(
            lower=each.lower,
            higher=each.higher,
            test=test,
            p_corrected=p,
            seeds_higher=sum(gain > 0 for gain in by_seed.values()),
            seeds=len(by_seed),
        )
        for each, test, by_seed, p in zip(expected, tests, gains, holm([t.p_value for t in tests]), strict=True)
    )


def _score_table(shown: Shown) -> Table:
    table = Table(
        title="success on held-out tasks, % [95% interval]", title_justify="left", box=box.SIMPLE_HEAD, pad_edge=False
    )
    table.add_column("", no_wrap=True)
    for name in (*(kind.replace("_", " ") for kind in shown.kinds), "all", "by seed", "M tokens", "trajectories"):
        table.add_column(name, justify="right")
    for row in shown.rows:
        cells = _cells(row, shown.kinds)
        # The intervals of single kinds are in ladder.md; here they would wrap.
        table.add_row(
            cells[0],
            *(cell.partition(" ")[0] for cell in cells[1 : len(shown.kinds) + 1]),
            *cells[len(shown.kinds) + 1 :],
        )
    return table


def _step_table(shown: Shown) -> Table:
    table = Table(title="the steps, on the same tasks", title_justify="left", box=box.SIMPLE_HEAD, pad_edge=False)
    for name in ("step", "points [95%]", "won / lost", "p", "seeds", ""):
        table.add_column(name, justify="left" if name in ("step", "") else "right")
    for step in shown.steps:
        table.add_row(*_step_cells(step, shown))
    return table


def _cells(row: MeasuredRow, kinds: tuple[str, ...]) -> list[str]:
    return [
        row.title,
        *(_percent(row.scores[kind]) if kind in row.scores else "-" for kind in kinds),
        _percent(row.all),
        " / ".join(f"{100 * each:.0f}" for each in row.by_seed.values()),
        f"{max(row.tokens.values()) / 1e6:.2f}" if any(row.tokens.values()) else "-",
        f"{max(row.trajectories.values()):,}" if any(row.trajectories.values()) else "-",
    ]


def _step_cells(step: Step, shown: Shown) -> list[str]:
    titles, test = {row.name: row.title for row in shown.rows}, step.test
    return [
        f"{titles[step.lower]} < {titles[step.higher]}",
        f"{100 * test.difference:+.1f} [{100 * test.low:+.1f}, {100 * test.high:+.1f}]",
        f"{test.first_better} / {test.second_better} of {test.n}",
        f"{step.p_corrected:.2g}" if step.p_corrected > SMALLEST else f"< {SMALLEST:g}",
        f"{step.seeds_higher} of {step.seeds}",
        step.verdict,
    ]


def _percent(rate: Score) -> str:
    return f"{100 * rate.mean:.0f} [{100 * rate.low:.0f}, {100 * rate.high:.0f}]"


def _line(cells: list[str]) -> str:
    return "| " + " | ".join(cells) + " |"
