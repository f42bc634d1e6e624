"""`launch.ledger validate`, `compact` and `failures`: is a ledger whole, is it tidy, what came to nothing and why."""

from __future__ import annotations

import argparse
import time
from dataclasses import asdict
from typing import Any

from launch.ledger.output import Output
from launch.ledger.sources import open_ledger
from rollout.retries import RetryRule
from rollout.trajectory import FailureClass

_SHOWN = 20


def add_validate_arguments(parser: argparse.ArgumentParser) -> None:
    del parser


def run_validate(options: argparse.Namespace, output: Output) -> int:
    """1 when a ledger is not whole."""
    told, ok = [], True
    for folder in options.ledgers:
        report = open_ledger(folder).validate()
        ok = ok and report.ok
        told.append({"ledger": folder, "ok": report.ok, **asdict(report)})
        output.say(f"{folder}: {report.rows:,} results, {report.failures:,} failures")
        _list("cannot be read", report.unreadable, output)
        _list("is not what the manifest says", report.disagreements, output)
        _list("key is recorded more than once (the first row counts)", report.duplicate_keys, output)
        _list("key is not made of its task, policy and sample (a resumed run never asks for it)",
              report.unlike_keys, output)  # fmt: skip
        _list("leftover of a call in flight or killed (harmless)", report.leftovers, output)
        output.say(f"{folder} is whole" if report.ok else f"{folder} is NOT whole")
    output.data({"ok": ok, "ledgers": told})
    return 0 if ok else 1


def _list(what: str, found: tuple[str, ...], output: Output) -> None:
    for each in found[:_SHOWN]:
        output.say(f"  {what}: {each}")
    if len(found) > _SHOWN:
        output.say(f"  {what}: and {len(found) - _SHOWN:,} more")


def add_compact_arguments(parser: argparse.ArgumentParser) -> None:
    del parser


def run_compact(options: argparse.Namespace, output: Output) -> int:
    """The one command that changes the ledger that it is given; no trajectory is lost by it."""
    told = []
    for folder in options.ledgers:
        report = open_ledger(folder).compact()
        told.append({"ledger": folder, **asdict(report)})
        if report.skipped:
            output.say(f"{folder}: {report.skipped}")
        else:
            output.say(
                f"{folder}: {report.merged:,} shards became {report.made:,}; {report.rows:,} rows, "
                f"{report.duplicates:,} duplicates dropped, {report.seconds:.1f} s"
            )
    output.data({"ledgers": told})
    return 0


def add_failures_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--class", dest="failure_class", choices=[each.value for each in FailureClass], help="of the last failure"
    )
    state = parser.add_mutually_exclusive_group()
    state.add_argument("--retryable", action="store_true", help="keys that a resumed run tries again")
    state.add_argument("--quarantined", action="store_true", help="keys that a resumed run leaves alone")
    state.add_argument("--solved", action="store_true", help="keys that have a result by now")
    parser.add_argument(
        "--attempts", type=int, help="recorded attempts that environment and engine failures have (default 3)"
    )
    parser.add_argument("--limit", type=int, default=50, help="keys to list (default %(default)s; 0: all)")


def run_failures(options: argparse.Namespace, output: Output) -> int:
    """One line a key: its last failure, and what becomes of it."""
    from rich import box
    from rich.table import Table
    from rich.text import Text

    rule = RetryRule() if options.attempts is None else RetryRule(
        environment=options.attempts, engine=options.attempts)  # fmt: skip
    wanted = next((name for name in ("retryable", "quarantined", "solved") if getattr(options, name)), None)
    found: list[dict[str, Any]] = []
    for folder in options.ledgers:
        ledger = open_ledger(folder)
        done = ledger.keys()
        for key, each in sorted(ledger.attempts().items()):
            state = "solved" if key in done else "quarantined" if rule.exhausted(each) else "retryable"
            if wanted not in (None, state) or options.failure_class not in (None, each.last_class.value):
                continue
            found.append(
                {
                    "ledger": folder,
                    "key": key,
                    "state": state,
                    "class": each.last_class.value,
                    "attempts": each.total,
                    "message": each.last_message,
                    "at": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(each.last_at_s)),
                }
            )
    shown = found[: options.limit or None]
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    table.add_column("key", overflow="fold")
    for name in ("class", "attempts", "state"):
        table.add_column(name, no_wrap=True)
    table.add_column("last message", overflow="fold")
    for each in shown:
        table.add_row(
            Text(each["key"]), each["class"], str(each["attempts"]), each["state"], Text(each["message"][:200])
        )
    if shown:
        output.show(table)
    states = {name: sum(each["state"] == name for each in found) for name in ("retryable", "quarantined", "solved")}
    output.say(f"{len(found):,} keys failed at some time: " + ", ".join(f"{n:,} {name}" for name, n in states.items()))
    if len(found) > len(shown):
        output.say(f"{len(found) - len(shown):,} more are not listed; --limit 0 lists all")
    output.data({"keys": len(found), "states": states, "failures": shown})
    return 0
