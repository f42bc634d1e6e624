"""The main job: a teacher acts, a student learns from it while it does, and both are scored on tasks never seen.

    python launch/distill.py                          the embedded default: two CPU cores, no download
    python launch/distill.py seed=1 learner.epochs=3  any value of configs/ can be set
    python launch/distill.py recipe=paper --cfg       print the configuration and stop
    ray job submit --working-dir . -- python launch/distill.py run_dir=/shared/runs/a

A second run of the same command goes on where the first one stopped.
"""

from __future__ import annotations

import sys
from pathlib import Path

if not __package__:  # run as a file: imports come from the repository's root, not from this folder
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

import argparse
import signal
from collections.abc import Sequence


def main(arguments: Sequence[str] | None = None) -> int:
    """Exit code: 0 done, 2 refused before anything started, 1 failed on the way, 130 interrupted."""
    parser = argparse.ArgumentParser(
        prog="launch/distill.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("overrides", nargs="*", help="Hydra overrides, such as recipe=paper or seed=1")
    parser.add_argument("--cfg", action="store_true", help="print the configuration as YAML and stop")
    options = parser.parse_args(arguments)

    from launch.config_reading import compose, parse_config
    from learner.config import ConfigError

    try:
        plain = compose(options.overrides)
        config = parse_config(plain)
        if options.cfg:
            from omegaconf import OmegaConf

            print(OmegaConf.to_yaml(OmegaConf.create(plain)), end="")
            return 0
        from launch.preflight import check

        check(config)
    except (ConfigError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    # A job that is stopped politely ends as one that is interrupted: everything it started ends first.
    # Both are set: a shell's background job starts with SIGINT ignored.
    for stop in (signal.SIGINT, signal.SIGTERM):
        signal.signal(stop, signal.default_int_handler)

    from launch.job import JobError, run_job
    from launch.run_folder import RunFolder, RunFolderError

    folder = RunFolder(config.run_dir)
    try:
        with folder.claim(config) as found:
            run_job(config, folder, resumed=found)
    except (RunFolderError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except JobError as error:
        print(f"error: {error}\nthe same command goes on from {folder.path}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print(f"interrupted; the same command goes on from {folder.path}", file=sys.stderr)
        return 130
    print(f"results: {folder.results}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
