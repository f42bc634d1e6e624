"""The learner with real DeepSpeed on a student of 0.1 M parameters: it trains, resumes, exports, and fails loudly."""

from __future__ import annotations

import json
import threading
import time
from pathlib import Path
from typing import Any

import learner_samples
import pytest
from learner_samples import ListSource, SilentSource, save_tiny_student, trajectory

from learner.base import LearnerError, Progress
from learner.config import ConfigError, LearnerConfig, LoraConfig
from learner.curriculum import held_out
from learner.trainer import Learner

ROWS = [trajectory(i) for i in range(20)]  # about 4,600 tokens


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_student(tmp_path_factory.mktemp("student"))


def config_of(base: Path, out: Path, **changes: Any) -> LearnerConfig:
    settings: dict[str, Any] = {
        "epochs": 1,
        "tokens_per_step": 1500,
        "micro_batch_tokens": 1024,
        "max_row_tokens": 512,
        "warmup_steps": 2,
        "expected_trajectories": len(ROWS),
        "collective_timeout_s": 30.0,
    }
    return LearnerConfig(model_path=str(base), output_dir=str(out), **{**settings, **changes})


def train(config: LearnerConfig, rows: list[Any] = ROWS) -> tuple[Progress, list[Progress]]:
    steps: list[Progress] = []
    final = Learner(config, ListSource(rows), on_progress=steps.append).run()
    return final, steps


def train_some(config: LearnerConfig, steps: int) -> list[Progress]:
    """Stop after so many optimizer steps."""
    taken: list[Progress] = []

    def watch(progress: Progress) -> None:
        taken.append(progress)
        if len(taken) == steps:
            learner.stop()

    learner = Learner(config, ListSource(ROWS), on_progress=watch)
    assert not learner.run().done
    return taken


def losses(steps: list[Progress]) -> list[float]:
    return [step.loss for step in steps]


# -- what it learns


def test_the_loss_does_not_depend_on_packing_or_micro_batches(base: Path, tmp_path: Path) -> None:
    # AdamW: Muon's bf16 iterations would blow up the rounding of sums that are added in another order.
    exact = {"precision": "fp32", "optimizer": "adamw"}
    whole = train(config_of(base, tmp_path / "a", **exact))[1]
    assert len(whole) >= 3 and whole[-1].loss < whole[0].loss
    small = train(config_of(base, tmp_path / "b", **exact, micro_batch_tokens=512))[1]
    packed = train(config_of(base, tmp_path / "c", **exact, batching="packed"))[1]
    for other in (small, packed):
        assert losses(other) == pytest.approx(losses(whole), abs=1e-5)
        assert [step.grad_norm for step in other] == pytest.approx([step.grad_norm for step in whole], rel=1e-4)


def test_the_first_loss_is_the_weighted_mean_that_transformers_computes(base: Path, tmp_path: Path) -> None:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from learner.examples import Example, ExampleMaker

    weights = {"code": 0.5, "thought": 2.0}
    config = config_of(base, tmp_path, precision="fp32", span_weights=weights, tokens_per_step=600)
    first = train(config, ROWS[:6])[1][0]
    maker = ExampleMaker(AutoTokenizer.from_pretrained(base), max_row_tokens=512, span_weights=weights)
    model = AutoModelForCausalLM.from_pretrained(base).eval()
    total = weight_sum = 0.0
    for row in ROWS[: first.rows]:
        made = maker.make(row)
        assert isinstance(made, Example)
        ids = torch.tensor([made.token_ids])
        with torch.no_grad():
            logprobs = model(ids).logits[0, :-1].log_softmax(-1)
        nll = -logprobs.gather(-1, ids[0, 1:, None])[:, 0]
        weight = torch.tensor(made.loss_weights[1:])
        total, weight_sum = total + float((nll * weight).sum()), weight_sum + float(weight.sum())
    assert first.loss == pytest.approx(total / weight_sum, abs=1e-5)


def test_it_trains_while_trajectories_still_arrive(base: Path, tmp_path: Path) -> None:
    seen: list[Progress] = []
    source = ListSource(ROWS, batch=4, pause_s=0.3)
    final = Learner(config_of(base, tmp_path), source, on_progress=seen.append).run()
    assert 0 < final.trajectories_at_first_step < len(ROWS)
    assert final.trajectories == final.examples == final.rows == len(ROWS)
    assert final.done and final.fraction == 1.0 and final.wait_s > 0
    assert set(final.loss_by_span) == {"thought", "code", "format"}


