"""Rollout collection alone, on any cluster: teachers act on tasks, and every trajectory is kept.

    python launch/collect.py                                  the starter world and its expert, into runs/
    python launch/collect.py out=runs/mine tasks=questions.jsonl retrieval.corpus=passages.jsonl \\
        teacher=openai teacher.model=gpt-4o-mini teacher.base_url=https://api.openai.com/v1
    ray job submit --working-dir . -- python launch/collect.py recipe=paper out=s3://bucket/paper rollout.samples=4

The same command again does what is missing. `--cfg` prints the configuration and stops.
"""

from __future__ import annotations

import sys
from pathlib import Path

if not __package__:  # run as a file: imports come from the repository's root, not from this folder
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

from collections.abc import Sequence
from typing import TYPE_CHECKING

from launch.job_command import checked_config, job_parser

if TYPE_CHECKING:
    from launch.config import CollectConfig

EXIT_CODES = """exit codes:
  0    done: every episode is recorded, or its failure is, with its class
  1    failed on the way, or episodes are missing
  2    refused before anything started
  3    stopped at the spend cap: the same command with a higher spend.usd or spend.tokens goes on
  130  interrupted"""


def main(arguments: Sequence[str] | None = None) -> int:
    """Returns the exit code."""
    parser = job_parser("launch/collect.py", __doc__, example="out=runs/a or rollout.samples=4", epilog=EXIT_CODES)
    options = parser.parse_args(arguments)

    from launch.config import CollectConfig
    from launch.preflight import check_collection

    config = checked_config(options, "collect", CollectConfig, check_collection)
    if isinstance(config, int):
        return config

    from launch.collect_folder import CollectFolder
    from launch.collect_job import CollectJobError, run_collection

    folder = CollectFolder(config.out, config.scratch)
    try:
        with folder.claim(config) as found:
            outcome = run_collection(config, folder, resumed=found)
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except CollectJobError as error:
        print(f"error: {error}\nthe same command goes on from {folder.out}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print(f"interrupted; the same command goes on from {folder.out}", file=sys.stderr)
        return 130
    print(f"summary: {folder.summary}")
    if outcome.at_cap:
        print(
            f"stopped at the spend cap: raise {' or '.join(_caps(config))}; the same command then goes on",
            file=sys.stderr,
        )
        return 3
    return 0 if outcome.summary.complete else 1


def _caps(config: CollectConfig) -> list[str]:
    caps = {"spend.usd": config.spend.usd, "spend.tokens": config.spend.tokens}
    return [f"{name}={value:g}" for name, value in caps.items() if value is not None]


if __name__ == "__main__":
    sys.exit(main())
