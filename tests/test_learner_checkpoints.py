"""Checkpoints: a resumed run is the uninterrupted one, by any number of ranks and any ZeRO stage; damage is noticed."""

from __future__ import annotations

import json
import logging
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from backend_samples import config_of, size_of, take_step, train
from learner_samples import save_tiny_student

from learner.base import LearnerError
from learner.checkpoints import STATE_FILE, CheckpointFolder
from learner.config import EmaConfig, LoraConfig
from learner.deepspeed_backend import DeepSpeedBackend, free_port

DROPOUT = LoraConfig(rank=4, alpha=8.0, dropout=0.3, target="q_proj,down_proj")
ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_student(tmp_path_factory.mktemp("student"))


def start(base: Path, **changes: Any) -> DeepSpeedBackend:
    return DeepSpeedBackend(config_of(base, base, **changes), rank=0, world_size=1)


def same_weights(one: DeepSpeedBackend, other: DeepSpeedBackend) -> bool:
    mine, theirs = one.full_weights(), other.full_weights()
    assert mine is not None and theirs is not None
    return all(torch.equal(mine[name], theirs[name]) for name in theirs)


# -- resuming


def check_resumes_exactly(base: Path, folder: Path, **changes: Any) -> None:
    changes = {"gradient_clipping": 0.0 if changes.get("optimizer") == "muon" else 1.0, **changes}
    whole, first, second = (start(base, ema=EmaConfig(decay=0.5), **changes) for _ in range(3))
    expected = train(whole, range(4))
    losses = train(first, range(2))
    first.save_checkpoint(folder, 2, {"epoch": 1})
    assert second.load_checkpoint(folder) == {"epoch": 1}
    assert losses + train(second, range(2, 4)) == expected
    assert same_weights(second, whole)


@pytest.mark.parametrize("stage", [0, 3])
def test_a_resumed_run_is_the_uninterrupted_one_dropout_included(base: Path, tmp_path: Path, stage: int) -> None:
    check_resumes_exactly(base, tmp_path, zero_stage=stage, lora=DROPOUT)


@pytest.mark.slow
@pytest.mark.parametrize("precision", ["fp32", "autocast", "bf16"])
@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
@pytest.mark.parametrize("lora", [None, DROPOUT], ids=["full", "lora"])
@pytest.mark.parametrize("stage", range(4))
def test_every_setting_resumes_exactly(
    base: Path, tmp_path: Path, stage: int, lora: LoraConfig | None, optimizer: str, precision: str
) -> None:
    if stage == 0 and precision == "bf16":
        pytest.skip("refused: no fp32 masters")
    check_resumes_exactly(base, tmp_path, zero_stage=stage, lora=lora, optimizer=optimizer, precision=precision)


@pytest.mark.parametrize(("before", "after"), [(0, 2), (2, 3), (3, 0)])
def test_another_zero_stage_goes_on_from_a_checkpoint(base: Path, tmp_path: Path, before: int, after: int) -> None:
    first, second = start(base, zero_stage=before), start(base, zero_stage=after)
    train(first, range(1))
    first.save_checkpoint(tmp_path, 1, {})
    second.load_checkpoint(tmp_path)
    assert train(second, range(1, 3)) == pytest.approx(train(first, range(1, 3)), abs=5e-5)


def test_a_run_can_begin_to_average_in_its_middle(base: Path, tmp_path: Path) -> None:
    first, second = start(base), start(base, ema=EmaConfig(decay=0.5))
    train(first, range(2))
    first.save_checkpoint(tmp_path, 2, {})
    second.load_checkpoint(tmp_path)
    assert same_weights(second, first)


def test_an_objectives_own_parameters_are_resumed(base: Path, tmp_path: Path) -> None:
    mine, theirs = torch.tensor([1.5], requires_grad=True), torch.zeros(1, requires_grad=True)
    first, second = start(base), start(base)
    first.train_also([mine])
    second.train_also([theirs])
    take_step(first, 0)
    first.save_checkpoint(tmp_path, 1, {})
    second.load_checkpoint(tmp_path)
    assert theirs.tolist() == mine.tolist() != [0.0]


