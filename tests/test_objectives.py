"""Every objective against numbers worked out here by hand, with `math` alone; and what rows each of them refuses."""

from __future__ import annotations

import dataclasses
import math
import pickle
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch
from learner_samples import trajectory

from learner.examples import TRAINED_SPANS, Example, Refusal, RefusedRow
from learner.group_advantages import AdvantageScorer, advantages_of, group_advantages
from learner.objectives import OBJECTIVES, Objective, TensorBatch, make_objective
from learner.objectives.divergence import divergence, with_rest
from learner.objectives.log_probs import log_probs
from learner.objectives.span import SpanObjective
from learner.packing import empty_micro_batch
from learner.token_scores import TokenScores
from rollout.trajectory import Failure, FailureClass, SpanType

LOG = math.log
NAN = math.nan
THOUGHT, CODE, ANSWER, FORMAT = range(4)

OUR_FAULT = Failure(failure_class=FailureClass.ENGINE, message="the engine died")

HALVES = [0.5, 0.25, 0.125, 0.125]
"""A student's probabilities of four tokens."""


class SameScores:
    """A scorer that can be pickled."""

    def __init__(self, scores: TokenScores) -> None:
        self.scores = scores

    def __call__(self, key: str, token_ids: tuple[int, ...]) -> TokenScores:
        return self.scores


def logits_of(rows: Sequence[Sequence[float]], shift: float = 3.0) -> torch.Tensor:
    """Logits whose softmax is `rows`: their logarithms, moved by a number that must not matter."""
    return (torch.tensor(rows, dtype=torch.float64).log() + shift).float().requires_grad_()


def batch_of(targets: list[int], weights: list[float] | None = None, **fields: Any) -> TensorBatch:
    n = len(targets)
    tensors = {
        "spans": torch.tensor(fields.pop("spans", [THOUGHT] * n)),
        "rows": torch.tensor(fields.pop("rows", [0] * n)),
        "turns": torch.tensor(fields.pop("turns", [0] * n)),
    }
    scalars = {name: fields.pop(name) for name in ("step_weight", "step_rows") if name in fields}
    tensors |= {name: torch.tensor(value) for name, value in fields.items()}
    return TensorBatch(torch.tensor(targets), torch.tensor(weights or [1.0] * n), **tensors, **scalars)


def gradient(objective: Objective, logits: torch.Tensor, batch: TensorBatch) -> torch.Tensor:
    (found,) = torch.autograd.grad(objective.loss(logits, batch).total, logits)
    return found


# -- log probabilities


def test_log_probs_are_those_of_the_softmax() -> None:
    found = log_probs(logits_of([HALVES] * 5), torch.tensor([[0, 2], [1, 1], [3, 0], [2, -1], [0, 1]]), chunk_logits=8)
    expected = [[LOG(2), LOG(8)], [LOG(4), LOG(4)], [LOG(8), LOG(2)], [LOG(8), None], [LOG(2), LOG(4)]]
    for row, numbers in zip(found.tolist(), expected, strict=True):
        assert [-x for x, y in zip(row, numbers, strict=True) if y] == pytest.approx(
            [y for y in numbers if y], rel=1e-6
        )


def test_the_gradient_of_log_probs_is_that_of_the_softmax() -> None:
    logits = torch.randn(5, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0)).requires_grad_()
    ids = torch.tensor([[0, 2], [1, 1], [3, 0], [2, 1], [0, 1]])  # one of them twice in a row
    assert torch.autograd.gradcheck(lambda x: log_probs(x, ids, chunk_logits=8), (logits,))


