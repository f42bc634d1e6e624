"""Watch a job that runs elsewhere: the same picture that it shows itself, from the `status.json` in its folder.

    python -m launch.watch runs/starter-seed0            until the job ends; Ctrl-C leaves it alone
    python -m launch.watch runs/starter-seed0 --once     one picture, and no more
    python -m launch.watch s3://bucket/mine --json       the status itself, for programs

It only reads. Exit code: 0 the job is done (or, with --once and --json, was read), 1 it failed or was interrupted,
2 there is nothing to watch, 130 interrupted.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Sequence
from pathlib import Path

if __name__ == "__main__" and not __package__:  # run as a file: imports come from the repository's root
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

from rich.console import Console

from launch.live.drawing import clock
from launch.live.lines import plain_line
from launch.live.status import JobStatus, StatusError, to_json
from launch.live.status_file import read_status
from launch.live.terminal import Screen

PLAIN_EVERY_S = 10.0


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m launch.watch", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", help="run_dir of distill, out of collect; s3:// and gs:// too")
    parser.add_argument("--once", action="store_true", help="show it once")
    parser.add_argument("--json", action="store_true", help="print the status as JSON, once")
    parser.add_argument("--every", type=float, default=2.0, metavar="S", help="seconds between looks (default: 2)")
    options = parser.parse_args(arguments)
    if not 0.1 <= options.every <= 3600:
        parser.error(f"--every {options.every:g}: give 0.1 to 3600 seconds")
    console = Console(highlight=False)
    try:
        status = read_status(options.folder)
        if options.json:
            sys.stdout.write(to_json(status).decode())
        elif options.once:
            console.print(Screen(status, now_unix_s=time.time(), watched=True))
        else:
            follow = _draw if console.is_terminal else _print
            return 0 if follow(console, options.folder, status, options.every).state == "done" else 1
        return 0
    except StatusError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130


def _draw(console: Console, folder: str, status: JobStatus, every_s: float) -> JobStatus:
    """The last status."""
    from rich.live import Live

    with Live(console=console, auto_refresh=False) as live:
        while True:
            live.update(Screen(status, now_unix_s=time.time(), watched=True), refresh=True)
            if status.state != "running":
                return status
            time.sleep(every_s)
            status = _again(folder, status)


def _print(console: Console, folder: str, status: JobStatus, every_s: float) -> JobStatus:
    """The lines that the job itself prints where it has no terminal. Returns the last status."""
    said_until_s, printed_s = 0.0, 0.0
    while True:
        ended = status.state != "running"
        for each in status.said:
            if each.unix_s > said_until_s:
                _line(console, each.unix_s - status.started_unix_s, each.text)
                said_until_s = each.unix_s
        if (ended or time.monotonic() - printed_s >= PLAIN_EVERY_S) and (figures := plain_line(status)):
            printed_s = time.monotonic()
            _line(console, status.elapsed_s, f"  {figures}")
        if ended:
            _line(console, status.elapsed_s, status.state + (f": {status.error}" if status.error else ""))
            return status
        time.sleep(every_s)
        status = _again(folder, status)


def _again(folder: str, before: JobStatus) -> JobStatus:
    """A look that fails (a network, a disk) shows what was seen before."""
    try:
        return read_status(folder)
    except StatusError:
        return before


def _line(console: Console, at_s: float, text: str) -> None:
    console.print(f"[{clock(at_s)}] {text}", markup=False, soft_wrap=True)


if __name__ == "__main__":
    sys.exit(main())
