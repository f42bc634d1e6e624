"""Engine-bound fraction: generated tokens/s of agent rollouts over those of vLLM with the same prompts and lengths.

Agent episodes run as in a collection: real `CodeEnv`s on Ray env hosts, retrieval, a ledger on disk. Every request of
theirs is recorded, then sent again through the same engine in the same order, as many at a time as there were episodes;
nothing waits for a tool then. A single completion is made exactly as long as it was. A request for k candidates of
unequal lengths is sent again as it was, with its seed and stop strings: the same tokens but for the rounding that other
batches bring; how many more or fewer is printed. Prefix caching is on for both and forgotten before each.

Both rates are of a steady state: tokens of requests that ended between the end of the first tenth of requests and the
moment when the last episode (the last request) started, from when fewer are in flight than there are slots. The whole
runs' ratio, ramps included, is printed beside. "Bare", for single completions, is the raw run without what agents need
of a request: no log-probabilities, no text; it is measured in the first turn alone.
"""

from __future__ import annotations

import asyncio
import statistics
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from benchmarks.rollout_processes import processor_seconds, since
from benchmarks.rollout_world import EngineRequest, Stage
from benchmarks.scoreboard import Row
from envs.base import Task
from rollout.episode import EpisodeSettings
from rollout.vllm_engine import InProcessEngine

GOALS = {1: 0.90, 8: 0.80}


@dataclass(slots=True)
class StepClock:
    """Times an engine's steps: wall and processor seconds, and how many."""

    wall_s: float = 0.0
    processor_s: float = 0.0
    steps: int = 0

    def attach(self, engine: Any) -> None:
        """`engine` is vLLM's `LLMEngine`."""
        inner = engine.step

        def step() -> Any:
            wall, processor = time.perf_counter(), time.thread_time()
            outputs = inner()
            self.wall_s += time.perf_counter() - wall
            self.processor_s += time.thread_time() - processor
            self.steps += 1
            return outputs

        engine.step = step

    def since(self, before: StepClock) -> StepClock:
        return StepClock(
            self.wall_s - before.wall_s,
            self.processor_s - before.processor_s,
            self.steps - before.steps,
        )

    def copy(self) -> StepClock:
        return StepClock(self.wall_s, self.processor_s, self.steps)


@dataclass(frozen=True, slots=True, kw_only=True)
class Rate:
    """One run."""

    steady: float
    """Generated tokens/s between the ramps."""
    whole: float
    """Generated tokens/s of all of it."""
    tokens: int
    in_flight: float
    """Requests in the engine, mean over the run."""
    engine: StepClock
    wall_s: float


