"""What every benchmark ends with: a table of what was measured beside its goal, JSON for machines, a verdict.

Example::

    parser = scoreboard.arguments(__doc__)
    options = parser.parse_args()
    rows = [Row(what="step in place, p50", measured=0.4, unit="ms", goal="<= 1", kept=0.4 <= 1, beside="fresh 310 ms")]
    sys.exit(scoreboard.publish(rows, options))
"""

from __future__ import annotations

import argparse
import json
import platform
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from rich.console import Console
from rich.table import Table


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """One measured thing."""

    what: str
    measured: float | str
    unit: str = ""
    goal: str = ""
    """Such as "<= 4"; empty where a number is only reported."""
    kept: bool | None = None
    """Whether the goal is reached; None where there is none."""
    beside: str = ""
    """The peer's or the limit's number of the same run."""
    group: str = ""


def arguments(doc: str | None) -> argparse.ArgumentParser:
    """A parser with what all benchmarks share: `--json PATH`, `--check`."""
    parser = argparse.ArgumentParser(description=(doc or "").splitlines()[0])
    parser.add_argument("--json", type=Path, help="write the rows to this file")
    parser.add_argument("--check", action="store_true", help="exit with 1 when a goal is missed")
    return parser


def publish(rows: Sequence[Row], options: argparse.Namespace, *, title: str = "") -> int:
    """Print the table, write the JSON; the exit status that `--check` asks for."""
    table = Table(title=title or None)
    grouped = any(row.group for row in rows)
    for name in (*(("run",) if grouped else ()), "what", "measured", "goal", "peer or limit", "kept"):
        table.add_column(name)
    for row in rows:
        value = row.measured if isinstance(row.measured, str) else f"{row.measured:.4g}"
        verdict = {None: "", True: "yes", False: "[red]NO[/red]"}[row.kept]
        cells = (row.what, f"{value} {row.unit}".strip(), row.goal, row.beside, verdict)
        table.add_row(*(((row.group,) if grouped else ()) + cells))
    console = Console()
    if not console.is_terminal:
        console.width = 130
    console.print(table)
    if options.json:
        record = {"machine": platform.platform(), "rows": [asdict(row) for row in rows]}
        options.json.write_text(json.dumps(record, indent=2) + "\n")
    return int(options.check and any(row.kept is False for row in rows))
