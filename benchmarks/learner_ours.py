"""Our side of the learner benchmarks: `learner.trainer.Learner`, one rank, as a user runs it.

Nothing is left out: trajectories are rendered and their masks proven while it trains, steps are planned, metrics by
span type are kept. Only the load of the model, the last checkpoint and the export lie outside the clock.

Example::

    measured = run(workload, OurSettings(optimizer="muon"), folder)
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from benchmarks.learner_world import BASE_STUDENT, MAX_ROW_TOKENS, WARMUP_STEPS, Clock, Measured, Workload
from benchmarks.learner_world import validation_loss as loss_of
from learner.base import Progress
from learner.config import LearnerConfig, OptimizerName
from rollout.trajectory import Trajectory

LR = 1e-3
MUON_LR = 1.2e-3
GRADIENT_CLIPPING = 1.0


@dataclass(frozen=True, slots=True, kw_only=True)
class OurSettings:
    """All else is the embedded default's."""

    optimizer: OptimizerName


def learner_config(
    output_dir: Path, *, optimizer: OptimizerName, rows_per_step: int | None, ranks: int = 1
) -> LearnerConfig:
    """One pass over the rows, in their order, with the embedded default's engine and batches."""
    return LearnerConfig(
        model_path=str(BASE_STUDENT),
        output_dir=str(output_dir),
        epochs=1,
        optimizer=optimizer,
        lr=LR,
        muon_lr=MUON_LR,
        schedule="constant",
        warmup_steps=WARMUP_STEPS,
        gradient_clipping=GRADIENT_CLIPPING,
        rows_per_step=rows_per_step,
        max_row_tokens=MAX_ROW_TOKENS,
        ranks=ranks,
        resume=False,
    )


class ListSource:
    """A `learner.base.TrajectorySource` that has everything at once."""

    def __init__(self, trajectories: Sequence[Trajectory]) -> None:
        self._left = list(reversed(trajectories))

    def next(self, max_trajectories: int, timeout_s: float) -> list[Trajectory] | None:
        count = min(max_trajectories, len(self._left))
        return [self._left.pop() for _ in range(count)] or None


class ClockedSteps:
    """The `on_progress` of a learner: what each of its steps trained, and when it ended."""

    def __init__(self) -> None:
        self.clock = Clock()
        self._seen: list[Progress] = [Progress()]

    def after_step(self, now: Progress) -> None:
        self.clock.step()
        self._seen.append(now)

    def measured(self, **measured: float) -> Measured:
        pairs = list(zip(self._seen, self._seen[1:], strict=False))
        return self.clock.measured(
            tokens=[now.tokens - before.tokens for before, now in pairs],
            trained=[now.trained_tokens - before.trained_tokens for before, now in pairs],
            losses=[now.loss for _, now in pairs],
            **measured,
        )


def run(workload: Workload, settings: OurSettings, folder: Path) -> Measured:
    """Train once; `folder` takes the checkpoint and the student."""
    from transformers import AutoModelForCausalLM

    from learner.trainer import Learner

    steps = ClockedSteps()
    config = learner_config(folder, optimizer=settings.optimizer, rows_per_step=workload.rows_per_step)
    final = Learner(config, ListSource(workload.trajectories), on_progress=steps.after_step).run()
    student = AutoModelForCausalLM.from_pretrained(str(final.student_dir))
    return steps.measured(
        validation_loss=loss_of(student, workload.held_out), in_steps_s=final.train_s, waited_s=final.wait_s
    )
