"""What a step costs beside engine and env: processor time of one worker with 50 to 500 episodes at once.

`VllmPolicy`'s engine is replaced by one that answers after a fixed delay, the env by one of this process that answers
at once. What is left is ours: rendering to token ids, parsing, the loop, the feed, the ledger on disk. All threads of
the process count, as `time.process_time` sums them. The same with real `CodeEnv`s is printed beside: threads that wait
for the sandbox, or Ray's client, are part of the worker then (the sandbox's own processes and a host's are not).
"""

from __future__ import annotations

import asyncio
import statistics
import time
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from benchmarks.rollout_world import BASE_STUDENT, Stage, collect
from benchmarks.scoreboard import Row
from envs.base import Observation, ObservationKind, StepResult, Task
from rollout import vllm_policy
from rollout.concurrency import Pressure
from rollout.episode import EpisodeSettings
from rollout.vllm_policy import VllmPolicy

AT_ONCE = (50, 100, 200, 500)
WITH_ENVS = (16, 64)
DELAY_S = 0.2
STEPS = 5
EPISODES_PER_SLOT = 3
EPISODES = 600
"""At least: few steps at a fifth of a millisecond each would measure the noise of the clock."""
GROUP = f"orchestration, engine answers after {DELAY_S:g} s"
_TURN = f"""Thought: I compute the next part of it and print what comes out.
Code:
```py
total = globals().get("total", 0) + 1
print(total)
if total == {STEPS}:
    final_answer(total)
```<end_code>"""


class DelayedEngine:
    """A `VllmEngine` that says `_TURN` after `DELAY_S`, whatever it is asked."""

    def __init__(self, token_ids: list[int]) -> None:
        from vllm.logprobs import FlatLogprobs, Logprob
        from vllm.outputs import CompletionOutput

        logprobs = FlatLogprobs()
        logprobs.extend({token: Logprob(-0.25)} for token in token_ids)
        self._answer = CompletionOutput(
            index=0, text=_TURN, token_ids=token_ids, cumulative_logprob=None, logprobs=logprobs,
            finish_reason="stop", stop_reason="<end_code>",
        )  # fmt: skip

    async def generate(self, request_id: str, prompt_ids: Sequence[int], parameters: Mapping[str, Any]) -> list[Any]:
        await asyncio.sleep(DELAY_S)
        return [self._answer] * int(parameters["n"])

    async def load(self, path: str, version: str) -> None:
        raise NotImplementedError("it has no weights")

    def running(self) -> int:
        return 0

    def pressure(self) -> Pressure:
        return Pressure(kv_usage=0.0, waiting=0)

    def close(self) -> None:
        pass


def delayed_policy() -> VllmPolicy:
    """A `VllmPolicy` with the base student's tokenizer and a `DelayedEngine`."""
    from transformers import AutoTokenizer

    token_ids = AutoTokenizer.from_pretrained(str(BASE_STUDENT)).encode(_TURN)
    start_engine = vllm_policy.start_engine
    vllm_policy.start_engine = lambda *_, **__: DelayedEngine(token_ids)
    try:
        return VllmPolicy(str(BASE_STUDENT), name="delayed", max_model_len=2048)
    finally:
        vllm_policy.start_engine = start_engine


class PromptEnv:
    """Answers at once: the number of the step, and the end at the last."""

    can_preview = False
    _steps = 0

    async def reset(self, task: Task, seed: int) -> tuple[Observation, dict[str, Any]]:
        self._steps = 0
        return Observation(text=task.question, kind=ObservationKind.OK), {}

    async def step(self, action: str) -> StepResult:
        self._steps += 1
        final = self._steps == STEPS
        kind = ObservationKind.FINAL if final else ObservationKind.OK
        info = {"final_answer": str(STEPS) if final else None, "tool_calls": 0}
        return StepResult(Observation(text=str(self._steps), kind=kind), float(final), final, False, info)

    async def preview(self, actions: Sequence[str]) -> list[StepResult]:
        raise NotImplementedError("it cannot preview")

    async def commit(self, index: int) -> StepResult:
        raise NotImplementedError("it cannot preview")

    async def close(self) -> None:
        pass


