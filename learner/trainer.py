"""`Learner`: one rank of a training run that learns from trajectories while they are still being rolled out.

Rank 0 reads the source, decides what happens next and tells every rank its part (`rank_work.Order`), so that all ranks
run the same collectives and end together. The first optimizer step is taken as soon as one step's tokens have arrived.

    source -> Intake (thread: Example | RefusedRow) -> Curriculum -> plan_step -> scatter -> forward, backward, step

Example::

    learner = Learner(LearnerConfig(model_path="base", output_dir="out", epochs=2), source)
    final = learner.run()                # blocks; final.student_dir is what vLLM loads
"""

from __future__ import annotations

import dataclasses
import queue
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from learner.admission import Admission
from learner.arrival_log import ArrivalLog
from learner.base import LearnerError, Progress, RankLostError, TrajectorySource
from learner.card_facts import data_facts, training_facts
from learner.config import LearnerConfig
from learner.curriculum import Curriculum, make_ordering
from learner.examples import Example, ExampleMaker, Scorer
from learner.gradient_guard import GradientGuard
from learner.intake import Arrival, Intake
from learner.model_selection import BestStudent, copy_folder
from learner.needed_scores import configured_scorer, refuse_missing_scores
from learner.packing import MicroBatch, StepPlan, plan_step
from learner.publish import CheckRows, Publications, WeightPublisher
from learner.rank_work import Done, Order, RankWork, lost_a_rank
from learner.schedules import lr_factor
from learner.speed_meter import SpeedMeter
from learner.student_check import student_tokenizer
from learner.tracking import Tracker, check_installed

if TYPE_CHECKING:
    from learner.deepspeed_backend import DeepSpeedBackend