def rate(requests: Sequence[EngineRequest], full_until_s: float, wall_s: float, engine: StepClock) -> Rate:
    ended = sorted(requests, key=lambda request: request.finished_s)
    full_from_s = ended[len(ended) // 10].finished_s
    if full_until_s <= full_from_s:
        raise ValueError(f"{len(requests)} requests are too few for a steady state: give more --tasks")
    within = sum(request.tokens for request in ended if full_from_s < request.finished_s <= full_until_s)
    total = sum(request.tokens for request in ended)
    return Rate(
        steady=within / (full_until_s - full_from_s),
        whole=total / wall_s,
        tokens=total,
        in_flight=sum(request.finished_s - request.submitted_s for request in ended) / wall_s,
        engine=engine,
        wall_s=wall_s,
    )


async def replay(engine: Any, requests: Sequence[EngineRequest], in_flight: int, *, bare: bool) -> None:
    """All of `requests` in their order, `in_flight` of them at any time."""
    waiting = iter(enumerate(requests))

    async def slot() -> None:
        for number, request in waiting:
            await engine.generate(f"raw{number}", request.prompt_ids, _again(request, bare))

    await asyncio.gather(*(slot() for _ in range(in_flight)))


def _again(request: EngineRequest, bare: bool) -> Mapping[str, Any]:
    if len(request.lengths) != 1:
        return request.parameters
    fixed = {"max_tokens": request.tokens, "ignore_eos": True, "stop": None, "stop_token_ids": None}
    without = {"logprobs": None, "flat_logprobs": False, "detokenize": False} if bare else {}
    return {**request.parameters, **fixed, **without}


@dataclass(frozen=True, slots=True, kw_only=True)
class Pair:
    """Agents and raw, one after the other."""

    agents: Rate
    raw: Rate
    bare: Rate | None
    """In the first pair alone."""
    steps: int
    success: float
    env_s: float
    """Median time that a step of an agent spent outside the engine, in its env."""
    spent: dict[str, float]
    """Processor seconds of the agents' run by thread and process."""


def measure_pair(
    stage: Stage, clock: StepClock, tasks: Sequence[Task], settings: EpisodeSettings, slots: int, *, bare: bool
) -> Pair:
    before, clock_before = processor_seconds(), clock.copy()
    collected = stage.collect(tasks, settings, slots)
    engine, spent = clock.since(clock_before), since(before)
    agents = rate(collected.requests, collected.last_start_s, collected.wall_s, engine)
    raw = _raw(stage, clock, collected.requests, slots, bare=False)
    without = _raw(stage, clock, collected.requests, slots, bare=True) if bare else None
    env_s = statistics.median(step.env_s for trajectory in collected.trajectories for step in trajectory.steps)
    return Pair(
        agents=agents,
        raw=raw,
        bare=without,
        steps=collected.steps,
        success=collected.success,
        env_s=env_s,
        spent=spent,
    )


def _raw(stage: Stage, clock: StepClock, requests: Sequence[EngineRequest], slots: int, *, bare: bool) -> Rate:
    stage.forget_prefixes()
    stage.engine.requests = []
    clock_before, started = clock.copy(), time.monotonic()
    stage.run(replay(stage.engine, requests, slots, bare=bare))
    wall_s = time.monotonic() - started
    again = stage.engine.requests
    asked, generated = (sum(request.tokens for request in side) for side in (requests, again))
    if generated != asked and all(len(request.lengths) == 1 for request in requests):
        raise RuntimeError(f"the raw run generated {generated} tokens, the agents {asked}")
    last_start_s = max(request.submitted_s for request in again)
    return rate(again, last_start_s, wall_s, clock.since(clock_before))


def rows(stage: Stage, *, candidates: int, tasks: int, slots: int, repeats: int) -> Iterator[Row]:
    """Agents and raw in turn, `repeats` times; medians."""
    temperature = 0.0 if candidates == 1 else 0.7
    settings = stage.settings(temperature=temperature, candidates=candidates)
    group = f"engine-bound, k={candidates}, T={temperature:g}"
    clock = StepClock()
    if isinstance(stage.engine.engine, InProcessEngine):  # another's steps are in its own process
        clock.attach(stage.engine.engine._engine)
    chosen = stage.tasks[:tasks]
    stage.collect(chosen[:slots], settings, slots)  # warms the engine, the envs and the ledger's imports up
    pairs: list[Pair] = []
    for repeat in range(repeats):
        pairs.append(pair := measure_pair(stage, clock, chosen, settings, slots, bare=candidates == 1 and repeat == 0))
        print(
            f"{group} {repeat + 1}/{repeats}: agents {pair.agents.steady:.0f} tokens/s, "
            f"raw {pair.raw.steady:.0f}; {pair.steps} steps in {pair.agents.wall_s:.0f} s",
            flush=True,
        )
    goal = GOALS[candidates]
    fraction = statistics.median(pair.agents.steady / pair.raw.steady for pair in pairs)
    whole = statistics.median(pair.agents.whole / pair.raw.whole for pair in pairs)
    tokens = statistics.median(pair.raw.tokens / pair.agents.tokens for pair in pairs)
    ours = statistics.median(pair.agents.steady for pair in pairs)
    raw = statistics.median(pair.raw.steady for pair in pairs)
    beside = f"{ours:.0f} of {raw:.0f} tokens/s" + (f", raw made {tokens:.3f} times as many" if candidates > 1 else "")
    yield Row(
        what="engine-bound fraction", measured=fraction, goal=f">= {goal:.2f}", kept=fraction >= goal, beside=beside,
        group=group,
    )  # fmt: skip
    yield Row(what="the same, ramps included", measured=whole, group=group)
    for pair in pairs:
        if pair.bare is not None:
            bare = pair.agents.steady / pair.bare.steady
            yield Row(
                what="the same over bare requests", measured=bare, beside="no logprobs, no text; once", group=group
            )
    success = statistics.median(pair.success for pair in pairs)
    yield Row(what="success of the episodes", measured=100 * success, unit="%", group=group)
    yield from _where(pairs, group)


def _where(pairs: Sequence[Pair], group: str) -> Iterator[Row]:
    """Where the agents' time goes."""
    ours, raw = [pair.agents for pair in pairs], [pair.raw for pair in pairs]
    flying, flying_raw = (statistics.median(run.in_flight for run in runs) for runs in (ours, raw))
    env_ms = 1000 * statistics.median(pair.env_s for pair in pairs)
    yield Row(what="requests in the engine, mean", measured=flying, beside=f"raw {flying_raw:.1f}", group=group)
    yield Row(what="median time of a step in its env", measured=env_ms, unit="ms", group=group)
    if all(run.engine.steps for run in ours):
        busy, busy_raw = (statistics.median(run.engine.wall_s / run.wall_s for run in runs) for runs in (ours, raw))
        yield Row(
            what="engine inside a step, of the wall time", measured=busy, beside=f"raw {busy_raw:.2f}", group=group
        )
        yield Row(what="one engine step: wall (CPU)", measured=_step(ours), beside=f"raw {_step(raw)}", group=group)
    for name in pairs[0].spent:
        each = statistics.median(1000 * pair.spent.get(name, 0.0) / pair.steps for pair in pairs)
        if each >= 0.01:
            yield Row(what=f"CPU per agent step: {name}", measured=each, unit="ms", group=group)


def _step(runs: Sequence[Rate]) -> str:
    wall_ms = 1000 * statistics.median(run.engine.wall_s / run.engine.steps for run in runs)
    processor_ms = 1000 * statistics.median(run.engine.processor_s / run.engine.steps for run in runs)
    return f"{wall_ms:.2f} ms ({processor_ms:.2f}), {statistics.median(run.engine.steps for run in runs):.0f} of them"
