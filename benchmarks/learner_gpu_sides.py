"""The two sides of `benchmarks/learner_gpu.py`: our `Learner` and TRL's `SFTTrainer`, on one GPU, for a few steps.

Both train bf16 products with AdamW, on the same rows in the same order, about `step_tokens` a step; with LoRA, the same
adapters on a frozen base in bf16. Full training keeps fp32 masters on both sides: ours are DeepSpeed's (ZeRO 1), TRL's
either transformers' mixed precision ("amp") or DeepSpeed's too. The run is left when enough steps are clocked: what a
checkpoint takes says nothing about speed.

Example::

    measured = run_ours(workload, GpuSettings(student="/s", steps=12, micro_rows=4), folder)
    measured.extra["peak_memory_mb"], measured.extra["mfu"]
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from benchmarks.learner_ours import GRADIENT_CLIPPING, ClockedSteps, ListSource
from benchmarks.learner_trl import common_arguments, fit
from benchmarks.learner_world import WARMUP_STEPS, Measured, Workload
from learner.base import Progress
from learner.config import LearnerConfig, LoraConfig
from learner.examples import Example

LORA = LoraConfig(rank=64, alpha=128.0, dropout=0.05)
"""The paper's (arXiv 2505.17612)."""


@dataclass(frozen=True, slots=True, kw_only=True)
class GpuSettings:
    """One run."""

    student: str
    """Folder."""
    steps: int
    row_tokens: int = 4096
    step_tokens: int = 65_536
    lora: bool = False
    batching: Literal["packed", "padded"] = "packed"
    """"packed": rows end to end up to `row_tokens`; "padded": rows as they are, side by side; one a micro-batch
    needs no mask."""
    micro_rows: int = 1
    """Rows of `row_tokens` in a micro-batch."""
    checkpointing: bool = False
    engine: Literal["amp", "deepspeed"] = "amp"
    """TRL's alone."""
    attention: Literal["sdpa", "flex_attention", "flash_attention_2"] = "sdpa"
    """TRL's alone; ours is chosen by the learner."""

    def describe(self, side: str) -> str:
        parts = [self.batching, f"{self.micro_rows} x {self.row_tokens} tokens a micro-batch"]
        parts += ["activations checkpointed"] if self.checkpointing else []
        parts += [self.engine, self.attention] if side == "gpu_trl" else []
        return ", ".join(parts)


class _EnoughError(Exception):
    """All steps are clocked."""


def run_ours(workload: Workload, settings: GpuSettings, folder: Path) -> Measured:
    """Our side. `extra` has `mfu` (where the device's peak is known) and `peak_memory_mb`."""
    from learner.trainer import Learner

    steps = ClockedSteps()

    def after_step(now: Progress) -> None:
        steps.after_step(now)
        if steps.clock.steps == settings.steps:
            raise _EnoughError

    try:
        Learner(gpu_config(settings, folder), ListSource(workload.trajectories), on_progress=after_step).run()
    except _EnoughError:
        return _with_use(steps.measured(), workload, settings)
    raise RuntimeError(f"{len(workload.rows)} rows were too few for {settings.steps} steps")


def gpu_config(settings: GpuSettings, folder: Path) -> LearnerConfig:
    return LearnerConfig(
        model_path=settings.student,
        output_dir=str(folder),
        epochs=1,
        optimizer="adamw",
        lr=2e-4 if settings.lora else 1e-5,
        schedule="constant",
        warmup_steps=WARMUP_STEPS,
        gradient_clipping=GRADIENT_CLIPPING,
        tokens_per_step=settings.step_tokens,
        micro_batch_tokens=settings.micro_rows * settings.row_tokens,
        max_row_tokens=settings.row_tokens,
        batching="packed" if settings.batching == "packed" else "bucketed",
        precision="bf16",
        zero_stage=1,
        gradient_checkpointing=settings.checkpointing,
        lora=LORA if settings.lora else None,
        resume=False,
    )


