"""The main job: a teacher acts, a student learns from it while it does, and both are scored on tasks never seen.

    python launch/distill.py                          the embedded default: two CPU cores, no download
    python launch/distill.py seed=1 learner.epochs=3  any value of configs/ can be set
    python launch/distill.py recipe=paper --cfg       print the configuration and stop
    python launch/distill.py recipe=ladder            many runs, and what each step adds: see launch/ladder.py
    ray job submit --working-dir . -- python launch/distill.py run_dir=s3://bucket/runs/a

A second run of the same command goes on where the first one stopped.
"""

from __future__ import annotations

import sys
from pathlib import Path

if not __package__:  # run as a file: imports come from the repository's root, not from this folder
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

from collections.abc import Sequence

from launch import ladder
from launch.job_command import checked_config, job_parser


def main(arguments: Sequence[str] | None = None) -> int:
    """Exit code: 0 done, 2 refused before anything started, 1 failed on the way, 130 interrupted."""
    given = sys.argv[1:] if arguments is None else arguments
    if ladder.RECIPE in given:
        return ladder.main(given)
    options = job_parser("launch/distill.py", __doc__, example="recipe=paper or seed=1").parse_args(given)

    from launch.config import DistillConfig
    from launch.preflight import check

    config = checked_config(options, "distill", DistillConfig, check)
    if isinstance(config, int):
        return config

    from launch.bucket.stored_run import open_run
    from launch.job import JobError, run_job
    from launch.run_folder import RunFolderError, RunLostError

    try:
        folder = open_run(config)
        with folder.claim(config) as found:
            run_job(config, folder, resumed=found)
    except (RunFolderError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except (JobError, RunLostError) as error:
        print(f"error: {error}\nthe same command goes on from {folder.place}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print(f"interrupted; the same command goes on from {folder.place}", file=sys.stderr)
        return 130
    print(f"results: {folder.place}/{folder.results.name}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
