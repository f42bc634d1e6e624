"""`StreamSource`: what the learner is handed. First what an earlier run recorded, then the live queue, then a last
look into the ledger for what was recorded but never arrived (a worker may die between the two). Each trajectory comes
once. A queue that was started again sends it back to the ledger as well: what the queue had is there.

What curation removes is handed over as one that did not succeed, which the learner refuses: its schedule goes by how
many trajectories have arrived. Filters that compare trajectories cannot judge a stream; they are not applied here.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path

from rollout.curation import Curation
from rollout.ledger import Ledger
from rollout.trajectory import Trajectory
from rollout.trajectory_queue import QueueRestartedError, TrajectoryQueue


class StreamSource:
    """A `learner.base.TrajectorySource`; picklable before its first use."""

    def __init__(self, ledger: Path, queue: TrajectoryQueue | None, curation: Curation | None = None) -> None:
        self._ledger, self._queue = ledger, queue
        self._curation = (curation or Curation()).stream
        self._delivered: set[str] = set()
        self._waiting: deque[Trajectory] | None = None
        self._streaming = queue is not None

    def next(self, max_trajectories: int, timeout_s: float) -> list[Trajectory] | None:
        """See `learner.base.TrajectorySource`. Raises `QueueError` when the queue's actor is gone for good."""
        if self._waiting is None:
            self._waiting = deque(self._recorded())
        if self._waiting:
            return self._take(max_trajectories)
        if not self._streaming:
            return None
        assert self._queue is not None
        try:
            arrived = self._queue.get(max_trajectories, timeout_s)
        except QueueRestartedError:
            self._waiting = deque(self._recorded())
            return self._take(max_trajectories)
        if arrived is None:
            self._streaming = False
            self._waiting = deque(self._recorded())
            return self.next(max_trajectories, timeout_s)
        return list(self._new(arrived))

    def _take(self, most: int) -> list[Trajectory]:
        assert self._waiting is not None
        return [self._waiting.popleft() for _ in range(min(most, len(self._waiting)))]

    def _recorded(self) -> list[Trajectory]:
        return list(self._new(Ledger(self._ledger).trajectories()))

    def _new(self, trajectories: Iterable[Trajectory]) -> Iterable[Trajectory]:
        for trajectory in trajectories:
            if trajectory.failure is None and trajectory.key not in self._delivered:
                self._delivered.add(trajectory.key)
                keeps = not trajectory.trainable or self._curation.keeps(trajectory)
                yield trajectory if keeps else replace(trajectory, success=False)
