"""The command that scores any student folder beside a run's own, greedy and with self-consistent actions, on the run's
world (`launch.evaluation` does the work):

    python -m launch.evaluate runs/starter-seed0/learner/snapshots/0.1 --run runs/starter-seed0 --count 300
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

if __name__ == "__main__" and not __package__:  # run as a file: imports come from the repository's root
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

from envs.base import EnvError
from launch.cluster import ClusterError
from launch.evaluation import MODES, EvaluationError, run_evaluation, student_settings, student_spec
from launch.live import LiveView
from launch.wiring import Environments
from learner.config import ConfigError
from rollout.collector import CollectionError
from rollout.placement import PlacementError


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m launch.evaluate", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("student", help="a Hugging Face folder")
    parser.add_argument("--run", required=True, help="the run whose world and settings are used")
    parser.add_argument(
        "--modes", default=",".join(MODES[:2]), help=f"comma-separated, of {', '.join(MODES)}; default: the first two"
    )
    parser.add_argument("--count", type=int, help="starter world: held-out tasks of each kind; default: the run's")
    parser.add_argument("--out", help="folder for its ledgers; default: evaluation/<student's name> in the run")
    options = parser.parse_args(arguments)
    try:
        return _evaluate_folder(options)
    except (ValueError, EvaluationError, OSError, ClusterError, CollectionError, PlacementError, EnvError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2


def _evaluate_folder(options: argparse.Namespace) -> int:
    from launch.cluster import ray_cluster
    from launch.report import score_table
    from launch.run_folder import RunFolder
    from launch.wiring import start_workers
    from launch.world import load_world

    student = Path(options.student)
    if not (student / "config.json").is_file():
        raise ConfigError(f"{student} is no Hugging Face folder: it holds no config.json")
    modes = options.modes.split(",")
    if unknown := set(modes) - set(MODES):
        raise ConfigError(f"mode {unknown.pop()!r} is unknown; there are {', '.join(MODES)}")
    folder = RunFolder(options.run)
    config = folder.config()
    if options.count is not None:
        config = replace(config, tasks=replace(config.tasks, test_count=options.count))
    world = load_world(config, folder.index)
    out = Path(options.out) if options.out else folder.scores / student.name
    view, scores = LiveView(), {}
    with ray_cluster(config.cluster):
        environments = Environments.start(config, world.retriever, slots=[config.evaluate.concurrency])
        spec = student_spec(config, str(student.absolute()))
        workers = start_workers(config, spec, count=1)
        for mode in modes:
            scores[f"{student.name}, {mode}"] = run_evaluation(
                config, environments, workers, world.test, policy=spec.policy_name,
                settings=student_settings(config, mode), ledger=out / mode, view=view, title=f"{student.name}: {mode}",
                samples=config.evaluate.candidates if mode == "whole_run_vote" else 1,
            )  # fmt: skip
    kinds = list(dict.fromkeys(task.kind for task in world.test))
    view.console.print(score_table(scores, kinds, title=f"held-out success of {student.name}, % [95% interval]"))
    return 0


if __name__ == "__main__":
    sys.exit(main())
