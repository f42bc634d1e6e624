"""LoRA and QLoRA through PEFT: put into a model, taken out of the gathered weights, merged or written as a folder.

PEFT does what it is right for: the layers, their initialisation, the merge, the folder that `PeftModel.from_pretrained`
and vLLM load. Not TRL's `peft_config` arguments, which come with its trainer.

Example::

    model = with_adapters(load_base(config, device), config)
    merged_weights(config, {"base_model.model...lora_A.default.weight": tensor, ...})   # as the plain model names them
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from learner.base import LearnerError
from learner.config import ConfigError, LearnerConfig

if TYPE_CHECKING:
    import torch

QUANTIZED_STORAGE = "bfloat16"


def is_quantized(config: LearnerConfig) -> bool:
    return config.lora is not None and config.lora.quantization != "none"


def load_base(config: LearnerConfig, device: torch.device | None = None) -> Any:
    """The model at `config.model_path` in fp32 on the CPU; with a `device`, frozen in 4 bits there where the
    configuration says so. Raises `ConfigError` for quantization without a GPU or without bitsandbytes, OSError for no
    model."""
    import torch
    from transformers import AutoModelForCausalLM
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()
    settings: dict[str, Any] = {"dtype": torch.float32}
    if device is not None and is_quantized(config):
        settings = {
            "dtype": torch.bfloat16,
            "device_map": {"": device},
            "quantization_config": _four_bits(device),
        }
    return AutoModelForCausalLM.from_pretrained(config.model_path, attn_implementation="sdpa", **settings)


def _four_bits(device: torch.device) -> Any:
    """NormalFloat 4 with doubly quantized constants, products in bf16 (arXiv 2305.14314, section 3)."""
    import importlib.util

    import torch
    from transformers import BitsAndBytesConfig

    if device.type != "cuda":
        raise ConfigError(
            f"lora.quantization is 'nf4' on the device {device.type!r}; it needs a GPU (cluster.gpus_per_rank=1), or "
            "set lora.quantization to 'none'"
        )
    if importlib.util.find_spec("bitsandbytes") is None:
        raise ConfigError(
            "lora.quantization is 'nf4', which needs the package bitsandbytes: pip install bitsandbytes, or set "
            "lora.quantization to 'none'"
        )
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.bfloat16,
        bnb_4bit_quant_storage=getattr(torch, QUANTIZED_STORAGE),
    )


def with_adapters(model: Any, config: LearnerConfig) -> Any:
    """Low-rank adapters in fp32 put into `model`, whose other weights are frozen."""
    from peft import get_peft_model

    return get_peft_model(model, _settings(config), autocast_adapter_dtype=True)


def _settings(config: LearnerConfig) -> Any:
    from peft import LoraConfig as PeftConfig

    lora = config.lora
    assert lora is not None
    target = lora.target if lora.target == "all-linear" else [name.strip() for name in lora.target.split(",")]
    return PeftConfig(
        r=lora.rank,
        lora_alpha=lora.alpha,  # pyright: ignore[reportArgumentType]  (declared int; a float works)
        lora_dropout=lora.dropout,
        target_modules=target,
        task_type="CAUSAL_LM",
    )


def merged_weights(config: LearnerConfig, adapters: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Name -> whole fp32 tensor as the plain model names them, from the adapters' weights as the PEFT model names them.

    The base is read again from `config.model_path`, in full precision also where it was trained on in 4 bits. Raises
    `LearnerError` when the adapters are not this configuration's.
    """
    model = with_adapters(load_base(config), config)
    missing, unexpected = model.load_state_dict(dict(adapters), strict=False)
    absent = [name for name in missing if "lora_" in name]
    if unexpected or absent:
        raise LearnerError(f"cannot merge LoRA: missing {absent[:3]}, unexpected {unexpected[:3]}")
    return dict(model.merge_and_unload().state_dict())


def write_adapter(folder: Path, adapters: Mapping[str, torch.Tensor], config: LearnerConfig, dtype: Any) -> None:
    """The adapters as PEFT's own folder: adapter_config.json, adapter_model.safetensors."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    with torch.device("meta"):
        base = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(config.model_path))
        model = with_adapters(base, config)
    model.peft_config["default"].base_model_name_or_path = config.model_path
    # Without this PEFT asks the hub whether the vocabulary has grown.
    model.save_pretrained(
        folder,
        state_dict={name: value.to(dtype, copy=True) for name, value in adapters.items()},
        save_embedding_layers=False,
    )
