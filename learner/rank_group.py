"""What ranks tell one another beside gradients: orders, sums of a few numbers, "I am here".

Over gloo, also where the gradients go over NCCL, and never longer than the configured wait: a rank that is lost ends
the others with a `LearnerError`. Alone, everything is an identity.

Example::

    ranks = RankGroup(rank=0, world_size=2, timeout_s=120.0)     # the default process group is there already
    ranks.sum([1.0, 2.0])
"""

from __future__ import annotations

from datetime import timedelta
from typing import Any

from learner.base import LearnerError


class RankGroup:
    """One rank's end. Each method is called by all ranks together; raises `LearnerError`."""

    def __init__(self, *, rank: int, world_size: int, timeout_s: float) -> None:
        import torch

        self.rank = rank
        self.world_size = world_size
        self._group: Any = None
        if world_size > 1:
            self._group = torch.distributed.new_group(backend="gloo", timeout=timedelta(seconds=timeout_s))

    def scatter(self, objects: list[Any] | None) -> Any:
        """Each rank gets its own of rank 0's `objects` ([world_size]); the others pass None."""
        import torch

        if self.world_size == 1:
            return objects[0] if objects else None
        received: list[Any] = [None]
        try:
            torch.distributed.scatter_object_list(received, objects, src=0, group=self._group)
        except RuntimeError as error:
            raise LearnerError(f"rank {self.rank} lost another rank: {error}") from error
        return received[0]

    def sum(self, values: list[float]) -> list[float]:
        """Element by element, in fp64."""
        import torch

        if self.world_size == 1:
            return values
        total = torch.tensor(values, dtype=torch.float64)
        try:
            torch.distributed.all_reduce(total, group=self._group)
        except RuntimeError as error:
            raise LearnerError(f"rank {self.rank} lost another rank: {error}") from error
        return total.tolist()

    def wait(self) -> None:
        """Until all are here."""
        self.sum([0.0])