def test_log_probs_of_half_precision_logits_are_in_full() -> None:
    logits = (100 + torch.randn(3, 50, generator=torch.Generator().manual_seed(0))).bfloat16().requires_grad_()
    ids = torch.arange(150).reshape(3, 50) % 50
    found = log_probs(logits, ids)
    assert found.dtype == torch.float32
    assert torch.allclose(found, logits.float().log_softmax(-1), atol=1e-5)
    (gradient,) = torch.autograd.grad(found[:, 0].sum(), logits)
    assert gradient.dtype == torch.bfloat16
    wanted = torch.nn.functional.one_hot(ids[:, 0], 50) - logits.float().softmax(-1)
    assert torch.allclose(gradient.float(), wanted, rtol=0.01, atol=1e-4)


# -- divergences


def test_the_rest_is_what_the_ids_leave() -> None:
    logprobs = torch.tensor([[LOG(0.5), LOG(0.25)], [LOG(0.5), NAN]])
    whole = with_rest(logprobs, torch.tensor([[True, True], [True, False]])).exp()
    assert whole.tolist() == [pytest.approx([0.5, 0.25, 0.25]), pytest.approx([0.5, 0.0, 0.5])]


@pytest.mark.parametrize(
    ("beta", "expected"),
    [
        (0.0, 0.8 * LOG(0.8 / 0.5) + 0.2 * LOG(0.2 / 0.5)),
        (1.0, 0.5 * LOG(0.5 / 0.8) + 0.5 * LOG(0.5 / 0.2)),
        (
            0.5,
            0.5 * (0.8 * LOG(0.8 / 0.65) + 0.2 * LOG(0.2 / 0.35))
            + 0.5 * (0.5 * LOG(0.5 / 0.65) + 0.5 * LOG(0.5 / 0.35)),
        ),
        (
            0.25,  # the mixture is 3/4 student, 1/4 teacher
            0.25 * (0.8 * LOG(0.8 / 0.575) + 0.2 * LOG(0.2 / 0.425))
            + 0.75 * (0.5 * LOG(0.5 / 0.575) + 0.5 * LOG(0.5 / 0.425)),
        ),
    ],
)
def test_the_divergence_of_two_coins(beta: float, expected: float) -> None:
    student, teacher = torch.tensor([[0.5, 0.5]]).log(), torch.tensor([[0.8, 0.2]]).log()
    assert divergence(student, teacher, beta=beta).item() == pytest.approx(expected, rel=1e-5)
    assert divergence(student, student, beta=beta).item() == pytest.approx(0.0, abs=1e-7)


# -- sft and cot


@pytest.mark.parametrize("name", ["sft", "cot"])
def test_cross_entropy_is_summed_with_the_weights(name: str) -> None:
    logits = logits_of([HALVES, HALVES])
    batch = batch_of([0, 2], [1.0, 0.5], spans=[THOUGHT, ANSWER])
    result = make_objective(name).loss(logits, batch)
    assert result.total.item() == pytest.approx(LOG(2) + 0.5 * LOG(8), rel=1e-6)
    assert result.per_token.tolist() == pytest.approx([LOG(2), LOG(8)], rel=1e-6)
    assert result.correct is not None and result.correct.tolist() == [True, False]
    # p - onehot, times the weight
    assert gradient(make_objective(name), logits, batch).tolist() == [
        pytest.approx([-0.5, 0.25, 0.125, 0.125], abs=1e-6),
        pytest.approx([0.25, 0.125, -0.4375, 0.0625], abs=1e-6),
    ]


# -- span

TEACHER = {"teacher_ids": [[1, 0], [1, 0], [-1, -1]], "teacher_logprobs": [[LOG(0.5), LOG(0.25)]] * 2 + [[NAN, NAN]]}
KL = 0.5 * LOG(0.5 / 0.25) + 0.25 * LOG(0.25 / 0.5) + 0.25 * LOG(0.25 / 0.25)
"""Teacher 1/4, 1/2, rest 1/4; student (`HALVES`) 1/2, 1/4, rest 1/4."""


