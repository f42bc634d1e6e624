"""Group relative policy optimization (arXiv 2402.03300): a policy gradient on the student's own rollouts.

Per token, with r = p_student / p_behaviour and the row's advantage A (`learner.group_advantages`):

    -min(r * A, clip(r, 1 - clip_low, 1 + clip_high) * A)  +  kl_weight * (exp(q) - q - 1)

with q = log p_reference - log p_student. `clip_high` above `clip_low` is DAPO's "clip higher" (arXiv 2503.14476). The
KL term, off by default, is Schulman's k3 estimator against a reference policy, whose log probabilities come in the
teacher's place. What the sum is divided by (`normalisation`):

- "token": the step's trained tokens (DAPO): the trainer does that already, so a long row counts more;
- "row": each row's own tokens, then the number of rows (GRPO as first published): a long wrong row is blamed less;
- "constant": rows * `max_row_tokens`, the same for every row and step (Dr. GRPO, arXiv 2503.20783).

TRL's `GRPOTrainer._compute_loss` is this formula tied to its trainer's rollouts, padding and gradient accumulation, so
it is checked against (tests/test_objectives_trl.py), not called.

Example::

    GrpoObjective(clip_high=0.28)                                         # DAPO
    GrpoObjective(normalisation="constant", max_row_tokens=2048)          # Dr. GRPO, with unscaled advantages
"""

from __future__ import annotations

from typing import Literal

import torch

from learner.objectives import ObjectiveLoss, TensorBatch, is_likeliest
from learner.objectives.inputs import OnScores, needed, teacher_own
from learner.objectives.log_probs import log_probs
from learner.token_scores import ScoreKind


class GrpoObjective(OnScores):
    """See the module. Raises ValueError."""

    name = "grpo"
    falls_back = False
    successes_only = False

    def __init__(
        self,
        *,
        clip_low: float = 0.2,
        clip_high: float = 0.2,
        kl_weight: float = 0.0,
        normalisation: Literal["token", "row", "constant"] = "token",
        max_row_tokens: int | None = None,
    ) -> None:
        if not 0 < clip_low < 1 or clip_high <= 0:
            raise ValueError(
                f"grpo objective: clip_low is {clip_low} and clip_high {clip_high}; use 0 < clip_low < 1, clip_high > 0"
            )
        if kl_weight < 0:
            raise ValueError(f"grpo objective: kl_weight is {kl_weight}; it must not be negative")
        if normalisation not in ("token", "row", "constant"):
            raise ValueError(f"grpo objective: normalisation is {normalisation!r}; use 'token', 'row' or 'constant'")
        if (normalisation == "constant") != (max_row_tokens is not None) or (max_row_tokens or 1) < 1:
            raise ValueError(
                f"grpo objective: max_row_tokens is {max_row_tokens} with normalisation {normalisation!r}; "
                "'constant' takes a number above 0, the others none"
            )
        self.clip_low, self.clip_high, self.kl_weight = clip_low, clip_high, kl_weight
        self.normalisation, self.max_row_tokens = normalisation, max_row_tokens
        kinds: tuple[ScoreKind, ...] = ("advantage", "behaviour", *(("teacher",) if kl_weight else ()))
        self.needs = frozenset(kinds)

    def loss(self, logits: torch.Tensor, batch: TensorBatch) -> ObjectiveLoss:
        trained = batch.weights > 0
        own = log_probs(logits, batch.targets[:, None])[:, 0]
        advantage = needed(batch, "advantages")
        ratio = torch.exp(own - needed(batch, "behaviour_logprobs"))
        kept = ratio.clamp(1 - self.clip_low, 1 + self.clip_high)
        losses = -torch.minimum(ratio * advantage, kept * advantage)
        clipped = trained & (kept * advantage < ratio * advantage)
        if self.kl_weight:
            gap = teacher_own(batch) - own
            losses = losses + self.kl_weight * (torch.exp(gap) - gap - 1)
        return ObjectiveLoss(
            total=torch.where(trained, losses * batch.weights * self._scale(batch), 0.0).sum(),
            per_token=losses.detach(),
            correct=is_likeliest(logits, batch.targets),
            metrics={
                "clipped": clipped.sum(),
                "importance_ratio": torch.where(trained, ratio.detach(), 0.0).sum(),
            },
        )

    def _scale(self, batch: TensorBatch) -> torch.Tensor:
        """[n] what turns the division by the step's weight, which the trainer does, into the wanted one."""
        ones = torch.ones_like(batch.weights)
        if self.normalisation == "token" or batch.step_weight is None:  # no step's weight: nothing is trained here
            return ones
        if batch.rows is None or not batch.step_rows:
            raise ValueError(f"grpo objective: normalisation {self.normalisation!r} needs to know the step's rows")
        if self.max_row_tokens is not None:
            return ones * (batch.step_weight / (batch.step_rows * self.max_row_tokens))
        rows, of = torch.unique(batch.rows, return_inverse=True)
        of_row = batch.weights.new_zeros(len(rows)).index_add(0, of, batch.weights)  # whole: rows are never split
        return batch.step_weight / (batch.step_rows * of_row[of])
