"""Supervised fine-tuning: token-weighted cross entropy on what the teacher produced (arXiv 2505.17612, equation 2).

Not a sequence mean: every trained token counts by its weight, however long its row is. TRL's `SFTTrainer` has the same
loss inside its trainer ("nll", divided by the step's number of trained tokens), without weights.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from learner.objectives import ObjectiveLoss, TensorBatch, is_likeliest

if TYPE_CHECKING:
    import torch

    from learner.examples import Example, RefusedRow
    from learner.token_scores import ScoreKind


class SftObjective:
    """-log p(target), summed with the weights."""

    name = "sft"
    needs: frozenset[ScoreKind] = frozenset()
    falls_back = True
    successes_only = True

    def parameters(self) -> tuple[()]:
        return ()

    def fit(self, example: Example) -> Example | RefusedRow:
        return example

    def loss(self, logits: torch.Tensor, batch: TensorBatch) -> ObjectiveLoss:
        if logits.is_cuda:  # where vocabularies are large and memory is short
            from learner.objectives.log_probs import log_probs

            nll = -log_probs(logits, batch.targets[:, None])[:, 0]
        else:
            from torch.nn.functional import cross_entropy

            logits = logits.float()
            nll = cross_entropy(logits, batch.targets, reduction="none")
        return ObjectiveLoss(
            total=(nll * batch.weights).sum(), per_token=nll.detach(), correct=is_likeliest(logits, batch.targets)
        )