class Learner:
    """One rank. `source` is needed on rank 0 alone; `on_progress` is called there after each step, and
    `scorer` says there what other policies think of a row's tokens; `publisher` is handed the weights every
    `publish_every_steps`.

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
        scorer: Scorer | None = None,
        publisher: WeightPublisher | None = None,
    ) -> None:
        from learner.objectives import make_objective

        if rank == 0 and source is None:
            raise LearnerError("rank 0 has no source of trajectories; pass one")
        check_installed(config.tracking)
        self.config = config
        self.rank = rank
        self.world_size = world_size
        self._source = source
        self._on_progress = on_progress
        self._scorer = scorer if scorer is not None or rank != 0 else configured_scorer(config)
        self._objective = make_objective(config.objective, **config.objective_options)
        if rank == 0:
            refuse_missing_scores(config, self._objective, self._scorer)
        self._progress = Progress()
        self._stop = threading.Event()
        self._save = threading.Event()
        self._scores: queue.SimpleQueue[tuple[int, float]] = queue.SimpleQueue()
        self._rows: list[Example] = []
        """Of the present step."""
        self._curriculum = Curriculum(
            tokens_per_step=config.tokens_per_step,
            rows_per_step=config.rows_per_step,
            seed=config.seed,
            epochs=config.epochs,
            ordering=make_ordering(config.curriculum) if rank == 0 else None,
        )
        self._admission = Admission(config, self._objective, self._curriculum)
        self._tokenizer = student_tokenizer(config.model_path) if rank == 0 else None
        self._folder = Path(config.output_dir)
        self._best = BestStudent(config, folder=self._folder)
        self._check_rows = CheckRows()
        self._publications: Publications | None = None
        if publisher is not None and config.publish_every_steps:
            self._publications = Publications(self._folder / "published", publisher, keep=config.keep_published)
        self._guard = GradientGuard(limit=config.max_skipped_steps)
        self._meter = SpeedMeter()
        self._tracker = Tracker([])

    def progress(self) -> Progress:
        """The run as it is now; may be called from any thread."""
        if self._publications is None:
            return self._progress
        return dataclasses.replace(self._progress, **self._publications.figures())

    def stop(self) -> None:
        """End after the present step, with a checkpoint and an export. From any thread; only rank 0's counts."""
        self._stop.set()

    def save_soon(self) -> None:
        """Write a checkpoint after the present step, due or not. From any thread; only rank 0's counts."""
        self._save.set()

    def report_score(self, step: int, score: float) -> None:
        """The score, larger is better, of the student in `progress().candidates[step]`. From any thread; only rank 0's
        counts."""
        self._scores.put((step, score))

    def run(self) -> Progress:
        """Train until the passes or the tokens are done. Raises `LearnerError`, `ConfigError`."""
        from learner.deepspeed_backend import DeepSpeedBackend

        backend = DeepSpeedBackend(self.config, rank=self.rank, world_size=self.world_size)
        work = RankWork(self.config, backend, self._objective, rank=self.rank, world_size=self.world_size)
        try:
            backend.train_also(self._objective.parameters())
            state = backend.load_checkpoint(work.checkpoints) if self.config.resume else None
            if self.rank == 0:
                self._lead(work, state)
            else:
                kind = ""
                while kind != "end":
                    order = backend.scatter(None)
                    work.do(order)
                    kind = order.kind
        except RuntimeError as error:
            if self.world_size > 1 and lost_a_rank(error):
                told = str(error) if isinstance(error, LearnerError) else f"rank {self.rank} lost another: {error}"
                raise RankLostError(told) from error
            raise
        finally:
            backend.close()
        return self._progress

    # -- rank 0: decide

    def _lead(self, work: RankWork, state: dict[str, Any] | None) -> None:
        backend, ordering = work.backend, self._curriculum.ordering
        if state is not None:
            self._restore(state)
        maker = ExampleMaker(
            self._tokenizer,
            max_row_tokens=self.config.max_row_tokens,
            system_prompt=self.config.system_prompt,
            span_weights=self.config.span_weights,
            scorer=self._scorer,
            difficulty=None if ordering is None else ordering.difficulty,
            successes_only=self._objective.successes_only,
        )
        self._meter = SpeedMeter.of(backend, self.config, ranks=self.world_size)
        assert self._source is not None
        log: ArrivalLog[Arrival] = ArrivalLog(self._folder / "arrivals.jsonl", resume=self.config.resume)
        self._tracker = Tracker.start(
            self.config.tracking,
            folder=self._folder,
            after_step=self._progress.step,
            settings=dataclasses.asdict(self.config),
            fresh=not self.config.resume,
        )
        with self._tracker, Intake(self._source, maker, log=log) as intake:
            for orders in self._orders(backend, intake, finished=bool(state and state["done"])):
                self._done(orders[0], work.do(backend.scatter(orders)))
            self._tracker.step(self._progress, last=True)

    def _orders(self, backend: DeepSpeedBackend, intake: Intake, *, finished: bool) -> Iterator[list[Order]]:
        """Every rank's next order; what happened in the meantime is in `self`."""
        was_finished = finished
        waiting_since = last_order = time.monotonic()
        while not finished and not self._stop.is_set():
            self._admission.fill(intake)
            self._update(**self._admission.figures())
            self._take_scores()
            epoch = self._curriculum.epoch
            rows = self._curriculum.take()
            if rows:
                yield self._step_orders(backend, rows)
                yield from self._after_step(epoch_over=self._curriculum.epoch > epoch, backend=backend)
                waiting_since = last_order = time.monotonic()
                self._update(stopped_early=self._best.exhausted)
                finished = self._budget_spent() or self._best.exhausted
            elif self._curriculum.done:
                finished = True
            else:
                now = time.monotonic()
                if now - waiting_since > self.config.data_timeout_s:
                    raise LearnerError(
                        f"no full step of trajectories came within data_timeout_s {self.config.data_timeout_s} s "
                        f"({self._progress.trajectories} arrived so far)"
                    )
                if self._others_wait(last_order):
                    last_order = now
                    yield self._all(Order(kind="wait"))
                self._wait(intake)
        if self._progress.step == 0:
            raise LearnerError(f"nothing to train on: {self._admission.in_words()}")
        if finished and not was_finished:
            yield from self._last_measurements(backend)
        self._update(fraction=1.0 if finished else self._progress.fraction, done=finished)
        yield self._checkpoint_orders()
        yield from self._export_student()
        yield self._all(Order(kind="end"))

    def _step_orders(self, backend: DeepSpeedBackend, rows: list[Example]) -> list[Order]:
        plan = self._plan(backend, rows)
        self._rows = rows
        at = self._progress
        factor = lr_factor(at.step, at.fraction, self.config)
        self._update(
            lr=self.config.lr * factor,
            tokens=at.tokens + plan.tokens,
            trained_tokens=at.trained_tokens + plan.trained_tokens,
            rows=at.rows + plan.rows,
        )
        self._meter.planned(plan, [len(row) for row in rows])
        return [
            Order(
                kind="step",
                batches=batches,
                total_weight=plan.total_weight,
                lr_factor=factor,
                step=at.step,
                rows=plan.rows,
            )
            for batches in plan.ranks
        ]

    def _after_step(self, *, epoch_over: bool, backend: DeepSpeedBackend) -> Iterator[list[Order]]:
        """What follows a step: validation, the best student, snapshots, checkpoints."""
        fraction = self._fraction()
        step = self._progress.step
        self._update(fraction=fraction, epoch=self._curriculum.epoch)
        if epoch_over or self._budget_spent() or _is_due(step, self.config.validate_every_steps):
            yield from self._validate(backend)
        self._tracker.step(self._progress)
        if self._on_progress is not None:
            self._on_progress(self._progress)
        if _is_due(step, self.config.score_every_steps):
            yield from self._hand_out(backend)
        if self._publications is not None and _is_due(step, self.config.publish_every_steps):
            yield self._publish_orders(self._publications, backend)
            self._publications.offer(step)
        for at in sorted(self.config.snapshot_at):
            name = f"{at:g}"
            if fraction >= at and name not in self._progress.snapshots:
                folder = self._folder / "snapshots" / name
                yield self._export_orders(folder)
                self._update(snapshots={**self._progress.snapshots, name: str(folder)})
        if _is_due(step, self.config.checkpoint_every_steps) or self._save.is_set():
            self._save.clear()
            yield self._checkpoint_orders()

    def _validate(self, backend: DeepSpeedBackend) -> Iterator[list[Order]]:
        """Measure what is held out; keep the student when it is the best by that."""
        if not self._admission.validation or self._validated_at == self._progress.step:
            return
        plan = self._plan(backend, self._admission.validation)
        yield [Order(kind="validate", batches=batches, total_weight=plan.total_weight) for batches in plan.ranks]
        self._validated_at = self._progress.step
        loss = self._progress.validation_loss
        assert loss is not None
        if self._best.by_loss and self._best.measured(self._progress.step, loss, rows=plan.rows):
            yield self._export_orders(self._best.folder)
            self._show_best()

    def _hand_out(self, backend: DeepSpeedBackend) -> Iterator[list[Order]]:
        folder = self._best.hand_out(self._progress.step)
        if folder is not None:
            yield self._export_orders(folder, check=self._check_batches(backend))
            self._show_best()

    def _last_measurements(self, backend: DeepSpeedBackend) -> Iterator[list[Order]]:
        """At the end of the run: the last student is measured too, and scores that are under way are waited for."""
        yield from self._validate(backend)
        if not self._best.by_score:
            return
        yield from self._hand_out(backend)
        deadline = time.monotonic() + self.config.score_timeout_s
        last_order = time.monotonic()
        while self._best.pending and time.monotonic() < deadline and not self._stop.is_set():
            if self._others_wait(last_order):
                last_order = time.monotonic()
                yield self._all(Order(kind="wait"))
            self._take_scores(timeout_s=0.5)

    def _export_student(self) -> Iterator[list[Order]]:
        folder = self._folder / "student"
        if self.config.final_student == "best" and self._best.step is not None and self._best.folder.is_dir():
            copy_folder(self._best.folder, folder)
        else:
            yield self._export_orders(folder)
        self._update(student_dir=str(folder))

    def _plan(self, backend: DeepSpeedBackend, rows: list[Example]) -> StepPlan:
        return plan_step(
            rows,
            ranks=self.world_size,
            micro_batch_tokens=self.config.micro_batch_tokens,
            row_tokens=self.config.max_row_tokens,
            batching="packed" if backend.batching == "packed" else "bucketed",
        )

    def _checkpoint_orders(self) -> list[Order]:
        return self._all(Order(kind="checkpoint", step=self._progress.step, state=self._state()))

    def _export_orders(self, folder: Path, *, check: tuple[MicroBatch, ...] = ()) -> list[Order]:
        """`check`: rows whose log-probabilities are written beside the student (`learner.publish`)."""
        order = Order(
            kind="export",
            folder=str(folder),
            facts=training_facts(self._progress, ranks=self.world_size),
            data=data_facts(self._progress, self._curriculum.examples.values()),
            batches=check,
        )
        return self._all(order)

    def _publish_orders(self, publications: Publications, backend: DeepSpeedBackend) -> list[Order]:
        folder, check = publications.folder(self._progress.step), self._check_batches(backend)
        return self._all(
            Order(
                kind="publish",
                folder=str(folder),
                batches=check,
                facts=training_facts(self._progress, ranks=self.world_size),
            )
        )

    def _check_batches(self, backend: DeepSpeedBackend) -> tuple[MicroBatch, ...]:
        return self._check_rows.batches(self._curriculum.examples.values(), packed=backend.batching == "packed")

    def _all(self, order: Order) -> list[Order]:
        return [order] * self.world_size

    def _others_wait(self, last_order: float) -> bool:
        """Whether other ranks must hear something, lest they give rank 0 up."""
        return self.world_size > 1 and time.monotonic() - last_order > self.config.collective_timeout_s / 4

    def _fraction(self) -> float:
        if self.config.max_tokens is not None:
            return min(1.0, self._progress.tokens / self.config.max_tokens)
        return self._curriculum.fraction(self.config.expected_trajectories)

    def _budget_spent(self) -> bool:
        return self.config.max_tokens is not None and self._progress.tokens >= self.config.max_tokens

    # -- rank 0: what comes

    def _wait(self, intake: Intake) -> None:
        begun = time.monotonic()
        self._admission.take(intake, timeout_s=0.5)
        waited = time.monotonic() - begun
        self._meter.waited(waited, learning=self._progress.first_step_unix_s is not None)
        figures = self._admission.figures()
        self._update(**figures, wait_s=self._progress.wait_s + waited, stall_share=self._meter.stall_share)

    def _take_scores(self, timeout_s: float = 0.0) -> None:
        """What rollouts said of students that were handed out; waits for the first one only."""
        taken = False
        while True:
            try:
                step, score = self._scores.get(timeout=timeout_s) if timeout_s else self._scores.get_nowait()
            except queue.Empty:
                break
            self._best.scored(step, score)
            taken, timeout_s = True, 0.0
        if taken:
            self._show_best()

    # -- rank 0: what was done

    def _done(self, order: Order, done: Done) -> None:
        if order.kind == "step":
            self._stepped(order, done)
        elif order.kind == "validate" and done.totals is not None:
            self._update(
                validation_loss=done.totals.total / order.total_weight, validation_accuracy=done.totals.accuracy
            )

    def _stepped(self, order: Order, done: Done) -> None:
        totals, outcome = done.totals, done.outcome
        assert totals is not None and outcome is not None
        self._meter.stepped(done.seconds)
        first = self._progress.first_step_unix_s is None
        at = self._progress
        self._update(
            step=order.step + 1,
            loss=totals.total / order.total_weight,
            loss_by_span=totals.loss_by_span,
            accuracy=totals.accuracy,
            accuracy_by_span=totals.accuracy_by_span,
            objective_metrics=totals.metrics,
            grad_norm=outcome.grad_norm,
            peak_memory_mb=totals.peak_memory_mb,
            train_s=self._meter.train_s,
            step_s=done.seconds,
            tokens_per_s=self._meter.tokens_per_s,
            mfu=self._meter.mfu,
            stall_share=self._meter.stall_share,
            first_step_unix_s=time.time() if first else at.first_step_unix_s,
            trajectories_at_first_step=at.trajectories if first else at.trajectories_at_first_step,
        )
        if outcome.skipped:
            keys = [row.key for row in self._rows]
            self._guard.skipped(order.step, rows=keys, suspects=[keys[i] for i in done.suspects])
            self._update(skipped_steps=self._guard.count)

    # -- state

    _validated_at = 0
    """Step of the last validation."""

    def _state(self) -> dict[str, Any]:
        at = self._progress
        counts = ("step", "tokens", "trained_tokens", "rows", "fraction", "snapshots")
        measures = ("loss", "accuracy", "validation_loss", "validation_accuracy")
        progress = {name: getattr(at, name) for name in (*counts, *measures)}
        return {
            "curriculum": self._curriculum.state(),
            "progress": progress,
            "best": self._best.state(),
            "guard": self._guard.state(),
            "validated_at": self._validated_at,
            "done": at.done,
        }

    def _restore(self, state: dict[str, Any]) -> None:
        try:
            self._curriculum.restore(state["curriculum"])
        except ValueError as error:
            raise LearnerError(str(error)) from error
        kept = state["progress"]
        self._best.restore(state["best"])
        self._guard.restore(state["guard"])
        self._validated_at = state["validated_at"]
        self._update(
            **kept,
            epoch=self._curriculum.epoch,
            resumed_from_step=kept["step"],
            skipped_steps=self._guard.count,
        )
        self._show_best()

    def _show_best(self) -> None:
        best = self._best
        self._update(
            best_step=best.step,
            best_value=best.value,
            best_dir=None if best.step is None else str(best.folder),
            candidates={str(step): str(folder) for step, folder in sorted(best.pending.items())},
        )

    def _update(self, **changes: Any) -> None:
        self._progress = dataclasses.replace(self._progress, **changes)


def _is_due(step: int, every: int) -> bool:
    return every > 0 and step % every == 0