def run_trl(workload: Workload, settings: GpuSettings, folder: Path) -> Measured:
    """TRL's side; the same `extra`."""
    import torch
    from transformers import AutoModelForCausalLM
    from trl.trainer.sft_config import SFTConfig

    from learner.adapters import with_adapters
    from learner.optimizers import MuonAdamW, parameter_groups

    gpu = torch.cuda.is_available()
    deepspeed = settings.engine == "deepspeed"
    packed = settings.batching == "packed"
    average = settings.row_tokens if packed else workload.tokens / len(workload.rows)
    per_step = max(1, round(settings.step_tokens / average))
    rows = min(settings.micro_rows, per_step)
    arguments = SFTConfig(
        max_steps=settings.steps,
        per_device_train_batch_size=rows,
        gradient_accumulation_steps=max(1, per_step // rows),
        train_sampling_strategy="sequential",
        packing=packed,
        max_length=settings.row_tokens if packed else None,
        max_grad_norm=GRADIENT_CLIPPING,
        use_cpu=not gpu,
        gradient_checkpointing=settings.checkpointing,
        deepspeed=_deepspeed_settings() if deepspeed else None,
        **common_arguments(folder),
    )
    model: Any = AutoModelForCausalLM.from_pretrained(
        settings.student,
        # Under DeepSpeed and below adapters bf16, of which DeepSpeed keeps fp32 masters and LoRA needs none.
        dtype=torch.bfloat16 if deepspeed or settings.lora else torch.float32,
        attn_implementation=settings.attention,
    )
    config = gpu_config(settings, folder)
    if settings.lora:
        if settings.checkpointing:
            model.enable_input_require_grads()
        model = with_adapters(model, config)
    if gpu:
        model = model.to("cuda")  # before its optimizer is made
    optimizer = MuonAdamW(parameter_groups(model, config))
    steps = fit(model, workload.rows, arguments, optimizer=optimizer, student=Path(settings.student))
    return _with_use(steps.measured(), workload, settings)


def _deepspeed_settings() -> dict[str, Any]:
    """ZeRO 1 for TRL, and what DeepSpeed wants to find in the environment of a single process."""
    import deepspeed
    import torch

    from learner.deepspeed_backend import free_port

    os.environ.update(RANK="0", LOCAL_RANK="0", WORLD_SIZE="1", MASTER_ADDR="127.0.0.1", MASTER_PORT=str(free_port()))
    if not torch.cuda.is_available():
        setattr(deepspeed.ops, "__compatible_ops__", {})  # noqa: B010  (no attribute until it is set)
    return {
        "train_batch_size": "auto",
        "train_micro_batch_size_per_gpu": "auto",
        "gradient_accumulation_steps": "auto",
        "gradient_clipping": "auto",
        "zero_optimization": {"stage": 1},
        "bf16": {"enabled": True},
        "zero_allow_untested_optimizer": True,
        "steps_per_print": 10**9,
    }


def _with_use(measured: Measured, workload: Workload, settings: GpuSettings) -> Measured:
    """With the share of the device's peak and its memory, worked out alike for both sides."""
    import torch
    from transformers import AutoConfig

    from learner.step_sums import peak_memory_mb
    from learner.tracking.flops import ModelFlops, peak_flops

    device = torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else torch.device("cpu")
    measured.extra["peak_memory_mb"] = peak_memory_mb(device)
    flops = ModelFlops.of(AutoConfig.from_pretrained(settings.student), lora=LORA if settings.lora else None)
    peak = peak_flops(device, threads=torch.get_num_threads(), bf16=True)
    if flops is not None and peak is not None:
        measured.extra["mfu"] = _flops(flops, measured, workload.rows) / measured.wall_s / peak
    return measured


def _flops(flops: Any, measured: Measured, rows: Sequence[Example]) -> float:
    """Of the counted steps, whose rows are taken to be as long as all rows are on average."""
    lengths = [len(row) for row in rows]
    share = measured.tokens / sum(lengths)
    return share * flops.of_rows(lengths, trained_tokens=round(measured.trained_tokens / share))
