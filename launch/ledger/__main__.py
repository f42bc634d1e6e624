"""`python -m launch.ledger COMMAND LEDGER...`: look into ledgers and make new ones; nothing is generated.

    python -m launch.ledger show runs/a/ledger
    python -m launch.ledger regrade runs/a/ledger --grader math --out runs/a-math
    python -m launch.ledger filter runs/a/ledger s3://bucket/b/ledger --curation strict --out runs/kept
    python -m launch.ledger export runs/kept --format trl --out train.jsonl

A ledger is a folder or an `s3://` URI; several are read as one, of rows that share a key the first counts. No command
but `compact` changes what it is given, and what a command makes is there whole or not at all. `--json` prints one
document for machines. Exit codes: 0 done, 1 `validate` found something wrong, 2 refused or failed, 130 interrupted.
"""

from __future__ import annotations

import argparse
import importlib
import sys
from collections.abc import Sequence
from typing import NamedTuple


class _Command(NamedTuple):
    """Where a command is, by name: its module is imported when it is asked for."""

    module: str
    name: str
    """"" or what stands behind `run_` and in `add_..._arguments`."""
    help: str
    takes: str = "ledgers"


COMMANDS = {
    "show": _Command("show", "", "counts, success, cost, steps, tokens, failures"),
    "failures": _Command("upkeep", "failures", "what came to no result, and whether it is tried again"),
    "validate": _Command("upkeep", "validate", "read everything and say whether it is whole"),
    "compact": _Command("upkeep", "compact", "merge small shards, in place"),
    "filter": _Command("rewrite", "filter", "what a curation keeps, and what each filter removes"),
    "regrade": _Command("regrade", "", "grade the recorded predictions again"),
    "merge": _Command("rewrite", "merge", "several ledgers into one"),
    "compose": _Command("rewrite", "compose", "two policies' trajectories on a task into one"),
    "vote": _Command("vote", "", "vote over the samples of each task"),
    "export": _Command("exchange", "export", "to a file that other tools read"),
    "import": _Command("exchange", "import", "from files that other tools wrote", "files"),
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Returns the exit code."""
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    options = _parser(next((each for each in arguments if each in COMMANDS), None)).parse_args(arguments)
    from envs.base import EnvError
    from launch.ledger.output import Output
    from rollout.ledger import LedgerError

    command = COMMANDS[options.command]
    run = getattr(importlib.import_module(f"launch.ledger.{command.module}"), f"run_{command.name}".rstrip("_"))
    try:
        return run(options, Output(as_json=options.json))
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
    except BrokenPipeError:  # whoever read our output has had enough
        sys.stderr.close()
        return 2
    except (ValueError, OSError, EnvError, LedgerError) as error:
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        return 2


def _parser(asked: str | None) -> argparse.ArgumentParser:
    """Options of the command that is asked for alone, so that `--help` imports nothing."""
    parser = argparse.ArgumentParser(
        prog="python -m launch.ledger", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for name, command in COMMANDS.items():
        sub = commands.add_parser(name, help=command.help, description=command.help[0].upper() + command.help[1:] + ".")
        if command.takes == "files":
            sub.add_argument("files", nargs="+", metavar="FILE")
        else:
            sub.add_argument("ledgers", nargs="+", metavar="LEDGER", help="folder or s3:// URI")
        sub.add_argument("--json", action="store_true", help="one JSON document instead of tables")
        if name == asked:
            module = importlib.import_module(f"launch.ledger.{command.module}")
            getattr(module, f"add_{command.name}_arguments".replace("__", "_"))(sub)
    return parser


if __name__ == "__main__":
    sys.exit(main())
