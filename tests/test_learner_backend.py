"""One rank of the engine: every ZeRO stage computes the same, bad gradients change nothing, memory that is short is
explained."""

from __future__ import annotations

import itertools
import logging
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from backend_samples import LORA, batches_of, config_of, loss_of, take_step, train
from learner_samples import save_tiny_student

from learner.base import LearnerError
from learner.config import ConfigError, EmaConfig, LearnerConfig, LoraConfig
from learner.deepspeed_backend import DeepSpeedBackend
from learner.ema import Average
from learner.engine_settings import engine_settings, refuse_what_does_not_work
from learner.gradient_guard import GradientGuard
from learner.out_of_memory import advice, explained
from learner.schedules import lr_factor
from learner.side_parameters import SideParameters
from learner.trained_state import MASTER

SAME = 5e-5
"""Losses of about 8 in fp32: the engines add the same numbers up in another order, which has grown to 1e-5 here after
four steps; a wrong scale, clip or decay shows at 1e-3."""


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_student(tmp_path_factory.mktemp("student"))


def start(base: Path, **changes: Any) -> DeepSpeedBackend:
    return DeepSpeedBackend(config_of(base, base, **changes), rank=0, world_size=1)


# -- every engine learns the same


@pytest.mark.parametrize("lora", [None, LORA], ids=["full", "lora"])
def test_every_zero_stage_reaches_the_same_loss(base: Path, lora: LoraConfig | None) -> None:
    runs = {stage: train(start(base, zero_stage=stage, lora=lora, lr=2e-2), range(4)) for stage in range(4)}
    assert runs[0][3] < runs[0][0] - 0.05  # the same tokens again
    for stage in (1, 2, 3):
        assert runs[stage] == pytest.approx(runs[0], abs=SAME), stage


@pytest.mark.parametrize(("stage", "offload"), [pytest.param(2, "optimizer", marks=pytest.mark.slow), (3, "all")])
def test_offloaded_states_train_alike(base: Path, stage: int, offload: str) -> None:
    here = train(start(base, zero_stage=stage), range(3))
    there = train(start(base, zero_stage=stage, offload=offload), range(3))
    assert there == pytest.approx(here, abs=SAME)


def test_activations_computed_twice_give_the_same_gradient(base: Path) -> None:
    kept, twice = start(base), start(base, gradient_checkpointing=True)
    assert train(twice, range(3)) == pytest.approx(train(kept, range(3)), abs=SAME)


def test_the_gradient_is_clipped_to_its_norm_under_zero_as_without(base: Path) -> None:
    runs = [train(start(base, zero_stage=stage, gradient_clipping=0.01, lr=5e-2), range(4)) for stage in (0, 2)]
    free = train(start(base, lr=5e-2, gradient_clipping=0.0), range(4))
    assert runs[1] == pytest.approx(runs[0], abs=SAME) and free != pytest.approx(runs[0], abs=SAME)


@pytest.mark.slow
@pytest.mark.parametrize("precision", ["fp32", "autocast", "bf16"])
@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
@pytest.mark.parametrize("lora", [None, LORA], ids=["full", "lora"])
def test_every_setting_trains_on_every_stage(
    base: Path, precision: str, optimizer: str, lora: LoraConfig | None
) -> None:
    clip = 0.0 if optimizer == "muon" else 1.0
    stages = range(1 if precision == "bf16" else 0, 4)
    runs = [
        train(
            start(base, zero_stage=s, precision=precision, optimizer=optimizer, lora=lora, gradient_clipping=clip),
            range(5),
        )
        for s in stages
    ]
    tolerance = SAME if (precision, optimizer) == ("fp32", "adamw") else 0.02  # bf16 has 3 digits, Muon iterates in it
    for run in runs[1:]:
        assert run == pytest.approx(runs[0], abs=tolerance)


# -- gradients that are not finite


def check_skipped(base: Path, spoil: float, **changes: Any) -> None:
    """A run with two spoilt steps in it ends exactly where one without them does."""
    settings = {**changes, "ema": EmaConfig(decay=0.5)}
    clean, spoilt = start(base, **settings), start(base, **settings)
    losses = [take_step(spoilt, 0)[0]]
    for _ in range(2):
        outcome = take_step(spoilt, 7, spoil=spoil)[1]
        assert outcome.skipped and not math.isfinite(outcome.grad_norm)
    losses += train(spoilt, range(1, 3))
    assert losses == train(clean, range(3))
    after, expected = spoilt.full_weights(), clean.full_weights()
    assert after is not None and expected is not None
    assert all(torch.equal(after[name], expected[name]) for name in expected)


