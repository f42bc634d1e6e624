"""Structured agent distillation (arXiv 2505.13820): thoughts by the teacher's distribution, acts by its tokens.

On tokens of `kl_spans` (thoughts) the loss is the divergence from the teacher's next-token distribution, KL(teacher ||
student) by default, over the ids that the teacher was asked about and the rest as one outcome
(`learner.objectives.divergence`). On code, answer and format tokens, and on every token for which the teacher gives no
log probabilities, it is cross entropy.

Weights per span are fixed or learned:

- "fixed": each token counts by its loss weight, so set them as `span_weights`.
- "learned": homoscedastic uncertainty weighting (arXiv 1705.07115, section 3.2): a parameter eta = log sigma^2 per span
  type, from 0, and exp(-eta) * loss + eta / 2 for each of its tokens; sigma^2 settles at twice the span's mean loss. A
  span whose loss stays high counts less. The parameters are trained with the student's (`parameters`).

TRL distils every completion token by one divergence, so nothing of it fits but the formula (see `divergence`).

Example::

    SpanObjective()                                     # the paper's: KL on thoughts, CE on acts
    SpanObjective(weights="learned", beta=0.5)          # Jensen-Shannon on thoughts, learned weights
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from torch import nn

from learner.examples import TRAINED_SPANS, Example, RefusedRow
from learner.objectives import ObjectiveLoss, TensorBatch, is_likeliest
from learner.objectives.divergence import divergence, with_rest
from learner.objectives.log_probs import log_probs
from learner.token_scores import ScoreKind


class SpanObjective:
    """`beta`: 0 is KL(teacher||student), 1 KL(student||teacher), between them generalized Jensen-Shannon. Raises
    ValueError."""

    name = "span"
    needs: frozenset[ScoreKind] = frozenset({"teacher"})
    falls_back = True
    successes_only = True

    def __init__(
        self,
        *,
        kl_spans: Sequence[str] = ("thought",),
        beta: float = 0.0,
        weights: Literal["fixed", "learned"] = "fixed",
    ) -> None:
        known = [span.value for span in TRAINED_SPANS]
        for span in kl_spans:
            if span not in known:
                raise ValueError(f"span objective: kl_spans names {span!r}; use {', '.join(known)}")
        if not 0 <= beta <= 1:
            raise ValueError(f"span objective: beta is {beta}; it must be in [0, 1]")
        if weights not in ("fixed", "learned"):
            raise ValueError(f"span objective: weights is {weights!r}; use 'fixed' or 'learned'")
        self.beta = beta
        self._by_divergence = torch.tensor([span in kl_spans for span in known])
        self.log_variances = nn.Parameter(torch.zeros(len(known))) if weights == "learned" else None
        """[span types] eta of each."""

    def parameters(self) -> tuple[nn.Parameter, ...]:
        return () if self.log_variances is None else (self.log_variances,)

    def fit(self, example: Example) -> Example | RefusedRow:
        return example

    def loss(self, logits: torch.Tensor, batch: TensorBatch) -> ObjectiveLoss:
        ids = batch.targets[:, None]
        if batch.teacher_ids is not None:
            ids = torch.cat([ids, batch.teacher_ids], -1)
        own = log_probs(logits, ids)
        per_token = -own[:, 0]
        soft = torch.zeros_like(batch.weights, dtype=torch.bool)
        if batch.teacher_ids is not None and batch.teacher_logprobs is not None:
            known = batch.teacher_ids >= 0
            student = with_rest(own[:, 1:], known)
            soft = known.any(-1) & self._by_divergence.to(logits.device)[batch.spans]
            teacher = with_rest(batch.teacher_logprobs, known)
            per_token = torch.where(soft, divergence(student, teacher, beta=self.beta), per_token)
        weighed = per_token
        if self.log_variances is not None:
            eta = self.log_variances.to(logits.device)[batch.spans]
            weighed = torch.exp(-eta) * per_token + eta / 2
        return ObjectiveLoss(
            total=(weighed * batch.weights).sum(),
            per_token=per_token.detach(),
            correct=is_likeliest(logits, batch.targets),
            metrics={"by_teacher": (soft & (batch.weights > 0)).sum()},
        )