def test_span_takes_thoughts_from_the_teacher_and_acts_from_the_tokens() -> None:
    batch = batch_of([0, 0, 1], [2.0, 1.0, 1.0], spans=[THOUGHT, CODE, THOUGHT], **TEACHER)
    result = make_objective("span").loss(logits_of([HALVES] * 3), batch)
    assert result.per_token.tolist() == pytest.approx([KL, LOG(2), LOG(4)], rel=1e-5)  # the third: no teacher there
    assert result.total.item() == pytest.approx(2 * KL + LOG(2) + LOG(4), rel=1e-5)
    assert result.metrics["by_teacher"].item() == 1


def test_span_without_a_teacher_is_sft() -> None:
    batch = batch_of([0, 2, 1], spans=[THOUGHT, CODE, ANSWER])
    ours, plain = (make_objective(name).loss(logits_of([HALVES] * 3), batch) for name in ("span", "sft"))
    assert ours.per_token.tolist() == pytest.approx(plain.per_token.tolist(), rel=1e-6)


def test_span_moves_the_student_towards_the_teacher() -> None:
    logits = logits_of([HALVES])
    batch = batch_of([0], teacher_ids=[[1, 0]], teacher_logprobs=[[LOG(0.5), LOG(0.25)]])
    # d KL(t||s) / d logit = p_s - p_t, the rest's p_t (1/4) being spread as the student spreads it.
    assert gradient(make_objective("span"), logits, batch).tolist() == [
        pytest.approx([0.25, -0.25, 0.0, 0.0], abs=1e-6)
    ]


def test_span_with_learned_weights() -> None:
    objective = make_objective("span", weights="learned", kl_spans=[])
    (eta,) = objective.parameters()
    with torch.no_grad():
        eta[CODE] = LOG(2.0)
    batch = batch_of([0, 0, 2], [1.0, 3.0, 1.0], spans=[THOUGHT, CODE, CODE])
    result = objective.loss(logits_of([HALVES] * 3), batch)
    losses = [LOG(2), LOG(2), LOG(8)]
    expected = losses[0] + 3 * (losses[1] / 2 + LOG(2) / 2) + (losses[2] / 2 + LOG(2) / 2)
    assert result.total.item() == pytest.approx(expected, rel=1e-6)
    result.total.backward()
    assert eta.grad is not None
    # d/d eta = weight * (1/2 - exp(-eta) * loss)
    assert eta.grad.tolist() == pytest.approx(
        [0.5 - LOG(2), 3 * (0.5 - LOG(2) / 2) + (0.5 - LOG(8) / 2), 0.0, 0.0], rel=1e-5
    )


def test_learned_weights_settle_at_twice_the_mean_loss() -> None:
    objective = SpanObjective(weights="learned")
    eta = objective.log_variances
    assert eta is not None
    batch = batch_of([0, 2, 0], spans=[THOUGHT, CODE, CODE])
    settled = torch.tensor([LOG(2 * LOG(2)), LOG(LOG(8) + LOG(2)), 0.0, 0.0])
    totals = []
    for offset in (0.0, -0.1, 0.1):
        with torch.no_grad():
            eta.copy_(settled + offset)
        totals.append(objective.loss(logits_of([HALVES] * 3), batch).total)
    assert min(totals) is totals[0]
    with torch.no_grad():
        eta.copy_(settled)
    (slope,) = torch.autograd.grad(objective.loss(logits_of([HALVES] * 3), batch).total, eta)
    assert slope.tolist() == pytest.approx([0.0] * 4, abs=1e-6)


# -- opd and sod