@pytest.mark.parametrize(("stage", "optimizer"), [(0, "muon"), (2, "adamw"), (3, "muon")])
def test_a_bad_gradient_leaves_no_trace(base: Path, stage: int, optimizer: str) -> None:
    check_skipped(base, math.nan, zero_stage=stage, optimizer=optimizer, gradient_clipping=0.0)


@pytest.mark.slow
@pytest.mark.parametrize("spoil", [math.nan, math.inf])
@pytest.mark.parametrize("precision", ["fp32", "autocast", "bf16"])
@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
@pytest.mark.parametrize("stage", range(4))
def test_no_bad_gradient_leaves_a_trace(base: Path, stage: int, optimizer: str, precision: str, spoil: float) -> None:
    if stage == 0 and precision == "bf16":
        pytest.skip("refused: no fp32 masters")
    clip = 0.0 if optimizer == "muon" else 1.0
    check_skipped(base, spoil, zero_stage=stage, optimizer=optimizer, precision=precision, gradient_clipping=clip)


def test_the_guard_names_the_rows_of_the_skipped_steps(caplog: pytest.LogCaptureFixture) -> None:
    guard = GradientGuard(limit=2)
    with caplog.at_level(logging.WARNING):
        guard.skipped(4, rows=["a", "b", "c"], suspects=["b"])
    assert "step 4" in caplog.text and "rows b;" in caplog.text and "1 of at most 2" in caplog.text
    with pytest.raises(LearnerError, match=r"2 steps.*max_skipped_steps is 2.*step 4: rows b; step 9: rows d, e"):
        guard.skipped(9, rows=["d", "e"])


def test_the_guard_counts_over_resumes() -> None:
    before, after = GradientGuard(limit=3), GradientGuard(limit=3)
    before.skipped(1, rows=["a"])
    before.skipped(2, rows=["b"])
    after.restore(before.state())
    with pytest.raises(LearnerError, match="step 1: rows a; step 2: rows b; step 3: rows c"):
        after.skipped(3, rows=["c"])


def test_the_guard_does_not_print_a_thousand_rows() -> None:
    with pytest.raises(LearnerError, match="row-19 and 980 more"):
        GradientGuard(limit=1).skipped(1, rows=[f"row-{i}" for i in range(1000)])


# -- memory


def test_out_of_memory_says_which_knobs_to_turn(base: Path) -> None:
    config = config_of(base, base, micro_batch_tokens=8192, max_row_tokens=4096, tokens_per_step=8192)
    with pytest.raises(LearnerError, match="in the forward pass.*micro_batch_tokens=4096.*gradient_checkpointing=true"):
        with explained(config, "the forward pass", world_size=1):
            torch.empty(2**60, dtype=torch.uint8)


def test_other_errors_are_not_explained_as_memory(base: Path) -> None:
    with pytest.raises(RuntimeError, match="mat1 and mat2"):
        with explained(config_of(base, base), "the forward pass", world_size=1):
            torch.matmul(torch.ones(2, 3), torch.ones(2, 3))


def test_what_is_turned_already_is_not_advised(base: Path) -> None:
    config = config_of(
        base, base, precision="bf16", zero_stage=3, offload="all", gradient_checkpointing=True,
        lora=LoraConfig(quantization="nf4"), micro_batch_tokens=1024, max_row_tokens=1024,
    )  # fmt: skip
    said = " ".join(advice(config, world_size=4))
    for knob in ("micro_batch_tokens=", "gradient_checkpointing", "precision", "zero_stage=", "lora", "offload"):
        assert knob not in said
    assert "max_row_tokens (it is 1024" in said and "more ranks (there are 4)" in said


def test_a_pass_that_needs_too_much_memory_is_explained(base: Path) -> None:
    backend = start(base)
    batch = batches_of(0, rows=1)[0]
    real = backend.student.model.get_input_embeddings().forward
    backend.student.model.get_input_embeddings().forward = lambda ids: real(ids).repeat(1, 1, 2**50)
    with pytest.raises(LearnerError, match="out of memory in the forward pass of 16 tokens"):
        backend.forward(batch)


# -- what DeepSpeed is told


