"""Make the report of a run again: one self-contained page of what ran, how well, how fast, at what cost, and samples.

    python -m launch.report runs/starter-seed0                       writes report.html into the run's folder
    python -m launch.report runs/mine/ledger --out mine.html         of a bare ledger
    python -m launch.report s3://bucket/collection --json figures.json

It reads what a job left, of a distillation, a collection or an evaluation, finished or not; it changes nothing.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence


def main(arguments: Sequence[str] | None = None) -> int:
    """Exit code: 0 done, 2 there is nothing to report on, or nowhere to write to."""
    parser = argparse.ArgumentParser(
        prog="python -m launch.report", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("place", metavar="RUN_OR_LEDGER", help="a run's or a ledger's folder, or an s3:// or gs:// URI")
    parser.add_argument(
        "--out", metavar="FILE", help="where to write the page; default: report.html in the place itself"
    )
    parser.add_argument("--json", metavar="FILE", help="write the figures as JSON, too")
    options = parser.parse_args(arguments)

    from launch.report.writing import ReportError, write_report

    try:
        print(write_report(options.place, options.out, options.json))
    except ReportError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except OSError as error:
        where = error.filename or options.out or options.place
        print(f"error: {where} cannot be written: {error.strerror or error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
