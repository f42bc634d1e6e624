"""Does a job on several nodes end with the same student as on one? A real cluster of six nodes on this machine.

    make distill                                                        # the single node's run
    python benchmarks/multi_node.py --one-node runs/starter-seed0 --check

The same job with the same seed runs on six raylets: the head, two nodes with a worker each, one with the env hosts and
retrieval, and two with a learner rank each, which exchange gradients over gloo. The two students are compared on the
same held-out tasks (McNemar's exact test, p after Holm's correction for the kinds). What differs between them is more
than the nodes: two ranks add in another order, and trajectories arrive in another one, so single answers differ.
"""

from __future__ import annotations

import argparse
import json
import os
import secrets
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

if not __package__:  # run as a file: imports come from the repository's root
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

from benchmarks import scoreboard
from benchmarks.scoreboard import Row

ROOT = Path(__file__).resolve().parent.parent
NODES: tuple[Mapping[str, float], ...] = (
    {"acting": 1.0, "acting_first": 1.0},
    {"acting": 1.0, "acting_second": 1.0},
    {"envs": 1.0},
    {"learning": 1.0},
    {"learning": 1.0},
)
"""Custom resources of the nodes beside the head."""
ROLES = (
    "cluster.roles.teacher={resources:{acting:1.0},strategy:STRICT_SPREAD}",
    "cluster.roles.student={resources:{acting_first:1.0}}",
    "cluster.roles.envs={resources:{envs:0.1}}",
    "cluster.roles.retrieval={resources:{envs:0.1}}",
    "cluster.roles.learner={resources:{learning:1.0},strategy:STRICT_SPREAD}",
    "rollout.workers=2",
    "rollout.env_hosts=2",
    "learner.ranks=2",
)
LEVEL = 0.05


@contextmanager
def six_nodes() -> Iterator[str]:
    """The head and `NODES`, each a raylet of its own; yields the address."""
    os.environ.update(RAY_AUTH_MODE="token", RAY_AUTH_TOKEN=secrets.token_hex(32), RAY_USAGE_STATS_ENABLED="0")
    from ray.cluster_utils import Cluster

    cluster = Cluster()
    try:
        cluster.add_node(num_cpus=2, include_dashboard=False, object_store_memory=120 << 20)
        for resources in NODES:
            cluster.add_node(num_cpus=2, resources=dict(resources), object_store_memory=120 << 20)
        cluster.wait_for_nodes(timeout=180)
        assert cluster.address is not None
        yield cluster.address
    finally:
        cluster.shutdown()


def run(address: str, folder: Path, overrides: Sequence[str]) -> None:
    """The job, to its end. Raises `CalledProcessError`."""
    command = [sys.executable, str(ROOT / "launch/distill.py"), f"cluster.address={address}", f"run_dir={folder}"]
    subprocess.run([*command, *ROLES, *overrides], cwd=ROOT, check=True)


def compared(one: Path, many: Path) -> Iterator[Row]:
    """The rows of the table: each kind of task, and all of them."""
    from launch.evaluation.rows import Row as Scores
    from launch.evaluation.significance import holm, mcnemar
    from rollout.ledger import Ledger

    ours, theirs = (Scores.read(str(run), Ledger(run / "evaluation" / "student")).results for run in (many, one))
    tasks = sorted(set(ours) & set(theirs))
    if not tasks:
        raise SystemExit(f"error: {one} and {many} share no task: were they run with the same seed?")
    kinds = {
        kind: [task for task in tasks if ours[task].kind == kind] for kind in sorted({ours[t].kind for t in tasks})
    }
    kinds["all"] = tasks
    tests = {
        kind: mcnemar([ours[t].value > 0.5 for t in of], [theirs[t].value > 0.5 for t in of])
        for kind, of in kinds.items()
    }
    adjusted = dict(zip(tests, holm([test.p_value for test in tests.values()]), strict=True))
    for kind, test in tests.items():
        of = kinds[kind]
        one_node = sum(theirs[task].value for task in of) / len(of)
        spread = sum(ours[task].value for task in of) / len(of)
        yield Row(
            what=f"{kind}: difference, points [95%], n={test.n}",
            measured=f"{100 * test.difference:+.1f} [{100 * test.low:+.1f}, {100 * test.high:+.1f}]",
            goal=f"p >= {LEVEL} (measured {adjusted[kind]:.3f})",
            kept=adjusted[kind] >= LEVEL,
            beside=f"one node {100 * one_node:.1f}, six nodes {100 * spread:.1f}",
        )


def main(arguments: Sequence[str] | None = None) -> int:
    parser = scoreboard.arguments(__doc__)
    parser.add_argument("--one-node", type=Path, required=True, help="a finished run of the same seed on one node")
    parser.add_argument("--folder", type=Path, default=ROOT / "runs" / "six-nodes", help="of the run on six nodes")
    parser.add_argument("overrides", nargs=argparse.REMAINDER, help="further settings, as for launch/distill.py")
    options = parser.parse_args(arguments)
    if not (options.one_node / "results.json").is_file():
        print(f"error: {options.one_node} is no finished run: it holds no results.json", file=sys.stderr)
        return 2
    with six_nodes() as address:
        run(address, options.folder.resolve(), options.overrides)
    both = (options.one_node, options.folder)
    minutes: list[float] = [json.loads((run / "results.json").read_text())["minutes"] for run in both]
    rows = [*compared(options.one_node, options.folder)]
    rows.append(Row(what="minutes of the job", measured=minutes[1], beside=f"one node {minutes[0]:g}"))
    return scoreboard.publish(rows, options, title="the same job on six nodes and on one")


if __name__ == "__main__":
    sys.exit(main())