def settings_of(**changes: Any) -> LearnerConfig:
    return config_of(Path("model"), Path("out"), **changes)


def test_offload_is_told_to_the_engine() -> None:
    zero = engine_settings(settings_of(zero_stage=3, offload="all"))["zero_optimization"]
    assert zero["stage"] == 3
    assert zero["offload_optimizer"] == zero["offload_param"] == {"device": "cpu", "pin_memory": True}
    zero = engine_settings(settings_of(zero_stage=1, offload="optimizer"))["zero_optimization"]
    assert "offload_optimizer" in zero and "offload_param" not in zero
    assert "offload_optimizer" not in engine_settings(settings_of(zero_stage=3))["zero_optimization"]


def test_bf16_gradients_are_looked_at_before_the_step() -> None:
    told = engine_settings(settings_of(zero_stage=2, precision="bf16", gradient_clipping=0.5))
    assert told["bf16"] == {"enabled": True, "check_grad_overflow": True} and told["gradient_clipping"] == 0.5


@pytest.mark.parametrize(("stage", "told"), [(1, None), (2, {"grad_accum_dtype": "fp32"})])
def test_the_sum_of_bf16_gradients_is_told_to_be_fp32(stage: int, told: dict[str, str] | None) -> None:
    assert engine_settings(settings_of(zero_stage=stage, precision="bf16")).get("data_types") == told


