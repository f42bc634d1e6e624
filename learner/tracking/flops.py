"""How much of the hardware a run uses: model FLOPs utilization (MFU; PaLM, arXiv 2204.02311, appendix B).

Counted is what the model's mathematics needs, once: 2 FLOPs forward and 4 backward for each parameter of the layers'
matrices and each token; the same for the head at each *trained* token (the others' logits are never computed); and
attention's two products, of which causality needs half: 6 * layers * heads * head size * n^2 for a row of n tokens,
forward and backward. Padding, recomputed activations, optimizer and embeddings' look-ups are not counted. With LoRA
the frozen matrices have no gradient of their own: 4 FLOPs a parameter instead of 6, and 6 for each of the adapters'.

The peak is the device's dense bf16 rate from its maker's data sheet, whatever precision the run has; on a CPU, where no
sheet says it, the rate of a large matrix product that is measured as the run starts, with the run's threads and
precision.

Example::

    flops = ModelFlops.of(model.config, lora=None)
    flops.of_rows([512, 300], trained_tokens=400) / step_s / peak_flops(device, threads=1, bf16=True)   # MFU
"""

from __future__ import annotations

import math
import re
import time
from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from learner.config import LoraConfig

if TYPE_CHECKING:
    import torch

PEAK_BF16_TFLOPS = {
    # NVIDIA's data sheets, tensor cores, dense (half of what is printed "with sparsity")
    "B200": 2250.0,
    "GH200": 989.4,
    "H200": 989.4,
    "H100 PCIe": 756.0,
    "H100 NVL": 835.5,
    "H100": 989.4,
    "H800": 989.4,
    "H20": 148.0,
    "A100": 311.8,
    "A800": 311.8,
    "A40": 149.7,
    "A30": 165.0,
    "A10G": 70.0,
    "A10": 125.0,
    "L40S": 362.1,
    "L40": 181.1,
    "L4": 121.0,
    "RTX 6000 Ada": 364.3,
    "RTX A6000": 154.8,
    "GeForce RTX 5090": 209.5,
    "GeForce RTX 4090": 165.2,
    "GeForce RTX 3090": 71.0,
    # AMD's
    "MI300X": 1307.4,
    "MI250X": 383.0,
    "MI210": 181.0,
}
"""Part of the device's name -> dense bf16 peak in TFLOP/s."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelFlops:
    """FLOPs of one forward and backward pass."""

    per_token: float
    """Layers' matrices."""
    per_trained_token: float
    """The head."""
    per_square: float
    """Attention, for each row's tokens squared."""

    @classmethod
    def of(cls, config: Any, *, lora: LoraConfig | None) -> ModelFlops | None:
        """Of a transformers model with that config; None for a mixture of experts, whose matrices are not all used."""
        if any(getattr(config, name, None) for name in ("num_experts", "num_local_experts", "n_routed_experts")):
            return None
        import torch
        from torch import nn
        from transformers import AutoModelForCausalLM

        with torch.device("meta"):
            decoder = AutoModelForCausalLM.from_config(config).get_decoder()
        linear = {name: module for name, module in decoder.named_modules() if isinstance(module, nn.Linear)}
        matrices = sum(module.weight.numel() for module in linear.values())
        adapters = 0
        if lora is not None:
            targets = [name.strip() for name in lora.target.split(",")]
            adapters = sum(
                lora.rank * (module.in_features + module.out_features)
                for name, module in linear.items()
                if lora.target == "all-linear" or name.rpartition(".")[2] in targets
            )
        head_size = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        frozen = lora is not None
        return cls(
            per_token=(4.0 if frozen else 6.0) * matrices + 6.0 * adapters,
            per_trained_token=(4.0 if frozen else 6.0) * config.hidden_size * config.vocab_size,
            per_square=6.0 * config.num_hidden_layers * config.num_attention_heads * head_size,
        )

    def of_rows(self, lengths: Iterable[int], *, trained_tokens: int) -> float:
        """FLOPs of rows of so many tokens each, of which `trained_tokens` are trained."""
        tokens = squares = 0
        for n in lengths:
            tokens += n
            squares += n * n
        return self.per_token * tokens + self.per_trained_token * trained_tokens + self.per_square * squares


def peak_flops(device: torch.device, *, threads: int, bf16: bool) -> float | None:
    """FLOP/s that the device can do at best; None for a GPU that `PEAK_BF16_TFLOPS` does not name."""
    if device.type == "cuda":
        import torch

        return peak_of_gpu(torch.cuda.get_device_name(device))
    return _measured_matmul(threads, bf16)


def peak_of_gpu(name: str) -> float | None:
    """By the name that the driver gives it, such as "NVIDIA H100 80GB HBM3"."""
    for part in sorted(PEAK_BF16_TFLOPS, key=len, reverse=True):
        if re.search(rf"\b{re.escape(part)}\b", name):
            return PEAK_BF16_TFLOPS[part] * 1e12
    return None


def _measured_matmul(threads: int, bf16: bool, *, size: int = 768, tries: int = 4) -> float:
    """FLOP/s of the fastest of a few matrix products, in the precision that the run multiplies in."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        a = torch.ones((size, size), dtype=torch.bfloat16 if bf16 else torch.float32)
        best_s = math.inf
        for _ in range(tries + 1):  # the first one warms up
            begun_s = time.perf_counter()
            torch.mm(a, a)
            best_s = min(best_s, time.perf_counter() - begun_s)
    finally:
        torch.set_num_threads(before)
    return 2.0 * size**3 / best_s
