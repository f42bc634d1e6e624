"""Packed examples do not see one another, whichever attention runs them; and what a step's plan makes of a loss does
not depend on ranks, micro-batches or packing."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from learner_samples import save_tiny_student

from learner.attention import use_short_row_attention
from learner.examples import TRAINED_SPANS, Example
from learner.objectives import TensorBatch, make_objective
from learner.packed_attention import use_packed_attention
from learner.packing import plan_step
from learner.token_scores import TokenScores
from rollout.trajectory import SpanType

VOCABULARY = 3072
LENGTHS = [37, 21, 44, 12, 30, 9, 51]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_student(tmp_path_factory.mktemp("student"))


@functools.cache
def load(folder: Path, attention: str) -> Any:
    from transformers import AutoModelForCausalLM

    own = attention in ("packed", "short_rows")
    model = AutoModelForCausalLM.from_pretrained(
        folder, attn_implementation="sdpa" if own else attention, dtype=torch.float32
    )
    if attention == "packed":
        assert use_packed_attention(model, device=torch.device("cpu"), half=False)
    if attention == "short_rows":
        assert use_short_row_attention(model)
    return model.train()


def example(i: int, length: int) -> Example:
    """Two turns, each with every span type; scores of a policy and a teacher made up from the example's number."""
    rng = np.random.default_rng(1000 * i + length)
    ids = rng.integers(5, VOCABULARY, length)
    types = [SpanType.USER] * length
    turns = [-1] * length
    for turn, start in enumerate((length // 4, length // 2 + 1)):
        for j in range(start, start + length // 4):
            types[j], turns[j] = TRAINED_SPANS[(i + j) % 4], turn
    weights = tuple((1.0, 0.5, 2.0)[j % 3] if turns[j] >= 0 else 0.0 for j in range(length))
    others = rng.integers(5, VOCABULARY, (length, 3))
    others[others == ids[:, None]] = 4
    probabilities = rng.dirichlet(np.ones(5), length)[:, :4]
    scores = TokenScores(
        behaviour_logprobs=(-8 + rng.normal(0, 0.3, length)).clip(max=0).astype(np.float32),
        teacher_ids=np.concatenate([ids[:, None], others], 1).astype(np.int32),
        teacher_logprobs=np.log(probabilities).astype(np.float32),
        advantage=float(rng.normal()),
    )
    return Example(
        f"key-{i}", f"task-{i}", "fact", tuple(map(int, ids)), tuple(types), weights, turns=tuple(turns), scores=scores
    )


def hidden_of(model: Any, input_ids: torch.Tensor, positions: torch.Tensor | None) -> torch.Tensor:
    """[rows, width, hidden size]"""
    return run(model, model.get_input_embeddings()(input_ids), positions)


def run(model: Any, embedded: torch.Tensor, positions: torch.Tensor | None) -> torch.Tensor:
    decoder = model.get_decoder()
    return decoder(
        inputs_embeds=embedded, position_ids=positions, attention_mask=None, use_cache=False
    ).last_hidden_state


# -- nothing crosses over


@pytest.mark.parametrize("attention", ["sdpa", "eager", "packed"])
def test_attention_across_packed_examples_is_zero(folder: Path, attention: str) -> None:
    """One example's tokens are all changed: no bit of another's hidden states changes, before or behind it."""
    model = load(folder, attention)
    rows = [example(i, length) for i, length in enumerate(LENGTHS)]
    plan = plan_step(rows, ranks=1, micro_batch_tokens=240, row_tokens=120, batching="packed")
    (batch,) = plan.ranks[0]
    assert batch.position_ids is not None and batch.input_ids.shape[0] == 2
    starts = np.flatnonzero(batch.position_ids.reshape(-1) == 0)
    ids, positions = torch.from_numpy(batch.input_ids), torch.from_numpy(batch.position_ids)
    with torch.no_grad():
        before = hidden_of(model, ids, positions).reshape(-1, 64)
        for start, end in zip(starts, [*starts[1:], ids.numel()], strict=True):
            other = ids.clone().reshape(-1)
            other[start:end] = (other[start:end] + 7) % VOCABULARY
            after = hidden_of(model, other.reshape(ids.shape), positions).reshape(-1, 64)
            same = (after == before).all(-1)
            assert same[:start].all() and same[end:].all() and not same[start:end].any()


@pytest.mark.parametrize("attention", ["sdpa", "eager", "packed"])
def test_no_gradient_crosses_packed_examples(folder: Path, attention: str) -> None:
    model = load(folder, attention)
    ids = torch.randint(5, VOCABULARY, (2, 40), generator=torch.Generator().manual_seed(1))
    positions = torch.stack([torch.cat([torch.arange(25), torch.arange(15)]), torch.arange(40)])
    embedded = model.get_input_embeddings()(ids).detach().requires_grad_()
    (found,) = torch.autograd.grad(run(model, embedded, positions)[0, 25:].square().sum(), embedded)
    touched = found.abs().sum(-1) > 0
    assert touched[0, 25:].all() and not touched[0, :25].any() and not touched[1].any()


@pytest.mark.parametrize("attention", ["sdpa", "eager", "packed"])
def test_a_packed_example_comes_out_as_it_does_alone(folder: Path, attention: str) -> None:
    model, alone = load(folder, attention), load(folder, "sdpa")
    rows = [example(i, length) for i, length in enumerate(LENGTHS)]
    plan = plan_step(rows, ranks=1, micro_batch_tokens=240, row_tokens=120, batching="packed")
    (batch,) = plan.ranks[0]
    assert batch.position_ids is not None
    with torch.no_grad():
        packed = hidden_of(model, torch.from_numpy(batch.input_ids), torch.from_numpy(batch.position_ids))
        for row in rows:
            ids = torch.tensor([row.token_ids])
            flat = batch.input_ids.reshape(-1)
            start = next(i for i in range(len(flat)) if tuple(flat[i : i + len(row)]) == row.token_ids)
            found = packed.reshape(-1, 64)[start : start + len(row)]
            assert torch.allclose(found, hidden_of(alone, ids, None)[0], atol=1e-5)


@pytest.mark.parametrize("attention", ["sdpa", "short_rows"])
def test_padding_and_other_rows_of_a_bucket_change_nothing(folder: Path, attention: str) -> None:
    model, alone = load(folder, attention), load(folder, "sdpa")
    rows = [example(i, length) for i, length in enumerate(LENGTHS)]
    plan = plan_step(rows, ranks=1, micro_batch_tokens=60 * len(rows), row_tokens=60, batching="bucketed")
    with torch.no_grad():
        for batch in plan.ranks[0]:
            hidden = hidden_of(model, torch.from_numpy(batch.input_ids), None)
            for found, ids in zip(hidden, batch.input_ids, strict=True):
                row = next(row for row in rows if tuple(ids[: len(row)]) == row.token_ids)
                lone = hidden_of(alone, torch.tensor([row.token_ids]), None)[0]
                assert torch.allclose(found[: len(row)], lone, atol=1e-5)


def test_no_gradient_crosses_rows_or_comes_from_padding_in_short_rows(folder: Path) -> None:
    model = load(folder, "short_rows")
    ids = torch.randint(5, VOCABULARY, (2, 40), generator=torch.Generator().manual_seed(1))
    ids[1, 20:] = 0
    embedded = model.get_input_embeddings()(ids).detach().requires_grad_()
    (found,) = torch.autograd.grad(run(model, embedded, None)[1, :20].square().sum(), embedded)
    touched = found.abs().sum(-1) > 0
    assert touched[1, :20].all() and not touched[1, 20:].any() and not touched[0].any()


def test_a_model_that_attends_otherwise_keeps_its_attention() -> None:
    from transformers import Qwen2Config, Qwen2ForCausalLM

    config = Qwen2Config(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        use_sliding_window=True,
        sliding_window=4,
        max_window_layers=1,
    )
    model = Qwen2ForCausalLM(config)
    before = model.config._attn_implementation
    assert not use_packed_attention(model, device=torch.device("cpu"), half=False)
    assert model.config._attn_implementation == before and model.training


# -- the same loss and gradient, however a step is laid out

Layout = tuple[int, int, Literal["bucketed", "packed"], str]
LAYOUTS: list[Layout] = [
    (1, 60, "bucketed", "sdpa"),
    (3, 150, "bucketed", "short_rows"),
    (8, 400, "bucketed", "sdpa"),
    (1, 120, "packed", "packed"),
    (2, 240, "packed", "sdpa"),
    (5, 120, "packed", "packed"),
]


def loss_and_gradients(
    folder: Path, name: str, options: dict[str, Any], layout: Layout, rows: list[Example]
) -> tuple[float, dict[str, torch.Tensor]]:
    """Of one step, all ranks' micro-batches run one after the other."""
    ranks, micro_batch_tokens, batching, attention = layout
    model, objective = load(folder, attention), make_objective(name, **options)
    own = dict(enumerate(objective.parameters()))
    model.zero_grad()
    plan = plan_step(
        rows,
        ranks=ranks,
        micro_batch_tokens=micro_batch_tokens,
        row_tokens=120 if batching == "packed" else 60,
        batching=batching,
    )
    assert len({len(share) for share in plan.ranks}) == 1
    loss = 0.0
    for batch in (batch for share in plan.ranks for batch in share):
        positions = None if batch.position_ids is None else torch.from_numpy(batch.position_ids)
        hidden = model.get_decoder()(
            input_ids=torch.from_numpy(batch.input_ids), position_ids=positions, attention_mask=None, use_cache=False
        ).last_hidden_state
        logits = model.lm_head(hidden.reshape(-1, hidden.shape[-1])[torch.from_numpy(batch.selected)])
        share = objective.loss(logits, TensorBatch.of(batch, torch.from_numpy)).total / plan.total_weight
        share.backward()
        loss += share.item()
    named = {key: parameter.grad.clone() for key, parameter in model.named_parameters()}
    for i, parameter in own.items():
        assert parameter.grad is not None
        named[f"own {i}"] = parameter.grad.clone()
    return loss, named


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("sft", {}),
        ("span", {"weights": "learned"}),
        ("opd", {}),
        ("opd", {"estimator": "top_k"}),
        ("sod", {}),
        ("grpo", {"normalisation": "row", "kl_weight": 0.05}),
        ("grpo", {"normalisation": "constant", "max_row_tokens": 30}),
    ],
)
def test_a_loss_does_not_depend_on_ranks_micro_batches_or_packing(
    folder: Path, name: str, options: dict[str, Any]
) -> None:
    rows = [example(i, length) for i, length in enumerate(LENGTHS)]
    loss, gradients = loss_and_gradients(folder, name, options, LAYOUTS[0], rows)
    assert all(gradient.abs().max() > 0 for gradient in gradients.values())
    for layout in LAYOUTS[1:]:
        other, others = loss_and_gradients(folder, name, options, layout, rows)
        assert other == pytest.approx(loss, rel=1e-5), layout
        for key, gradient in gradients.items():
            worst = (others[key] - gradient).abs().max() / gradient.abs().max()
            assert worst < 1e-5, (layout, key)


@settings(deadline=None, max_examples=15)
@given(
    lengths=st.lists(st.integers(8, 60), min_size=1, max_size=12),
    ranks=st.integers(1, 8),
    micro_batch_tokens=st.integers(60, 300),
    batching=st.sampled_from(["bucketed", "packed"]),
)
def test_any_rows_have_the_same_loss_on_any_number_of_ranks(
    folder: Path,
    lengths: list[int],
    ranks: int,
    micro_batch_tokens: int,
    batching: Literal["bucketed", "packed"],
) -> None:
    rows = [example(i, length) for i, length in enumerate(lengths)]
    attention = "packed" if batching == "packed" else "sdpa"
    expected, _ = loss_and_gradients(folder, "sft", {}, (1, 60, "bucketed", "sdpa"), rows)
    layout: Layout = (ranks, max(micro_batch_tokens, 120), batching, attention)
    assert loss_and_gradients(folder, "sft", {}, layout, rows)[0] == pytest.approx(expected, rel=1e-5)
