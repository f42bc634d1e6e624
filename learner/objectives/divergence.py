"""How far two policies' next-token distributions are apart, where one of them is known on a few ids alone.

A teacher is asked about k ids of each position, not about its vocabulary. Both distributions are taken over those k ids
and one more outcome, "any other token", which gets what the k leave (`with_rest`): so both sum to 1, the divergence is
never negative, it is 0 exactly where they agree on all of it, and it is a lower bound of that over the vocabulary,
equal to it when the ids are the vocabulary.

`divergence` is the generalized Jensen-Shannon divergence of arXiv 2306.13649, equation 1: with beta 0 it is
KL(teacher||student), with 1 KL(student||teacher). TRL has the same pieces (`_add_tail_bucket` and `_jsd_divergence` of
its server_distillation trainer), but private, experimental, copied from trainer to trainer, and importing a whole
trainer; its public `GKDTrainer.generalized_jsd_loss` takes the teacher's whole vocabulary and reduces over the batch.
So they are checked against (tests/test_objectives_trl.py), not imported.

Example::

    known = teacher_ids >= 0
    student = with_rest(log_probs(logits, teacher_ids), known)           # [n, k + 1]
    divergence(student, with_rest(teacher_logprobs, known), beta=0.0)  # [n]
"""

from __future__ import annotations

import math

import torch

LEAST = -50.0
"""The log p of what cannot happen: small enough to add nothing in float32, and finite, so that no gradient is NaN."""

LEAST_REST = 1e-7
"""The least probability that is left to other tokens; float32 cannot tell less from none. As in TRL."""


def with_rest(logprobs: torch.Tensor, known: torch.Tensor) -> torch.Tensor:
    """[n, k + 1]: `logprobs` [n, k] where `known`, nothing elsewhere, and last the log p of any other token."""
    kept = torch.where(known, logprobs, LEAST).clamp(min=LEAST)
    total = kept.logsumexp(-1, keepdim=True).clamp(max=math.log1p(-LEAST_REST))
    return torch.cat([kept, torch.log(-torch.expm1(total))], -1)


def divergence(student: torch.Tensor, teacher: torch.Tensor, *, beta: float) -> torch.Tensor:
    """[n] nats between log probabilities [n, outcomes]. `beta`: 0 KL(teacher||student), 1 KL(student||teacher)."""
    if beta == 0.0:
        return _kl(teacher, student)
    if beta == 1.0:
        return _kl(student, teacher)
    mixed = torch.logaddexp(student + math.log1p(-beta), teacher + math.log(beta))
    return beta * _kl(teacher, mixed) + (1.0 - beta) * _kl(student, mixed)


def _kl(p: torch.Tensor, q: torch.Tensor) -> torch.Tensor:
    return (p.exp() * (p - q)).sum(-1)
