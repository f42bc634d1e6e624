"""A PEFT adapter merged into its base says what the two say together, and what does not fit is our input's fault."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from learner_samples import TOKENIZER, save_tiny_student
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from rollout.adapter_merge import base_of, merged_model
from rollout.policy import PolicyError
from rollout.policy_spec import PolicySpec
from rollout.trajectory import FailureClass


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> Path:
    return save_tiny_student(tmp_path_factory.mktemp("base"))


@pytest.fixture(scope="module")
def adapter(base, tmp_path_factory) -> Path:
    """One that changes something: LoRA's own beginning does not."""
    folder = tmp_path_factory.mktemp("adapter")
    torch.manual_seed(0)
    settings = LoraConfig(r=4, lora_alpha=8, target_modules="all-linear", task_type="CAUSAL_LM")
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(base), settings)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if "lora_B" in name:
                weight.normal_(std=0.1)
    model.save_pretrained(folder, save_embedding_layers=False)
    return folder


def logits(model: object, ids: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        return model(ids).logits  # type: ignore[operator]


def test_the_merged_model_says_what_base_and_adapter_say_together(base, adapter):
    ids = torch.arange(5, 45).reshape(2, 20)
    plain = AutoModelForCausalLM.from_pretrained(base)
    alone = logits(plain, ids)
    together = logits(PeftModel.from_pretrained(plain, str(adapter)).eval(), ids)
    with merged_model(str(base), str(adapter)) as folder:
        merged = AutoModelForCausalLM.from_pretrained(folder)
        assert not list(folder.glob("adapter_*"))
        template = AutoTokenizer.from_pretrained(TOKENIZER).chat_template
        assert AutoTokenizer.from_pretrained(folder).chat_template == template
    torch.testing.assert_close(logits(merged, ids), together, atol=1e-5, rtol=1e-5)
    assert (together - alone).abs().max() > 0.01
    assert not folder.exists()


def test_an_adapter_names_its_base(base, adapter):
    assert base_of(adapter) == str(base)


def test_a_folder_without_an_adapter_is_named(tmp_path):
    with pytest.raises(ValueError, match=r"is no PEFT adapter: it holds no adapter_config\.json"):
        base_of(tmp_path)


def test_an_adapter_of_another_model_is_a_bad_input(base, adapter, tmp_path):
    config = AutoConfig.from_pretrained(base)
    config.hidden_size, config.intermediate_size = 128, 64
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path)
    with pytest.raises(PolicyError, match="cannot be merged into") as caught, merged_model(str(tmp_path), str(adapter)):
        pass
    assert caught.value.failure_class is FailureClass.INPUT


def test_a_policy_is_named_after_its_adapter():
    assert PolicySpec(kind="vllm", model="m/n", adapter="runs/a/adapter").policy_name == "runs/a/adapter"
