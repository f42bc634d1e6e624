"""On-policy distillation: the student is moved towards the teacher on tokens that the student itself sampled.

What is made smaller is the reverse KL, KL(student || teacher), at each sampled token given what came before it (not
through what comes after: a discount of 0). Two estimators of it:

- "sampled": from the sampled token alone, as Thinking Machines' "On-Policy Distillation" does: the advantage of a token
  is log p_teacher - log p_behaviour, held constant, and the loss is -(p_student / p_behaviour) * advantage. On fresh
  rollouts its gradient is an unbiased estimate of the reverse KL's; `max_ratio` truncates the importance ratio on
  rollouts of older weights (None: not at all). Needs the behaviour's log probability and the teacher's of each token.
- "top_k": the divergence itself over the ids that the teacher was asked about and the rest as one outcome
  (`learner.objectives.divergence`), with an exact gradient and no ratio: less noise, if the teacher's k ids hold most
  of what the student would say. `beta` 1 is the reverse KL; others are GKD's generalized JSD (arXiv 2306.13649).

TRL's `DistillationTrainer` and `GKDTrainer` are the "top_k" kind over the whole vocabulary, each inside a trainer that
also samples; here sampling and scoring are somebody else's, so the formula alone is ours.

Example::

    OpdObjective()                                  # sampled-token estimator
    OpdObjective(estimator="top_k", beta=1.0)
"""

from __future__ import annotations

from typing import Literal

import torch

from learner.objectives import ObjectiveLoss, TensorBatch, is_likeliest
from learner.objectives.divergence import divergence, with_rest
from learner.objectives.inputs import OnScores, needed, teacher_own
from learner.objectives.log_probs import log_probs
from learner.token_scores import ScoreKind


class OpdObjective(OnScores):
    """See the module. Raises ValueError."""

    name = "opd"
    falls_back = False
    successes_only = False

    def __init__(
        self,
        *,
        estimator: Literal["sampled", "top_k"] = "sampled",
        max_ratio: float | None = None,
        beta: float = 1.0,
    ) -> None:
        if estimator not in ("sampled", "top_k"):
            raise ValueError(f"{self.name} objective: estimator is {estimator!r}; use 'sampled' or 'top_k'")
        if max_ratio is not None and max_ratio < 1:
            raise ValueError(f"{self.name} objective: max_ratio is {max_ratio}; it must be at least 1, or null")
        if not 0 <= beta <= 1:
            raise ValueError(f"{self.name} objective: beta is {beta}; it must be in [0, 1]")
        self.estimator, self.max_ratio, self.beta = estimator, max_ratio, beta
        kinds: tuple[ScoreKind, ...] = ("teacher", "behaviour") if estimator == "sampled" else ("teacher",)
        self.needs = frozenset(kinds)

    def loss(self, logits: torch.Tensor, batch: TensorBatch) -> ObjectiveLoss:
        teacher = teacher_own(batch)
        ids = batch.targets[:, None]
        if self.estimator == "top_k" and batch.teacher_ids is not None:
            ids = torch.cat([ids, batch.teacher_ids], -1)
        asked = log_probs(logits, ids)
        own = asked[:, 0]
        ratio = torch.ones_like(own)
        if self.estimator == "sampled":
            behaviour = needed(batch, "behaviour_logprobs")
            ratio = torch.exp(own - behaviour)
            if self.max_ratio is not None:
                ratio = ratio.clamp(max=self.max_ratio)
            losses = -ratio * (teacher - behaviour)
        elif batch.teacher_ids is None or batch.teacher_logprobs is None:
            losses = own * 0.0  # nothing is trained here: `teacher_own` would have raised
        else:
            known = batch.teacher_ids >= 0
            student = with_rest(asked[:, 1:], known)
            losses = divergence(student, with_rest(batch.teacher_logprobs, known), beta=self.beta)
        gap = (own - teacher).detach()
        weights = batch.weights * self.step_weights(batch, gap)
        trained = batch.weights > 0
        return ObjectiveLoss(
            total=torch.where(trained, losses * weights, 0.0).sum(),
            per_token=gap if self.estimator == "sampled" else losses.detach(),
            correct=is_likeliest(logits, batch.targets),
            metrics={
                "teacher_gap": torch.where(trained, gap.abs(), 0.0).sum(),
                "importance_ratio": torch.where(trained, ratio.detach(), 0.0).sum(),
                "step_weight": torch.where(trained, weights / batch.weights, 0.0).sum(),
            },
        )

    def step_weights(self, batch: TensorBatch, gap: torch.Tensor) -> torch.Tensor:
        """[n] further weights of the positions; `gap` [n] is log p_student - log p_teacher, without gradient."""
        return torch.ones_like(gap)