def test_opd_weighs_the_sampled_token_by_what_the_teacher_thinks_of_it() -> None:
    batch = batch_of(
        [0, 2],
        [1.0, 2.0],
        behaviour_logprobs=[LOG(0.25), LOG(0.125)],
        teacher_ids=[[3, 0], [2, 1]],
        teacher_logprobs=[[LOG(0.9), LOG(0.1)], [LOG(0.5), LOG(0.3)]],
    )
    logits = logits_of([HALVES, HALVES])
    result = make_objective("opd").loss(logits, batch)
    # ratio 2, advantage log(0.1 / 0.25); ratio 1, advantage log(0.5 / 0.125)
    assert result.total.item() == pytest.approx(-2 * LOG(0.4) - 2 * LOG(4), rel=1e-5)
    assert result.per_token.tolist() == pytest.approx([LOG(0.5 / 0.1), LOG(0.125 / 0.5)], rel=1e-5)
    assert result.metrics["importance_ratio"].item() == pytest.approx(3.0, rel=1e-5)
    # -ratio * advantage * weight * (onehot - p)
    first, second = -2 * LOG(0.4), -2 * LOG(4)
    assert gradient(make_objective("opd"), logits, batch).tolist() == [
        pytest.approx([first * (1 - 0.5), -first * 0.25, -first * 0.125, -first * 0.125], rel=1e-4),
        pytest.approx([-second * 0.5, -second * 0.25, second * (1 - 0.125), -second * 0.125], rel=1e-4),
    ]
    truncated = make_objective("opd", max_ratio=1.5).loss(logits, batch)
    assert truncated.total.item() == pytest.approx(-1.5 * LOG(0.4) - 2 * LOG(4), rel=1e-5)


def test_the_sampled_estimator_has_the_gradient_of_the_reverse_kl_on_average() -> None:
    teacher = [0.1, 0.2, 0.3, 0.4]
    logits = logits_of([HALVES])
    kl = (logits.softmax(-1) * (logits.log_softmax(-1) - torch.tensor(teacher).log())).sum()
    (exact,) = torch.autograd.grad(kl, logits)
    mean = torch.zeros_like(exact)
    for token, p in enumerate(HALVES):  # every token that could be sampled, as often as it would be
        batch = batch_of(
            [token], behaviour_logprobs=[LOG(p)], teacher_ids=[[token]], teacher_logprobs=[[LOG(teacher[token])]]
        )
        mean += p * gradient(make_objective("opd"), logits, batch)
    assert mean[0].tolist() == pytest.approx(exact[0].tolist(), abs=1e-6)


def test_opd_over_k_tokens_is_the_reverse_kl_with_the_rest_as_one_outcome() -> None:
    batch = batch_of([0], teacher_ids=[[1, 0]], teacher_logprobs=[[LOG(0.5), LOG(0.1)]])
    result = make_objective("opd", estimator="top_k").loss(logits_of([HALVES]), batch)
    expected = 0.5 * LOG(0.5 / 0.1) + 0.25 * LOG(0.25 / 0.5) + 0.25 * LOG(0.25 / 0.4)
    assert result.total.item() == pytest.approx(expected, rel=1e-5)
    assert result.per_token.tolist() == pytest.approx([expected], rel=1e-5)


def test_sod_weighs_steps_by_how_far_they_drift_from_the_teacher() -> None:
    # |log p_s - log p_t| of the six tokens; p_s is 1/2 throughout
    gaps = [0.2, 0.4, 0.6, 0.15, 0.5, 0.5]
    turns, rows = [0, 0, 1, 2, 1, 3], [7, 7, 7, 7, 9, 9]
    signs = [1, -1, 1, 1, -1, 1]
    batch = batch_of(
        [0] * 6,
        rows=rows,
        turns=turns,
        behaviour_logprobs=[LOG(0.5)] * 6,
        teacher_ids=[[0]] * 6,
        teacher_logprobs=[[LOG(0.5) - sign * gap] for sign, gap in zip(signs, gaps, strict=True)],
    )
    result = make_objective("sod", delta=0.2).loss(logits_of([HALVES] * 6), batch)
    # row 7: d = 0.3, 0.6, 0.15, so w = 1, 1/2, min(0.3/0.6 * 0.6/0.15, 1.2); row 9: both 0.5, so 1 and 1
    weights = [1, 1, 0.5, 1.2, 1, 1]
    expected = sum(w * sign * gap for w, sign, gap in zip(weights, signs, gaps, strict=True))
    assert result.total.item() == pytest.approx(expected, rel=1e-4)
    assert result.metrics["step_weight"].item() == pytest.approx(sum(weights), rel=1e-4)
    plain = make_objective("opd").loss(logits_of([HALVES] * 6), batch)
    assert plain.total.item() == pytest.approx(sum(s * g for s, g in zip(signs, gaps, strict=True)), rel=1e-4)


