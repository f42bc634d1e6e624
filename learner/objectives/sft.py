"""Supervised fine-tuning: token-weighted cross entropy on what the teacher produced (arXiv 2505.17612, equation 2).

Not a sequence mean: every trained token counts by its weight, however long its row is.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from learner.objectives import ObjectiveLoss, TensorBatch

if TYPE_CHECKING:
    import torch


class SftObjective:
    """-log p(target), summed with the weights."""

    name = "sft"

    def loss(self, logits: torch.Tensor, batch: TensorBatch) -> ObjectiveLoss:
        from torch.nn.functional import cross_entropy

        nll = cross_entropy(logits.float(), batch.targets, reduction="none")
        return ObjectiveLoss(total=(nll * batch.weights).sum(), per_token=nll.detach())
