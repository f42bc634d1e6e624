"""An exponential moving average of the trained weights: smoother than the last ones, and often a little better.

Each rank averages the fp32 masters that it steps on (`learner.trained_state`), so under ZeRO the average is shared out
like they are, and nothing is sent. `in_place` puts the average where the weights are for as long as they are gathered
or saved. The decay warms up as min(decay, (1 + n) / (10 + n)), TensorFlow's rule, else the first weights would weigh
for 1 / (1 - decay) steps. Not stochastic weight averaging: no schedule of its own, no batch norms to set again.

Example::

    average = Average(state, decay=0.999)
    average.update()                  # after each optimizer step
    with average.in_place():
        weights = gather()
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

    from learner.trained_state import TrainedState


class Average:
    """Begins as the present weights. `updates`: optimizer steps averaged so far."""

    def __init__(self, state: TrainedState, *, decay: float) -> None:
        self._state = state
        self._decay = decay
        self.restart()

    def restart(self) -> None:
        """Begin again at the present weights."""
        self.updates = 0
        self.shards: list[torch.Tensor] = [shard.clone() for shard in self._state.shards()]

    def update(self) -> None:
        """Take in the weights of one more step."""
        keep = min(self._decay, (1 + self.updates) / (10 + self.updates))
        self.updates += 1
        for mine, theirs in zip(self.shards, self._state.shards(), strict=True):
            mine.lerp_(theirs, 1.0 - keep)

    @contextlib.contextmanager
    def in_place(self) -> Iterator[None]:
        """The masters are the average; call the state's `show` inside and after, where the model's weights count."""
        self._swap()
        try:
            yield
        finally:
            self._swap()

    def _swap(self) -> None:
        for mine, theirs in zip(self.shards, self._state.shards(), strict=True):
            kept = theirs.clone()
            theirs.copy_(mine)
            mine.copy_(kept)
