"""The exported student: merged, as a PEFT adapter, or both, and the card that says what it is."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from backend_samples import config_of, train
from learner_samples import save_tiny_student

from learner.config import LoraConfig
from learner.deepspeed_backend import DeepSpeedBackend
from learner.export import export_student, write_card

PROMPT = torch.arange(3, 40)[None]


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_student(tmp_path_factory.mktemp("student"))


def exported(base: Path, folder: Path, *, stage: int = 0, **lora: Any) -> Path:
    config = config_of(base, folder, zero_stage=stage, lr=5e-2, lora=LoraConfig(rank=4, alpha=8.0, **lora))
    backend = DeepSpeedBackend(config, rank=0, world_size=1)
    train(backend, range(1))
    backend.export(folder / "student", facts={"optimizer steps": 2}, data={"trajectories trained on": 12})
    return folder / "student"


def logits_of(folder: Path, adapter: Path | None = None) -> torch.Tensor:
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    model: Any = AutoModelForCausalLM.from_pretrained(folder)
    if adapter is not None:
        model = PeftModel.from_pretrained(model, str(adapter))
    with torch.no_grad():
        return model.eval()(PROMPT).logits


@pytest.mark.parametrize("stage", [0, pytest.param(3, marks=pytest.mark.slow)])
def test_an_adapter_on_its_base_is_the_merged_student(base: Path, tmp_path: Path, stage: int) -> None:
    merged = exported(base, tmp_path / "merged", stage=stage)
    adapter = exported(base, tmp_path / "adapter", stage=stage, export="adapter")
    assert torch.allclose(logits_of(base, adapter), logits_of(merged), atol=1e-4)
    assert not torch.allclose(logits_of(base), logits_of(merged), atol=1e-2)


def test_an_adapter_folder_has_what_a_server_needs_and_no_base(base: Path, tmp_path: Path) -> None:
    from transformers import AutoTokenizer, GenerationConfig

    folder = exported(base, tmp_path, export="adapter")
    assert not (folder / "model.safetensors").exists()
    settings = json.loads((folder / "adapter_config.json").read_text())
    assert settings["base_model_name_or_path"] == str(base) and settings["r"] == 4
    tokenizer = AutoTokenizer.from_pretrained(folder)
    assert tokenizer.chat_template
    assert GenerationConfig.from_pretrained(folder).eos_token_id == tokenizer.eos_token_id
    assert "library_name: peft" in (folder / "README.md").read_text()
    assert all(path.stat().st_mode & 0o777 == 0o644 for path in folder.iterdir())


def test_both_are_written_when_asked_for(base: Path, tmp_path: Path) -> None:
    folder = exported(base, tmp_path, export="both")
    assert torch.allclose(logits_of(base, folder / "adapter"), logits_of(folder), atol=1e-4)
    assert "PeftModel" in (folder / "adapter" / "README.md").read_text()
    assert "library_name: transformers" in (folder / "README.md").read_text()


def test_the_card_says_recipe_data_and_scores(base: Path, tmp_path: Path) -> None:
    folder = exported(base, tmp_path)
    write_card(folder, scores={"arithmetic": 0.915})
    card = (folder / "README.md").read_text()
    for said in ("| optimizer steps | 2 |", "| trajectories trained on | 12 |", "| zero_stage | 0 |", "| lr | 0.05 |"):
        assert said in card
    assert "| arithmetic | 0.915 |" in card and str(tmp_path) not in card


def test_an_export_that_fails_leaves_the_one_before(base: Path, tmp_path: Path) -> None:
    folder = exported(base, tmp_path)
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    with pytest.raises(ValueError, match="the weights are not the model's: .* differ"):
        export_student(folder, weights={"model.norm.weight": torch.ones(64)}, config=config_of(base, base), facts={})
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before
