"""What the learner benchmarks share: the same rows for every side, one clock, one validation loss.

The rows are trajectories of the built-in expert on the starter world, made here by running it in the real env, and
rendered for the base student. Every side trains on the same rows in the same order, `rows_per_step` a step, with the
same schedule (a short warm-up, then a constant rate), and calls `Clock.step` after each optimizer step; the first
`WARM_STEPS` are not counted. What a side trained is judged by `validation_loss`, in fp32, one row at a time, without
any padding.

Example::

    workload = make_workload(rows=768, held_out=128)
    clock = Clock()
    clock.step()                                      # after each step
    measured = clock.measured(tokens=[5_600, ...], trained=[2_700, ...], losses=[4.5, ...])
"""

from __future__ import annotations

import asyncio
import math
import time
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from envs.local_envs import LocalEnvs
from envs.pool import EnvSpec
from envs.retrieval.bm25 import Bm25Retriever
from envs.retrieval.corpus import Corpus, Passage
from envs.starter import StarterWorld
from learner.examples import Example, ExampleMaker
from rollout.episode import EpisodeSettings, run_episode
from rollout.expert import ExpertPolicy
from rollout.trajectory import Trajectory

BASE_STUDENT = Path(__file__).resolve().parent.parent / "learner" / "base_student" / "checkpoint"
WARM_STEPS = 3
"""The first steps load kernels and fill caches; no side's count."""
WARMUP_STEPS = 20
"""Of the learning rate."""
MAX_ROW_TOKENS = 1024
AT_ONCE = 4
"""Episodes of the expert in flight while rows are made."""
_ENV_S = 60.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Workload:
    """What every side trains on. Picklable."""

    trajectories: tuple[Trajectory, ...]
    """In the order in which they are trained on."""
    rows: tuple[Example, ...]
    """[trajectories] the same, rendered."""
    held_out: tuple[Example, ...]
    rows_per_step: int
    """0: a step is so many tokens instead."""
    trajectories_per_s: float
    """How fast the expert made them, on an otherwise idle process."""

    @property
    def tokens(self) -> int:
        return sum(len(row) for row in self.rows)

    @property
    def trained_tokens(self) -> int:
        return sum(trained_tokens(row) for row in self.rows)

    def describe(self) -> str:
        lengths = sorted(len(row) for row in self.rows)
        return (
            f"{len(self.rows)} rows of {lengths[0]} to {lengths[-1]} tokens, {self.tokens / len(self.rows):.0f} on "
            f"average, {self.trained_tokens / self.tokens:.0%} of them trained"
            + (f", {self.rows_per_step} rows a step" if self.rows_per_step else "")
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Measured:
    """One run of one side, from the end of step `WARM_STEPS` to the end of the last."""

    steps: int
    tokens: int
    """Without padding."""
    trained_tokens: int
    wall_s: float
    cpu_s: float
    """Processor seconds of the process, all threads."""
    validation_loss: float
    """Of the weights at the end; NaN where it was not measured."""
    first_loss: float
    """Training loss of the first step: all sides that begin with the same rows agree on it."""
    last_loss: float
    extra: dict[str, float] = field(default_factory=dict)

    @property
    def trained_per_s(self) -> float:
        return self.trained_tokens / self.wall_s

    @property
    def trained_per_cpu_s(self) -> float:
        return self.trained_tokens / self.cpu_s

    def describe(self) -> str:
        return (
            f"{self.trained_per_s:.0f} trained tokens/s, {self.trained_per_cpu_s:.0f} per processor second, "
            f"validation loss {self.validation_loss:.4f}"
        )


class Clock:
    """Called after each optimizer step of a side; waits for the GPU where there is one, on every side alike."""

    def __init__(self) -> None:
        self._wall_s: list[float] = []
        self._cpu_s: list[float] = []

    @property
    def steps(self) -> int:
        return len(self._wall_s)

    def step(self) -> None:
        import torch

        if torch.cuda.is_available():
            torch.cuda.synchronize()
        self._wall_s.append(time.perf_counter())
        self._cpu_s.append(time.process_time())

    def measured(
        self,
        *,
        tokens: Sequence[int],
        trained: Sequence[int],
        losses: Sequence[float],
        validation_loss: float = math.nan,
        **extra: float,
    ) -> Measured:
        """`tokens`, `trained`: [steps] of each step, without padding. Raises ValueError for too few steps, or for
        others than were clocked."""
        if not self.steps == len(tokens) == len(trained) == len(losses):
            raise ValueError(f"{self.steps} steps were clocked, {len(tokens)} counted, {len(losses)} have a loss")
        if self.steps <= WARM_STEPS:
            raise ValueError(f"{self.steps} steps were run; the first {WARM_STEPS} do not count: train on more")
        return Measured(
            steps=self.steps - WARM_STEPS,
            tokens=sum(tokens[WARM_STEPS:]),
            trained_tokens=sum(trained[WARM_STEPS:]),
            wall_s=self._wall_s[-1] - self._wall_s[WARM_STEPS - 1],
            cpu_s=self._cpu_s[-1] - self._cpu_s[WARM_STEPS - 1],
            validation_loss=validation_loss,
            first_loss=losses[0],
            last_loss=losses[-1],
            extra=extra,
        )


def make_workload(*, rows: int, held_out: int, rows_per_step: int = 16, student: Path = BASE_STUDENT) -> Workload:
    """`rows` + `held_out` tasks of the starter world, solved by the expert and rendered for `student`.

    Raises `RuntimeError` when the expert fails or a row is refused: the benchmark would not run what it says.
    """
    from transformers import AutoTokenizer

    trajectories, wall_s = asyncio.run(expert_trajectories(rows + held_out))
    maker = ExampleMaker(AutoTokenizer.from_pretrained(student), max_row_tokens=MAX_ROW_TOKENS)
    made = [maker.make(trajectory) for trajectory in trajectories]
    examples = [row for row in made if isinstance(row, Example)]
    if len(examples) != len(trajectories):
        refused = next(row for row in made if not isinstance(row, Example))
        raise RuntimeError(f"a row of the expert was refused: {refused}")
    return Workload(
        trajectories=tuple(trajectories[:rows]),
        rows=tuple(examples[:rows]),
        held_out=tuple(examples[rows:]),
        rows_per_step=rows_per_step,
        trajectories_per_s=len(trajectories) / wall_s,
    )


async def expert_trajectories(
    count: int, *, at_once: int = AT_ONCE, hand_on: Callable[[Trajectory], Awaitable[None]] | None = None
) -> tuple[list[Trajectory], float]:
    """The expert's trajectories in the order of their tasks, and the seconds that it took, start of the envs left
    out. `hand_on` is given each as soon as it is finished."""
    world = StarterWorld(seed=0)
    passages = Corpus(Passage(id=i, title=title, text=text) for i, title, text in world.passages())
    retriever = Bm25Retriever.build(passages)
    settings = EpisodeSettings(dialect="code")
    policy = ExpertPolicy()
    left = list(enumerate(world.train_tasks(count, seed=0)))[::-1]
    made: dict[int, Trajectory] = {}
    local = LocalEnvs(EnvSpec(), lambda query, k: retriever.search([query], k)[0], count=at_once, timeout_s=_ENV_S)
    try:
        envs = await local.connect()

        async def work(env: Any) -> None:
            while left:
                i, task = left.pop()
                done = await run_episode(task, policy=policy, env=env, settings=settings)
                made[i] = replace(done, policy="expert", key=settings.key(task, "expert", 0))
                if hand_on is not None:
                    await hand_on(made[i])

        begun = time.perf_counter()
        await asyncio.gather(*(work(env) for env in envs))
        wall_s = time.perf_counter() - begun
    finally:
        await local.close()
    return [made[i] for i in sorted(made)], wall_s


def trained_tokens(row: Example) -> int:
    return sum(weight > 0 for weight in row.loss_weights[1:])


def rate_factor(step: int) -> float:
    """Share of the learning rate in the `step`-th step (from 0), the same for all sides."""
    return min(1.0, (step + 1) / WARMUP_STEPS)


def validation_loss(model: Any, rows: Sequence[Example]) -> float:
    """Mean nll over the trained tokens of `rows`: fp32, one row at a time, nothing padded."""
    import torch

    model = model.float().eval()
    total, count = 0.0, 0
    with torch.no_grad():
        for row in rows:
            ids = torch.tensor([row.token_ids], device=model.device)
            logits = model(input_ids=ids, use_cache=False).logits[0, :-1]
            nll = torch.nn.functional.cross_entropy(logits, ids[0, 1:], reduction="none")
            weights = torch.tensor(row.loss_weights[1:], device=nll.device)
            total += float((nll * weights).sum())
            count += int((weights > 0).sum())
    return total / count