# -- grpo

ROLLOUT = {
    "rows": [0, 0, 0, 1],
    "advantages": [2.0, 2.0, 2.0, -1.0],
    "behaviour_logprobs": [LOG(0.5), LOG(0.25), LOG(0.625), LOG(0.25)],
    "step_weight": 4.0,
    "step_rows": 2,
}
"""The student says 1/2 of every token: ratios 1, 2, 0.8 (advantage 2) and 2 (advantage -1)."""
SURROGATE = [-1.0 * 2, -1.3 * 2, -0.8 * 2, 2.0 * 1]
"""Clipped at 0.8 and 1.3: the second ratio; the last is not, as clipping would make a bad token look better."""


@pytest.mark.parametrize(
    ("options", "scale"),
    [
        ({}, [1, 1, 1, 1]),
        ({"normalisation": "row"}, [4 / 2 / 3] * 3 + [4 / 2]),
        ({"normalisation": "constant", "max_row_tokens": 10}, [4 / 20] * 4),
    ],
)
def test_grpo_is_the_clipped_surrogate(options: dict[str, Any], scale: list[float]) -> None:
    objective = make_objective("grpo", clip_high=0.3, **options)
    result = objective.loss(logits_of([HALVES] * 4), batch_of([0] * 4, **ROLLOUT))
    assert result.per_token.tolist() == pytest.approx(SURROGATE, rel=1e-5)
    assert result.total.item() == pytest.approx(sum(s * x for s, x in zip(scale, SURROGATE, strict=True)), rel=1e-5)
    assert result.metrics["clipped"].item() == 1


def test_a_clipped_token_has_no_gradient() -> None:
    logits = logits_of([HALVES] * 4)
    found = gradient(make_objective("grpo", clip_high=0.3), logits, batch_of([0] * 4, **ROLLOUT))
    assert found[1].tolist() == [0.0] * 4
    assert found[0].tolist() == pytest.approx([-2 * 0.5, 2 * 0.25, 2 * 0.125, 2 * 0.125], rel=1e-5)


def test_grpo_stays_near_a_reference() -> None:
    reference = {"teacher_ids": [[0]] * 4, "teacher_logprobs": [[LOG(0.25)]] * 4}
    objective = make_objective("grpo", clip_high=0.3, kl_weight=0.1)
    result = objective.loss(logits_of([HALVES] * 4), batch_of([0] * 4, **ROLLOUT, **reference))
    k3 = 0.5 - LOG(0.5) - 1
    assert result.per_token.tolist() == pytest.approx([x + 0.1 * k3 for x in SURROGATE], rel=1e-5)
    assert objective.needs == {"advantage", "behaviour", "teacher"}


def test_advantages_compare_a_rollout_with_its_group() -> None:
    rewards, groups = [1.0, 5.0, 0.0, 1.0, 0.5], ["a", "b", "a", "a", "b"]
    plain = group_advantages(rewards, groups, scale=False)
    assert plain == pytest.approx([1 / 3, 2.25, -2 / 3, 1 / 3, -2.25])
    a, b = math.sqrt((1 / 9 + 4 / 9 + 1 / 9) / 2) + 1e-4, math.sqrt(2 * 2.25**2) + 1e-4
    assert group_advantages(rewards, groups) == pytest.approx([1 / 3 / a, 2.25 / b, -2 / 3 / a, 1 / 3 / a, -2.25 / b])
    assert group_advantages([1, 1, 3], ["a", "a", "alone"]) == [0.0, 0.0, 0.0]
    with pytest.raises(ValueError, match="2 rewards for 1 groups"):
        group_advantages([1, 2], ["a"])


