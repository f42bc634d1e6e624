"""`python -m launch.audit LEDGER --tokenizer FOLDER`: decodes every trained token of a ledger and proves the loss
masks.

Prints counts by span type, the first failures and a few rows in colour; exits with 1 when anything is wrong or when
nothing could be checked. The checks are in `learner.audit`.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from learner.audit import AuditReport

_COLOURS = {
    "thought": "cyan",
    "code": "green",
    "answer": "magenta",
    "format": "yellow",
    "observation": "dim",
    "system": "dim",
    "user": "dim",
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Returns the exit code."""
    parser = argparse.ArgumentParser(prog="python -m launch.audit", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("ledger", help="folder of the ledger")
    parser.add_argument("--tokenizer", required=True, help="folder of the student's tokenizer, with a chat template")
    parser.add_argument("--max-row-tokens", type=int, default=1024, help="longer rows are refused (default 1024)")
    parser.add_argument("--system-prompt", default=None, help="the student's own; default: the trajectory's")
    parser.add_argument("--rows", type=int, default=2, help="rows to show (default 2)")
    parser.add_argument("--json", action="store_true", help="print the report as JSON only")
    options = parser.parse_args(arguments)

    from transformers import AutoTokenizer

    from learner.audit import audit
    from rollout.ledger import Ledger, LedgerError
    from rollout.rendering import RenderingError

    try:
        tokenizer = AutoTokenizer.from_pretrained(options.tokenizer)
        report = audit(
            Ledger(options.ledger).trajectories(),
            tokenizer,
            max_row_tokens=options.max_row_tokens,
            system_prompt=options.system_prompt,
            samples=options.rows,
        )
    except (LedgerError, RenderingError, OSError) as error:
        print(f"audit: {error}", file=sys.stderr)
        return 1
    if options.json:
        print(report.to_json())
    else:
        show(report, tokenizer)
    return 0 if report.ok else 1


def show(report: AuditReport, tokenizer: Any) -> None:
    """The report, for people."""
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    console = Console()
    table = Table("tokens", "trained", "only read", title="Loss masks")
    for span in _COLOURS:
        table.add_row(Text(span, style=_COLOURS[span]), f"{report.trained[span]:,}", f"{report.read[span]:,}")
    table.add_row("all", f"{report.trained.total():,}", f"{report.read.total():,}", style="bold")
    console.print(table)
    console.print(
        f"{report.trajectories:,} trajectories, {report.rows:,} rows, {report.turns:,} turns, "
        f"{report.stop_tokens:,} stop tokens trained"
    )
    for reason, count in report.refused.most_common():
        console.print(f"refused: {count:,} {reason}")
    for example in report.samples:
        console.rule(Text(f"{example.key}: trained tokens are underlined"))
        row = Text()
        for token, span, weight in zip(example.token_ids, example.span_types, example.loss_weights, strict=True):
            style = _COLOURS[span.value] + (" underline" if weight > 0 else "")
            row.append(tokenizer.decode([token], clean_up_tokenization_spaces=False), style=style)
        console.print(row)
    for failure in report.failures[:10]:
        console.print(Text(f"WRONG {failure.key}: {failure.problem}", style="bold red"))
    if report.ok:
        console.print("Every mask is proven.", style="bold green")
    elif not report.failures:
        console.print("No trajectory could be checked.", style="bold red")
    else:
        console.print(f"{len(report.failures):,} masks are wrong.", style="bold red")


if __name__ == "__main__":
    sys.exit(main())
