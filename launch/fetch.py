"""Copies a run from an object store into a folder, where every other command can use it.

    python -m launch.fetch s3://bucket/runs/a runs/a
    python -m launch.fetch s3://bucket/runs/a runs/a --without-checkpoints
    python -m launch.ask --run runs/a "your question"

It may be asked again while the run goes on: what is there already is not copied again. The copy is a run's folder like
any other; a job that goes on in it goes its own way, and nothing of it is copied back.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path


def main(arguments: Sequence[str] | None = None) -> int:
    """Exit code: 0 copied, 2 there is no run, 1 the store failed on the way."""
    parser = argparse.ArgumentParser(
        prog="python -m launch.fetch", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("run", help="its run_dir: s3://bucket/path or gs://bucket/path")
    parser.add_argument("folder", type=Path, help="where to; made if it is missing")
    parser.add_argument("--without-checkpoints", action="store_true", help="leave out what only goes on with training")
    options = parser.parse_args(arguments)

    from launch.bucket.stored_run import fetch
    from launch.run_folder import RunFolderError

    try:
        if "://" not in options.run:
            raise RunFolderError(f"{options.run!r} is no URI such as s3://bucket/runs/a; copy a folder with cp -r")
        fetch(options.run, options.folder, checkpoints=not options.without_checkpoints)
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except OSError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    print(f"copied to {options.folder}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