def test_a_group_is_one_tasks_rollouts_by_one_policy() -> None:
    base = trajectory(1)
    rollouts = [
        dataclasses.replace(base, key="a", policy="s", weights_version="3", reward=1.0),
        dataclasses.replace(base, key="b", policy="s", weights_version="3", reward=0.0),
        dataclasses.replace(base, key="older", policy="s", weights_version="2", reward=0.0),
        dataclasses.replace(trajectory(2), key="other task", policy="s", weights_version="3", reward=0.0),
        dataclasses.replace(base, key="broken", policy="s", weights_version="3", failure=OUR_FAULT),
    ]
    advantages = advantages_of(rollouts, scale=False)
    assert advantages == {"a": 0.5, "b": -0.5, "older": 0.0, "other task": 0.0}
    reference = TokenScores(**TEACHER_ROW)
    scorer = pickle.loads(pickle.dumps(AdvantageScorer(advantages, SameScores(reference))))
    assert scorer("a", (1,)) == dataclasses.replace(reference, advantage=0.5)
    assert scorer("broken", (1,)) == reference and AdvantageScorer(advantages)("broken", (1,)) is None


# -- what all of them promise

SCORES = {
    "behaviour_logprobs": [LOG(0.3), LOG(0.4), NAN],
    "teacher_ids": [[0, 1], [2, 3], [-1, -1]],
    "teacher_logprobs": [[LOG(0.5), LOG(0.1)], [LOG(0.2), LOG(0.7)], [NAN, NAN]],
    "advantages": [1.0, -0.5, NAN],
    "step_weight": 3.0,
    "step_rows": 2,
    "rows": [0, 0, 1],
}


@pytest.mark.parametrize("name", sorted(OBJECTIVES))
def test_a_position_without_weight_changes_nothing_even_without_scores(name: str) -> None:
    objective = make_objective(name)
    logits = logits_of([HALVES] * 3)
    with_it = objective.loss(logits, batch_of([0, 2, 1], [1.0, 2.0, 0.0], **SCORES))
    shorter = {key: value[:2] if isinstance(value, list) else value for key, value in SCORES.items()}
    without = objective.loss(logits_of([HALVES] * 2), batch_of([0, 2], [1.0, 2.0], **shorter))
    assert with_it.total.item() == pytest.approx(without.total.item(), rel=1e-6)
    assert {k: v.item() for k, v in with_it.metrics.items()} == {k: v.item() for k, v in without.metrics.items()}
    (found,) = torch.autograd.grad(with_it.total, logits)
    assert found[2].tolist() == [0.0] * 4


@pytest.mark.parametrize("name", sorted(OBJECTIVES))
def test_an_empty_micro_batch_weighs_nothing_and_has_the_same_metrics(name: str) -> None:
    objective = make_objective(name)
    logits = logits_of([HALVES])
    result = objective.loss(logits, TensorBatch.of(empty_micro_batch(), torch.from_numpy))
    result.total.backward()
    assert result.total.item() == 0.0 and logits.grad is not None and not logits.grad.any()
    full = objective.loss(logits_of([HALVES] * 3), batch_of([0, 2, 1], [1.0, 2.0, 0.0], **SCORES))
    assert result.metrics.keys() == full.metrics.keys() and not any(result.metrics.values())