def test_the_schedule_does_not_depend_on_how_fast_trajectories_come(base: Path, tmp_path: Path) -> None:
    for expected in (len(ROWS), None):
        fast = train(config_of(base, tmp_path / f"fast-{expected}", epochs=2, expected_trajectories=expected))[1]
        slow: list[Progress] = []
        source = ListSource(ROWS, batch=4, pause_s=0.2)
        config = config_of(base, tmp_path / f"slow-{expected}", epochs=2, expected_trajectories=expected)
        Learner(config, source, on_progress=slow.append).run()
        assert [step.lr for step in slow] == [step.lr for step in fast]
        assert losses(slow) == losses(fast)


def test_refused_and_held_out_trajectories_are_counted_and_not_trained_on(base: Path, tmp_path: Path) -> None:
    failed = [trajectory(100 + i, success=False) for i in range(3)]
    held = sum(held_out(row.task.id, 0.3) for row in ROWS)
    assert 0 < held < len(ROWS)
    final, _ = train(config_of(base, tmp_path, validation_share=0.3), [*failed, *ROWS, ROWS[0]])
    once = 0 if held_out(ROWS[0].task.id, 0.3) else 1
    assert final.rows == final.examples == len(ROWS) - held
    assert final.refused == {"not_trainable": 3, **({"duplicate": 1} if once else {})}
    assert final.validation_loss is not None and 0 < final.validation_loss < 12


def test_a_budget_of_tokens_ends_the_run_and_leads_the_schedule(base: Path, tmp_path: Path) -> None:
    final, steps = train(config_of(base, tmp_path, epochs=None, max_tokens=9000, snapshot_at=(0.5,)))
    assert 9000 <= final.tokens < 9000 + 1500 and final.epoch >= 1
    rates = [step.lr for step in steps]
    assert rates[2:] == sorted(rates[2:], reverse=True) and rates[-1] < 0.3 * max(rates)
    assert final.snapshots == {"0.5": str(tmp_path / "snapshots" / "0.5")}
    assert (tmp_path / "snapshots" / "0.5" / "model.safetensors").exists()


@pytest.mark.slow
@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_every_zero_stage_trains_alike(base: Path, tmp_path: Path, optimizer: str) -> None:
    runs = {}
    for stage in range(4):
        config = config_of(
            base, tmp_path / str(stage), zero_stage=stage, optimizer=optimizer, gradient_clipping=0.0, lr=5e-3
        )
        runs[stage] = losses(train(config, ROWS[:16])[1])
    assert len(runs[0]) >= 3 and runs[0][-1] < runs[0][0] - 0.05
    for stage in (1, 2, 3):
        assert runs[stage] == pytest.approx(runs[0], abs=0.02), stage


@pytest.mark.parametrize("stage", [pytest.param(1, marks=pytest.mark.slow), 2, pytest.param(3, marks=pytest.mark.slow)])
def test_bf16_weights_train_with_fp32_masters(base: Path, tmp_path: Path, stage: int) -> None:
    final, steps = train(
        config_of(base, tmp_path, zero_stage=stage, precision="bf16", gradient_clipping=0.0), ROWS[:12]
    )
    assert losses(steps)[-1] < losses(steps)[0]
    assert final.student_dir is not None and Path(final.student_dir, "model.safetensors").exists()


# -- what it keeps