@pytest.mark.parametrize(
    ("changes", "said"),
    [({"lora": DROPOUT}, "'lora': None.*resume with the same settings"), ({"precision": "autocast"}, "'precision'")],
)
def test_other_settings_are_refused(base: Path, tmp_path: Path, changes: dict[str, Any], said: str) -> None:
    first = start(base)
    take_step(first, 0)
    first.save_checkpoint(tmp_path, 1, {})
    with pytest.raises(LearnerError, match=said):
        start(base, **changes).load_checkpoint(tmp_path)


def test_another_students_checkpoint_is_refused(base: Path, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    wider = AutoModelForCausalLM.from_pretrained(base, intermediate_size=112, ignore_mismatched_sizes=True)
    wider.save_pretrained(tmp_path / "wider")
    first = start(base)
    first.save_checkpoint(tmp_path / "checkpoints", 0, {})
    with pytest.raises(LearnerError, match="of another model: .*proj.weight is .*96.* there and .*112.* here"):
        start(tmp_path / "wider").load_checkpoint(tmp_path / "checkpoints")


# -- damage


def tear(path: Path) -> None:
    os.truncate(path, path.stat().st_size // 2)


def flip_a_bit(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[-9] ^= 4
    path.write_bytes(content)


DAMAGES: list[tuple[str, Callable[[Path], None]]] = [
    ("rank-000-00.safetensors", tear),
    ("rank-000-00.safetensors", flip_a_bit),
    ("rank-000-00.safetensors", Path.unlink),
    ("rank-001.json", flip_a_bit),
    ("rank-001.json", Path.unlink),
    (STATE_FILE, tear),
    (STATE_FILE, flip_a_bit),
    (STATE_FILE, Path.unlink),
]


def write(store: CheckpointFolder, step: int) -> str:
    name = f"step-{step:07d}"
    store.begin(name)
    for rank in range(2):
        store.write_part(name, rank, [(f"weight-{rank}", torch.full((64,), float(step)))], facts={"rank": rank})
    store.finish(name, {"step": step})
    return name


@pytest.mark.parametrize(("file", "damage"), DAMAGES)
def test_every_kind_of_damage_is_noticed(tmp_path: Path, file: str, damage: Callable[[Path], None]) -> None:
    store = CheckpointFolder(tmp_path, keep=2)
    name = write(store, 1)
    assert store.damage(name) is None
    damage(tmp_path / name / file)
    assert store.damage(name) is not None


def test_the_ranks_share_the_looking(tmp_path: Path) -> None:
    store = CheckpointFolder(tmp_path, keep=2)
    name = write(store, 1)
    flip_a_bit(tmp_path / name / "rank-001-00.safetensors")
    assert [store.damage(name, rank=rank, world_size=2) is None for rank in range(2)] == [True, False]


def test_a_checkpoint_gives_back_what_every_rank_wrote(tmp_path: Path) -> None:
    store = CheckpointFolder(tmp_path, keep=2)
    name = write(store, 7)
    tensors = store.open(name)
    assert store.state(name) == {"step": 7} and store.facts(name) == [{"rank": 0}, {"rank": 1}]
    assert "weight-2" not in tensors and torch.equal(tensors["weight-1"], torch.full((64,), 7.0))


def test_the_oldest_are_removed(tmp_path: Path) -> None:
    store = CheckpointFolder(tmp_path, keep=2)
    names = [write(store, step) for step in (9, 10, 11)]
    assert store.names() == names[:0:-1] and not (tmp_path / names[0]).exists()


def test_one_cut_off_while_written_is_not_seen(tmp_path: Path) -> None:
    store = CheckpointFolder(tmp_path, keep=2)
    name = write(store, 1)
    store.begin("step-0000002")
    store.write_part("step-0000002", 0, [("weight", torch.zeros(4))], facts={})
    assert CheckpointFolder(tmp_path, keep=2).names() == [name]


def test_a_damaged_newest_falls_back_to_the_one_before(
    base: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    first = start(base)
    train(first, range(1))
    first.save_checkpoint(tmp_path, 1, {"step": 1})
    train(first, range(1, 2))
    first.save_checkpoint(tmp_path, 2, {"step": 2})
    flip_a_bit(tmp_path / "step-0000002" / "rank-000-00.safetensors")
    with caplog.at_level(logging.WARNING):
        assert start(base).load_checkpoint(tmp_path) == {"step": 1}
    assert "step-0000002 is damaged (rank-000-00.safetensors is not what was written)" in caplog.text
    assert sorted(path.name for path in tmp_path.iterdir()) == ["damaged-step-0000002", "step-0000001"]


def test_no_whole_checkpoint_is_an_error_and_not_a_new_beginning(base: Path, tmp_path: Path) -> None:
    backend = start(base)
    backend.save_checkpoint(tmp_path, 1, {})
    (tmp_path / "step-0000001" / STATE_FILE).unlink()
    with pytest.raises(LearnerError, match="every checkpoint in .* is damaged"):
        backend.load_checkpoint(tmp_path)


def test_no_checkpoint_is_none(base: Path, tmp_path: Path) -> None:
    assert start(base).load_checkpoint(tmp_path / "none") is None


# -- other numbers of ranks


SETTINGS: dict[str, dict[str, Any]] = {
    "zero-0": {"zero_stage": 0},
    "zero-1": {"zero_stage": 1},
    "zero-2": {"zero_stage": 2},
    "zero-3": {"zero_stage": 3},
    "zero-2-average": {"zero_stage": 2, "ema": {"decay": 0.5}},
    "zero-3-average": {"zero_stage": 3, "ema": {"decay": 0.5}},
    "zero-2-muon": {"zero_stage": 2, "optimizer": "muon", "gradient_clipping": 0.0},
    "zero-3-muon": {"zero_stage": 3, "optimizer": "muon", "gradient_clipping": 0.0},
    "zero-2-lora-bf16": {"zero_stage": 2, "precision": "bf16", "lora": {"rank": 4, "alpha": 8.0}},
}


def run_ranks(base: Path, folder: Path, steps: range, *, ranks: int) -> dict[str, tuple[list[float], float]]:
    """A process per rank that for each of the settings resumes from `folder`, trains and saves there. Mean losses of
    all ranks, and the size of the weights."""
    result, port = folder.with_suffix(f".{steps.stop}.json"), free_port()
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu"}
    processes = [
        subprocess.Popen(
            [
                sys.executable, str(ROOT / "tests" / "backend_samples.py"), str(base), str(folder), str(rank),
                str(ranks), str(steps.start), str(steps.stop), str(port), str(result), json.dumps(SETTINGS),
            ],
            env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        )
        for rank in range(ranks)
    ]  # fmt: skip
    try:
        outputs = [process.communicate(timeout=400)[0] for process in processes]
    finally:
        for process in processes:
            process.kill()
    assert [process.returncode for process in processes] == [0] * ranks, "\n".join(outputs)
    return json.loads(result.read_text())


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize(("before", "after"), [(2, 1), (1, 2), (3, 2)])
def test_another_number_of_ranks_goes_on(base: Path, tmp_path: Path, before: int, after: int) -> None:
    first = run_ranks(base, tmp_path / "checkpoints", range(3), ranks=before)
    rest = run_ranks(base, tmp_path / "checkpoints", range(3, 5), ranks=after)
    for name, changes in SETTINGS.items():
        alone = start(base, **json.loads(json.dumps(changes)))
        losses = train(alone, range(5))
        # Muon iterates in bf16: what is added up in another order comes out another way.
        exact = "muon" not in name and "bf16" not in name
        assert first[name][0] + rest[name][0] == pytest.approx(losses, abs=5e-5 if exact else 0.02), name
        assert rest[name][1] == pytest.approx(size_of(alone), rel=1e-6 if exact else 1e-3), name