@pytest.mark.parametrize(
    ("name", "missing", "message"),
    [
        ("opd", "behaviour_logprobs", "1 of 2 trained positions have no behaviour_logprobs"),
        ("sod", "teacher_logprobs", "2 of 2 trained positions have no the teacher's log probability"),
        ("grpo", "advantages", "1 of 2 trained positions have no advantages"),
    ],
)
def test_a_batch_without_the_scores_is_an_error(name: str, missing: str, message: str) -> None:
    fields = {**SCORES, "behaviour_logprobs": [LOG(0.3), NAN, NAN], "advantages": [NAN, 1.0, NAN]}
    if missing == "teacher_logprobs":
        fields = {**SCORES, "teacher_ids": None, "teacher_logprobs": None}
    fields = {key: value for key, value in fields.items() if value is not None}
    with pytest.raises(ValueError, match=message):
        make_objective(name).loss(logits_of([HALVES] * 3), batch_of([0, 2, 1], [1.0, 1.0, 0.0], **fields))


def test_an_unknown_objective_or_option_names_those_there_are() -> None:
    with pytest.raises(ValueError, match="objective is 'spam'; use one of 'cot', 'grpo', 'opd', 'sft', 'sod', 'span'"):
        make_objective("spam")
    with pytest.raises(ValueError, match="objective 'sod' has no option 'beat'; there are 'delta', 'estimator'"):
        make_objective("sod", beat=1)
    with pytest.raises(ValueError, match="objective 'sft' has no option 'beta'; there are none"):
        make_objective("sft", beta=1)


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("span", {"beta": 2}, "beta is 2; it must be in"),
        ("span", {"kl_spans": ["thoughts"]}, "kl_spans names 'thoughts'; use thought, code, answer, format"),
        ("span", {"weights": "free"}, "weights is 'free'; use 'fixed' or 'learned'"),
        ("opd", {"estimator": "full"}, "opd objective: estimator is 'full'; use 'sampled' or 'top_k'"),
        ("opd", {"max_ratio": 0.5}, "max_ratio is 0.5; it must be at least 1"),
        ("sod", {"delta": -1}, "delta is -1; it must not be negative"),
        ("grpo", {"clip_low": 1.5}, "use 0 < clip_low < 1"),
        ("grpo", {"normalisation": "constant"}, "max_row_tokens is None with normalisation 'constant'"),
        ("grpo", {"max_row_tokens": 5}, "max_row_tokens is 5 with normalisation 'token'"),
    ],
)
def test_an_option_that_cannot_work_is_named(name: str, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make_objective(name, **options)


# -- rows


def test_what_imitates_its_rows_wants_them_right() -> None:
    assert {name for name in OBJECTIVES if make_objective(name).successes_only} == {"sft", "cot", "span"}


N = 6
TEACHER_ROW = {
    "teacher_ids": np.array([[-1], [-1], [12], [13], [14], [15]], np.int32),
    "teacher_logprobs": np.array([[NAN], [NAN], [-1], [-1], [-1], [-1]], np.float32),
}
BEHAVIOUR = np.array([NAN, NAN, -1, -1, -1, NAN], np.float32)
"""The last token, a stop token, was not sampled."""


def row(scores: TokenScores | None = None, span: SpanType = SpanType.THOUGHT) -> Example:
    spans = (SpanType.USER,) * 2 + (span,) * 3 + (SpanType.FORMAT,)
    return Example("k", "t", "arithmetic", tuple(range(10, 16)), spans, (0.0, 0.0, 1.0, 1.0, 1.0, 1.0), scores=scores)


def refusal(name: str, example: Example, **options: Any) -> str:
    fitted = make_objective(name, **options).fit(example)
    assert isinstance(fitted, RefusedRow) and fitted.key == "k" and fitted.reason in (Refusal.SCORES, Refusal.OBJECTIVE)
    return fitted.detail


@pytest.mark.parametrize("name", ["sft", "span", "cot"])
def test_rows_without_scores_are_trained_where_cross_entropy_will_do(name: str) -> None:
    assert make_objective(name).fit(row()) == row() and make_objective(name).falls_back


@pytest.mark.parametrize(
    ("name", "scores", "reason"),
    [
        ("opd", None, "it has no scores; its objective needs behaviour, teacher"),
        ("opd", TokenScores(behaviour_logprobs=BEHAVIOUR), "it has no teacher scores"),
        ("sod", TokenScores(**TEACHER_ROW), "it has no behaviour scores"),
        ("grpo", TokenScores(behaviour_logprobs=BEHAVIOUR), "it has no advantage scores"),
        ("grpo", TokenScores(behaviour_logprobs=BEHAVIOUR, advantage=NAN), "its advantage is nan"),
        (
            "opd",
            TokenScores(
                behaviour_logprobs=BEHAVIOUR,
                teacher_ids=TEACHER_ROW["teacher_ids"] + (TEACHER_ROW["teacher_ids"] == 13),
                teacher_logprobs=TEACHER_ROW["teacher_logprobs"],
            ),
            "1 of its 3 trained tokens have no log probability of the teacher",
        ),
        ("grpo", TokenScores(behaviour_logprobs=BEHAVIOUR[:4], advantage=1.0), "its scores are of 4 tokens, it has 6"),
        (
            "grpo",
            TokenScores(behaviour_logprobs=np.full(N, NAN, np.float32), advantage=1.0),
            "no trained token has a behaviour log probability",
        ),
    ],
)
def test_a_row_that_lacks_scores_is_refused_with_its_reason(name: str, scores: TokenScores | None, reason: str) -> None:
    assert refusal(name, row(scores)) == reason


def test_a_token_that_was_not_sampled_is_only_read() -> None:
    scores = TokenScores(behaviour_logprobs=BEHAVIOUR, **TEACHER_ROW)
    fitted = make_objective("opd").fit(row(scores))
    assert isinstance(fitted, Example)
    assert fitted.loss_weights == (0.0, 0.0, 1.0, 1.0, 1.0, 0.0) and fitted.scores is scores
    by_k = row(TokenScores(**TEACHER_ROW))
    assert make_objective("opd", estimator="top_k").fit(by_k) is by_k


def test_an_agents_row_is_no_chain_of_thought() -> None:
    assert refusal("cot", row(span=SpanType.CODE)) == "1 turns with 3 tokens of code are no chain of thought"
    two = dataclasses.replace(row(), turns=(-1, -1, 0, 0, -1, 1))
    assert refusal("cot", two) == "2 turns with 0 tokens of code are no chain of thought"


# -- scores


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"teacher_ids": TEACHER_ROW["teacher_ids"]}, "belong together"),
        ({**TEACHER_ROW, "teacher_ids": TEACHER_ROW["teacher_ids"][:3]}, r"is \(3, 1\) and teacher_logprobs \(6, 1\)"),
        ({**TEACHER_ROW, "teacher_ids": TEACHER_ROW["teacher_ids"] * 0}, "must be -1 exactly where"),
        ({"behaviour_logprobs": np.array([0.5], np.float32)}, "behaviour_logprobs has 0.5"),
        ({**TEACHER_ROW, "behaviour_logprobs": BEHAVIOUR[:2]}, "scores 2 tokens, teacher_ids 6"),
    ],
)
def test_scores_that_do_not_fit_together_are_an_error(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        TokenScores(**fields)


def test_scores_are_equal_when_their_numbers_are() -> None:
    one = TokenScores(behaviour_logprobs=BEHAVIOUR, advantage=1.0)
    assert one == TokenScores(behaviour_logprobs=BEHAVIOUR.copy(), advantage=1.0)
    assert one != TokenScores(behaviour_logprobs=BEHAVIOUR, advantage=2.0) and one != TokenScores(**TEACHER_ROW)
    assert len({one, TokenScores(behaviour_logprobs=BEHAVIOUR.copy(), advantage=1.0)}) == 1
    assert one.has == {"behaviour", "advantage"} and one.tokens == N


def test_span_types_have_the_order_that_the_tests_count_on() -> None:
    assert [span.value for span in TRAINED_SPANS] == ["thought", "code", "answer", "format"]
