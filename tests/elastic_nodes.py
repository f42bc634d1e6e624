"""A program of its own: a collection on a Ray cluster of several nodes on this machine, while nodes join, die, and are
taken away on notice. Prints what happened, and how long it took, as one line of JSON.

    python tests/elastic_nodes.py FOLDER [LOG]
"""

from __future__ import annotations

import asyncio
import json
import os
import signal
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))
os.environ.update(
    RAY_USAGE_STATS_ENABLED="0",
    RAY_AUTH_MODE="disabled",
    RAY_raylet_start_wait_time_s="180",
    PYTHONPATH=os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH", "")])),
)

FOLDER = Path(sys.argv[1])
FAST = FOLDER / "fast"
"""Once this file is there the teacher is quick."""
TURN_S = 0.8
EPISODES = 600
CONCURRENCY = 4
NOTICE_S = 20
LIMIT_S = 240.0
"""Of each wait; the machine may be busy."""


def slow_expert() -> Any:
    """Of the built-in teacher, one that takes `TURN_S` for a turn, like an API."""
    from rollout.expert import ExpertPolicy
    from rollout.policy_spec import PolicySpec

    class SlowExpert(ExpertPolicy):
        async def complete(self, messages, sampling, *, prefix=""):
            if not FAST.exists():
                await asyncio.sleep(TURN_S)
            return await super().complete(messages, sampling, prefix=prefix)

    class SlowSpec(PolicySpec):
        def build(self, meter=None):
            return SlowExpert()

    return SlowSpec(kind="expert")


class Run:
    """The collection as a job polls it, and what was said when."""

    def __init__(self, collection: Any) -> None:
        self.collection, self.said = collection, []
        self.over = False

    def say(self, line: str) -> None:
        self.said.append((time.monotonic(), line))
        print(f"  {line}", file=sys.stderr, flush=True)

    def until(self, what: str, true: Callable[[], Any]) -> float:
        """Poll until `true()`; the moment."""
        deadline_s = time.monotonic() + LIMIT_S
        while not true():
            assert time.monotonic() < deadline_s, f"{what} did not happen within {LIMIT_S:g} s"
            assert not self.over, f"it was over before {what}"
            self.over = self.collection.poll(timeout_s=0.1)
        return time.monotonic()

    def when(self, words: str, *, after_s: float) -> float | None:
        return next((at_s for at_s, line in self.said if at_s >= after_s and words in line), None)

    def leased(self) -> dict[str, int]:
        """Number of each worker that holds episodes -> how many."""
        return {name.partition("-")[0]: count for name, count in self.collection.progress().leased.items()}


