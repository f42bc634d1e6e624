"""The ladder: does it work, and what of it? One student, one world, equal training tokens; step by step from untrained
over chain of thought to an agent with all that helps, on several seeds.

    python launch/distill.py recipe=ladder                        all of configs/ladder.yaml, on the embedded default
    python launch/distill.py recipe=ladder ladder.seeds=[0]       one seed
    python launch/distill.py recipe=ladder tasks.test_count=50    any other key goes to every run

Each run is one of the main job, in `OUT/seed<N>/<run>`; the same command goes on where it was stopped, and shows the
table of what is there. It leaves `ladder.json`, `ladder.md` and `ladder.png`.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Sequence
from pathlib import Path

if __name__ == "__main__" and not __package__:  # run as a file: imports come from the repository's root
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

from launch.job_command import stops_like_an_interrupt
from launch.rungs.config import LadderConfig, read_ladder
from learner.config import ConfigError

RECIPE = "recipe=ladder"


def main(arguments: Sequence[str] | None = None) -> int:
    """Exit code: 0 done, 2 refused before anything started, 1 a run failed, 130 interrupted."""
    parser = argparse.ArgumentParser(
        prog=f"launch/distill.py {RECIPE}", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("overrides", nargs="*", help="ladder.KEY=VALUE, or overrides of every run")
    parser.add_argument("--cfg", action="store_true", help="print the commands of all runs and stop")
    options = parser.parse_intermixed_args(arguments)
    try:
        ladder, overrides = read_ladder([text for text in options.overrides if text != RECIPE])
        _check_runs(ladder, overrides)
    except ValueError as error:  # a ConfigError is one
        print(f"error: {error}", file=sys.stderr)
        return 2
    if options.cfg:
        for seed in ladder.seeds:
            for run in ladder.runs:
                print(" ".join(["python launch/distill.py", *ladder.command(run, seed=seed, overrides=overrides)]))
        return 0
    stops_like_an_interrupt()
    try:
        return _run(ladder, overrides)
    except KeyboardInterrupt:
        print(f"interrupted; the same command goes on from {ladder.out}", file=sys.stderr)
        return 130


def _check_runs(ladder: LadderConfig, overrides: Sequence[str]) -> None:
    """Every run's configuration, before the first one starts: none shall fail after hours for a typo in its own."""
    from launch.config_reading import load_config

    for run in ladder.runs:
        try:
            config = load_config(ladder.command(run, seed=ladder.seeds[0], overrides=overrides))
        except ConfigError as error:
            raise ConfigError(f"run {run.name!r}: {error}") from None
        if config.learner.max_tokens is None:
            raise ConfigError(
                f"run {run.name!r}: learner.epochs is {config.learner.epochs}; a ladder compares students of equal "
                "training tokens, so set learner.max_tokens, and learner.epochs=null"
            )


def _run(ladder: LadderConfig, overrides: Sequence[str]) -> int:
    from launch.live.view import LiveView
    from launch.rungs.runs import LadderRuns
    from launch.rungs.table import leave, measure

    view, started_s = LiveView(), time.monotonic()
    with LadderRuns(ladder, overrides) as runs:
        with view.stage(f"{len(ladder.runs) * len(ladder.seeds)} runs, {ladder.parallel} at a time, in {ladder.out}"):
            while not runs.done():
                runs.advance()
                view.show(runs.figures())
                time.sleep(1.0)
        failed = runs.failed()
    for name, tail in failed.items():
        print(f"failed: {name}\n{tail}", file=sys.stderr)
    leave(measure(ladder), ladder, view.console, minutes=(time.monotonic() - started_s) / 60)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
