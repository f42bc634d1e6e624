"""What DeepSpeed is told: `engine_settings`, and what it would get wrong: `refuse_what_does_not_work`.

Plain dictionaries from a `LearnerConfig`; DeepSpeed itself is imported by `learner.deepspeed_backend` alone. What works
with DeepSpeed 0.19, on CPU and GPU alike unless said otherwise:

- ZeRO 0: fp32 and autocast, AdamW and Muon. Not bf16 weights: there is no fp32 master copy to step on.
- ZeRO 1, 2, 3: all precisions, AdamW and Muon. Muon under ZeRO is DeepSpeed's (torch's wants matrices; a shard is
  flat), and DeepSpeed measures and clips the norm of Muon's update instead of the gradient's: gradient_clipping must
  be 0 there.
- Offload of the optimizer (ZeRO 1 to 3) and of the weights (ZeRO 3), with AdamW: the step runs torch's fused AdamW on
  the CPU, which needs no compiled operator of DeepSpeed's. On a machine without a GPU the same code runs; it moves
  nothing.

Example::

    engine_settings(LearnerConfig(model_path="m", output_dir="o", epochs=1, zero_stage=2))["zero_optimization"]
"""

from __future__ import annotations

from typing import Any

from learner.config import ConfigError, LearnerConfig


def refuse_what_does_not_work(config: LearnerConfig) -> None:
    """Raises `ConfigError` for a combination that DeepSpeed would get wrong, naming what works."""
    if config.zero_stage == 0 and config.precision == "bf16":
        raise ConfigError(
            "precision is 'bf16' with zero_stage 0, which keeps no fp32 master weights; "
            "use precision 'autocast', or zero_stage 1, 2 or 3"
        )
    if config.zero_stage > 0 and config.optimizer == "muon" and config.gradient_clipping > 0:
        raise ConfigError(
            f"gradient_clipping is {config.gradient_clipping} with optimizer 'muon' and zero_stage "
            f"{config.zero_stage}, where DeepSpeed clips Muon's update instead of the gradient; set gradient_clipping "
            "to 0, zero_stage to 0, or optimizer to 'adamw'"
        )
    if config.batching == "packed" and config.compile:
        raise ConfigError("compile is true with batching 'packed'; use batching 'bucketed', or compile false")
    _refuse_offload(config)
    _refuse_quantization(config)


def _refuse_offload(config: LearnerConfig) -> None:
    if config.offload == "none":
        return
    least = 3 if config.offload == "all" else 1
    if config.zero_stage < least:
        raise ConfigError(
            f"offload is {config.offload!r} with zero_stage {config.zero_stage}; it needs zero_stage "
            + ("3" if least == 3 else "1, 2 or 3")
        )
    if config.optimizer == "muon":
        raise ConfigError(
            f"offload is {config.offload!r} with optimizer 'muon', whose matrix products are too slow on the CPU; "
            "set optimizer to 'adamw'"
        )


def _refuse_quantization(config: LearnerConfig) -> None:
    if config.lora is None or config.lora.quantization == "none":
        return
    if config.zero_stage == 3:
        raise ConfigError(
            "lora.quantization is 'nf4' with zero_stage 3, which cannot share out 4-bit weights; use zero_stage 0, 1 "
            "or 2 (the adapters are all there is to share out)"
        )
    if config.precision == "fp32":
        raise ConfigError("lora.quantization is 'nf4' with precision 'fp32'; use 'autocast' or 'bf16'")


def engine_settings(config: LearnerConfig) -> dict[str, Any]:
    """DeepSpeed's configuration for `config`, which `refuse_what_does_not_work` has let pass."""
    zero: dict[str, Any] = {"stage": config.zero_stage}
    if config.zero_stage > 0 and config.optimizer == "muon":
        zero["reduce_scatter"] = False
    if config.zero_stage == 3:
        zero["stage3_gather_16bit_weights_on_model_save"] = True
    if config.offload != "none":
        zero["offload_optimizer"] = {"device": "cpu", "pin_memory": True}
    if config.offload == "all":
        zero["offload_param"] = {"device": "cpu", "pin_memory": True}
    settings: dict[str, Any] = {
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": 2,  # more than one; the true number varies and is told by the boundary
        "gradient_clipping": config.gradient_clipping if config.zero_stage > 0 else 0.0,
        "steps_per_print": 10**9,
        "zero_optimization": zero,
        # Without the check, a bf16 gradient that is not finite would be stepped on.
        "bf16": {"enabled": config.precision == "bf16", "check_grad_overflow": True},
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
    }
    if config.precision == "bf16" and config.zero_stage >= 2:
        # In bf16, DeepSpeed's default, the sum over 32 micro-batches is off by 0.7% (0.2% in fp32). Stage 1 would be
        # another optimizer class of DeepSpeed's with it.
        settings["data_types"] = {"grad_accum_dtype": "fp32"}
    return settings