def test_the_export_is_the_trained_student_for_transformers(base: Path, tmp_path: Path) -> None:
    import torch
    from safetensors import safe_open
    from transformers import AutoModelForCausalLM, AutoTokenizer

    final, _ = train(config_of(base, tmp_path), ROWS[:8])
    folder = Path(str(final.student_dir))
    assert all(path.stat().st_mode & 0o777 == 0o644 for path in folder.iterdir())
    with safe_open(folder / "model.safetensors", "pt") as file:
        assert "lm_head.weight" not in file.keys()
        before = AutoModelForCausalLM.from_pretrained(base).state_dict()
        moved = [key for key in file.keys() if not torch.equal(file.get_tensor(key), before[key])]
        assert len(moved) == len(list(file.keys()))
    model = AutoModelForCausalLM.from_pretrained(folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    assert type(model).__name__ == "Qwen2ForCausalLM" and model.config.use_cache
    assert model.generation_config.eos_token_id == tokenizer.eos_token_id
    assert "attn_implementation" not in (folder / "config.json").read_text()
    prompt = tokenizer.apply_chat_template(
        [{"role": "user", "content": "hi"}], add_generation_prompt=True, return_dict=True, return_tensors="pt"
    )
    answer = model.generate(**prompt, max_new_tokens=3)  # pyright: ignore[reportAttributeAccessIssue]
    assert prompt["input_ids"].shape[1] < answer.shape[1] <= prompt["input_ids"].shape[1] + 3
    card = (folder / "README.md").read_text()
    assert "| optimizer steps |" in card and str(final.tokens) in card and str(tmp_path) not in card


def test_scores_can_be_added_to_the_card(base: Path, tmp_path: Path) -> None:
    from learner.export import write_card

    final, _ = train(config_of(base, tmp_path), ROWS[:8])
    assert "## Scores" not in Path(str(final.student_dir), "README.md").read_text()
    write_card(str(final.student_dir), scores={"arithmetic": 0.915})
    assert "| arithmetic | 0.915 |" in Path(str(final.student_dir), "README.md").read_text()


@pytest.mark.parametrize(
    "changes",
    [
        {"zero_stage": 0},
        {"zero_stage": 2, "precision": "bf16", "batching": "packed", "gradient_checkpointing": True},
        {"zero_stage": 3},
    ],
)
def test_lora_is_merged_at_export(base: Path, tmp_path: Path, changes: dict[str, Any]) -> None:
    import torch
    from transformers import AutoModelForCausalLM

    lora = LoraConfig(rank=4, alpha=8.0, dropout=0.05, target="q_proj,down_proj")
    final, steps = train(
        config_of(base, tmp_path, epochs=3, lora=lora, optimizer="adamw", lr=5e-2, **changes), ROWS[:12]
    )
    assert losses(steps)[-1] < losses(steps)[0]
    before = AutoModelForCausalLM.from_pretrained(base).state_dict()
    after = AutoModelForCausalLM.from_pretrained(str(final.student_dir)).state_dict()
    assert after.keys() == before.keys()
    kept = torch.bfloat16 if "precision" in changes else torch.float32
    changed = {key for key in before if not torch.equal(before[key].to(kept), after[key].to(kept))}
    assert changed == {key for key in before if "q_proj.weight" in key or "down_proj.weight" in key}


@pytest.mark.parametrize("stage", [0, 2])
def test_a_resumed_run_repeats_the_uninterrupted_one(base: Path, tmp_path: Path, stage: int) -> None:
    changes = {"epochs": 2, "zero_stage": stage, "gradient_clipping": 0.0}
    whole = train(config_of(base, tmp_path / "whole", **changes))[1]
    assert len(whole) >= 6
    for stop_after in (2, 5):  # within the stream, within the second pass
        config = config_of(base, tmp_path / f"cut-{stop_after}", **changes)
        first = train_some(config, stop_after)
        final, rest = train(config)
        assert final.done and final.resumed_from_step == stop_after
        assert losses([*first, *rest]) == losses(whole)
        assert [step.lr for step in [*first, *rest]] == [step.lr for step in whole]
        assert final.tokens == whole[-1].tokens


def test_a_finished_run_is_not_trained_again(base: Path, tmp_path: Path) -> None:
    config = config_of(base, tmp_path)
    final, _ = train(config)
    again, steps = train(config)
    assert not steps and again.done and again.step == final.step and again.student_dir == final.student_dir


def test_checkpoints_are_rotated_and_whole(base: Path, tmp_path: Path) -> None:
    final, _ = train(config_of(base, tmp_path, epochs=2, checkpoint_every_steps=2, keep_checkpoints=2))
    folder = tmp_path / "checkpoints"
    kept = sorted(path.name for path in folder.iterdir())
    assert len(kept) == 2 and kept[-1] == f"step-{final.step:07d}"


def test_a_checkpoint_that_is_asked_for_is_written_before_it_is_due(base: Path, tmp_path: Path) -> None:
    def watch(progress: Progress) -> None:
        if progress.step == 2:
            learner.save_soon()

    config = config_of(base, tmp_path, epochs=3, checkpoint_every_steps=1000)
    learner = Learner(config, ListSource(ROWS), on_progress=watch)
    final = learner.run()
    kept = sorted(path.name for path in (tmp_path / "checkpoints").iterdir())
    assert final.step > 4 and kept == ["step-0000002", f"step-{final.step:07d}"]


def test_a_checkpoint_of_other_settings_is_refused(base: Path, tmp_path: Path) -> None:
    train(config_of(base, tmp_path), ROWS[:8])
    with pytest.raises(LearnerError, match="'optimizer': 'muon'.*resume with the same settings"):
        train(config_of(base, tmp_path, optimizer="adamw"), ROWS[:8])
    with pytest.raises(LearnerError, match="seed is 7, the checkpoint's run had 0"):
        train(config_of(base, tmp_path, seed=7), ROWS[:8])


def test_a_checkpoint_cut_off_while_written_is_passed_over(base: Path, tmp_path: Path) -> None:
    config = config_of(base, tmp_path, epochs=2)
    train_some(config, 1)
    partial = tmp_path / "checkpoints" / ".partial-step-0000002"
    partial.mkdir()
    (partial / "mp_rank_00_model_states.pt").write_bytes(b"torn")
    final, _ = train(config)
    assert final.resumed_from_step == 1 and final.done


# -- how it fails


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"precision": "bf16"}, "use precision 'autocast', or zero_stage 1, 2 or 3"),
        ({"zero_stage": 2}, "set gradient_clipping to 0"),
        ({"objective": "magic"}, "objective is 'magic'; use one of"),
    ],
)
def test_what_deepspeed_would_get_wrong_is_refused(base: Path, tmp_path: Path, changes: Any, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        train(config_of(base, tmp_path, **changes))


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"epochs": 2, "max_tokens": 100}, "exactly one"),
        ({"epochs": None}, "exactly one"),
        ({"optimizer": "sgd"}, "optimizer is 'sgd'; use one of 'muon', 'adamw'"),
        ({"zero_stage": 4}, "zero_stage is 4"),
        ({"tokens_per_step": 100}, "at least max_row_tokens, 512"),
        ({"snapshot_at": (1.0,)}, "between 0 and 1"),
        ({"span_weights": {"observation": 1.0}}, "'observation'"),
        ({"lr": 0.0}, "lr is 0.0"),
    ],
)
def test_wrong_settings_are_named(tmp_path: Path, changes: Any, said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        config_of(tmp_path, tmp_path, **changes)


def test_nothing_to_train_on_is_an_error_that_says_why(base: Path, tmp_path: Path) -> None:
    failed = [trajectory(i, success=False) for i in range(3)]
    with pytest.raises(LearnerError, match="nothing to train on: 3 trajectories.*'not_trainable': 3"):
        train(config_of(base, tmp_path), failed)


def test_a_silent_source_is_given_up(base: Path, tmp_path: Path) -> None:
    begun = time.monotonic()
    with pytest.raises(LearnerError, match="data_timeout_s 1.0 s"):
        Learner(config_of(base, tmp_path, data_timeout_s=1.0), SilentSource()).run()
    assert time.monotonic() - begun < 30


def test_a_failing_source_is_named(base: Path, tmp_path: Path) -> None:
    class Failing:
        def next(self, max_trajectories: int, timeout_s: float) -> list[Any] | None:
            raise ConnectionError("queue is gone")

    with pytest.raises(LearnerError, match="queue is gone"):
        Learner(config_of(base, tmp_path), Failing()).run()
    assert not [thread for thread in threading.enumerate() if thread.name == "learner-intake"]


# -- ranks as Ray actors


def test_two_ranks_train_like_one(ray_cluster: Any, base: Path, tmp_path: Path) -> None:
    from learner.learner_actor import LearnerGroup

    ray_cluster.cloudpickle.register_pickle_by_value(learner_samples)
    one = config_of(base, tmp_path / "one", precision="fp32", zero_stage=2, optimizer="adamw", validation_share=0.2)
    alone, _ = train(one)
    two = config_of(
        base, tmp_path / "two", precision="fp32", zero_stage=2, optimizer="adamw", validation_share=0.2, ranks=2
    )
    group = LearnerGroup.start(two, ListSource(ROWS, batch=4, pause_s=0.2))
    try:
        assert len(group.run()) == 2
        final = group.result(timeout_s=90)
    finally:
        group.shutdown()
    assert final.step == alone.step and final.tokens == alone.tokens
    assert final.loss == pytest.approx(alone.loss, abs=1e-5)
    assert final.grad_norm == pytest.approx(alone.grad_norm, rel=1e-4)
    assert final.validation_loss == pytest.approx(alone.validation_loss, abs=1e-5)
    facts = json.loads(Path(str(final.student_dir), "training.json").read_text())["facts"]
    assert facts["ranks"] == 2


def test_a_dead_rank_ends_the_run_with_an_error(ray_cluster: Any, base: Path, tmp_path: Path) -> None:
    from learner.learner_actor import LearnerGroup

    ray_cluster.cloudpickle.register_pickle_by_value(learner_samples)
    config = config_of(base, tmp_path, ranks=2, collective_timeout_s=10.0, restarts=0)
    group = LearnerGroup.start(config, SilentSource())
    try:
        group.run()
        assert not group.finished(timeout_s=1.0)
        ray_cluster.kill(group._actors[1])
        begun = time.monotonic()
        with pytest.raises(LearnerError, match="rank 1 of the learner failed"):
            group.result(timeout_s=60)
        assert time.monotonic() - begun < 30
        with pytest.raises(LearnerError, match="does not answer"):
            group.progress()
    finally:
        group.shutdown()


def test_a_cluster_without_room_is_named(ray_cluster: Any, base: Path, tmp_path: Path) -> None:
    from learner.learner_actor import LearnerGroup

    with pytest.raises(LearnerError, match="no room for 3 ranks"):
        LearnerGroup.start(config_of(base, tmp_path, ranks=3), SilentSource(), cpus_per_rank=2.0, timeout_s=1.0)
