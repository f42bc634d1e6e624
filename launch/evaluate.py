"""Scores of any policy on held-out tasks, in one or more modes, by really running its code and searches.

    python launch/evaluate.py run=runs/starter-seed0 'modes=[agent,agent_sc]'    a finished run's student, in its world
    python launch/evaluate.py run=RUN policy.model=RUN/learner/snapshots/0.1 tasks.test_count=300
    python launch/evaluate.py policy=expert 'modes=[agent,cot]'
    python launch/evaluate.py policy=openai policy.model=m policy.base_url=http://host/v1 'modes=[cot,cot_rag,direct]'
    python launch/evaluate.py run=RUN benchmark=paper8 benchmark.folder=DIR retrieval.corpus=passages.jsonl
    ray job submit --working-dir . -- python launch/evaluate.py run=/shared/runs/a out=/shared/scores/a

modes: agent (greedy), agent_sc (self-consistent actions), whole_run_vote, cot, cot_rag, direct. samples=8 adds pass@k.
The same command again does what is missing; with another policy or mode it adds to the table. `--cfg` prints the
configuration and stops; `--json` prints the results for machines. `python -m launch.compare` compares any ledgers.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

if not __package__:  # run as a file: imports come from the repository's root, not from this folder
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

from collections.abc import Sequence
from functools import partial
from typing import TYPE_CHECKING

from launch.job_command import job_parser, stops_like_an_interrupt

if TYPE_CHECKING:
    from launch.evaluation.config import EvaluationConfig
    from launch.evaluation.folder import EvaluationFolder
    from launch.evaluation.tasks import EvaluationWorld

EXIT_CODES = """exit codes:
  0    done: every episode has a result
  1    failed on the way, or episodes have no result: the same command tries them again
  2    refused before anything started
  3    stopped at the spend cap: the same command with a higher spend.usd or spend.tokens goes on
  130  interrupted"""


def main(arguments: Sequence[str] | None = None) -> int:
    """Returns the exit code."""
    parser = job_parser("launch/evaluate.py", __doc__, example="policy=expert or samples=4", epilog=EXIT_CODES)
    parser.add_argument("--json", action="store_true", help="print the results as JSON, and what happens on stderr")
    options = parser.parse_intermixed_args(arguments)

    from launch.config_reading import to_plain
    from launch.evaluation.folder import EvaluationFolder
    from launch.evaluation.reading import load_evaluation
    from launch.preflight import check_evaluation

    try:
        config = load_evaluation(options.overrides)
        if options.cfg:
            from omegaconf import OmegaConf

            print(OmegaConf.to_yaml(OmegaConf.create(to_plain(config))), end="")
            return 0
        folder = EvaluationFolder(config.out)
        world = check_evaluation(config, folder)
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    stops_like_an_interrupt()
    return _run(config, folder, world, as_json=options.json)


def _run(config: EvaluationConfig, folder: EvaluationFolder, world: EvaluationWorld, *, as_json: bool) -> int:
    from rich.console import Console

    from launch.evaluation.job import EvaluationJobError, run_evaluation_job
    from launch.live.job_views import evaluation_view
    from launch.report import reported

    console = Console(file=sys.stderr, highlight=False, soft_wrap=True) if as_json else None
    view = evaluation_view(config, folder.path, console)
    say = partial(print, file=sys.stderr) if as_json else print
    try:
        with folder.claim(config) as found, reported(folder.path, say=say), view:
            view.say(f"evaluation {folder.path}: {config.label}, {len(world.tasks):,} tasks" + " (goes on)" * found)
            outcome = run_evaluation_job(config, folder, world, view)
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except EvaluationJobError as error:
        print(f"error: {error}\nthe same command goes on from {folder.path}", file=sys.stderr)
        return 3 if "spend cap" in str(error) else 1
    except KeyboardInterrupt:
        print(f"interrupted; the same command goes on from {folder.path}", file=sys.stderr)
        return 130
    if as_json:
        print(json.dumps(outcome.results, indent=2))
    else:
        print(f"results: {folder.results}")
    if outcome.missing:
        print(
            f"{outcome.missing:,} episodes have no result (see failures/ of their ledger); the same command tries them "
            "again",
            file=sys.stderr,
        )
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
