"""`Learner`: one rank of a training run that learns from trajectories while they are still being rolled out.

Rank 0 reads the source, decides what happens next and tells every rank its part (`_Order`), so that all ranks run the
same collectives and end together. The first optimizer step is taken as soon as one step's tokens have arrived.

    source -> Intake (thread: Example | RefusedRow) -> Curriculum -> plan_step -> scatter -> forward, backward, step

Example::

    learner = Learner(LearnerConfig(model_path="base", output_dir="out", epochs=2), source)
    final = learner.run()                # blocks; final.student_dir is what vLLM loads
"""

from __future__ import annotations

import dataclasses
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from learner.base import LearnerError, Progress, TrajectorySource
from learner.config import LearnerConfig
from learner.curriculum import Curriculum, held_out
from learner.examples import TRAINED_SPANS, Example, ExampleMaker, RefusedRow
from learner.intake import END, Intake
from learner.packing import MicroBatch, StepPlan, plan_step

if TYPE_CHECKING:
    from learner.deepspeed_backend import DeepSpeedBackend


@dataclass(frozen=True, slots=True, kw_only=True)
class _Order:
    """What one rank does next."""

    kind: Literal["step", "validate", "checkpoint", "export", "wait", "end"]
    batches: tuple[MicroBatch, ...] = ()
    total_weight: float = 1.0
    lr_factor: float = 0.0
    step: int = 0
    folder: str = ""
    state: dict[str, Any] = field(default_factory=dict)


