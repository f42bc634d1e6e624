"""Log probabilities of a few tokens under logits over a large vocabulary, without a second copy of them in fp32.

A student of 150,000 tokens has 600 KB of fp32 logits for each trained position. `torch.nn.functional.cross_entropy` on
bf16 logits holds them in fp32 twice more, forward and backward: 12 bytes per logit at its peak. Here the softmax's sum
is taken in fp32 a few rows at a time, and the gradient written in the logits' own type: 4 bytes. The idea is that of
Liger's and TRL's chunked losses, which go further and do the head's product by chunks too, within their own trainers.

Example::

    nll = -log_probs(logits, targets[:, None])[:, 0]           # [n]
"""

from __future__ import annotations

from typing import Any

import torch

CHUNK_LOGITS = 2**25
"""Logits that are in fp32 at once: 128 MiB."""


def log_probs(logits: torch.Tensor, ids: torch.Tensor, *, chunk_logits: int = CHUNK_LOGITS) -> torch.Tensor:
    """[n, k] at least fp32: log p of `ids` [n, k] under `logits` [n, vocabulary]; meaningless where an id is -1."""
    found = _LogProbs.apply(logits, ids.clamp(min=0), max(1, chunk_logits // logits.shape[-1]))
    assert isinstance(found, torch.Tensor)
    return found


class _LogProbs(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, logits: torch.Tensor, ids: torch.Tensor, rows: int) -> torch.Tensor:
        kind = torch.promote_types(logits.dtype, torch.float32)
        whole = torch.cat([part.to(kind).logsumexp(-1, keepdim=True) for part in logits.split(rows)])
        ctx.rows = rows
        ctx.save_for_backward(logits, ids, whole)
        return logits.gather(-1, ids).to(kind) - whole

    @staticmethod
    def backward(ctx: Any, *grad_outputs: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        (grad,) = grad_outputs
        logits, ids, whole = ctx.saved_tensors
        found = torch.empty_like(logits)
        for start in range(0, len(logits), ctx.rows):
            at = slice(start, start + ctx.rows)
            part = (logits[at].to(grad.dtype) - whole[at]).exp_().mul_(-grad[at].sum(-1, keepdim=True))
            found[at] = part.scatter_add_(-1, ids[at], grad[at])
        return found, None, None
