"""The tables of an evaluation for a terminal: scores, what they cost, pass@k, which policies differ.

Example::

    for table in tables(rows, domains={}):
        console.print(table)
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

from rich import box
from rich.table import Table
from rich.text import Text

from launch.evaluation.intervals import Score
from launch.evaluation.rows import AVERAGE, Row, pairs

_ROWS_A_TABLE = 3
"""Policies beside one another; more go into a further table."""
_CELL = len("100.0 [100.0, 100.0]")
_NUMBERS = ("difference, %", "better\n1st : 2nd", "p", "tasks")


def tables(rows: Sequence[Row], *, domains: Mapping[str, str]) -> Iterator[Table]:
    """Every table that says something."""
    for i in range(0, len(rows), _ROWS_A_TABLE):
        yield score_table(rows[i : i + _ROWS_A_TABLE], domains=domains)
    yield effort_table(rows)
    if any(row.pass_at() for row in rows):
        yield pass_table(rows)
    if len(rows) > 1:
        yield pair_table(rows, domains=domains)


def score_table(rows: Sequence[Row], *, domains: Mapping[str, str]) -> Table:
    """A line for each kind of task and each average, a column for each row."""
    table = _table("score, % [95% interval]", "tasks", [row.name for row in rows], widest=_CELL)
    kinds = list(dict.fromkeys([*domains, *(kind for row in rows for kind in row.kinds)]))
    scores = [row.scores() for row in rows]
    for kind in kinds:
        name = f"{kind} ({domains[kind]})" if kind in domains else kind.replace("_", " ")
        table.add_row(Text(name), *(_cell(each.get(kind)) for each in scores))
    averages = [row.averages(domains) for row in rows]
    names = list(dict.fromkeys(name for each in averages for name in each))
    if names:
        table.add_section()
    for name in names:
        shown = f"{name} of {len(kinds)}" if name == AVERAGE else name
        table.add_row(Text(shown, style="bold"), *(_cell(each.get(name)) for each in averages))
    return table


def effort_table(rows: Sequence[Row]) -> Table:
    """What an episode took."""
    costs = any(row.summary.all.cost_usd or row.summary.failed_cost_usd for row in rows)
    columns = ["episodes", "steps", "tool\ncalls", "prompt\ntokens", "sampled\ntokens", "seconds\np50 / p95"]
    table = _table("what an episode took (means; seconds beside others)", "policy, mode", columns, minimum=12)
    if costs:
        table.add_column("US$\nin all", justify="right", no_wrap=True)
    table.add_column("no result", justify="right", overflow="fold")
    for row in rows:
        summary, all_ = row.summary, row.summary.all
        latency = all_.latency
        cells = [
            f"{all_.n:,}",
            f"{all_.mean_steps:.1f}",
            f"{all_.mean_tool_calls:.1f}",
            f"{all_.mean_prompt_tokens:,.0f}",
            f"{all_.mean_completion_tokens:,.0f}",
            f"{latency.p50_s:.1f} / {latency.p95_s:.1f}" if latency else "-",
        ]
        if costs:
            cells.append(f"{all_.cost_usd + summary.failed_cost_usd:.4f}")
        lost = ", ".join(f"{name} {count:,}" for name, count in summary.unresolved.items())
        cells.append(lost or (f"{row.missing:,}" if row.missing else "0"))
        table.add_row(Text(row.name), *cells)
    return table


def pass_table(rows: Sequence[Row]) -> Table:
    """pass@k and mean@n, of rows whose tasks were run several times."""
    shown = [(row, row.pass_at()) for row in rows]
    ks = sorted({k for _, passed in shown for k in passed})
    table = _table("several runs a task, %", "policy, mode", ["mean@n", *(f"pass@{k}" for k in ks)])
    for row, passed in shown:
        if passed:
            table.add_row(Text(row.name), _cell(row.mean_at_n()), *(_cell(passed.get(k)) for k in ks))
    return table


def pair_table(rows: Sequence[Row], *, domains: Mapping[str, str]) -> Table:
    """Every two rows on the tasks that both have."""
    found = pairs(rows, domains)
    table = _table(
        "do they differ on the same tasks?" + " (average of the sets)" * bool(domains), "first",
        ["second", "tasks", "better\n1st : 2nd", "difference, %", "p"],
        minimum=14,
    )  # fmt: skip
    several = len(rows) > 2
    if several:
        table.add_column("Holm's p", justify="right", no_wrap=True)
    methods = {each.test.method for each in found}
    named = {"mcnemar": "McNemar's exact test", "permutation": "permutation test"}
    caption = f"p: {' or '.join(named[method] for method in sorted(methods))}, two-sided"
    table.caption = caption + ("; Holm's: adjusted for the number of pairs" if several else "")
    table.caption_justify = "left"
    for each in found:
        test = each.test
        cells = [
            f"{test.n:,}",
            f"{test.first_better} : {test.second_better}",
            f"{100 * test.difference:+.1f} [{100 * test.low:+.1f}, {100 * test.high:+.1f}]",
            _p(test.p_value),
            *([_p(each.holm_p)] if several else []),
        ]
        table.add_row(Text(each.first), Text(each.second), *cells)
    return table


def _table(title: str, first: str, columns: Sequence[str], *, minimum: int = 10, widest: int | None = None) -> Table:
    """`widest`: characters of a number, which is not broken."""
    table = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD, pad_edge=False, collapse_padding=True)
    table.add_column(Text(first), overflow="fold", min_width=minimum)
    for column in columns:
        # Numbers are not broken; the names of policies may be.
        table.add_column(Text(column), justify="right", overflow="fold", no_wrap=column in _NUMBERS, min_width=widest)
    return table


def _cell(score: Score | None) -> str:
    if score is None:
        return "-"
    return f"{100 * score.mean:.1f} [{100 * score.low:.1f}, {100 * score.high:.1f}]"


def _p(value: float) -> str:
    return "< 0.0001" if value < 0.0001 else f"{value:.4f}"
