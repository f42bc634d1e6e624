"""`WeightSync`: one version of a learner's weights to every running rollout worker, by a deadline.

All workers are told at once, and each loads the folder for itself (`rollout.weight_loading`: in place, else by starting
its engine anew, checked either way). Weights travel by the file system that learner and workers share; on one machine
a folder in /dev/shm makes that memory. Nobody is waited for beyond the deadline: a worker that has not answered by then
is named, left out of this version and, unless told otherwise, restarted, since an engine that hangs is of no use. A
worker that acts with weights of its own choice, as an evaluation does, is busy until it has done: it is asked again
until the deadline, and left alone after.

It is what a learner is handed as its `WeightPublisher`: `publish` returns a receipt, or raises when nobody took the
weights. It does not remove folders, and it does not know what a learner is.

Example::

    sync = WeightSync([RayWorker(actor, f"w{i}") for i, actor in enumerate(actors)], deadline_s=120)
    receipt = sync.publish(Path("runs/a/learner/published/step-0000200"), "step-0000200")
    receipt.took, receipt.left_out               # ("w0", "w1"), {}
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Protocol

from rollout.policy import PolicyError
from rollout.trajectory import FailureClass
from rollout.weight_loading import Loaded, Weights

ASK_AGAIN_S = 0.25
RESTART_S = 30.0
"""How long it may take to end a worker that missed the deadline."""


class WorkerBusyError(PolicyError):
    """The worker acts with weights of its own choice; ask again."""

    def __init__(self, message: str) -> None:
        super().__init__(message, FailureClass.INPUT)


class WorkerAwayError(PolicyError):
    """The worker's process is not there; it may come back."""


class WeightSyncError(PolicyError):
    """No worker took the weights; the message says why of each."""


class Worker(Protocol):
    """Something that acts with weights. Its methods are awaited in a loop that does not live on."""

    @property
    def name(self) -> str: ...

    async def load(self, weights: Weights) -> Loaded:
        """Raises `WorkerBusyError`, `WorkerAwayError`, other `PolicyError`s."""
        ...

    async def restart(self) -> None:
        """End it at once, whatever it does; it comes back by itself with the weights that it was started with."""
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class Receipt:
    """What became of one version."""

    version: str
    loaded: Mapping[str, Loaded]
    """Worker -> how it came to the weights."""
    left_out: Mapping[str, str]
    """Worker -> why it does not have them."""
    seconds: float

    @property
    def took(self) -> tuple[str, ...]:
        return tuple(self.loaded)

    @property
    def largest_difference(self) -> float | None:
        """Of log-probabilities on both sides, over all workers; None when none was checked."""
        found = [each.difference.largest for each in self.loaded.values() if each.difference is not None]
        return max(found) if found else None

    def __str__(self) -> str:
        """One line."""
        anew = [f"{name} started anew: {each.why_anew}" for name, each in self.loaded.items() if each.why_anew]
        out = [f"{name} left out: {why}" for name, why in self.left_out.items()]
        checked = "" if self.largest_difference is None else f", largest difference {self.largest_difference:.4g}"
        workers = "worker" if len(self.loaded) == 1 else "workers"
        first = f"{self.version} on {len(self.loaded)} {workers} in {self.seconds:.1f} s{checked}"
        return "; ".join([first, *anew, *out])


class WeightSync:
    """Hands weights to `workers`. Picklable where they are; plain, with no thread and no state of its own."""

    def __init__(
        self, workers: Sequence[Worker], *, deadline_s: float = 300.0, late: Literal["restart", "exclude"] = "restart"
    ) -> None:
        if not workers:
            raise ValueError("there is no worker to hand weights to")
        if not deadline_s > 0:
            raise ValueError(f"deadline_s is {deadline_s}; it must be above 0")
        self._workers, self._deadline_s, self._late = tuple(workers), deadline_s, late

    def publish(self, folder: Path, version: str) -> Receipt:
        """Blocks for `deadline_s` and a little at most. Raises `WeightSyncError` when no worker took the weights."""
        return asyncio.run(self.apublish(folder, version))

    async def apublish(self, folder: Path, version: str) -> Receipt:
        """The same, for a loop that runs."""
        begun_s = time.monotonic()
        weights = Weights(str(folder), version)
        results = await asyncio.gather(*(self._hand(worker, weights) for worker in self._workers))
        pairs = list(zip(self._workers, results, strict=True))
        receipt = Receipt(
            version=version,
            loaded={worker.name: result for worker, result in pairs if isinstance(result, Loaded)},
            left_out={worker.name: result for worker, result in pairs if isinstance(result, str)},
            seconds=time.monotonic() - begun_s,
        )
        if not receipt.loaded:
            whys = "; ".join(f"{name}: {why}" for name, why in receipt.left_out.items())
            raise WeightSyncError(f"no worker took the weights {version!r}: {whys}")
        return receipt

    async def _hand(self, worker: Worker, weights: Weights) -> Loaded | str:
        """How it loaded them, or why it did not."""
        waiting: PolicyError | None = None
        try:
            async with asyncio.timeout(self._deadline_s):
                while True:
                    try:
                        return await worker.load(weights)
                    except (WorkerBusyError, WorkerAwayError) as error:
                        waiting = error
                    await asyncio.sleep(ASK_AGAIN_S)
        except TimeoutError:
            pass
        except PolicyError as error:
            return str(error)
        late = f"not done within deadline_s={self._deadline_s:g}"
        if waiting is not None:
            return f"{late}: {waiting}"
        if self._late == "exclude":
            return late
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(RESTART_S):
                await worker.restart()
        return f"{late}: restarted"


class RayWorker:
    """A `rollout.collector.RolloutActor`."""

    def __init__(self, actor: Any, name: str) -> None:
        self._actor, self.name = actor, name

    async def load(self, weights: Weights) -> Loaded:
        from ray.exceptions import RayActorError, RayTaskError

        try:
            return await asyncio.wrap_future(self._actor.load_weights.remote(weights).future())
        except RayTaskError as error:
            raise error.cause if isinstance(error.cause, PolicyError) else PolicyError(_last_line(error)) from None
        except RayActorError as error:
            raise WorkerAwayError(f"its process is gone: {_last_line(error)}") from None

    async def restart(self) -> None:
        import ray

        await asyncio.to_thread(ray.kill, self._actor, no_restart=False)


def _last_line(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return lines[-1] if lines else type(error).__name__
