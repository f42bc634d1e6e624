"""The limit of the learner benchmarks: a bare PyTorch loop over micro-batches that lie in memory as tensors.

Forward, backward, clip and step, and nothing else: no source, no rendering, no planning, no metrics, no DeepSpeed. The
micro-batches are those that our planner makes of the same rows, the attention and the optimizer are ours, and the
vocabulary's product is taken at the trained positions alone. So the distance to it is what our machinery costs.

Example::

    measured = run(workload, BareSettings(optimizer="muon"), folder)
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.learner_ours import GRADIENT_CLIPPING, learner_config
from benchmarks.learner_world import BASE_STUDENT, Clock, Measured, Workload, rate_factor
from benchmarks.learner_world import validation_loss as loss_of
from learner.config import OptimizerName
from learner.examples import Example


@dataclass(frozen=True, slots=True, kw_only=True)
class BareSettings:
    optimizer: OptimizerName


@dataclass(frozen=True, slots=True, kw_only=True)
class _Step:
    """One optimizer step, ready."""

    micro_batches: tuple[tuple[Any, Any, Any, Any], ...]
    """input_ids [rows, width], selected [n], targets [n], weights [n]."""
    total_weight: float
    tokens: int
    trained: int


def run(workload: Workload, settings: BareSettings, folder: Path) -> Measured:
    """Train once; nothing is written to `folder`."""
    import torch
    from transformers import AutoModelForCausalLM

    from learner.attention import use_short_row_attention
    from learner.optimizers import MuonAdamW, parameter_groups

    config = learner_config(folder, optimizer=settings.optimizer, rows_per_step=workload.rows_per_step)
    torch.manual_seed(config.seed)
    model = AutoModelForCausalLM.from_pretrained(BASE_STUDENT, dtype=torch.float32)
    model.config.use_cache = False
    if not use_short_row_attention(model):
        raise RuntimeError("the base student's attention is not what the learner takes any more")
    model.train()
    decoder, head = model.get_decoder(), model.lm_head
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = MuonAdamW(parameter_groups(model, config))
    steps = list(_steps(workload.rows, workload.rows_per_step, config.micro_batch_tokens))
    clock, losses = Clock(), list[Any]()
    for i, step in enumerate(steps):
        for group in optimizer.param_groups:
            group["lr"] = group["base_lr"] * rate_factor(i)
        losses.append(0.0)
        for ids, selected, targets, weights in step.micro_batches:
            with torch.autocast("cpu", dtype=torch.bfloat16):
                hidden = decoder(input_ids=ids, attention_mask=None, use_cache=False).last_hidden_state
                logits = head(hidden.reshape(-1, hidden.shape[-1])[selected])
            nll = torch.nn.functional.cross_entropy(logits.float(), targets, reduction="none")
            loss = (nll * weights).sum() / step.total_weight
            loss.backward()
            losses[-1] += loss.detach()
        torch.nn.utils.clip_grad_norm_(parameters, GRADIENT_CLIPPING)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        clock.step()
    model.set_attn_implementation("sdpa")
    return clock.measured(
        tokens=[step.tokens for step in steps],
        trained=[step.trained for step in steps],
        losses=[float(loss) for loss in losses],
        validation_loss=loss_of(model, workload.held_out),
    )


def _steps(rows: Sequence[Example], rows_per_step: int, micro_batch_tokens: int) -> list[_Step]:
    import torch

    from learner.packing import plan_step

    steps = []
    for start in range(0, len(rows), rows_per_step):
        plan = plan_step(
            rows[start : start + rows_per_step], ranks=1, micro_batch_tokens=micro_batch_tokens,
            row_tokens=micro_batch_tokens, batching="bucketed",
        )  # fmt: skip
        steps.append(
            _Step(
                micro_batches=tuple(
                    (
                        torch.from_numpy(batch.input_ids), torch.from_numpy(batch.selected),
                        torch.from_numpy(batch.targets), torch.from_numpy(batch.weights),
                    )
                    for batch in plan.ranks[0]
                ),
                total_weight=plan.total_weight,
                tokens=plan.tokens,
                trained=plan.trained_tokens,
            )
        )  # fmt: skip
    return steps
