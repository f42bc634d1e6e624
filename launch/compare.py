"""Compares ledgers that are there already, task by task: what did better on the tasks that they share?

    python -m launch.compare runs/a/evaluation/student runs/a/evaluation/student_self_consistent
    python -m launch.compare runs/a/evaluation/student runs/b/evaluation/student --names seed-0,seed-1
    python -m launch.compare LEDGER LEDGER --kind two_hop --json

It runs nothing. A ledger of several policies, or settings, is a row for each of them. A task with several runs counts
with their mean, or with their vote's result (--votes). Right or wrong is compared by McNemar's exact test, other scores
by a permutation test; the interval of a difference is Newcombe's or a bootstrap's.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

if __name__ == "__main__" and not __package__:  # run as a file: imports come from the repository's root
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

if TYPE_CHECKING:
    from launch.evaluation.rows import Row

_SETTINGS = re.compile(r"\|([0-9a-f]{12})$")
"""At the end of a key: the digest of the settings."""
_MOST_SETTINGS = 8


def main(arguments: Sequence[str] | None = None) -> int:
    """Exit code: 0 done, 2 for ledgers that cannot be compared."""
    parser = argparse.ArgumentParser(
        prog="python -m launch.compare", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("ledgers", nargs="+", metavar="LEDGER", help="folders, or s3://bucket/prefix")
    parser.add_argument("--names", help="comma-separated, one for each ledger")
    parser.add_argument("--kind", action="append", help="tasks of this kind alone; may be given several times")
    parser.add_argument("--votes", action="store_true", help="of a task with several runs, score their vote")
    parser.add_argument("--all-tasks", action="store_true", help="show each ledger's score over all of its own tasks")
    parser.add_argument("--json", action="store_true", help="print the results as JSON")
    options = parser.parse_args(arguments)

    from rollout.ledger import LedgerError
    from rollout.records import RecordsError
    from rollout.storage import StorageError

    try:
        rows = _rows(options)
    except (ValueError, LedgerError, RecordsError, StorageError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    if options.json:
        from launch.evaluation.rows import pairs

        found = {
            "rows": {row.name: row.to_json({}) for row in rows},
            "pairs": [pair.to_json() for pair in pairs(rows)],
        }
        print(json.dumps(found, indent=2))
        return 0
    _print(rows)
    return 0


def _rows(options: argparse.Namespace) -> list[Row]:
    names = _names(options.ledgers, options.names)
    rows = [row for path, name in zip(options.ledgers, names, strict=True) for row in _read(path, name, options.votes)]
    if options.kind:
        known = {kind for row in rows for kind in row.kinds}
        if unknown := [kind for kind in options.kind if kind not in known]:
            raise ValueError(f"--kind {unknown[0]!r}: the ledgers' tasks are of the kinds {', '.join(sorted(known))}")
        rows = [_only(row, lambda task, row=row: row.results[task].kind in options.kind) for row in rows]
    shared = set.intersection(*(set(row.results) for row in rows))
    if not shared:
        raise ValueError("the ledgers share no task, so there is nothing to compare; tasks are told by their ids")
    most = max(len(row.results) for row in rows)
    if len(shared) < most and not options.all_tasks:
        print(f"scores are over the {len(shared):,} tasks that all have (of {most:,})", file=sys.stderr)
        rows = [_only(row, lambda task: task in shared) for row in rows]
    return rows


def _read(path: str, name: str, votes: bool) -> list[Row]:
    from launch.evaluation.rows import Row
    from rollout.ledger import Ledger, LedgerError

    ledger = Ledger(path)
    keys: dict[tuple[str, str], set[str]] = {}
    for table in ledger.scan(["key", "policy"]):
        for key, policy in zip(*(table.column(column).to_pylist() for column in ("key", "policy")), strict=True):
            settings = _SETTINGS.search(key)
            keys.setdefault((policy, settings[1] if settings else ""), set()).add(key)
    if not keys:
        missing = "://" not in path and not Path(path).exists()
        raise LedgerError(f"{path} does not exist" if missing else f"{path} holds no trajectory")
    policies = sorted({policy for policy, _ in keys})
    rows = []
    for policy in policies:
        own = {settings: each for (of, settings), each in keys.items() if of == policy}
        if len(own) > _MOST_SETTINGS:  # such as composed trajectories, whose settings name what they are made of
            own = {"": set[str]().union(*own.values())}
        for settings, each in own.items():
            parts = [policy] * (len(policies) > 1) + [f"settings {settings}"] * (len(own) > 1)
            rows.append(Row.read(f"{name}: {', '.join(parts)}" if parts else name, ledger, only=each, votes=votes))
    return rows


def _only(row: Row, wanted: object) -> Row:
    return replace(row, results={task: each for task, each in row.results.items() if wanted(task)})  # type: ignore[operator]


def _names(ledgers: Sequence[str], given: str | None) -> list[str]:
    """Of the rows: what tells the paths apart."""
    if given is not None:
        names = given.split(",")
        if len(names) != len(ledgers) or len(set(names)) < len(names):
            raise ValueError(f"--names {given!r}: give {len(ledgers)} different names, one for each ledger")
        return names
    parts = [[part for part in path.split("/") if part not in ("", ".")] or [path] for path in ledgers]
    if len(set(map(tuple, parts))) < len(parts):
        raise ValueError("a ledger is named twice")
    common = len(os.path.commonprefix([each[:-1] for each in parts]))
    ends = [each[common:] for each in parts]
    while len(ends) > 1 and all(len(each) > 1 for each in ends) and len({each[-1] for each in ends}) == 1:
        ends = [each[:-1] for each in ends]  # such as /ledger behind each
    return ["/".join(each) for each in ends]


def _print(rows: Sequence[Row]) -> None:
    from launch.evaluation.tables import tables
    from launch.live.view import LiveView

    console = LiveView().console
    for table in tables(rows, domains={}):
        console.print(table)


if __name__ == "__main__":
    sys.exit(main())
