"""Statuses of jobs for the tests of the live view."""

from __future__ import annotations

import math
from dataclasses import replace

from launch.evaluation.intervals import score
from launch.live.status import JobStatus, Said, Stage
from learner.base import Progress
from rollout.spend import ModelSpend, SpendCap, SpendSnapshot
from rollout.task_feed import CollectProgress, WorkerState
from rollout.trajectory_queue import QueueStats

STARTED_S = 1_700_000_000.0
NOW_S = STARTED_S + 272
LEARNING = "the teacher acts, the student learns"


def collected(recorded: int = 2449, *, elapsed_s: float = 260.0) -> CollectProgress:
    return CollectProgress(
        total=5500,
        found=100,
        recorded=recorded,
        succeeded=2380,
        failed=9,
        failures={"engine": 5, "limit": 4},
        last_failure="the endpoint does not answer within 60 s",
        running=32,
        steps=7000,
        completion_tokens=304_000,
        prompt_tokens=2_000_000,
        tool_calls=5000,
        elapsed_s=elapsed_s,
        by_kind={"arithmetic": (1200, 1190), "two_hop": (1240, 1190)},
        workers={"w0-1a2b": WorkerState(running=30, limit=32, kv_usage=0.43, note="the endpoint asks for a pause")},
    )


def learned(step: int = 188) -> Progress:
    return Progress(
        step=step,
        fraction=0.19,
        loss=0.019,
        loss_by_span={"thought": 0.021, "code": 0.01, "answer": 0.3},
        accuracy=0.993,
        accuracy_by_span={"thought": 0.98, "code": 0.992, "answer": 0.9},
        validation_loss=0.03,
        tokens=812_345,
        rows=1500,
        tokens_per_s=3333.0,
        mfu=0.123,
        peak_memory_mb=2883.0,
        lr=2e-4,
        grad_norm=0.4,
        step_s=0.5,
        wait_s=25.0,
        stall_share=0.09,
        refused={"too_long": 3},
    )


def queued(depth: int = 205) -> QueueStats:
    return QueueStats(
        capacity=256, depth=depth, put=2400, got=2195, put_waits=9, get_waits=1, waiting_puts=1, closed=False
    )


def spent() -> SpendSnapshot:
    return SpendSnapshot(
        spent_usd=1.2034,
        tokens=202_000,
        requests=3000,
        reserved_usd=0.0,
        reserved_tokens=0,
        lost_requests=0,
        lost_usd=0.0,
        cap=SpendCap(usd=20.0),
        by_model={"m": ModelSpend(usd=1.2034)},
    )


def learning_status() -> JobStatus:
    """In the middle of the main job, with all that may be known of one."""
    trail = tuple(3 * math.exp(-i / 9) + 0.01 for i in range(70))
    seen = collected()
    return JobStatus(
        job="distill",
        run="starter-seed0",
        note="recipe starter, seed 0",
        began_unix_s=STARTED_S - 1000,
        started_unix_s=STARTED_S,
        updated_unix_s=NOW_S,
        stages=(
            Stage(
                title=LEARNING,
                state="running",
                learns=True,
                elapsed_s=230.0,
                episodes=seen,
                by_policy={"expert": replace(seen), "m": replace(seen)},
                episodes_left_s=300.0,
                completion_tokens_per_s=1203.0,
            ),
            Stage(title="evaluation: untrained"),
            Stage(title="evaluation: student"),
        ),
        queue=queued(),
        learning=learned(),
        learning_left_s=660.0,
        trails={"all": trail, "thought": trail, "code": trail, "answer": trail},
        spent=spent(),
        said=(
            Said(unix_s=STARTED_S + 2, text="Ray: a Ray of its own on this machine"),
            Said(unix_s=STARTED_S + 200, text="a rank of the learner died", warning=True),
        ),
    )


def replace_seen(seen: CollectProgress) -> CollectProgress:
    return replace(seen)


def scored_status() -> JobStatus:
    """One evaluation has ended, another runs."""
    before = learning_status()
    seen = CollectProgress(
        total=400, recorded=372, succeeded=340, completion_tokens=70_000, elapsed_s=25.0, running=28, steps=1000,
        by_kind={"arithmetic": (186, 180), "two_hop": (186, 160)}, workers={"w": WorkerState(running=28, limit=48)},
    )  # fmt: skip
    scores = {"arithmetic": score(3, 100), "two_hop": score(0, 100)}
    return replace(
        before,
        learning_left_s=None,
        stages=(
            replace(before.stages[0], state="done", elapsed_s=930.0, episodes_left_s=None),
            Stage(title="evaluation: untrained", state="done", elapsed_s=47.0, scores=scores),
            Stage(title="evaluation: student", state="running", episodes=seen, by_policy={"student": seen}),
        ),
    )
