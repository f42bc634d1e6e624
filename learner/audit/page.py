"""An audit's report as one HTML page that needs nothing else: no script, no font, no picture from elsewhere.

It shows the proofs, counts by span type, every row as a line of a table (up to `learner.audit.report.KEPT`), what was
refused and why, and the sampled rows token by token: the colour is the span type, underlined is trained, and pointing
at a stretch tells its weight and turn, at a token its id.

Example::

    Path("audit.html").write_text(html_page(report, tokenizer, title="runs/a/ledger"), encoding="utf-8")
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from html import escape
from typing import Any

from learner.audit.proofs import Claim, decode
from learner.audit.report import KEPT, AuditReport, RowCounts
from learner.audit.terminal import pieces, row_weights
from learner.examples import TRAINED_SPANS, Example
from rollout.trajectory import SpanType

OPENED = 5
"""Rows in full that need no click."""

_STYLE = """
:root { color-scheme: light dark; --ground: #ffffff; --ink: #1c1f23; --faint: #6a7078; --line: #d9dde2; --bad: #b3261e;
  --good: #1b6e3c; --thought: #d6ecfb; --code: #d8f2dc; --answer: #f6dcf5; --format: #fbefc6; --observation: #e3e4fb;
  --system: #e8eaec; --user: #f1e6dc; }
@media (prefers-color-scheme: dark) { :root { --ground: #16181b; --ink: #e7e9ec; --faint: #9aa1aa; --line: #363b42;
  --bad: #ff8a80; --good: #7fd8a0; --thought: #17405c; --code: #1d4a29; --answer: #57275a; --format: #574a17;
  --observation: #33366b; --system: #363b42; --user: #52402f; } }
body { background: var(--ground); color: var(--ink); font: 15px/1.5 system-ui, sans-serif; margin: 2rem auto;
  max-width: 72rem; padding: 0 1rem; }
h1 { font-size: 1.5rem; overflow-wrap: anywhere; } h2 { font-size: 1.15rem; margin-top: 2rem; }
table { border-collapse: collapse; } .wide { overflow-x: auto; }
td, th { border-bottom: 1px solid var(--line); padding: .25rem .7rem; text-align: left; vertical-align: top; }
td.n, th.n { text-align: right; font-variant-numeric: tabular-nums; }
summary { cursor: pointer; padding: .25rem 0; } .faint { color: var(--faint); }
.bad { color: var(--bad); font-weight: 600; } .good { color: var(--good); font-weight: 600; }
pre { white-space: pre-wrap; overflow-wrap: anywhere; border: 1px solid var(--line); border-radius: 6px; padding: 1rem;
  font: 13px/1.7 ui-monospace, monospace; }
mark { color: inherit; border-radius: 3px; padding: .1em 0; }
mark.on { text-decoration: underline; text-decoration-thickness: 2px; text-underline-offset: 3px; }
mark.off { opacity: .75; } mark i { font-style: normal; } mark i:hover { outline: 1px solid var(--ink); }
mark u { text-decoration: none; color: var(--faint); user-select: none; }
.key { font-family: ui-monospace, monospace; font-size: 13px; overflow-wrap: anywhere; }
""" + "\n".join(f"mark.{span} {{ background: var(--{span}); }}" for span in SpanType)


def html_page(report: AuditReport, tokenizer: Any, *, title: str) -> str:
    """The whole page."""
    verdict = (
        '<p class="good">Every mask is proven.</p>'
        if report.ok
        else '<p class="bad">No trajectory could be checked.</p>'
        if not report.wrong
        else f'<p class="bad">{report.wrong.total():,} proofs fail.</p>'
    )
    parts = [
        f"<h1>Loss masks of {escape(title)}</h1>",
        verdict,
        f"<p>{report.trajectories:,} trajectories, {report.rows:,} rows, {report.refused.total():,} refused.</p>",
        "<h2>Proofs</h2>",
        _table(
            ("claim", "checked on", "#wrong"),
            [(c.value, report.checked(c), f"{report.wrong[c]:,}") for c in Claim],
            bad={i for i, c in enumerate(Claim) if report.wrong[c]},
        ),
        _failures(report),
        "<h2>Tokens by span type</h2>",
        _legend(report),
        "<h2>Rows in full</h2>" if report.samples else "",
        *(_row(example, tokenizer, opened=i < OPENED) for i, example in enumerate(report.samples)),
        "<h2>All rows</h2>",
        _rows(report.row_counts, report.rows),
        "<h2>Refused</h2>",
        _refused(report),
    ]
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>Loss masks of {escape(title)}</title>\n<style>{_STYLE}</style>\n</head>\n<body>\n"
        + "\n".join(parts)
        + "\n</body>\n</html>\n"
    )


def _table(head: Sequence[str], rows: Iterable[Sequence[str]], *, bad: set[int] | None = None) -> str:
    """Texts are escaped; a column whose name begins with # holds numbers."""
    numeric = [name.startswith("#") for name in head]

    def cells(tag: str, texts: Sequence[str]) -> str:
        opened = [f'<{tag} class="n">' if n else f"<{tag}>" for n in numeric]
        return "".join(f"{begin}{escape(text)}</{tag}>" for text, begin in zip(texts, opened, strict=True))

    lines = [('<tr class="bad">' if bad and i in bad else "<tr>") + cells("td", row) for i, row in enumerate(rows)]
    body = "</tr>\n".join([*lines, ""])
    names = [name.lstrip("#") for name in head]
    return f'<div class="wide"><table>\n<tr>{cells("th", names)}</tr>\n{body}</table></div>'


def _failures(report: AuditReport) -> str:
    if not report.failures:
        return ""
    rows = [(failure.key, failure.claim.value, failure.problem) for failure in report.failures]
    return "<h2>What is wrong</h2>" + _table(("trajectory", "claim", "problem"), rows)


def _legend(report: AuditReport) -> str:
    lines = [
        f'<tr><td><mark class="{span} {"on" if span in TRAINED_SPANS else "off"}">{span}</mark></td>'
        f'<td class="n">{report.trained[span]:,}</td><td class="n">{report.weight.get(span, 0.0):,.6g}</td>'
        f'<td class="n">{report.read[span]:,}</td></tr>'
        for span in SpanType
    ]
    head = '<tr><th>span type</th><th class="n">trained</th><th class="n">their weight</th><th class="n">only read</th>'
    note = '<p class="faint">Underlined is trained. What is only read, a template\'s own tokens included, is faint.</p>'
    return f'<div class="wide"><table>\n{head}</tr>\n{"".join(lines)}\n</table></div>{note}'


def _row(example: Example, tokenizer: Any, *, opened: bool) -> str:
    weights = ", ".join(f"{span} {weight:g}" for span, weight in sorted(row_weights(example)))
    trained = sum(weight > 0 for weight in example.loss_weights)
    ends = [first for _, first in pieces(example, tokenizer)][1:] + [len(example)]
    marks = []
    for (text, first), end in zip(pieces(example, tokenizer), ends, strict=True):
        span, weight, turn = example.span_types[first], example.loss_weights[first], example.turns[first]
        where = f"turn {turn}" if turn >= 0 else "only read"
        marks.append(
            f'<mark class="{span} {"on" if weight > 0 else "off"}" title="{span}, weight {weight:g}, {where}">'
            f"{_tokens(example.token_ids[first:end], text, tokenizer)}</mark>"
        )
    return (
        f'<details{" open" * opened}><summary><span class="key">{escape(example.key)}</span> '
        f'<span class="faint">{len(example):,} tokens, {trained:,} trained, weights: {escape(weights)}</span></summary>'
        f"<pre>{''.join(marks)}</pre></details>"
    )


def _tokens(ids: Sequence[int], text: str, tokenizer: Any) -> str:
    """Each token for itself where it is text of its own, else the stretch as one."""
    each = [decode(tokenizer, (i,)) for i in ids]
    if "".join(each) != text:
        return f'<i title="ids {", ".join(map(str, ids))}">{_visible(text)}</i>'
    return "".join(f'<i title="id {i}">{_visible(piece)}</i>' for i, piece in zip(ids, each, strict=True))


def _visible(text: str) -> str:
    """Escaped, with a sign where a line ends."""
    return escape(text).replace("\n", "<u>\u23ce</u>\n")


def _rows(rows: list[RowCounts], total: int) -> str:
    spans = [span.value for span in SpanType]
    head = ("trajectory", "#tokens", "#turns", *(f"#{span}" for span in spans), "#trained", "#weight", "#wrong")
    lines = [
        (
            row.key,
            f"{row.tokens:,}",
            f"{row.turns:,}",
            *(f"{row.by_span.get(span, 0):,}" for span in spans),
            f"{row.trained:,}",
            f"{row.weight:,.6g}",
            f"{row.wrong:,}",
        )
        for row in rows
    ]
    cut = f'<p class="faint">The first {KEPT:,} of {total:,}.</p>' if total > len(rows) else ""
    return _table(head, lines, bad={i for i, row in enumerate(rows) if row.wrong}) + cut


def _refused(report: AuditReport) -> str:
    if not report.refused:
        return "<p>None.</p>"
    counts = _table(("reason", "#trajectories"), [(reason, f"{n:,}") for reason, n in report.refused.most_common()])
    rows = [(row.key, row.reason.value, row.detail) for row in report.refused_rows]
    listed = _table(("trajectory", "reason", "detail"), rows)
    return f"{counts}<details><summary>One by one</summary>{listed}</details>"
