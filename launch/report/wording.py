"""How a report writes numbers and names: short, and the same everywhere.

Example::

    number(735_000), duration(379), usd(0.00123)      # "735k", "6 min 19 s", "0.00123"
    row_title("student_self_consistent")              # "distilled, voting"
"""

from __future__ import annotations

from launch.evaluation.intervals import Score
from launch.report.scores import ROW_TITLES


def row_title(row: str) -> str:
    return ROW_TITLES.get(row, row.replace("_", " "))


def ledger_name(ledger: str) -> str:
    return "collected for training" if ledger == "training" else row_title(ledger)


def percent(score: Score) -> str:
    """`87% [83, 90]`, with a decimal where there are enough trials for it to mean something."""
    digits = 1 if score.n >= 1000 else 0
    return f"{100 * score.mean:.{digits}f}% [{100 * score.low:.{digits}f}, {100 * score.high:.{digits}f}]"


def number(value: float) -> str:
    """Short, for axes and cells: 0.0004 as 4e-4, 12,000 as 12k."""
    if value == 0:
        return "0"
    size = abs(value)
    if size < 0.001:
        mantissa, exponent = f"{value:.2e}".split("e")
        return f"{float(mantissa):g}e{int(exponent)}"
    for limit, unit in ((1e9, "G"), (1e6, "M"), (1e4, "k")):
        if size >= limit:
            scaled = value / (1e3 if unit == "k" else limit)
            return f"{scaled:.3g}{unit}"
    return f"{value:,.0f}" if size >= 1000 else f"{value:.3g}"


def duration(seconds: float) -> str:
    """3.1 s, 6 min 19 s, 2 h 5 min."""
    if seconds < 60:
        return f"{seconds:.1f} s" if seconds < 10 else f"{seconds:.0f} s"
    if seconds < 3600:
        return f"{seconds // 60:.0f} min {seconds % 60:.0f} s"
    return f"{seconds // 3600:.0f} h {seconds % 3600 // 60:.0f} min"


def usd(value: float) -> str:
    if value == 0:
        return "0"
    return f"{value:,.2f}" if value >= 0.1 else f"{value:.5f}"
