"""Takes trajectories off the source and makes examples of them, while the main thread trains.

One thread, one order: what comes out is what the source gave, in its order; after a restart, in the order that the
first run's log has. It holds at most `room` trajectories that nobody has asked for yet (and after a restart those whose
turn has not come), so the source's own bound on what is under way keeps meaning something.

Example::

    with Intake(source, maker) as intake:
        arrival = intake.next(timeout_s=1.0)      # Arrival | None (nothing yet) | END
"""

from __future__ import annotations

import queue
import threading
from types import TracebackType
from typing import Final

from learner.arrival_log import ArrivalLog
from learner.base import LearnerError, TrajectorySource
from learner.examples import Example, ExampleMaker, RefusedRow

Arrival = Example | RefusedRow


class _End:
    """The stream has ended."""


END: Final = _End()


class Intake:
    """Consumes the source, produces arrivals; waits for the source (a second at a time) and for room. `close` unblocks
    it."""

    def __init__(
        self,
        source: TrajectorySource,
        maker: ExampleMaker,
        *,
        log: ArrivalLog[Arrival] | None = None,
        room: int = 64,
        batch: int = 32,
    ) -> None:
        self._source = source
        self._log = log
        self._maker = maker
        self._batch = batch
        self._arrivals: queue.Queue[Arrival | _End | BaseException] = queue.Queue(maxsize=room)
        self._closed = threading.Event()
        self._thread = threading.Thread(target=self._pull, name="learner-intake", daemon=True)

    def __enter__(self) -> Intake:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def next(self, timeout_s: float) -> Arrival | _End | None:
        """The next arrival; None when there is none within `timeout_s`. Raises `LearnerError` when the source
        failed."""
        try:
            item = self._arrivals.get(timeout=timeout_s) if timeout_s > 0 else self._arrivals.get_nowait()
        except queue.Empty:
            return None
        if isinstance(item, BaseException):
            raise LearnerError(f"the source of trajectories failed: {item!r}") from item
        return item

    def close(self) -> None:
        """Stop pulling; what was not taken is left to whoever replays the ledger."""
        self._closed.set()
        self._thread.join(timeout=5.0)
        if self._log is not None:
            self._log.close()

    def _pull(self) -> None:
        try:
            while not self._closed.is_set():
                trajectories = self._source.next(self._batch, 1.0)
                for trajectory in trajectories or ():
                    self._give(self._maker.make(trajectory))
                if not trajectories and self._log is not None:
                    for arrival in self._log.give_up_waiting():
                        self._put(arrival)
                if trajectories is None:
                    self._put(END)
                    return
        except Exception as error:  # the main thread raises it
            self._put(error)

    def _give(self, made: Arrival) -> None:
        for arrival in [made] if self._log is None else self._log.in_order([made]):
            self._put(arrival)

    def _put(self, item: Arrival | _End | BaseException) -> None:
        while not self._closed.is_set():
            try:
                self._arrivals.put(item, timeout=0.5)
                return
            except queue.Full:
                continue
