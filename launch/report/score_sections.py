"""What a report says of success: the table of scores, what differs, and success by kind, steps and difficulty. Each
section is HTML, "" where nothing is known.

Example::

    score_sections.scores(figures)
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

from launch.evaluation.intervals import Score, score
from launch.report.charts import Line, line_chart
from launch.report.figures import Figures, recorded_scores
from launch.report.ledger_figures import LENGTH_LABELS, Cell, LedgerFigures, Tally
from launch.report.markup import Markup, joined, table, tag
from launch.report.rate_charts import Rate, interval, rate_chart
from launch.report.run_files import Kind, Role
from launch.report.wording import row_title

_MOST_ROWS = 40
_MOST_KINDS = 16
"""Columns of the table of scores; beyond them, kinds are rows of a chart."""
_CHARTED = 6
"""Policies in one chart."""
_SMALL = 3
"""Trajectories: fewer make no bucket worth showing."""


def scores(figures: Figures) -> Markup:
    """The table, and one dot with its interval for each row and kind."""
    rows = figures.scores
    if not rows:
        return Markup("")
    kinds = list(dict.fromkeys(kind for cells in rows.values() for kind in cells))
    pooled = {row: pool(cells.values()) for row, cells in rows.items()}
    what = "collected tasks" if figures.files.kind is Kind.COLLECT else "tasks"
    if figures.files.kind is Kind.DISTILL:
        what = "held-out tasks"
    far = ""
    if figures.scored == "ledgers" and figures.files.kind in (Kind.DISTILL, Kind.EVALUATE):
        far = " Not every evaluation has ended: this is what is recorded so far."
    averages = _averages(figures)
    order = list(rows)
    colour = {row: at for at, row in enumerate(order)}
    shown = kinds[:_MOST_KINDS]
    last = list(dict.fromkeys(name for each in averages.values() for name in each)) or ["all tasks"]
    last = last if len(kinds) > 1 else []
    head = ["policy", *(kind.replace("_", " ") for kind in shown), *last]
    body = []
    for row in order[:_MOST_ROWS]:
        cells: list[object] = [row_title(row)]
        cells += [_score_cell(rows[row].get(kind), colour[row]) for kind in shown]
        beside = averages.get(row, {}) if averages else {"all tasks": pooled[row]}
        cells += [_score_cell(beside.get(name), colour[row]) for name in last]
        body.append(cells)
    charted = order[:_CHARTED]
    groups = [
        (kind.replace("_", " "), [Rate(row_title(r), rows[r][kind], colour[r]) for r in charted if kind in rows[r]])
        for kind in kinds[:_MOST_ROWS]
    ]
    return joined(
        [
            tag("h2", "Scores"),
            tag("p", f"Success on {what}, with 95% intervals.{far}", class_="intro"),
            table(head, body, numeric=range(1, len(head)), class_="scores"),
            rate_chart(groups, unit=what) if len(kinds) * len(rows) > 1 else "",
            _comparisons(figures),
            _several_runs(figures),
            _watched(figures),
        ]
    )


def _averages(figures: Figures) -> dict[str, dict[str, Score]]:
    """Over kinds that count the same, as an evaluation gives them: row -> name -> average."""
    found = recorded_scores((figures.files.results or {}).get("averages"))
    return {row: each for row, each in found.items() if row in figures.scores}


def _comparisons(figures: Figures) -> Markup:
    """Every two rows on the tasks that both did, where an evaluation tested them."""
    rows: list[list[object]] = []
    pairs = (figures.files.results or {}).get("pairs")
    for pair in pairs if isinstance(pairs, list) else []:
        try:
            test = pair["test"]
            difference, low, high = (100 * float(test[name]) for name in ("difference", "low", "high"))
            rows.append(
                [
                    f"{row_title(str(pair['first']))} less {row_title(str(pair['second']))}",
                    f"{difference:+.1f} [{low:+.1f}, {high:+.1f}]",
                    f"{int(test['n']):,}",
                    f"{int(test['first_better']):,}",
                    f"{int(test['second_better']):,}",
                    f"{float(test['p_value']):.3g}",
                    f"{float(pair['holm_p']):.3g}",
                ]
            )
        except (KeyError, TypeError, ValueError):
            continue
    if not rows:
        return Markup("")
    head = ["on the same tasks", "difference, % points", "tasks", "first better", "second better", "p", "p, Holm"]
    return joined(
        [
            tag("h3", "Are they different?"),
            tag("p", "Paired tests: McNemar's exact one for right or wrong, else by permutation. Holm's p is adjusted "
                "for the number of pairs.", class_="intro"),
            table(head, rows[:_MOST_ROWS], numeric=range(1, 7)),
        ]
    )  # fmt: skip


def _several_runs(figures: Figures) -> Markup:
    """pass@k and mean@n, where tasks were run several times."""
    rows: list[list[object]] = []
    ks: list[str] = []
    found = (figures.files.results or {}).get("rows")
    for name, row in found.items() if isinstance(found, Mapping) else ():
        passes = recorded_scores({"row": row.get("pass_at_k")}).get("row", {}) if isinstance(row, Mapping) else {}
        if passes:
            ks += [k for k in passes if k not in ks]
            mean = recorded_scores({"row": {"mean": row.get("mean_at_n")}}).get("row", {}).get("mean")
            rows.append([row_title(str(name)), _score_cell(mean, 0), *(_score_cell(passes.get(k), 0) for k in ks)])
    if not rows:
        return Markup("")
    head = ["policy", "mean@n", *(f"pass@{k}" for k in ks)]
    return joined(
        [tag("h3", "Over several runs of each task"),
         table(head, [[*row, *[""] * (len(head) - len(row))] for row in rows], numeric=range(1, len(head)))]
    )  # fmt: skip


def pool(cells: object) -> Score | None:
    """All kinds together, each task counted once."""
    found = [each for each in cells if isinstance(each, Score)] if hasattr(cells, "__iter__") else []  # type: ignore[union-attr]
    n = sum(each.n for each in found)
    return score(min(n, round(sum(each.mean * each.n for each in found))), n) if n else None


def _score_cell(found: Score | None, colour: int) -> Markup:
    if found is None:
        return Markup("–")
    return joined(
        [
            tag("b", f"{100 * found.mean:.{1 if found.n >= 1000 else 0}f}%"),
            tag("i", f" [{100 * found.low:.0f}, {100 * found.high:.0f}]", title=f"n={found.n:,}"),
            interval(found, colour),
        ]
    )


def _watched(figures: Figures) -> Markup:
    if not figures.watched:
        return Markup("")
    points = [(float(step), 100 * each.mean) for step, each in figures.watched]
    low = [(float(step), 100 * each.low) for step, each in figures.watched]
    high = [(float(step), 100 * each.high) for step, each in figures.watched]
    n = max(each.n for _, each in figures.watched)
    return line_chart(
        [
            Line("success", points, 0, strong=True, dots=True),
            Line("interval, low", low, "muted"),
            Line("interval, high", high, "muted"),
        ],
        title="Success while it learned", x="optimizer steps", y=f"% of {n:,} tasks", top=100, bottom=0,
    )  # fmt: skip


# -- success by kind, steps, difficulty


def success(figures: Figures) -> Markup:
    """By kind, by the number of steps, by difficulty."""
    evaluated = figures.of(Role.EVALUATION)
    collected = figures.of(Role.TRAINING)
    parts: list[object] = []
    if collected and figures.files.kind is Kind.DISTILL:
        ledger = collected["training"]
        parts += [tag("h3", "Of the trajectories collected for training, by kind"), _by_kind(ledger)]
    series = _series(figures, evaluated or collected)
    by_steps = _grouped(series, lambda ledger, policy: ledger.by_steps.get(policy, {}), _steps_label, least=1)
    if by_steps:
        parts += [
            tag("h3", "By the number of steps that the policy took"),
            rate_chart(by_steps, unit="trajectories"),
        ]
    name, groups = _difficulty(series)
    if groups:
        parts += [tag("h3", f"By difficulty: {name}"), rate_chart(groups, unit="trajectories")]
    if not parts:
        return Markup("")
    return joined([tag("h2", "Success by kind, steps and difficulty"), *parts])


_Series = list[tuple[str, int, LedgerFigures, str]]
"""(title, colour, ledger, policy)"""


def _series(figures: Figures, ledgers: Mapping[str, LedgerFigures]) -> _Series:
    """Each policy of each ledger, in the colours of the scores."""
    colours = {row: at for at, row in enumerate(figures.scores)}
    found: _Series = []
    for name, ledger in ledgers.items():
        for policy in ledger.policies:
            title = name if len(ledger.policies) == 1 and name != "training" else policy
            found.append((row_title(title), colours.get(title, colours.get(name, len(found))), ledger, policy))
    return found[:_CHARTED]


def _grouped(
    series: _Series,
    cells: Callable[[LedgerFigures, str], Mapping[int, Cell]],
    label: Callable[[int], str],
    *,
    least: int = 2,
) -> list[tuple[str, list[Rate]]]:
    """Buckets that at least one policy fills; [] when there are fewer than `least`."""
    by_bucket: dict[int, list[Rate]] = {}
    for title, colour, ledger, policy in series:
        for bucket, (n, right) in cells(ledger, policy).items():
            if n >= _SMALL:
                by_bucket.setdefault(bucket, []).append(Rate(title, score(right, n), colour))
    if len(by_bucket) < least:
        return []
    return [(label(bucket), rates) for bucket, rates in sorted(by_bucket.items())][:_MOST_ROWS]


def _difficulty(series: _Series) -> tuple[str, list[tuple[str, list[Rate]]]]:
    """By the best measure that there is."""
    by_level: dict[str, list[Rate]] = {}
    for title, colour, ledger, policy in series:
        for level, (n, right) in sorted(ledger.by_level.get(policy, {}).items()):
            by_level.setdefault(level, []).append(Rate(title, score(right, n), colour))
    if len(by_level) > 1:
        return "what the tasks say of themselves", sorted(by_level.items())[:_MOST_ROWS]
    groups = _grouped(series, lambda ledger, policy: ledger.by_reference.get(policy, {}), _steps_label)
    if groups:
        return "the steps that the teacher needed for the same task", groups
    groups = _grouped(series, lambda ledger, policy: ledger.by_length.get(policy, {}), lambda at: LENGTH_LABELS[at])
    return "characters of the question", groups


def _steps_label(steps: int) -> str:
    return f"{steps} step{'s' if steps != 1 else ''}"


def _by_kind(ledger: LedgerFigures) -> Markup:
    policies = ledger.policies[:_CHARTED]
    groups = []
    for kind in ledger.kinds[:_MOST_ROWS]:
        rates = [
            Rate(policy, rate, at)
            for at, policy in enumerate(policies)
            if (rate := ledger.tallies.get((policy, kind), Tally()).rate) is not None
        ]
        groups.append((kind.replace("_", " "), rates))
    return rate_chart(groups, unit="trajectories")