def main() -> None:
    import psutil
    import ray
    from ray._raylet import GcsClient  # pyright: ignore[reportAttributeAccessIssue]
    from ray.cluster_utils import Cluster
    from ray.core.generated import autoscaler_pb2

    from envs.starter import StarterWorld
    from launch.config import CollectConfig
    from launch.config_reading import load_config
    from launch.placement import place_collection
    from launch.wiring import Environments, assignments, start_collections
    from rollout.ledger import Ledger

    config = load_config(
        [
            f"out={FOLDER}", "retrieval.kind=none", f"rollout.concurrency={CONCURRENCY}", "rollout.env_hosts=0",
            "rollout.max_workers=3", "cluster.roles.teacher.num_cpus=1",
        ],
        CollectConfig,
    )  # fmt: skip
    config = replace(config, teacher=slow_expert())
    tasks = StarterWorld(0).train_tasks(EPISODES, seed=0, arithmetic_share=1.0)
    ledger, found = FOLDER / "ledger", {}
    cluster = Cluster()

    def add() -> Any:
        return cluster.add_node(num_cpus=1, object_store_memory=80 << 20)

    try:
        cluster.add_node(num_cpus=0, include_dashboard=False, object_store_memory=80 << 20)
        add()
        ray.init(address=cluster.address, log_to_driver=False, logging_level="ERROR")
        assigned = assignments(config, tasks, Ledger(ledger))
        run = Run(None)
        placed = place_collection(config, assigned, say=run.say)
        environments = Environments.start(config, None, slots=[CONCURRENCY], placed=placed)
        run.collection, _ = start_collections(config, environments, assigned, ledger=ledger, placed=placed)
        run.until("the first worker has work", lambda: run.leased().get("w0"))

        second = add()
        registered_s = time.monotonic()
        told_s = run.until("another worker joins", lambda: run.when("1 worker more", after_s=registered_s))
        at_work_s = run.until("it has work", lambda: run.leased().get("w1"))
        found["join_s"] = {"started": told_s - registered_s, "has_work": at_work_s - registered_s}
        run.until("it has recorded", lambda: any("w1-" in each for each in Ledger(ledger).shards()))

        raylet = second.all_processes["raylet"][0].process.pid
        os.kill(raylet, signal.SIGKILL)
        killed_s = time.monotonic()
        run.until("its episodes go to others", lambda: run.when("given to others", after_s=killed_s))
        found["lost_s"] = (run.when("given to others", after_s=killed_s) or 0) - killed_s
        run.until("its node is lost", lambda: run.when("is lost", after_s=killed_s))

        third = add()
        registered_s = time.monotonic()
        at_work_s = run.until("a third has work", lambda: run.leased().get("w2"))
        found["join_again_s"] = at_work_s - registered_s
        notice_s, notice_unix_s = time.monotonic(), time.time()
        GcsClient(address=cluster.address).drain_node(
            third.node_id,
            autoscaler_pb2.DrainNodeReason.Value("DRAIN_NODE_REASON_PREEMPTION"),  # pyright: ignore
            "spot",
            int((time.time() + NOTICE_S) * 1000),
        )
        seen_s = run.until("the notice is seen", lambda: run.when("drains", after_s=notice_s))
        seen_unix_s = time.time()
        gone_s = run.until("it is drained", lambda: run.when("is drained", after_s=notice_s))
        found["drain_s"] = {"seen": seen_s - notice_s, "drained": gone_s - notice_s}
        of_third = [
            each
            for name in Ledger(ledger).shards()
            if "w2-" in name
            for each in Ledger(ledger).read(name)
            if each.started_at_s > notice_unix_s
        ]
        found["begun_after_the_notice_was_seen"] = sum(each.started_at_s > seen_unix_s + 0.5 for each in of_third)
        found["died_while_draining"] = run.when("died", after_s=notice_s) is not None
        cluster.remove_node(third)

        [feed] = [each for each in psutil.process_iter(["cmdline"]) if _is_feed(each)]
        feed.kill()
        fed_s = time.monotonic()
        run.until("the feed is there again", lambda: run.when("was started again", after_s=fed_s))
        found["feed_s"] = (run.when("was started again", after_s=fed_s) or 0) - fed_s

        FAST.touch()
        run.until("the end", lambda: run.over or run.collection.poll(timeout_s=0.1))
        whole = Ledger(ledger)
        found["expected"] = EPISODES
        found["missing"] = len({each.key for each in assigned[0].requests} - whole.keys())
        found["keys"], found["duplicates"], found["failures"] = (
            len(whole.keys()), whole.duplicates(), len(list(whole.failures()))
        )  # fmt: skip
        found["valid"] = whole.validate().ok
        found["progress"] = {
            name: getattr(run.collection.progress(), name) for name in ("total", "recorded", "running", "waiting")
        }
        found["said"] = [line for _, line in run.said]
        run.collection.close()
    finally:
        ray.shutdown()
        cluster.shutdown()
    print(json.dumps(found))


def _is_feed(process: Any) -> bool:
    """Of this cluster: its environment says so."""
    import psutil

    try:
        title = " ".join(process.info["cmdline"] or [])
        return title.startswith("ray::FeedActor") and process.environ().get("RAY_TMPDIR") == os.environ["RAY_TMPDIR"]
    except psutil.Error:
        return False


if __name__ == "__main__":
    main()
