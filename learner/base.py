"""The learner's seams: where trajectories come from (`TrajectorySource`), and what a run tells (`Progress`).

No torch, no Ray. `learner.trainer.Learner` is one rank of a run; `learner.learner_actor.LearnerGroup` is all ranks as
Ray actors.

Example::

    learner = Learner(config, source)             # one rank in this process; `source` may be None on ranks other than 0
    final = learner.run()                         # Progress; final.student_dir is the exported student
    learner.progress()                            # from another thread, while it runs

    group = LearnerGroup.start(config, source)    # config.ranks Ray actors; `source` is pickled to rank 0
    refs = group.run()                            # one ref per rank, returns at once
    group.progress(); group.stop()                # snapshots; end after the present step, checkpoint and export
    final = group.result(timeout_s=1200)          # Progress of rank 0; raises LearnerError when any rank died
    group.shutdown()
"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

from rollout.trajectory import Trajectory


class LearnerError(RuntimeError):
    """The learner cannot go on: a dead rank, no data in time, a checkpoint of another run; the message says which."""


class RankLostError(LearnerError):
    """Another rank is gone or silent: what this one raises when it can only tell that. The cause is elsewhere."""


class TrajectorySource(Protocol):
    """Trajectories as they are finished. Only rank 0 asks.

    A run that is started again, by hand or because a rank died, asks a new source from the beginning: it must bring
    all that it brought before, in whatever order.
    """

    def next(self, max_trajectories: int, timeout_s: float) -> list[Trajectory] | None:
        """1 to `max_trajectories` of them, [] when none came within `timeout_s`, None when the stream has ended."""
        ...


class FolderKeeper(Protocol):
    """Sees to it that the learner's folder outlives its machine; the learner just writes there. Picklable."""

    def kept(self, folder: Path, *, rank: int, attempt: str) -> AbstractContextManager[None]:
        """Around a rank's whole run, which begins with what was there before; all that is new lasts once it has ended.
        `attempt` is the same for all ranks that start together, and for no others."""
        ...

    def check(self) -> None:
        """Asked now and then, from any thread; raises when what is written does not last any more."""
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class Progress:
    """A run at one moment; numbers of the last optimizer step unless said otherwise. Picklable and JSON-able."""

    step: int = 0
    """Optimizer steps so far, those before a resume included."""
    epoch: int = 0
    """Passes over the trajectories that are complete."""
    fraction: float = 0.0
    """Of the whole run, in [0, 1]; the learning rate follows it."""
    loss: float = 0.0
    """Weighted mean over the step's trained tokens, all ranks."""
    loss_by_span: Mapping[str, float] = field(default_factory=dict)
    """Unweighted mean per span type."""
    accuracy: float = 0.0
    """Share of the trained tokens that the student finds likeliest, given what is before them."""
    accuracy_by_span: Mapping[str, float] = field(default_factory=dict)
    objective_metrics: Mapping[str, float] = field(default_factory=dict)
    """What the objective tells of itself, as means over the trained tokens."""
    validation_loss: float | None = None
    """When it was last measured; None where nothing is held out."""
    validation_accuracy: float | None = None
    grad_norm: float = 0.0
    """Before clipping."""
    skipped_steps: int = 0
    """Whose gradient was not finite; those before a resume included."""
    lr: float = 0.0
    tokens: int = 0
    """All tokens of the rows trained on so far, padding not counted: what `max_tokens` counts."""
    trained_tokens: int = 0
    """Those of them that the student had to produce."""
    rows: int = 0
    """Rows trained on so far, each pass counted."""
    trajectories: int = 0
    """Arrived from the source so far, in this process."""
    examples: int = 0
    """Kept for training."""
    held_out: int = 0
    refused: Mapping[str, int] = field(default_factory=dict)
    """Reason -> trajectories that are not trained on."""
    tokens_per_s: float = 0.0
    """Over the time spent in steps, in this process."""
    step_s: float = 0.0
    """The last optimizer step took so long."""
    mfu: float | None = None
    """Share of the device's peak, over the time spent in steps, in this process; see `learner.tracking.flops`. None
    where the peak or the model's arithmetic is unknown."""
    peak_memory_mb: float = 0.0
    """Of the rank that needs most so far: GPU memory, or on a CPU resident memory, in MiB."""
    train_s: float = 0.0
    """Spent in optimizer steps, in this process."""
    wait_s: float = 0.0
    """Spent waiting for trajectories, in this process."""
    stall_share: float = 0.0
    """Of the time since this process's first optimizer step, how much was spent waiting for trajectories: in [0, 1]."""
    first_step_unix_s: float | None = None
    """When the first optimizer step of this process ended."""
    trajectories_at_first_step: int = 0
    """How many had arrived by then: below the total when training overlapped with rollouts."""
    resumed_from_step: int = 0
    restarts: int = 0
    """How many times dead ranks were started again."""
    snapshots: Mapping[str, str] = field(default_factory=dict)
    """Fraction ("0.5") -> folder of the student exported there."""
    student_dir: str | None = None
    """The final export, once the run has ended."""
    best_step: int | None = None
    """Of the best student so far, which is in `best_dir`."""
    best_value: float | None = None
    """Its validation loss or its score, as `best_by` says."""
    best_dir: str | None = None
    candidates: Mapping[str, str] = field(default_factory=dict)
    """Step -> folder of a student that waits for its score (`best_by` "rollout_score")."""
    published: str = ""
    """The newest version of the weights that is in use, a folder in `published/` (`learner.publish`)."""
    publish_told: str = ""
    """What was told of the last one that was handed on."""
    publish_failures: int = 0
    """Versions that nobody took, in this process."""
    stopped_early: bool = False
    """No better student came within `patience`."""
    done: bool = False
