"""Our divergences and GRPO against TRL's own functions, on the same numbers. Slow: importing TRL's trainers is."""

from __future__ import annotations

from collections import defaultdict
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from learner.group_advantages import group_advantages
from learner.objectives import TensorBatch, make_objective
from learner.objectives.divergence import divergence, with_rest

pytestmark = pytest.mark.slow

N, VOCABULARY, K = 11, 23, 4


def normal(*shape: int, seed: int) -> torch.Tensor:
    return 2 * torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("beta", [0.0, 0.3, 0.5, 1.0])
def test_over_the_whole_vocabulary_it_is_gkds_divergence(beta: float) -> None:
    from trl.experimental.gkd.gkd_trainer import GKDTrainer

    student, teacher = normal(N, VOCABULARY, seed=1).requires_grad_(), normal(N, VOCABULARY, seed=2)
    ours = divergence(student.log_softmax(-1), teacher.log_softmax(-1), beta=beta).mean()
    theirs = GKDTrainer.generalized_jsd_loss(student[None], teacher[None], torch.zeros(1, N), beta=beta)
    assert ours.item() == pytest.approx(theirs.item(), rel=1e-5)
    assert torch.allclose(*[torch.autograd.grad(loss, student)[0] for loss in (ours, theirs)], atol=1e-7)


@pytest.mark.parametrize("beta", [0.0, 0.3, 1.0])
def test_over_k_tokens_it_is_trls_with_its_tail_bucket(beta: float) -> None:
    from trl.experimental.server_distillation.server_distillation_trainer import _add_tail_bucket, _jsd_divergence

    student, teacher = (normal(N, VOCABULARY, seed=seed).log_softmax(-1) for seed in (3, 4))
    student.requires_grad_()
    top, ids = teacher.topk(K)
    known = torch.ones_like(ids, dtype=torch.bool)
    ours = divergence(with_rest(student.gather(-1, ids), known), with_rest(top, known), beta=beta)
    theirs_student, support = _add_tail_bucket(student.gather(-1, ids), known)
    theirs = _jsd_divergence(theirs_student, _add_tail_bucket(top, known)[0], beta, support).sum(-1)
    assert torch.allclose(ours, theirs, rtol=1e-5, atol=1e-7)
    assert torch.allclose(*[torch.autograd.grad(loss.sum(), student)[0] for loss in (ours, theirs)], atol=1e-6)


LENGTHS = [7, 3, 5, 6]
WIDTH = max(LENGTHS)


@pytest.mark.parametrize("kl_weight", [0.0, 0.07])
@pytest.mark.parametrize(
    ("loss_type", "options"),
    [
        ("dapo", {}),
        ("grpo", {"normalisation": "row"}),
        ("dr_grpo", {"normalisation": "constant", "max_row_tokens": 9}),
    ],
)
def test_grpo_is_trls(loss_type: str, options: dict[str, Any], kl_weight: float) -> None:
    from trl.trainer.grpo_trainer import GRPOTrainer

    mask = torch.tensor([[float(j < length) for j in range(WIDTH)] for length in LENGTHS])
    targets = torch.randint(VOCABULARY, mask.shape, generator=torch.Generator().manual_seed(5))
    logits = normal(*mask.shape, VOCABULARY, seed=6).requires_grad_()
    own = logits.log_softmax(-1).gather(-1, targets[..., None])[..., 0]
    behaviour = (own + 0.2 * normal(*mask.shape, seed=7)).detach().clamp(max=0)
    reference = (own + 0.3 * normal(*mask.shape, seed=8)).detach().clamp(max=0)
    advantages = normal(len(LENGTHS), seed=9)

    # As much of a trainer as its loss asks for.
    trainer = SimpleNamespace(
        _get_per_token_logps_and_entropies=lambda *args, **kwargs: (own, torch.zeros_like(own), None),
        _entropy_bonus_enabled=False,
        _metrics={"train": defaultdict(list)},
        accelerator=SimpleNamespace(num_processes=1, gather=lambda x: x, reduce=lambda x, reduction: x),
        args=SimpleNamespace(delta=None, use_bias_correction_kl=False, steps_per_generation=1),
        aux_loss_enabled=False,
        beta=kl_weight,
        current_gradient_accumulation_steps=1,
        epsilon_low=0.2,
        epsilon_high=0.28,
        importance_sampling_level="token",
        loss_type=loss_type,
        max_completion_length=9,
        model=SimpleNamespace(training=True),
        off_policy_mask_threshold=None,
        top_entropy_quantile=1.0,
        use_vllm=False,
    )
    theirs = GRPOTrainer._compute_loss(
        trainer,  # pyright: ignore[reportArgumentType]
        None,
        {
            "prompt_ids": targets[:, :1],
            "prompt_mask": mask[:, :1],
            "completion_ids": targets,
            "completion_mask": mask,
            "advantages": advantages,
            "old_per_token_logps": behaviour,
            "ref_per_token_logps": reference,
            "num_items_in_batch": mask.sum(),
        },
    )

    on = mask.bool()
    rows = torch.arange(len(LENGTHS))[:, None].expand(mask.shape)
    batch = TensorBatch(
        targets[on],
        torch.ones(sum(LENGTHS)),
        torch.zeros(sum(LENGTHS), dtype=torch.long),
        rows=rows[on],
        behaviour_logprobs=behaviour[on],
        advantages=advantages[:, None].expand(mask.shape)[on],
        teacher_ids=targets[on][:, None],
        teacher_logprobs=reference[on][:, None],
        step_weight=float(sum(LENGTHS)),
        step_rows=len(LENGTHS),
    )
    objective = make_objective("grpo", clip_low=0.2, clip_high=0.28, kl_weight=kl_weight, **options)
    result = objective.loss(logits[on], batch)
    ours = result.total / sum(LENGTHS)
    assert result.metrics["clipped"].item() > 0
    assert ours.item() == pytest.approx(theirs.item(), rel=1e-5)
    ours_gradient, theirs_gradient = (
        torch.autograd.grad(loss, logits, retain_graph=True)[0] for loss in (ours, theirs)
    )
    assert torch.allclose(ours_gradient, theirs_gradient, atol=1e-7)


@pytest.mark.parametrize("scale", [True, False])
def test_advantages_are_trls(scale: bool) -> None:
    from trl.trainer.utils import nanstd

    rewards = torch.tensor([[1.0, 0.0, 0.0, 1.0], [0.5, 0.5, 0.5, 0.5], [0.0, 0.0, 0.0, 1.0]])
    theirs = rewards - rewards.nanmean(dim=1, keepdim=True)
    if scale:
        theirs = theirs / (nanstd(rewards, dim=1)[:, None] + 1e-4)
    groups = [i for i in range(3) for _ in range(4)]
    assert group_advantages(rewards.flatten().tolist(), groups, scale=scale) == pytest.approx(theirs.flatten().tolist())
