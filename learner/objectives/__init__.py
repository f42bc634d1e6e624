"""What a student is trained for: one file per method, each an `Objective`, found by name.

Example::

    objective = make_objective("sft")
    loss = objective.loss(logits, batch)       # loss.total is a sum; the trainer divides by the step's total weight
"""

from __future__ import annotations

from dataclasses import dataclass
from importlib import import_module
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    import torch

OBJECTIVES = {"sft": "learner.objectives.sft:SftObjective"}
"""Name -> where it is; imported when it is asked for."""


@dataclass(slots=True)
class TensorBatch:
    """A micro-batch on the device; n is the number of trained positions."""

    targets: torch.Tensor
    """[n] int64"""
    weights: torch.Tensor
    """[n] float32"""
    spans: torch.Tensor
    """[n] int64 indices into `learner.examples.TRAINED_SPANS`"""


@dataclass(slots=True)
class ObjectiveLoss:
    """What an objective makes of one micro-batch."""

    total: torch.Tensor
    """Scalar: sum over trained positions of weight * loss, with gradient."""
    per_token: torch.Tensor
    """[n] unweighted, detached: for the metrics per span type."""


class Objective(Protocol):
    """One training method."""

    name: str

    def loss(self, logits: torch.Tensor, batch: TensorBatch) -> ObjectiveLoss:
        """`logits`: [n, vocabulary] of the student at the trained positions."""
        ...


def make_objective(name: str) -> Objective:
    """The objective of that name. Raises ValueError, naming those there are."""
    if name not in OBJECTIVES:
        raise ValueError(f"objective is {name!r}; use one of {', '.join(map(repr, sorted(OBJECTIVES)))}")
    module, _, attribute = OBJECTIVES[name].partition(":")
    return getattr(import_module(module), attribute)()
