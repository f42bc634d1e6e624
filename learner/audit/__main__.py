"""`python -m learner.audit LEDGER`: decodes every trained token of a ledger and proves the loss masks.

Prints what is proven, counts by span type, refused rows with their reasons and a few rows in colour; `--html` writes
the same as a page. Exits with 1 when anything is wrong or when nothing could be checked. A program, as those of
`launch/` are: it alone in this package knows ledgers.

Example::

    python -m learner.audit runs/a/ledger --html audit.html --rows 20
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path


def main(arguments: Sequence[str] | None = None) -> int:
    """Returns the exit code."""
    options = _parser().parse_args(arguments)
    try:
        weights = dict(_span_weight(each) for each in options.span_weight)
    except ValueError as error:
        print(f"audit: {error}", file=sys.stderr)
        return 1

    from transformers import AutoTokenizer

    from learner.audit.report import audit
    from rollout.ledger import Ledger, LedgerError
    from rollout.rendering import RenderingError

    folder = options.tokenizer or _tokenizer_of(options.ledger)
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder)
        report = audit(
            Ledger(options.ledger).trajectories(),
            tokenizer,
            max_row_tokens=options.max_row_tokens,
            system_prompt=options.system_prompt,
            span_weights=weights,
            samples=options.rows,
        )
        if options.html:
            from learner.audit.page import html_page

            title = f"{options.ledger}, tokenizer {folder}"
            Path(options.html).write_text(html_page(report, tokenizer, title=title), encoding="utf-8")
    except (LedgerError, RenderingError, OSError, ValueError) as error:
        print(f"audit: {error}", file=sys.stderr)
        return 1
    if options.json:
        print(report.to_json())
    else:
        from rich.console import Console

        from learner.audit.terminal import show

        console = Console()
        console.print(f"ledger {options.ledger}, tokenizer {folder}", highlight=False, markup=False)
        show(report, tokenizer, console)
        if options.html:
            console.print(f"written: {options.html}", highlight=False, markup=False)
    return 0 if report.ok else 1


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m learner.audit", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("ledger", help="folder of the ledger")
    parser.add_argument(
        "--tokenizer",
        help="folder of the student's tokenizer, with a chat template; default: the student that was trained on it "
        "(../learner/student), else the starter student's",
    )
    parser.add_argument("--max-row-tokens", type=int, default=1024, help="longer rows are refused (default 1024)")
    parser.add_argument("--system-prompt", default=None, help="the student's own; default: the trajectory's")
    parser.add_argument(
        "--span-weight",
        action="append",
        default=[],
        metavar="TYPE=WEIGHT",
        help="weight of a span type in the loss, such as code=0.5; may be repeated; default 1",
    )
    parser.add_argument("--rows", type=int, default=2, help="rows to show in full (default 2)")
    parser.add_argument("--html", metavar="FILE", help="write the report as a page, too")
    parser.add_argument("--json", action="store_true", help="print the report as JSON only")
    return parser


def _span_weight(text: str) -> tuple[str, float]:
    from learner.examples import TRAINED_SPANS

    name, _, weight = text.partition("=")
    if name not in TRAINED_SPANS:
        raise ValueError(f"--span-weight {text!r}: use TYPE=WEIGHT with one of {', '.join(TRAINED_SPANS)}")
    try:
        value = float(weight)
    except ValueError:
        value = -1.0
    if not value >= 0:
        raise ValueError(f"--span-weight {text!r}: the weight must be a number from 0 on")
    return name, value


def _tokenizer_of(ledger: str) -> str:
    """The student's that the ledger's own run has trained, else the starter's."""
    from learner.base_student import BASE_STUDENT_FOLDER

    trained = Path(ledger).parent / "learner" / "student"
    return str(trained if (trained / "tokenizer_config.json").is_file() else BASE_STUDENT_FOLDER)


if __name__ == "__main__":
    sys.exit(main())