def tasks(count: int) -> list[Task]:
    question = "What is the sum of the numbers that the earlier steps have printed, one after the other?"
    return [
        Task(id=f"sum-{number}", question=f"{number}: {question}", answer=str(STEPS), kind="sum")
        for number in range(count)
    ]


def cost_ms(policy: VllmPolicy, envs: Sequence[Any], episodes: int = 0) -> tuple[float, float]:
    """Processor ms of this process for a step, and steps/s. Raises `RuntimeError` when an episode went wrong."""
    chosen = tasks(max(episodes, EPISODES_PER_SLOT * len(envs)))
    settings = EpisodeSettings(max_steps=STEPS)
    before = time.process_time()
    wall_s, trajectories = asyncio.run(collect(chosen, policy=policy, envs=envs, settings=settings))
    spent_s = time.process_time() - before
    wrong = [t for t in trajectories if len(t.steps) != STEPS or not t.success]
    if wrong:
        raise RuntimeError(f"{len(wrong)} episodes went wrong; the first stopped by {wrong[0].stop_reason}")
    steps = STEPS * len(chosen)
    return 1000 * spent_s / steps, steps / wall_s


def rows(*, repeats: int) -> Iterator[Row]:
    """All sizes in turn, `repeats` times; medians."""
    policy = delayed_policy()
    cost_ms(policy, [PromptEnv() for _ in range(AT_ONCE[0])])  # imports, the ledger's first file
    measured: dict[int, list[tuple[float, float]]] = {count: [] for count in AT_ONCE}
    for repeat in range(repeats):
        for count in AT_ONCE:
            measured[count].append(cost_ms(policy, [PromptEnv() for _ in range(count)], EPISODES))
        shown = ", ".join(f"{count}: {values[-1][0]:.2f}" for count, values in measured.items())
        print(f"{GROUP} {repeat + 1}/{repeats}: CPU ms a step at {shown}", flush=True)
    cost = {count: statistics.median(ms for ms, _ in values) for count, values in measured.items()}
    most, least = AT_ONCE[-1], AT_ONCE[0]
    for count in AT_ONCE:
        rate = statistics.median(steps for _, steps in measured[count])
        last = count == most
        yield Row(
            what=f"CPU of a step, {count} episodes at once", measured=cost[count], unit="ms",
            goal="<= 2" if last else "", kept=cost[count] <= 2 if last else None,
            beside=f"{rate:.0f} of at most {count / DELAY_S:.0f} steps/s", group=GROUP,
        )  # fmt: skip
    growth = statistics.median(
        large / small for (small, _), (large, _) in zip(measured[least], measured[most], strict=True)
    )
    yield Row(
        what=f"CPU of a step at {most}, of that at {least}", measured=growth, goal="<= 1.2", kept=growth <= 1.2,
        beside="1 is linear growth of the whole", group=GROUP,
    )  # fmt: skip


def rows_with_envs(stage: Stage, *, repeats: int) -> Iterator[Row]:
    """With real envs, in this process or on Ray hosts."""
    policy = delayed_policy()
    for count in WITH_ENVS:
        measured = [cost_ms(policy, stage.envs(count)) for _ in range(repeats)]
        cost, rate = (statistics.median(values) for values in zip(*measured, strict=True))
        print(f"{GROUP}, {count} CodeEnvs {stage.place}: {cost:.2f} CPU ms a step", flush=True)
        yield Row(
            what=f"CPU of a step in the worker, {count} CodeEnvs {stage.place}", measured=cost, unit="ms",
            beside=f"{rate:.0f} steps/s", group=GROUP,
        )  # fmt: skip
