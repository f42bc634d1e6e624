"""Served episodes, written to a ledger like any other's: to be looked at, graded, curated and trained on.

They are written in batches, aside, so that no answer waits for a disk. A ledger that cannot be written is tried again;
what does not fit in memory meanwhile is counted as lost. They have no right answer, so no success: see
`python -m launch.ledger vote` and `regrade`.

Example::

    recorder = Recorder(LedgerWriter(folder, writer="serve"), metrics)
    recorder.put(trajectory)
    await recorder.close()
"""

from __future__ import annotations

import asyncio
import logging
from collections import deque

from launch.serving.service_metrics import ServiceMetrics
from rollout.ledger import LedgerWriter
from rollout.trajectory import Trajectory

logger = logging.getLogger(__name__)

_MOST_HELD = 10_000
_BATCH = 256
_RETRY_S = 5.0
_LAST_TRIES = 3
"""Of a batch once the server is closing."""


class Recorder:
    """Belongs to one event loop; begins when it is first given something. A shard is written every `every_s` at
    most."""

    def __init__(self, writer: LedgerWriter, metrics: ServiceMetrics, *, every_s: float = 2.0) -> None:
        self._writer, self._metrics, self._every_s = writer, metrics, every_s
        self._held: deque[Trajectory] = deque()
        self._closing = asyncio.Event()
        self._task: asyncio.Task[None] | None = None

    def put(self, trajectory: Trajectory) -> None:
        """Returns at once."""
        if len(self._held) >= _MOST_HELD:
            self._metrics.unrecorded.inc()
            return
        self._held.append(trajectory)
        if self._task is None:
            self._task = asyncio.create_task(self._run())

    async def close(self) -> None:
        """Write what is left."""
        self._closing.set()
        if self._task is not None:
            await self._task
            self._task = None

    async def _run(self) -> None:
        tries = 0
        while self._held or not self._closing.is_set():
            await self._pause(_RETRY_S if tries else self._every_s)
            batch = [self._held.popleft() for _ in range(min(_BATCH, len(self._held)))]
            if not batch:
                continue
            try:
                await asyncio.to_thread(self._writer.append, batch)
            except (OSError, ValueError) as error:
                tries += 1
                logger.error("the ledger cannot be written (%s); %d episodes wait", type(error).__name__, len(batch))
                if self._closing.is_set() and tries >= _LAST_TRIES or isinstance(error, ValueError):
                    self._metrics.unrecorded.inc(len(batch))
                else:
                    self._held.extendleft(reversed(batch))
            else:
                tries = 0
                self._metrics.recorded.inc(len(batch))

    async def _pause(self, seconds: float) -> None:
        """Until then, or until the server closes."""
        try:
            async with asyncio.timeout(seconds if not self._closing.is_set() else 0.2):
                await self._closing.wait()
        except TimeoutError:
            pass
