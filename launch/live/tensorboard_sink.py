"""`TensorBoardFigures`: what the job knows beside the learner's own curves, as TensorBoard event files: episodes,
success, throughput of the rollouts, queue, cost, and the scores at the end.

The learner writes its curves itself (`learner.tracking`, over optimizer steps); these are over the seconds since the
first job on the folder began, so that a job that goes on goes on in its curves. `tensorboard --logdir RUN` shows both.
Written with the `tensorboard` package alone: a driver needs no torch for it.

Example::

    LiveView(sinks=[TensorBoardFigures(Path("runs/a/tensorboard"))])
"""

from __future__ import annotations

import math
import time
from pathlib import Path
from typing import Any

from launch.live.status import JobStatus, Stage

EVERY_S = 10.0


class TensorBoardFigures:
    """A `StatusSink`. Raises `OSError` for a folder that cannot be written."""

    def __init__(self, folder: Path) -> None:
        from tensorboard.summary.writer.event_file_writer import EventFileWriter

        folder.mkdir(parents=True, exist_ok=True)
        self._writer: Any = EventFileWriter(str(folder), flush_secs=int(EVERY_S))
        self._at_s = -EVERY_S
        self._shape: object = None

    def take(self, status: JobStatus) -> None:
        shape = (status.state, *((stage.state, len(stage.scores)) for stage in status.stages))
        if shape == self._shape and time.monotonic() - self._at_s < EVERY_S:
            return
        self._at_s, self._shape = time.monotonic(), shape
        numbers = figures(status)
        if not numbers:
            return
        from tensorboard.compat.proto.event_pb2 import Event  # pyright: ignore[reportAttributeAccessIssue]
        from tensorboard.compat.proto.summary_pb2 import Summary  # pyright: ignore[reportAttributeAccessIssue]

        values = [Summary.Value(tag=tag, simple_value=value) for tag, value in numbers.items() if math.isfinite(value)]
        step = int(status.updated_unix_s - status.began_unix_s)
        self._writer.add_event(Event(wall_time=status.updated_unix_s, step=step, summary=Summary(value=values)))

    def close(self) -> None:
        self._writer.close()


def figures(status: JobStatus) -> dict[str, float]:
    """Tag -> number: `job/...` of the whole, `<stage>/...` of its rollouts, `scores/<stage>/<kind>` at the end."""
    numbers: dict[str, float] = {}
    stage = status.current
    if stage is not None and stage.learns:
        if status.queue is not None:
            numbers["job/queue"] = status.queue.depth
        if status.learning is not None:
            numbers["job/trained"] = status.learning.fraction
            numbers["job/learner waited s"] = status.learning.wait_s
    if status.spent is not None:
        numbers["job/spent usd"] = status.spent.spent_usd
        numbers["job/spent tokens"] = status.spent.tokens
    if stage is not None and stage.episodes is not None:
        numbers |= _rollouts(stage)
    for stage in status.stages:
        for kind, score in stage.scores.items():
            numbers[f"scores/{_name(stage)}/{kind}"] = score.mean
    return numbers


def _rollouts(stage: Stage) -> dict[str, float]:
    seen = stage.episodes
    assert seen is not None
    name = "rollouts" if stage.learns else _name(stage)
    numbers: dict[str, float] = {
        f"{name}/episodes": seen.finished,
        f"{name}/failed": seen.failed,
        f"{name}/completion tokens per s": stage.completion_tokens_per_s,
        f"{name}/running": sum(worker.running for worker in seen.workers.values()),
    }
    answered = seen.recorded - seen.failed
    if answered:
        numbers[f"{name}/success"] = seen.succeeded / answered
    numbers |= {f"{name}/success {kind}": k / n for kind, (n, k) in seen.by_kind.items() if n}
    return numbers


def _name(stage: Stage) -> str:
    return stage.title.rpartition(": ")[2]
