"""Step-wise on-policy distillation (SOD, arXiv 2605.07725): `opd` that trusts the teacher less where they have drifted.

A small student's wrong tool call leads to states that the teacher would never be in, where what it says of tokens is
noise. So each step (turn) k of a row is weighted by how far student and teacher are apart in it compared with before:

    d_k = mean over the trained tokens of step k of |log p_student - log p_teacher|
    w_1 = 1,   w_k = min(prod_{u<k} d_u / d_{u+1}, 1 + delta)  =  min(d_1 / d_k, 1 + delta)

(the product telescopes). A step that drifts twice as far counts half; one that comes back counts at most 1 + delta. The
student is the present one, its log probabilities those of the same forward pass, without gradient. The weights scale
the losses, not what the sum is divided by.

TRL has no step-weighted distillation.
"""

from __future__ import annotations

from typing import Literal

import torch

from learner.objectives import TensorBatch
from learner.objectives.inputs import steps_of
from learner.objectives.opd import OpdObjective

LEAST_DIVERGENCE = 1e-6
"""Below it, a step counts as having none: two equal policies are weighted 1."""


class SodObjective(OpdObjective):
    """`delta`: how much more than 1 a step may count. Raises ValueError."""

    name = "sod"

    def __init__(
        self,
        *,
        delta: float = 0.2,
        estimator: Literal["sampled", "top_k"] = "sampled",
        max_ratio: float | None = None,
        beta: float = 1.0,
    ) -> None:
        super().__init__(estimator=estimator, max_ratio=max_ratio, beta=beta)
        if delta < 0:
            raise ValueError(f"sod objective: delta is {delta}; it must not be negative")
        self.delta = delta

    def step_weights(self, batch: TensorBatch, gap: torch.Tensor) -> torch.Tensor:
        of, drift, first = steps_of(batch, gap.abs())
        drift = drift.clamp(min=LEAST_DIVERGENCE)
        return (drift[first] / drift).clamp(max=1 + self.delta)[of]
