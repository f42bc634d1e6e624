"""What a job would take, before it runs: where each role goes, memory of each model, time and cost. Starts nothing.

    python launch/plan.py                                              the embedded default, on this machine
    python launch/plan.py recipe=paper --nodes '2*8xH100 + 4xCPU64'    would the paper's run fit there?
    python launch/plan.py recipe=paper --address auto                  on a running cluster, which is only looked at
    python launch/plan.py recipe=paper --nodes 8xH100 --from runs/small --gpu-hour-usd 2.5 --json
    python launch/plan.py --collect teacher=openai teacher.model=m teacher.base_url=http://host/v1

Overrides are those of `launch/distill.py` (with --collect, of `launch/collect.py`). Shapes of models come from
config.json files that are here, or a built-in table; no GPU is needed and nothing is downloaded.
"""

from __future__ import annotations

import sys
from pathlib import Path

if not __package__:  # run as a file: imports come from the repository's root, not from this folder
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

import argparse
from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from launch.config import JobConfig
    from launch.planning.cost import Pace
    from launch.planning.nodes import PlanNode

EXIT_CODES = """exit codes:
  0  it fits, as far as is known
  1  it does not fit: what is missing is said
  2  refused: a setting that is wrong, a cluster that does not answer"""


def main(arguments: Sequence[str] | None = None) -> int:
    """Returns the exit code."""
    options = _parser().parse_intermixed_args(arguments)
    from envs.base import EnvError, TaskError
    from launch.cluster import ClusterError
    from launch.config import CollectConfig, DistillConfig
    from launch.config_reading import load_config
    from launch.planning.making import make_plan

    try:
        config = load_config(options.overrides, CollectConfig if options.collect else DistillConfig)
        plan = make_plan(
            config,
            _nodes(options, config),
            pace=_pace(options),
            gpu_gib=options.gpu_gib,
            gpu_hour_usd=options.gpu_hour_usd,
        )
    except (ValueError, OSError, TaskError, EnvError, ClusterError) as error:  # a ConfigError is a ValueError
        print(f"error: {error}", file=sys.stderr)
        return 2
    if options.json:
        import json

        print(json.dumps(plan.to_json(), indent=2))
    else:
        from rich.console import Console

        from launch.planning.drawing import draw

        console = Console(highlight=False)
        if not console.is_terminal:
            console.width = max(console.width, 120)
        draw(plan, console, title=f"recipe {config.recipe}: a plan; nothing was started")
    return 0 if plan.fits else 1


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="launch/plan.py",
        description=__doc__,
        epilog=EXIT_CODES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("overrides", nargs="*", help="Hydra overrides, such as recipe=paper learner.ranks=4")
    add("--collect", action="store_true", help="a collection alone")
    where = parser.add_mutually_exclusive_group()
    where.add_argument("--nodes", default="", help="the machines: '8xH100 + 2xCPU64', '2*8xA100:cpu=96:env_node=1'")
    where.add_argument("--address", default="", help="a running Ray cluster, looked at only: auto, or host:port")
    add("--gpu-gib", type=_positive, help="memory of a GPU whose kind does not tell, in GiB")
    add("--from", dest="run", default="", help="an earlier run's folder: its steps, tokens and paces")
    add("--steps", type=_positive, help="of an episode")
    add("--prompt-tokens", type=_positive, help="of a step")
    add("--completion-tokens", type=_positive, help="of a step, all candidates together")
    add("--tokens-per-s", type=_positive, help="completion tokens that one teacher engine (or all API workers) makes")
    add("--student-tokens-per-s", type=_positive, help="completion tokens of the student's engine, greedy")
    add("--train-tokens-per-s", type=_positive, help="tokens that all ranks of the learner train together")
    add("--gpu-hour-usd", type=_positive, help="price of a GPU for an hour")
    add("--json", action="store_true", help="the plan as JSON")
    return parser


def _positive(text: str) -> float:
    import math

    try:
        value = float(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is no number") from None
    if not (math.isfinite(value) and value > 0):
        raise argparse.ArgumentTypeError(f"{text} must be above 0")
    return value


def _nodes(options: argparse.Namespace, config: JobConfig) -> list[PlanNode]:
    from launch.planning.nodes import PlanNode, nodes_of, nodes_of_cluster
    from rollout.placement_fit import Node

    if options.nodes:
        return nodes_of(options.nodes)
    if options.address:
        return nodes_of_cluster(options.address)
    if config.cluster.address:
        return []
    # The Ray that such a job starts for itself.
    return [PlanNode(node=Node(name="this machine", total={"CPU": float(config.cluster.num_cpus)}))]


def _pace(options: argparse.Namespace) -> Pace:
    from dataclasses import replace

    from launch.planning.cost import Known, Pace, pace_of_run

    pace = pace_of_run(options.run) if options.run else Pace()
    given = {
        "steps": options.steps,
        "prompt_tokens": options.prompt_tokens,
        "completion_tokens": options.completion_tokens,
        "teacher_tokens_per_s": options.tokens_per_s,
        "student_tokens_per_s": options.student_tokens_per_s,
        "train_tokens_per_s": options.train_tokens_per_s,
    }
    known = {name: Known(value=value, source="given") for name, value in given.items() if value is not None}
    return replace(pace, **known)


if __name__ == "__main__":
    sys.exit(main())