@pytest.mark.slow
@pytest.mark.parametrize("stage", [2, 3])
def test_bf16_gradients_of_many_micro_batches_are_summed_in_fp32(base: Path, stage: int) -> None:
    name = "model.model.layers.0.mlp.down_proj.weight"

    def momentum(stage: int, precision: str) -> torch.Tensor:
        backend = start(base, zero_stage=stage, precision=precision)
        for i, batch in enumerate(batches_of(0, rows=32)):
            backend.backward(loss_of(backend, batch) / 1000, last=i == 31)
        backend.step(1.0)
        return backend.state.whole(name, "exp_avg")

    exact = momentum(stage, "fp32")
    error, error_of_stage_1 = ((momentum(s, "bf16") - exact).norm() for s in (stage, 1))
    assert 0 < error < 0.85 * error_of_stage_1  # which sums in bf16; what is left is the products'


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"offload": "optimizer"}, "offload is 'optimizer' with zero_stage 0; it needs zero_stage 1, 2 or 3"),
        ({"offload": "all", "zero_stage": 2}, "it needs zero_stage 3"),
        (
            {"offload": "optimizer", "zero_stage": 2, "optimizer": "muon", "gradient_clipping": 0.0},
            "set optimizer to 'adamw'",
        ),
        ({"lora": LoraConfig(quantization="nf4"), "zero_stage": 3, "precision": "bf16"}, "use zero_stage 0, 1 or 2"),
        ({"lora": LoraConfig(quantization="nf4")}, "precision 'fp32'; use 'autocast' or 'bf16'"),
    ],
)
def test_settings_that_cannot_work_together_are_refused(changes: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        refuse_what_does_not_work(settings_of(**changes))


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"schedule": "step"}, "schedule is 'step'; use one of 'linear', 'cosine', 'constant', 'wsd'"),
        ({"decay_share": 0.0}, "decay_share is 0.0"),
        ({"max_skipped_steps": 0}, "max_skipped_steps is 0"),
        ({"offload": "disk"}, "offload is 'disk'; use one of 'none', 'optimizer', 'all'"),
    ],
)
def test_wrong_settings_of_the_engine_are_named(changes: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        settings_of(**changes)


@pytest.mark.skipif(torch.cuda.is_available(), reason="says what is missing without a GPU")
def test_four_bit_weights_without_a_gpu_are_refused(base: Path) -> None:
    with pytest.raises(ConfigError, match="'nf4' on the device 'cpu'; it needs a GPU"):
        start(base, lora=LoraConfig(quantization="nf4"), precision="autocast")


# -- schedules


@pytest.mark.parametrize(
    ("schedule", "expected"),
    [
        ("linear", [1.0, 0.775, 0.55, 0.325, 0.1]),
        ("cosine", [1.0, 0.1 + 0.45 * (1 + 2**-0.5), 0.55, 0.1 + 0.45 * (1 - 2**-0.5), 0.1]),
        ("constant", [1.0, 1.0, 1.0, 1.0, 1.0]),
        ("wsd", [1.0, 1.0, 1.0, 0.55, 0.1]),
    ],
)
def test_a_schedule_falls_as_its_name_says(schedule: str, expected: list[float]) -> None:
    config = settings_of(schedule=schedule, final_lr_fraction=0.1, decay_share=0.5)
    assert [lr_factor(100, at / 4, config) for at in range(5)] == pytest.approx(expected)


@pytest.mark.parametrize("schedule", ["linear", "cosine", "constant", "wsd"])
def test_every_schedule_warms_up_by_steps(schedule: str) -> None:
    config = settings_of(schedule=schedule, warmup_steps=4)
    assert [lr_factor(step, 0.0, config) for step in range(5)] == [0.25, 0.5, 0.75, 1.0, 1.0]


# -- the average


@pytest.mark.parametrize("stage", [0, 2, pytest.param(3, marks=pytest.mark.slow)])
def test_the_average_is_of_the_weights_after_each_step(base: Path, stage: int) -> None:
    backend = start(base, zero_stage=stage, ema=EmaConfig(decay=0.3))
    name = next(name for name in backend.state.names() if "q_proj.weight" in name)
    expected = backend.state.whole(name, MASTER).clone()
    for step, keep in enumerate([0.1, 2 / 11, 0.25, 0.3]):  # min(decay, (1 + n) / (10 + n))
        take_step(backend, step)
        expected = keep * expected + (1 - keep) * backend.state.whole(name, MASTER)
    weights = backend.full_weights()
    assert weights is not None
    assert torch.allclose(weights[name.removeprefix("model.")], expected, atol=1e-6)


def test_exporting_the_average_leaves_the_training_as_it_was(base: Path) -> None:
    plain, averaged = start(base, zero_stage=2), start(base, zero_stage=2, ema=EmaConfig(decay=0.9))
    train(averaged, range(2))
    assert averaged.full_weights() is not None
    assert train(averaged, range(2, 4)) == train(plain, range(4))[2:]


def test_an_average_that_is_not_exported_is_only_kept(base: Path) -> None:
    last, averaged = start(base), start(base, ema=EmaConfig(decay=0.9, export=False))
    train(last, range(2))
    train(averaged, range(2))
    assert isinstance(averaged.average, Average)
    mine, theirs = averaged.full_weights(), last.full_weights()
    assert mine is not None and theirs is not None and all(torch.equal(mine[name], theirs[name]) for name in theirs)


# -- an objective's own parameters


def test_an_objectives_own_parameter_is_trained_beside_the_student(base: Path) -> None:
    scale = torch.zeros((), requires_grad=True)
    backend = start(base, zero_stage=2, lr=0.1)
    backend.train_also([scale])
    batch = batches_of(0, rows=1)[0]
    backend.backward(loss_of(backend, batch) * torch.exp(scale), last=True)
    backend.step(0.5)
    assert float(scale.detach()) == pytest.approx(-0.05)  # AdamW's first step is the rate, against the gradient
    assert scale.grad is None


def test_a_side_parameter_sees_the_gradient_of_all_ranks() -> None:
    value = torch.zeros(2, requires_grad=True)
    side = SideParameters([value], lr=0.1)
    value.grad = torch.tensor([1.0, -1.0])
    side.step(lr_factor=1.0, sum_over_ranks=lambda mine: [mine[0] - 5.0, mine[1]], world_size=2)
    assert value.tolist() == pytest.approx([0.1, 0.1])


def test_side_parameters_go_on_where_they_were() -> None:
    def run(steps: range, state: list[dict[str, Any]] | None) -> tuple[list[float], list[dict[str, Any]]]:
        value = torch.ones(2, requires_grad=True)
        side = SideParameters([value], lr=0.1)
        if state is not None:
            side.restore(state)
        for step in steps:
            (value * torch.tensor([1.0 + step, -0.5])).square().sum().backward()
            side.step(lr_factor=1.0, sum_over_ranks=lambda mine: mine, world_size=1)
        return value.tolist(), side.state()

    assert run(range(2, 4), run(range(2), None)[1])[0] == run(range(4), None)[0]


def test_the_advice_is_never_empty() -> None:
    for stage, offload, world_size in itertools.product(range(4), ("none", "optimizer", "all"), (1, 2)):
        assert advice(settings_of(zero_stage=stage, offload=offload), world_size=world_size)