class Learner:
    """One rank. `source` is needed on rank 0 alone; `on_progress` is called there after each step.

    Raises `ConfigError` at once for settings that cannot work. With `world_size` above 1, MASTER_ADDR and MASTER_PORT
    must be in the environment (`learner.learner_actor` sees to it).
    """

    def __init__(
        self,
        config: LearnerConfig,
        source: TrajectorySource | None,
        *,
        rank: int = 0,
        world_size: int = 1,
        on_progress: Callable[[Progress], None] | None = None,
    ) -> None:
        from learner.objectives import make_objective

        if rank == 0 and source is None:
            raise LearnerError("rank 0 has no source of trajectories; pass one")
        self.config = config
        self.rank = rank
        self.world_size = world_size
        self._source = source
        self._on_progress = on_progress
        self._objective = make_objective(config.objective)
        self._progress = Progress()
        self._stop = threading.Event()
        self._refused: Counter[str] = Counter()
        self._validation: list[Example] = []
        self._curriculum = Curriculum(
            tokens_per_step=config.tokens_per_step,
            rows_per_step=config.rows_per_step,
            seed=config.seed,
            epochs=config.epochs,
        )
        self._checkpoints = Path(config.output_dir) / "checkpoints"

    def progress(self) -> Progress:
        """The run as it is now; may be called from any thread."""
        return self._progress

    def stop(self) -> None:
        """End after the present step, with a checkpoint and an export. From any thread; only rank 0's counts."""
        self._stop.set()

    def run(self) -> Progress:
        """Train until the passes or the tokens are done. Raises `LearnerError`, `ConfigError`."""
        from learner.deepspeed_backend import DeepSpeedBackend

        backend = DeepSpeedBackend(self.config, rank=self.rank, world_size=self.world_size)
        try:
            state = backend.load_checkpoint(self._checkpoints) if self.config.resume else None
            if self.rank == 0:
                self._lead(backend, state)
            else:
                while self._do(backend, backend.scatter(None)).kind != "end":
                    pass
        finally:
            backend.close()
        return self._progress

    # -- rank 0: decide

    def _lead(self, backend: DeepSpeedBackend, state: dict[str, Any] | None) -> None:
        from transformers import AutoTokenizer

        if state is not None:
            self._restore(state)
        maker = ExampleMaker(
            AutoTokenizer.from_pretrained(self.config.model_path),
            max_row_tokens=self.config.max_row_tokens,
            system_prompt=self.config.system_prompt,
            span_weights=self.config.span_weights,
        )
        assert self._source is not None
        with Intake(self._source, maker) as intake:
            for orders in self._orders(backend, intake, finished=bool(state and state["done"])):
                self._do(backend, backend.scatter(orders))

    def _orders(self, backend: DeepSpeedBackend, intake: Intake, *, finished: bool) -> Iterator[list[_Order]]:
        """Every rank's next order; what happened in the meantime is in `self`."""
        waiting_since = last_order = time.monotonic()
        while not finished and not self._stop.is_set():
            self._drain(intake)
            epoch = self._curriculum.epoch
            rows = self._curriculum.take()
            if rows:
                yield self._step_orders(backend, rows)
                yield from self._after_step(epoch_over=self._curriculum.epoch > epoch, backend=backend)
                waiting_since = last_order = time.monotonic()
                finished = self._budget_spent()
            elif self._curriculum.done:
                finished = True
            else:
                now = time.monotonic()
                if now - waiting_since > self.config.data_timeout_s:
                    raise LearnerError(
                        f"no full step of trajectories came within data_timeout_s {self.config.data_timeout_s} s "
                        f"({self._progress.trajectories} arrived so far)"
                    )
                if self.world_size > 1 and now - last_order > self.config.collective_timeout_s / 4:
                    last_order = now
                    yield self._all(_Order(kind="wait"))
                self._wait(intake)
        if self._progress.step == 0:
            raise LearnerError(
                f"nothing to train on: {self._progress.trajectories} trajectories arrived, "
                f"refused {dict(self._refused)}, held out {len(self._validation)}"
            )
        self._update(fraction=1.0 if finished else self._progress.fraction, done=finished)
        yield self._checkpoint_orders()
        folder = str(Path(self.config.output_dir) / "student")
        yield self._all(_Order(kind="export", folder=folder))
        self._update(student_dir=folder)
        yield self._all(_Order(kind="end"))

    def _step_orders(self, backend: DeepSpeedBackend, rows: list[Example]) -> list[_Order]:
        plan = self._plan(backend, rows)
        at = self._progress
        factor = lr_factor(at.step, at.fraction, self.config)
        self._update(
            lr=self.config.lr * factor,
            tokens=at.tokens + plan.tokens,
            trained_tokens=at.trained_tokens + plan.trained_tokens,
            rows=at.rows + plan.rows,
        )
        return [
            _Order(kind="step", batches=batches, total_weight=plan.total_weight, lr_factor=factor, step=at.step)
            for batches in plan.ranks
        ]

    def _after_step(self, *, epoch_over: bool, backend: DeepSpeedBackend) -> Iterator[list[_Order]]:
        """What follows a step: validation at the end of a pass, snapshots, checkpoints."""
        fraction = self._fraction()
        self._update(fraction=fraction, epoch=self._curriculum.epoch)
        if self._on_progress is not None:
            self._on_progress(self._progress)
        if epoch_over and self._validation:
            plan = self._plan(backend, self._validation)
            yield [_Order(kind="validate", batches=batches, total_weight=plan.total_weight) for batches in plan.ranks]
        for at in sorted(self.config.snapshot_at):
            name = f"{at:g}"
            if fraction >= at and name not in self._progress.snapshots:
                folder = str(Path(self.config.output_dir) / "snapshots" / name)
                yield self._all(_Order(kind="export", folder=folder))
                self._update(snapshots={**self._progress.snapshots, name: folder})
        every = self.config.checkpoint_every_steps
        if every and self._progress.step % every == 0:
            yield self._checkpoint_orders()

    def _plan(self, backend: DeepSpeedBackend, rows: list[Example]) -> StepPlan:
        return plan_step(
            rows,
            ranks=self.world_size,
            micro_batch_tokens=self.config.micro_batch_tokens,
            row_tokens=self.config.max_row_tokens,
            batching="packed" if backend.batching == "packed" else "bucketed",
        )

    def _checkpoint_orders(self) -> list[_Order]:
        return self._all(_Order(kind="checkpoint", step=self._progress.step, state=self._state()))

    def _all(self, order: _Order) -> list[_Order]:
        return [order] * self.world_size

    def _fraction(self) -> float:
        if self.config.max_tokens is not None:
            return min(1.0, self._progress.tokens / self.config.max_tokens)
        return self._curriculum.fraction(self.config.expected_trajectories)

    def _budget_spent(self) -> bool:
        return self.config.max_tokens is not None and self._progress.tokens >= self.config.max_tokens

    # -- rank 0: what arrives

    def _wait(self, intake: Intake) -> None:
        begun = time.monotonic()
        self._take_in(intake, timeout_s=0.5)
        self._update(wait_s=self._progress.wait_s + time.monotonic() - begun)

    def _drain(self, intake: Intake) -> None:
        """What is there, up to `ahead_rows`: the rest stays in the queue, whose producers then wait for us."""
        curriculum = self._curriculum
        while not curriculum.stream_ended and curriculum.waiting < self.config.ahead_rows:
            if not self._take_in(intake, timeout_s=0.0):
                return

    def _take_in(self, intake: Intake, *, timeout_s: float) -> bool:
        """Put one arrival where it belongs; False when there was none."""
        arrival = intake.next(timeout_s)
        if arrival is None:
            return False
        if not isinstance(arrival, (Example, RefusedRow)):
            assert arrival is END
            try:
                self._curriculum.end_stream()
            except ValueError as error:
                raise LearnerError(str(error)) from error
            return True
        arrived = self._progress.trajectories + 1
        if isinstance(arrival, RefusedRow):
            self._refused[arrival.reason.value] += 1
        elif held_out(arrival.task_id, self.config.validation_share):
            self._validation.append(arrival)
        elif not self._curriculum.add(arrival, arrived):
            self._refused["duplicate"] += 1
        self._update(
            trajectories=arrived,
            examples=len(self._curriculum.examples),
            held_out=len(self._validation),
            refused=dict(self._refused),
        )
        return True

    # -- every rank: do

    def _do(self, backend: DeepSpeedBackend, order: _Order) -> _Order:
        if order.kind == "step":
            self._train_step(backend, order)
        elif order.kind == "validate":
            self._validate(backend, order)
        elif order.kind == "checkpoint":
            backend.save_checkpoint(self._checkpoints, order.step, order.state)
        elif order.kind == "export":
            self._export(backend, Path(order.folder))
        return order

    def _train_step(self, backend: DeepSpeedBackend, order: _Order) -> None:
        begun = time.monotonic()
        backend.seed(self.config.seed + order.step)
        sums = _Sums()
        for i, batch in enumerate(order.batches):
            loss = self._loss(backend, batch, sums)
            backend.backward(loss / order.total_weight, last=i + 1 == len(order.batches))
        norm = backend.step(order.lr_factor)
        sums = _Sums.from_list(backend.sum_over_ranks(sums.to_list()))
        if self.rank != 0:
            return
        ended, train_s = time.time(), self._progress.train_s + time.monotonic() - begun
        tokens_here = self._progress.tokens - self._tokens_before
        first = self._progress.first_step_unix_s is None
        self._update(
            step=order.step + 1,
            loss=sums.total / order.total_weight,
            loss_by_span=sums.means(),
            grad_norm=norm,
            train_s=train_s,
            tokens_per_s=tokens_here / train_s,
            first_step_unix_s=ended if first else self._progress.first_step_unix_s,
            trajectories_at_first_step=(
                self._progress.trajectories if first else self._progress.trajectories_at_first_step
            ),
        )

    def _validate(self, backend: DeepSpeedBackend, order: _Order) -> None:
        sums = _Sums()
        with backend.evaluation():
            for batch in order.batches:
                self._loss(backend, batch, sums)
        sums = _Sums.from_list(backend.sum_over_ranks(sums.to_list()))
        self._update(validation_loss=sums.total / order.total_weight)

    def _loss(self, backend: DeepSpeedBackend, batch: MicroBatch, sums: _Sums) -> Any:
        from learner.objectives import TensorBatch

        tensors = TensorBatch(
            targets=backend.to_device(batch.targets),
            weights=backend.to_device(batch.weights),
            spans=backend.to_device(batch.spans),
        )
        result = self._objective.loss(backend.forward(batch), tensors)
        sums.add(float(result.total.detach()), result.per_token, batch)
        return result.total

    def _export(self, backend: DeepSpeedBackend, folder: Path) -> None:
        weights = backend.full_weights()
        if weights is not None:
            from learner.publish import export_student

            export_student(folder, weights=weights, config=self.config, facts=self._facts())

    def _facts(self) -> dict[str, Any]:
        at = self._progress
        return {
            "optimizer steps": at.step,
            "tokens": at.tokens,
            "trained tokens": at.trained_tokens,
            "rows": at.rows,
            "passes over the trajectories": at.epoch,
            "trajectories trained on": at.examples,
            "trajectories refused": sum(at.refused.values()),
            "last loss": at.loss,
            "validation loss": "none held out" if at.validation_loss is None else at.validation_loss,
            "tokens per second": round(at.tokens_per_s),
            "ranks": self.world_size,
        }

    # -- state

    _tokens_before = 0
    """Tokens trained on before this process."""

    def _state(self) -> dict[str, Any]:
        at = self._progress
        kept = ("step", "tokens", "trained_tokens", "rows", "fraction", "loss", "validation_loss", "snapshots")
        progress = {name: getattr(at, name) for name in kept}
        return {"curriculum": self._curriculum.state(), "progress": progress, "done": at.done}

    def _restore(self, state: dict[str, Any]) -> None:
        try:
            self._curriculum.restore(state["curriculum"])
        except ValueError as error:
            raise LearnerError(str(error)) from error
        kept = state["progress"]
        self._tokens_before = kept["tokens"]
        self._update(**kept, epoch=self._curriculum.epoch, resumed_from_step=kept["step"])

    def _update(self, **changes: Any) -> None:
        self._progress = dataclasses.replace(self._progress, **changes)


