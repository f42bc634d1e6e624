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
        warmup_steps=WARMUP_STEPS,
        final_lr_fraction=1.0,
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


def run(workload: Workload, settings: OurSettings, folder: Path) -> Measured:
    """Train once; `folder` takes the checkpoint and the student."""
    from transformers import AutoModelForCausalLM

    from learner.trainer import Learner

    clock, before, losses = Clock(), Progress(), list[float]()

    def after_step(now: Progress) -> None:
        nonlocal before
        clock.step(tokens=now.tokens - before.tokens, trained=now.trained_tokens - before.trained_tokens)
        losses.append(now.loss)
        before = now

    config = learner_config(folder, optimizer=settings.optimizer, rows_per_step=workload.rows_per_step)
    final = Learner(config, ListSource(workload.trajectories), on_progress=after_step).run()
    student = AutoModelForCausalLM.from_pretrained(str(final.student_dir))
    return clock.measured(
        validation_loss=loss_of(student, workload.held_out),
        first_loss=losses[0],
        in_steps_s=final.train_s,
        waited_s=final.wait_s,
    )
