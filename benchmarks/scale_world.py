"""What is simulated: a policy that answers and envs that return after measured delays. All else of a collection is
real: Ray's actors, the feed, the episode loop, the ledger on disk, the trajectory queue.

The policy answers as an endpoint does that tells token ids: text, ids and log-probabilities of `TURN_TOKENS` tokens.
It renders no prompt and tokenises nothing (`benchmarks/rollout_orchestration.py` has that: VllmPolicy's own share). Its
delays, and those of the envs, sleep in the event loop: no thread and no process of a sandbox is part of what a worker
costs here.

Example::

    delays = {"student": load()}
    actors = start_rollout_actors(SimulatedSpec(kind="expert", delays=delays), count=2)
    Collection(actors, sleeping_envs(delays), requests_of(tasks("student", 800)), ..., concurrency=200)
"""

from __future__ import annotations

import asyncio
import math
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from benchmarks.scale_delays import Delays, StepDelay
from envs.base import Observation, ObservationKind, StepResult, Task
from envs.local_envs import LocalEnvs
from envs.pool import EnvSpec
from rollout.policy import Policy, Sampling
from rollout.policy_spec import PolicySpec
from rollout.spend import Meter
from rollout.trajectory import Completion, Message

NAME = "simulated"
TURN_TOKENS = 128
_VOCABULARY = 32_000
_TURNS = 64
"""Different turns to be said, so that neither compression nor caches have an easy time."""
_ENV_S = 3600.0


AllDelays = Mapping[str, Delays]
"""Name -> measured episodes; a task says by which of them it goes."""


def tasks(name: str, count: int, *, begun: int = 0) -> list[Task]:
    """Their ids, with which their questions begin, tell policy and env what to replay: name, number, share.

    The first `begun` replay a part of an episode only, the shares evenly spread between none and all: as if they had
    been under way for a while. A collection is in its steady state from the start then.
    """
    question = "Which of the numbers that the earlier steps have printed is the largest, and after which step?"
    shares = [(number + 0.5) / begun for number in range(begun)]
    random.Random(f"{name}-{begun}").shuffle(shares)
    shares += [1.0] * (count - begun)
    ids = [f"{name}-{number}@{share:.4f}" for number, share in enumerate(shares)]
    return [Task(id=each, question=f"{each}: {question}", answer=each, kind=name) for each in ids]


def replayed(delays: AllDelays, text: str) -> tuple[int, list[StepDelay]]:
    """The number in a question or an id, and what is replayed for it."""
    name, _, numbers = text.partition(":")[0].rpartition("-")
    number, _, share = numbers.partition("@")
    part = float(share)
    steps = delays[name].episode(int(number))
    return int(number), [StepDelay(policy_s=part * step.policy_s, env_s=part * step.env_s) for step in steps]


def lengths_s(delays: AllDelays, chosen: Sequence[Task]) -> list[float]:
    """All delays of each of these."""
    return [sum(step.policy_s + step.env_s for step in replayed(delays, task.id)[1]) for task in chosen]


class SimulatedPolicy:
    """Says one of `_TURNS` turns once the replayed step's delay has passed."""

    name = NAME
    weights_version = "simulated-1"

    def __init__(self, delays: AllDelays) -> None:
        self._delays = delays
        draw = random.Random(0)
        self._turns = [_turn(draw) for _ in range(_TURNS)]

    async def complete(self, messages: Sequence[Message], sampling: Sampling, *, prefix: str = "") -> list[Completion]:
        number, steps = replayed(self._delays, messages[1].content)
        step = (len(messages) - 2) // 2
        await asyncio.sleep(steps[step].policy_s)
        return [self._turns[(number + step + i) % _TURNS] for i in range(sampling.n)]

    async def close(self) -> None:
        pass


def _turn(draw: random.Random) -> Completion:
    words = " ".join(f"{draw.choice(_WORDS)}{draw.randrange(100)}" for _ in range(TURN_TOKENS // 2))
    text = f"Thought: {words}\nCode:\n```py\nprint({draw.randrange(10**6)})\n```<end_code>"
    return Completion(
        text=text,
        token_ids=tuple(draw.randrange(_VOCABULARY) for _ in range(TURN_TOKENS)),
        logprobs=tuple(-draw.expovariate(4.0) for _ in range(TURN_TOKENS)),
        weights_version=SimulatedPolicy.weights_version,
        prompt_tokens=600,
        completion_tokens=TURN_TOKENS,
    )


_WORDS = ("compare", "the", "value", "of", "step", "with", "largest", "so", "far", "then", "keep", "it", "and", "print")


@dataclass(frozen=True, slots=True, kw_only=True)
class SimulatedSpec(PolicySpec):
    """Builds a `SimulatedPolicy`; its `kind` must be one that needs no model ("expert")."""

    delays: AllDelays

    @property
    def policy_name(self) -> str:
        return NAME

    def build(self, meter: Meter | None = None) -> Policy:
        return SimulatedPolicy(self.delays)


class SleepingEnv:
    """`rollout.async_env.AsyncEnv`: sleeps as long as the replayed step took, and ends the episode where that ended."""

    can_preview = False

    def __init__(self, delays: AllDelays) -> None:
        self._delays = delays
        self._left: list[StepDelay] = []

    async def reset(self, task: Task, seed: int) -> tuple[Observation, dict[str, Any]]:
        self._left = replayed(self._delays, task.id)[1][::-1]
        return Observation(text=task.question, kind=ObservationKind.OK), {}

    async def step(self, action: str) -> StepResult:
        await asyncio.sleep(self._left.pop().env_s)
        final = not self._left
        kind = ObservationKind.FINAL if final else ObservationKind.OK
        info = {"final_answer": action if final else None, "tool_calls": 1}
        return StepResult(Observation(text=action, kind=kind), float(final), final, False, info)

    async def preview(self, actions: Sequence[str]) -> list[StepResult]:
        raise NotImplementedError("it cannot preview")

    async def commit(self, index: int) -> StepResult:
        raise NotImplementedError("it cannot preview")

    async def close(self) -> None:
        pass


@dataclass(slots=True)
class SleepingEnvs(LocalEnvs):
    """`LocalEnvs` without a sandbox: `SleepingEnv`s in the worker's process."""

    delays: AllDelays = field(kw_only=True)

    async def connect(self) -> list[SleepingEnv]:  # type: ignore[override]
        return [SleepingEnv(self.delays) for _ in range(self.count)]

    async def close(self) -> None:
        pass


def sleeping_envs(delays: AllDelays) -> SleepingEnvs:
    """As many as each worker's concurrency asks for."""
    return SleepingEnvs(EnvSpec(name="answer"), None, count=0, timeout_s=_ENV_S, delays=delays)


def deadline_s(delays: Delays) -> float:
    """Of an episode: never what ends one here."""
    longest = max(sum(step.policy_s + step.env_s for step in steps) for steps in delays.episodes)
    return math.ceil(10 * longest) + 600.0
