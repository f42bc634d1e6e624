"""`python -m launch.view LEDGER...`: look at trajectories in a browser, ledgers of any size.

    python -m launch.view runs/a/ledger
    python -m launch.view runs/a                              # its ledger and those of its evaluations
    python -m launch.view s3://bucket/a/ledger --port 8080 --open
    python -m launch.view runs/a/ledger --host 0.0.0.0        # asks for a token, which it prints

A ledger is a folder or an `s3://` URI; a run's folder stands for the ledgers in it. Nothing is written to them; rows
that come meanwhile show up. An index is kept in the user's cache folder (`--cache`, `--no-cache`), so that a
filter over millions of rows is quick; it may be removed at any time. Ends on Ctrl-C.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

if __name__ == "__main__" and not __package__:  # run as a file: imports come from the repository's root
    sys.path[0] = str(Path(__file__).resolve().parent.parent)


def main(arguments: Sequence[str] | None = None) -> int:
    """Returns the exit code: 0 ended, 2 refused."""
    options = _parser().parse_args(arguments)
    from launch.viewer.server import Options, ViewError, default_cache, serve
    from rollout.ledger import LedgerError

    def say(line: str) -> None:
        print(line, flush=True)

    try:
        if options.token is not None and not options.token:
            raise ViewError("--token is empty; give one, or leave it out")
        if not 0 <= options.port < 65536:
            raise ViewError(f"--port {options.port}: use 0 (any that is free) to 65535")
        if options.tokenizer and not (Path(options.tokenizer) / "tokenizer_config.json").is_file():
            raise ViewError(f"--tokenizer {options.tokenizer}: there is no tokenizer_config.json in it")
        ledgers = [ledger for named in options.ledgers for ledger in _ledgers(named)]
        serve(
            list({ledger.storage.uri: ledger for ledger in ledgers}.values()),
            Options(
                host=options.host,
                port=options.port,
                token=options.token or "",
                names=tuple(options.name),
                cache=None if options.no_cache else Path(options.cache) if options.cache else default_cache(),
                tokenizer=options.tokenizer,
                open_browser=options.open,
            ),
            say=say,
        )
    except KeyboardInterrupt:
        pass
    except (ValueError, OSError, LedgerError) as error:
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    return 0


def _ledgers(named: str) -> list:
    """A ledger, or those of a run. Raises `launch.ledger.sources.UsageError`."""
    from launch.ledger.sources import UsageError, open_ledger
    from rollout.ledger_mark import MARK

    folder = Path(named)
    if "://" not in named and folder.is_dir() and not (folder / MARK).is_file():
        inside = [folder / "ledger", *sorted((folder / "evaluation").glob("*"))]
        found = [str(each) for each in inside if (each / MARK).is_file()]
        if found:
            return [open_ledger(each) for each in found]
        raise UsageError(
            f"{named} is no ledger and no run: there is no {MARK} in it, nor in its ledger/ and evaluation/*/"
        )
    return [open_ledger(named)]


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m launch.view", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("ledgers", nargs="+", metavar="LEDGER", help="folder of a ledger or a run, or an s3:// URI")
    parser.add_argument("--port", type=int, default=0, help="default: any that is free")
    parser.add_argument("--open", action="store_true", help="open a browser")
    parser.add_argument("--tokenizer", help="folder of the tokenizer for the token view; default: the run's student's")
    parser.add_argument("--host", default="127.0.0.1", help="where to listen; other than loopback asks for a token")
    parser.add_argument("--token", help="the token to ask for; default: none on loopback, a new one elsewhere")
    parser.add_argument(
        "--name",
        action="append",
        default=[],
        help="another name that it is called by, as behind a proxy; may be repeated",
    )
    parser.add_argument("--cache", help="folder of the index (default: apprentice/viewer in the user's cache folder)")
    parser.add_argument("--no-cache", action="store_true", help="keep no index; it is made anew at each start")
    return parser


if __name__ == "__main__":
    sys.exit(main())
