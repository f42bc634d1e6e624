"""When memory runs out: which settings to turn, in the order in which they cost least.

`explained(config, doing)` is a context: torch's own "out of memory" inside it, on a GPU or a CPU, comes out as a
`LearnerError` that says what was being done, how much memory there is, and what to change. A process that the system
kills for its memory cannot say anything; `advice` is for whoever finds it dead.

Example::

    with explained(config, "the forward pass of 4096 tokens", world_size=1):
        logits = engine(ids)
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

from learner.base import LearnerError
from learner.config import LearnerConfig


@contextlib.contextmanager
def explained(config: LearnerConfig, doing: str, *, world_size: int) -> Iterator[None]:
    """Raises `LearnerError` in place of torch's error; others pass."""
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        raise LearnerError(
            f"out of memory in {doing}{_in_use()}. Turn one of these, cheapest first: "
            + "; ".join(advice(config, world_size=world_size))
        ) from error


def is_out_of_memory(error: BaseException) -> bool:
    """Whether torch (GPU: its own class; CPU: a RuntimeError of its allocator) or Python ran out of memory."""
    import torch

    text = str(error)
    return (
        isinstance(error, (torch.cuda.OutOfMemoryError, MemoryError))
        or "DefaultCPUAllocator: can't allocate memory" in text
        or "DefaultCPUAllocator: not enough memory" in text
        or "out of memory" in text.lower()
    )


def advice(config: LearnerConfig, *, world_size: int) -> list[str]:
    """What would need less memory than `config`, cheapest first; only what is not turned already, never empty."""
    knobs: list[str] = []
    if config.micro_batch_tokens > config.max_row_tokens:
        half = max(config.max_row_tokens, config.micro_batch_tokens // 2)
        knobs.append(f"micro_batch_tokens={half} (it is {config.micro_batch_tokens}; the loss stays the same)")
    if not config.gradient_checkpointing:
        knobs.append("gradient_checkpointing=true (a third more work, far fewer activations)")
    if config.precision != "bf16":
        stage = "" if config.zero_stage else " with zero_stage=1"
        knobs.append(f"precision=bf16{stage} (weights of half the size)")
    if world_size > 1 and config.zero_stage < 3:
        knobs.append(f"zero_stage={config.zero_stage + 1} (it is {config.zero_stage}; more of the state is shared out)")
    if config.lora is None:
        knobs.append("lora (no gradients nor optimizer state of the frozen weights), with optimizer=adamw")
    elif config.lora.quantization == "none":
        knobs.append("lora.quantization=nf4 (frozen weights in 4 bits; on a GPU)")
    if config.offload == "none":
        knobs.append(f"offload=optimizer with zero_stage={max(1, config.zero_stage)} (slower steps)")
    elif config.offload == "optimizer":
        knobs.append("offload=all with zero_stage=3 (slower passes)")
    if config.ema is not None:
        knobs.append("ema=null (a copy of the trained weights)")
    knobs.append(
        f"max_row_tokens (it is {config.max_row_tokens}; longer trajectories are then refused), with micro_batch_tokens"
    )
    knobs.append(f"more ranks (there {'is 1' if world_size == 1 else f'are {world_size}'}) with zero_stage 1 to 3")
    return knobs


def _in_use() -> str:
    import torch

    if not torch.cuda.is_available():
        return ""
    free, total = torch.cuda.mem_get_info()
    ours, peak = torch.cuda.memory_allocated(), torch.cuda.max_memory_allocated()
    gib = 2**30
    return (
        f" ({free / gib:.1f} of {total / gib:.1f} GiB are free on the GPU; this rank holds {ours / gib:.1f} GiB, "
        f"at its peak {peak / gib:.1f} GiB)"
    )
