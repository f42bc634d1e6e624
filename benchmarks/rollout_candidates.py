"""What k self-consistent candidates cost: the wall time of a step with k=8 over that of a step with one sample.

The same tasks, student, temperature, top-k and concurrency. A run's wall time over its steps, times the episodes in
flight, is what a step takes; the medians of single steps (policy and env, as the trajectories record them) are printed
beside, and what k candidates cost that share no decoding (`top_k` 0: see `rollout.shared_decoding`).
"""

from __future__ import annotations

import statistics
from collections.abc import Iterator
from dataclasses import replace

from benchmarks.rollout_world import Collected, Stage
from benchmarks.scoreboard import Row
from rollout.trajectory import Candidate

TEMPERATURE = 0.7
GOAL = 2.5


def candidates_of(run: Collected) -> Iterator[Candidate]:
    return (candidate for t in run.trajectories for step in t.steps for candidate in step.candidates)


def rows(stage: Stage, *, candidates: int, tasks: int, slots: int, repeats: int) -> Iterator[Row]:
    """One sample and k in turn, `repeats` times; medians."""
    group = f"k={candidates} against one sample, T={TEMPERATURE:g}, {slots} at a time"
    single = stage.settings(temperature=TEMPERATURE)
    voted = stage.settings(temperature=TEMPERATURE, candidates=candidates)
    apart = replace(voted, top_k=0)
    chosen = stage.tasks[:tasks]
    stage.collect(chosen[:slots], voted, slots)
    pairs: list[tuple[Collected, Collected]] = []
    ratios_apart: list[float] = []
    for repeat in range(repeats):
        pairs.append(pair := (stage.collect(chosen, single, slots), stage.collect(chosen, voted, slots)))
        one, many = (1000 * run.wall_s / run.steps for run in pair)
        sparse = stage.collect(chosen[: 4 * slots], apart, slots)
        ratios_apart.append(1000 * sparse.wall_s / sparse.steps / one)
        print(f"{group} {repeat + 1}/{repeats}: {one:.2f} and {many:.2f} ms of wall time a step", flush=True)
    ratio = statistics.median((many.wall_s / many.steps) / (one.wall_s / one.steps) for one, many in pairs)
    one_ms, many_ms = (
        statistics.median(1000 * slots * run.wall_s / run.steps for run in runs) for runs in zip(*pairs, strict=True)
    )
    yield Row(
        what=f"wall time of a k={candidates} step, of a single one's", measured=ratio, goal=f"<= {GOAL}",
        kept=ratio <= GOAL, beside=f"{many_ms:.0f} of {one_ms:.0f} ms", group=group,
    )  # fmt: skip
    yield Row(
        what=f"the same, when the {candidates} share no decoding", measured=statistics.median(ratios_apart),
        beside="top_k 0", group=group,
    )  # fmt: skip
    decoded = statistics.median(
        sum(request.tokens for request in many.requests) / sum(len(c.token_ids or ()) for c in candidates_of(many))
        for _, many in pairs
    )
    yield Row(
        what="decoded tokens, of those of all candidates", measured=decoded, beside=f"1/{candidates}: all alike",
        group=group,
    )  # fmt: skip
    for name, part in (("policy", lambda step: step.policy_s), ("env", lambda step: step.env_s)):
        one_ms, many_ms = (
            statistics.median(1000 * part(step) for run in runs for t in run.trajectories for step in t.steps)
            for runs in zip(*pairs, strict=True)
        )
        yield Row(
            what=f"median {name} time of a k={candidates} step", measured=many_ms, unit="ms",
            beside=f"single {one_ms:.0f} ms", group=group,
        )  # fmt: skip
    success = tuple(statistics.median(run.success for run in runs) for runs in zip(*pairs, strict=True))
    yield Row(
        what=f"success with k={candidates}", measured=100 * success[1], unit="%",
        beside=f"single {100 * success[0]:.1f} %", group=group,
    )  # fmt: skip
