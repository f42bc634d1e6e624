"""What every rank does at rank 0's word: `Order` says what, `RankWork` does it.

All ranks get their orders at the same moment and do the same kind of thing, so that their collectives meet. Nothing is
decided here.

Example::

    work = RankWork(config, backend, objective, rank=0, world_size=1)
    done = work.do(Order(kind="step", batches=batches, total_weight=812.0, lr_factor=0.5, rows=3))
    done.totals.total / 812.0                      # the step's loss, over all ranks
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from learner.config import LearnerConfig
from learner.gradient_guard import StepOutcome
from learner.packing import MicroBatch
from learner.publish import Said, add_check, write_version
from learner.step_sums import StepSums, StepTotals

if TYPE_CHECKING:
    import torch

    from learner.deepspeed_backend import DeepSpeedBackend
    from learner.objectives import Objective, TensorBatch


@dataclass(frozen=True, slots=True, kw_only=True)
class Order:
    """What one rank does next."""

    kind: Literal["step", "validate", "checkpoint", "export", "publish", "wait", "end"]
    batches: tuple[MicroBatch, ...] = ()
    total_weight: float = 1.0
    lr_factor: float = 0.0
    step: int = 0
    rows: int = 0
    """Examples of the step, over all ranks."""
    folder: str = ""
    state: dict[str, Any] = field(default_factory=dict)
    facts: Mapping[str, Any] = field(default_factory=dict)
    """For the model card of an export: of the training."""
    data: Mapping[str, Any] = field(default_factory=dict)
    """For the model card: of what it was trained on."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Done:
    """What came of an order, the same on every rank."""

    totals: StepTotals | None = None
    """Of a step or a validation."""
    outcome: StepOutcome | None = None
    """Of a step."""
    suspects: tuple[int, ...] = ()
    """Of a skipped step: indices of the examples whose own loss was not finite."""
    seconds: float = 0.0


class RankWork:
    """One rank's hands."""

    def __init__(
        self, config: LearnerConfig, backend: DeepSpeedBackend, objective: Objective, *, rank: int, world_size: int
    ) -> None:
        self.config = config
        self.backend = backend
        self.objective = objective
        self.rank = rank
        self.world_size = world_size
        self.checkpoints = Path(config.output_dir) / "checkpoints"
        self._said: Said | None = None
        """Of the checked rows, by the last version that was handed out."""

    def do(self, order: Order) -> Done:
        begun_s = time.monotonic()
        if order.kind == "step":
            return self._train_step(order, begun_s)
        if order.kind == "validate":
            return self._validate(order, begun_s)
        if order.kind == "checkpoint":
            self.backend.save_checkpoint(self.checkpoints, order.step, order.state)
        elif order.kind == "export":
            self.backend.export(Path(order.folder), facts=order.facts, data=order.data)
            if order.batches:
                self._said = add_check(self.backend, Path(order.folder), order.batches, before=self._said)
        elif order.kind == "publish":
            self._said = write_version(
                self.backend, Path(order.folder), order.batches, order.facts, before=self._said
            )
        return Done(seconds=time.monotonic() - begun_s)

    def _train_step(self, order: Order, begun_s: float) -> Done:
        self.backend.seed(self.config.seed + order.step)
        sums, losses = self._sums(), []
        for i, batch in enumerate(order.batches):
            total, per_token, tensors = self._loss(batch, sums)
            losses.append((per_token, tensors))
            self.backend.backward(total / order.total_weight, last=i + 1 == len(order.batches))
        outcome = self.backend.step(order.lr_factor)
        totals = self._totals(sums)
        suspects = self._suspects(losses, order.rows) if outcome.skipped else ()
        return Done(totals=totals, outcome=outcome, suspects=suspects, seconds=time.monotonic() - begun_s)

    def _validate(self, order: Order, begun_s: float) -> Done:
        sums = self._sums()
        with self.backend.evaluation():
            for batch in order.batches:
                self._loss(batch, sums)
        return Done(totals=self._totals(sums), seconds=time.monotonic() - begun_s)

    def _loss(self, batch: MicroBatch, sums: StepSums) -> tuple[torch.Tensor, torch.Tensor, TensorBatch]:
        from learner.objectives import TensorBatch

        tensors = TensorBatch.of(batch, self.backend.to_device)
        result = self.objective.loss(self.backend.forward(batch), tensors)
        sums.add(result, tensors)
        return result.total, result.per_token, tensors

    def _sums(self) -> StepSums:
        return StepSums(self.backend.device, rank=self.rank, ranks=self.world_size)

    def _totals(self, sums: StepSums) -> StepTotals:
        values = self.backend.sum_over_ranks(sums.to_list())
        return StepTotals.of(values, ranks=self.world_size, names=sums.names)

    def _suspects(self, losses: list[tuple[torch.Tensor, TensorBatch]], rows: int) -> tuple[int, ...]:
        """Which examples of the step, on whatever rank, have a loss that is not finite. Every rank asks together."""
        bad = [0.0] * rows
        for per_token, tensors in losses:
            if tensors.rows is not None:
                wrong = (tensors.weights > 0) & ~per_token.isfinite()
                for row in tensors.rows[wrong].unique().tolist():
                    bad[row] = 1.0
        return tuple(i for i, count in enumerate(self.backend.sum_over_ranks(bad)) if count)


def lost_a_rank(error: BaseException) -> bool:
    """Whether this is what torch's collectives raise when another rank is gone or silent."""
    import torch.distributed as distributed

    told: BaseException | None = error
    while told is not None:
        if isinstance(told, distributed.DistError) or (isinstance(told, RuntimeError) and "gloo" in str(told)):
            return True
        told = told.__cause__
    return False
