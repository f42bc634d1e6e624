"""Who stands for the learner in a simulation: an actor that takes trajectories from the queue as fast as they come."""

from __future__ import annotations

import threading
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from launch.source import StreamSource
from rollout.trajectory_queue import TrajectoryQueue

BATCH = 64
WAIT_S = 1.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Consumed:
    """What came so far."""

    trajectories: int
    tokens: int
    ended: bool
    """The queue was closed and is drained."""
    lag_s: float
    """Mean time from an episode's end until it was here."""


class Consumer:
    """Consumes a `StreamSource` (ledger, then queue), as the learner does, in a thread; keeps only counts. Waits for
    the queue; unblocked by its producers, or by its end."""

    def __init__(self, ledger: str, queue: TrajectoryQueue) -> None:
        self._source = StreamSource(Path(ledger), queue)
        self._trajectories = self._tokens = 0
        self._lag_s = 0.0
        self._ended = False
        self._error: BaseException | None = None
        threading.Thread(target=self._take, daemon=True).start()

    def progress(self) -> Consumed:
        """Raises what taking raised."""
        if self._error is not None:
            raise self._error
        return Consumed(
            trajectories=self._trajectories,
            tokens=self._tokens,
            ended=self._ended,
            lag_s=self._lag_s / max(1, self._trajectories),
        )

    def _take(self) -> None:
        try:
            while (batch := self._source.next(BATCH, WAIT_S)) is not None:
                now_s = time.time()
                for trajectory in batch:
                    self._tokens += trajectory.completion_tokens
                    self._lag_s += now_s - trajectory.started_at_s - trajectory.duration_s
                self._trajectories += len(batch)
        except BaseException as error:
            self._error = error
        self._ended = True


def start_consumer(ledger: Path, queue: TrajectoryQueue) -> Any:
    """A Ray actor; it takes no logical CPU."""
    import ray

    return ray.remote(Consumer).options(num_cpus=0).remote(str(ledger), queue)  # type: ignore[attr-defined]
