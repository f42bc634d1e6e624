"""An objective's own few parameters (learned span weights), trained beside the student's engine.

They are numbers, not matrices: every rank holds them all, their gradients are summed over the ranks, and AdamW without
decay steps on them in fp32. Inside the engine ZeRO would take them apart, and only find them in a module's forward.

Example::

    side = SideParameters(objective.parameters(), lr=config.lr)
    side.step(lr_factor=0.5, sum_over_ranks=backend.sum_over_ranks, world_size=2)
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch


class SideParameters:
    """`parameters`: leaf tensors that need gradients, the same on every rank."""

    def __init__(self, parameters: Iterable[torch.Tensor], *, lr: float) -> None:
        import torch

        self._parameters = list(parameters)
        self._lr = lr
        self._adamw = torch.optim.AdamW(self._parameters, lr=lr, weight_decay=0.0)

    def step(self, *, lr_factor: float, sum_over_ranks: Callable[[list[float]], list[float]], world_size: int) -> None:
        """Take the gradients that `backward` left, summed over the ranks, and clear them. A gradient that is not finite
        is dropped."""
        import torch

        flat = [
            value
            for parameter in self._parameters
            for value in (torch.zeros_like(parameter) if parameter.grad is None else parameter.grad).flatten().tolist()
        ]
        # The backend multiplies the loss by the number of ranks, as the engine averages over them.
        summed = [value / world_size for value in sum_over_ranks(flat)]
        if all(map(math.isfinite, summed)):
            start = 0
            for parameter in self._parameters:
                values = summed[start : start + parameter.numel()]
                parameter.grad = torch.tensor(values, dtype=parameter.dtype, device=parameter.device).view_as(parameter)
                start += parameter.numel()
            for group in self._adamw.param_groups:
                group["lr"] = self._lr * lr_factor
            self._adamw.step()
        self.clear()

    def clear(self) -> None:
        """Drop the gradients, of a step that is skipped."""
        self._adamw.zero_grad(set_to_none=True)

    def state(self) -> list[dict[str, Any]]:
        """JSON-able, exact: one record per parameter."""
        return [
            {
                "value": parameter.detach().flatten().tolist(),
                "moments": {key: value.flatten().tolist() for key, value in self._adamw.state[parameter].items()},
            }
            for parameter in self._parameters
        ]

    def restore(self, state: list[dict[str, Any]]) -> None:
        """Raises ValueError for another number or another shape of parameters."""
        import torch

        if [len(record["value"]) for record in state] != [parameter.numel() for parameter in self._parameters]:
            raise ValueError(f"the checkpoint has {len(state)} parameters of an objective, not those of this one")
        with torch.no_grad():
            for parameter, record in zip(self._parameters, state, strict=True):
                parameter.copy_(torch.tensor(record["value"], dtype=parameter.dtype).view_as(parameter))
                moments = {key: torch.tensor(values) for key, values in record["moments"].items()}
                self._adamw.state[parameter] = {
                    key: value[0] if key == "step" else value.view_as(parameter).to(parameter.device)
                    for key, value in moments.items()
                }