def lr_factor(step: int, fraction: float, config: LearnerConfig) -> float:
    """Share of the peak learning rate: linear warm-up by steps, then a linear fall by the run's fraction to the
    floor."""
    warm = min(1.0, (step + 1) / config.warmup_steps) if config.warmup_steps else 1.0
    return warm * (1.0 - (1.0 - config.final_lr_fraction) * fraction)


@dataclass(slots=True)
class _Sums:
    """A step's metrics, as sums that ranks can add up."""

    total: float = 0.0
    by_span: list[float] = field(default_factory=lambda: [0.0] * len(TRAINED_SPANS))
    counts: list[float] = field(default_factory=lambda: [0.0] * len(TRAINED_SPANS))

    def add(self, total: float, per_token: Any, batch: MicroBatch) -> None:
        import numpy as np

        self.total += total
        counted = batch.weights > 0
        values = per_token.float().cpu().numpy()[counted]
        spans = batch.spans[counted]
        n = len(TRAINED_SPANS)
        self.by_span = [a + b for a, b in zip(self.by_span, np.bincount(spans, values, n).tolist(), strict=True)]
        self.counts = [a + b for a, b in zip(self.counts, np.bincount(spans, minlength=n).tolist(), strict=True)]

    def means(self) -> dict[str, float]:
        pairs = zip(TRAINED_SPANS, self.by_span, self.counts, strict=True)
        return {span.value: total / count for span, total, count in pairs if count}

    def to_list(self) -> list[float]:
        return [self.total, *self.by_span, *self.counts]

    @classmethod
    def from_list(cls, values: list[float]) -> _Sums:
        n = len(TRAINED_SPANS)
        return cls(total=values[0], by_span=values[1 : n + 1], counts=values[n + 1 :])
