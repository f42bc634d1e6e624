"""An audit's report on a terminal: what is proven, counts by span type, refused rows, and rows in colour (rich).

Example::

    show(report, tokenizer, Console())
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from learner.audit.proofs import Claim, decode
from learner.audit.report import AuditReport
from learner.examples import Example
from rollout.trajectory import SpanType

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

COLOURS = {
    SpanType.THOUGHT: "cyan",
    SpanType.CODE: "green",
    SpanType.ANSWER: "magenta",
    SpanType.FORMAT: "yellow",
    SpanType.OBSERVATION: "blue",
    SpanType.SYSTEM: "bright_black",
    SpanType.USER: "white",
}
FAILURES = 10
REFUSED = 5
"""A reason."""


def show(report: AuditReport, tokenizer: Any, console: Console) -> None:
    """Print it."""
    from rich.text import Text

    console.print(_counts(report))
    console.print(
        f"{report.trajectories:,} trajectories, {report.rows:,} rows, {report.turns:,} turns, "
        f"{report.stop_tokens:,} stop tokens trained"
    )
    for reason, count in report.refused.most_common():
        console.print(Text(f"refused: {count:,} {reason}", style="red"))
        for row in [row for row in report.refused_rows if row.reason == reason][:REFUSED]:
            console.print(Text(f"    {row.key}: {row.detail}"))
    for example in report.samples:
        console.rule(Text(f"{example.key}: trained tokens are underlined"))
        console.print(coloured(example, tokenizer))
        weights = ", ".join(f"{span} {weight:g}" for span, weight in sorted(row_weights(example)))
        console.print(Text(f"weights: {weights}", style="italic"))
    for failure in report.failures[:FAILURES]:
        console.print(Text(f"WRONG {failure.key}: {failure.problem}", style="bold red"))
    console.print(_proofs(report))
    if report.ok:
        console.print("Every mask is proven.", style="bold green")
    elif not report.wrong:
        console.print("No trajectory could be checked.", style="bold red")
    else:
        console.print(f"{report.wrong.total():,} proofs fail.", style="bold red")


def coloured(example: Example, tokenizer: Any) -> Text:
    """A row: the colour is the span type, underlined is trained."""
    from rich.text import Text

    row = Text()
    for text, first in pieces(example, tokenizer):
        trained = example.loss_weights[first] > 0
        row.append(text, style=COLOURS[example.span_types[first]] + (" underline" if trained else " dim"))
    return row


def pieces(example: Example, tokenizer: Any) -> Iterator[tuple[str, int]]:
    """(text, index of its first token) of stretches of tokens that are alike in type, weight and turn; a character that
    is several tokens stays whole that way."""
    first = 0
    for j in range(1, len(example) + 1):
        if j == len(example) or _kind(example, j) != _kind(example, first):
            yield decode(tokenizer, example.token_ids[first:j]), first
            first = j


def row_weights(example: Example) -> set[tuple[str, float]]:
    """(span type, weight) of the trained tokens."""
    return {(s.value, w) for s, w in zip(example.span_types, example.loss_weights, strict=True) if w > 0}


def _kind(example: Example, j: int) -> tuple[SpanType, float, int]:
    return example.span_types[j], example.loss_weights[j], example.turns[j]


def _counts(report: AuditReport) -> Table:
    from rich.table import Table
    from rich.text import Text

    table = Table("tokens", "trained", "their weight", "only read", title="Loss masks")
    for span, colour in COLOURS.items():
        table.add_row(
            Text(span, style=colour),
            f"{report.trained[span]:,}",
            f"{report.weight.get(span, 0.0):,.6g}",
            f"{report.read[span]:,}",
        )
    weight = sum(report.weight.values())
    table.add_row("all", f"{report.trained.total():,}", f"{weight:,.6g}", f"{report.read.total():,}", style="bold")
    return table


def _proofs(report: AuditReport) -> Table:
    from rich.table import Table

    table = Table("claim", "checked on", "wrong", title="Proofs")
    for claim in Claim:
        wrong = report.wrong[claim]
        table.add_row(claim.value, report.checked(claim), f"{wrong:,}", style="red" if wrong else "")
    return table
