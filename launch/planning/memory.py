"""How much memory a job's models take, in plain arithmetic: `engine_memory` of a vLLM engine, `learner_memory` of a
learner's rank. Every part says how it was reckoned; what is not known exactly says that it is an estimate.

Weights, gradients, masters and the optimizer's state are exact: tests count the bytes of a learner's tensors and vLLM's
own number of KV cache blocks. What comes and goes (activations, buffers, the CUDA context) is estimated, on the high
side. The sources: ZeRO (arXiv 1910.02054) with the buffers that DeepSpeed 0.19 has by default, activations as in
Korthikanti et al. (arXiv 2205.05198) with an attention that keeps no scores (FlashAttention), for SwiGLU layers.

Example::

    memory = learner_memory(config.learner, shape_of("Qwen/Qwen2.5-1.5B-Instruct"), gpu=True)
    memory.total / 2**30, memory.parts[0].formula
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from launch.planning.shapes import ModelShape
from learner.config import LearnerConfig
from rollout.policy_spec import PolicySpec

GIB = 2**30
CONTEXT_BYTES = 1.5 * GIB
"""Of a GPU: CUDA's context, cuBLAS' and NCCL's buffers."""
BUCKET = 500_000_000
"""Numbers in DeepSpeed's buffer of gradients (`reduce_bucket_size`)."""
LIVE = 1_000_000_000
"""Parameters that ZeRO 3 may hold whole at a time (`stage3_max_live_parameters`)."""
PREFILL_TOKENS = 8192
"""Tokens that vLLM computes at once on a large GPU."""
BLOCK_TOKENS, CPU_BLOCK_TOKENS = 16, 64
"""Tokens in a block of vLLM's KV cache; on a CPU as `rollout.vllm_policy` sets it."""
_WIDTH = {"float32": 4, "float": 4, "bfloat16": 2, "float16": 2, "half": 2, "auto": 2}


@dataclass(frozen=True, slots=True, kw_only=True)
class Part:
    """Bytes of one kind of thing, on one GPU (or in one process)."""

    name: str
    bytes: float
    formula: str
    """How it was reckoned, with its numbers."""
    exact: bool = True
    where: Literal["device", "host"] = "device"
    passing: bool = False
    """Only there during a forward and backward pass."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Memory:
    """Of one GPU, or of one process where there is none."""

    parts: tuple[Part, ...]

    @property
    def total(self) -> float:
        return sum(part.bytes for part in self.parts if part.where == "device")

    @property
    def host(self) -> float:
        """What was offloaded, of this rank."""
        return sum(part.bytes for part in self.parts if part.where == "host")

    @property
    def kept(self) -> float:
        """What is there all the time, on either."""
        return sum(part.bytes for part in self.parts if not part.passing)

    def part(self, name: str) -> float:
        return sum(part.bytes for part in self.parts if part.name == name)


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineMemory:
    """Of one GPU of an engine."""

    memory: Memory
    kv_bytes_per_token: float
    kv_tokens: int | None
    """That fit in an engine's KV cache; None where the size of the GPU is not known."""
    max_model_len: int

    @property
    def sequences(self) -> float | None:
        """Of `max_model_len` tokens, that fit at a time."""
        return None if self.kv_tokens is None else self.kv_tokens / self.max_model_len


def engine_memory(spec: PolicySpec, shape: ModelShape, *, gpu_bytes: float | None, gpu: bool) -> EngineMemory:
    """`gpu_bytes`: of the share of a GPU that each rank has; None: not known. Without a `gpu`, of the process."""
    tp, pp = spec.tensor_parallel_size, spec.pipeline_parallel_size
    width = _WIDTH.get(spec.dtype, 2)
    stored = shape.quantized_bytes or width
    split = f" / ({tp} x {pp})" if tp * pp > 1 else ""
    weights = shape.parameters * stored / (tp * pp)
    parts = [
        Part(
            name="weights",
            bytes=weights,
            formula=f"{shape.parameters:,} parameters x {stored:g} bytes{split}; {shape.source}",
        )
    ]
    per_token = shape.kv_bytes_per_token(width, tensor_parallel=tp, pipeline_parallel=pp)
    layers, heads = -(-shape.layers // pp), max(1.0, shape.kv_heads / tp)
    each = f"2 x {layers} layers x {heads:g} KV heads x {shape.head_dim} x {width} bytes a token"
    if not gpu:
        cache = spec.kv_cache_bytes or _cpu_cache(spec, per_token)
        tokens = int(cache // (per_token * CPU_BLOCK_TOKENS)) * CPU_BLOCK_TOKENS
        why = "kv_cache_bytes" if spec.kv_cache_bytes else "max_num_seqs whole sequences; less where memory is short"
        parts.append(Part(name="KV cache", bytes=cache, formula=f"{why}; {each}", exact=bool(spec.kv_cache_bytes)))
        return EngineMemory(
            memory=Memory(parts=tuple(parts)), kv_bytes_per_token=per_token, kv_tokens=tokens,
            max_model_len=spec.max_model_len,
        )  # fmt: skip
    batch = max(PREFILL_TOKENS, spec.max_num_seqs)
    wide = max(shape.intermediate * 3 / tp, (shape.heads + 2 * shape.kv_heads) * shape.head_dim / tp)
    working = batch * (wide + 2 * shape.hidden) * width
    sampling = spec.max_num_seqs * shape.vocabulary * 4 * 2
    parts.append(
        Part(
            name="activations",
            bytes=working + sampling,
            formula=f"{batch:,} tokens at once x one layer's widest {wide + 2 * shape.hidden:,.0f} numbers x {width} "
            f"bytes, and {spec.max_num_seqs} rows of {shape.vocabulary:,} fp32 logits twice",
            exact=False,
            passing=True,
        )
    )
    graphs = 0.0 if spec.enforce_eager else 0.5 * GIB + 0.02 * weights
    parts.append(
        Part(
            name="context and graphs",
            bytes=CONTEXT_BYTES + graphs,
            formula="1.5 GiB for CUDA and NCCL"
            + ("" if spec.enforce_eager else ", 0.5 GiB and 2% of the weights for graphs"),
            exact=False,
        )
    )
    used = sum(part.bytes for part in parts)
    if spec.kv_cache_bytes is not None:
        cache, why = float(spec.kv_cache_bytes), "kv_cache_bytes"
    elif gpu_bytes is not None:
        cache = max(0.0, gpu_bytes * spec.gpu_memory_utilization - used)
        why = f"what is left of {spec.gpu_memory_utilization:.0%} of {gpu_bytes / GIB:.0f} GiB"
    else:
        return EngineMemory(
            memory=Memory(parts=tuple(parts)), kv_bytes_per_token=per_token, kv_tokens=None,
            max_model_len=spec.max_model_len,
        )  # fmt: skip
    parts.append(Part(name="KV cache", bytes=cache, formula=f"{why}; {each}", exact=False))
    tokens = int(cache // (per_token * BLOCK_TOKENS)) * BLOCK_TOKENS
    return EngineMemory(
        memory=Memory(parts=tuple(parts)), kv_bytes_per_token=per_token, kv_tokens=tokens,
        max_model_len=spec.max_model_len,
    )  # fmt: skip


def learner_memory(config: LearnerConfig, shape: ModelShape, *, gpu: bool, trained_share: float = 1.0) -> Memory:
    """Of one of `config.ranks` ranks. `trained_share`: of a micro-batch's tokens, those whose logits are computed."""
    lora, ranks, stage = config.lora, config.ranks, config.zero_stage
    trained = shape.adapters(lora.rank, lora.target) if lora is not None else shape.parameters
    frozen = shape.parameters if lora is not None else 0
    width = 2 if config.precision == "bf16" else 4
    sharded = stage == 3
    parts: list[Part] = []
    parts += _weights(config, shape, trained, frozen, width)
    offloaded: Literal["device", "host"] = "host" if config.offload != "none" and gpu else "device"
    share = f" / {ranks} ranks" if ranks > 1 else ""
    if stage > 0:
        parts.append(
            Part(
                name="fp32 masters",
                bytes=trained * 4 / ranks,
                formula=f"{trained:,} trained x 4 bytes{share}",
                where=offloaded,
            )
        )
    state, formula = _optimizer_state(config, shape, trained)
    divided = ranks if stage > 0 else 1
    parts.append(
        Part(
            name="optimizer state",
            bytes=state / divided,
            formula=formula + (share if stage > 0 else ""),
            where=offloaded if stage > 0 else "device",
        )
    )
    parts += _gradients(config, trained, width, offloaded)
    if config.ema is not None:
        parts.append(
            Part(
                name="average",
                bytes=trained * 4 / divided,
                formula=f"{trained:,} trained x 4 bytes" + (share if stage > 0 else ""),
                where=offloaded if stage > 0 else "device",
            )
        )
    if sharded:
        live = min(shape.parameters, LIVE)
        parts.append(
            Part(
                name="gathered weights",
                bytes=live * width if ranks > 1 or config.offload == "all" else 0,
                formula=f"at most {live:,} parameters whole at a time x {width} bytes",
                exact=False,
                passing=True,
            )
        )
    parts += _activations(config, shape, gpu)
    parts.append(_logits(config, shape, gpu, trained_share))
    if gpu:
        parts.append(
            Part(name="context", bytes=CONTEXT_BYTES, formula="1.5 GiB for CUDA, cuBLAS and NCCL", exact=False)
        )
    return Memory(parts=tuple(part for part in parts if part.bytes > 0))


def _weights(config: LearnerConfig, shape: ModelShape, trained: int, frozen: int, width: int) -> list[Part]:
    divided = config.ranks if config.zero_stage == 3 else 1
    share = f" / {divided} ranks" if divided > 1 else ""
    where: Literal["device", "host"] = "host" if config.offload == "all" else "device"
    if config.lora is None:
        return [
            Part(
                name="weights",
                bytes=trained * width / divided,
                formula=f"{trained:,} x {width} bytes{share}; {shape.source}",
                where=where,
            )
        ]
    per_weight, note = float(width), f"{width} bytes"
    if config.lora.quantization == "nf4":
        kept = shape.embedding * (1 if shape.tied else 2) + shape.vectors
        per_weight = (shape.matrices * 0.516 + kept * 4.0) / frozen
        note = f"{per_weight:.3g} bytes (4 bits and 0.127 for scales; embeddings and norms in 4 bytes)"
    return [
        Part(
            name="weights",
            bytes=frozen * per_weight / divided,
            formula=f"{frozen:,} frozen x {note}{share}; {shape.source}",
            exact=config.lora.quantization == "none",
            where=where,
        ),
        Part(
            name="adapters",
            bytes=trained * width / divided,
            formula=f"rank {config.lora.rank} x (rows + columns) of {config.lora.target}: {trained:,} x {width} bytes"
            + share,
            where=where,
        ),
    ]


def _optimizer_state(config: LearnerConfig, shape: ModelShape, trained: int) -> tuple[float, str]:
    if config.optimizer == "adamw":
        return trained * 8.0, f"AdamW: {trained:,} trained x 2 moments x 4 bytes"
    if config.zero_stage in (1, 2):
        return trained * 8.0, f"DeepSpeed's Muon under ZeRO {config.zero_stage}: {trained:,} trained x 8 bytes"
    matrices = trained if config.lora is not None else shape.matrices
    rest = trained - matrices
    return (
        matrices * 4.0 + rest * 8.0,
        f"Muon: {matrices:,} of matrices x 4 bytes; AdamW: {rest:,} others x 8",
    )


def _gradients(config: LearnerConfig, trained: int, width: int, offloaded: Literal["device", "host"]) -> list[Part]:
    stage, ranks = config.zero_stage, config.ranks
    each = 4 if stage >= 2 else width
    divided = ranks if stage >= 2 else 1
    share = f" / {divided} ranks" if divided > 1 else ""
    parts = [
        Part(
            name="gradients",
            bytes=trained * each / divided,
            formula=f"{trained:,} trained x {each} bytes{share}",
            where=offloaded if stage >= 2 else "device",
            passing=stage < 3,
        )
    ]
    if stage > 0:
        parts.append(
            Part(
                name="gradient buffer",
                bytes=BUCKET * width,
                formula=f"DeepSpeed's reduce_bucket_size {BUCKET:,} x {width} bytes",
                exact=False,
                passing=stage < 3,
            )
        )
    return parts


def _activations(config: LearnerConfig, shape: ModelShape, gpu: bool) -> list[Part]:
    tokens = config.micro_batch_tokens
    half = config.precision != "fp32"
    width = 2 if half else 4
    h, q, kv, f = shape.hidden, shape.heads * shape.head_dim, shape.kv_heads * shape.head_dim, shape.intermediate
    # Kept by one layer for its backward pass, per token: inputs of matrices, of attention, of the two norms (in fp32
    # too), of the activation function and of its product.
    layer = width * (2 * h + 2 * (q + 2 * kv) + 2 * q + 4 * f) + 4 * 4 * h
    if config.lora is not None:
        layer += width * 2 * h
    if config.gradient_checkpointing:
        stream = 4 if config.precision != "bf16" else 2
        total = shape.layers * h * stream + layer
        formula = (
            f"{tokens:,} tokens x ({shape.layers} layers' inputs of {h} x {stream} bytes + one layer's {layer:,} bytes)"
        )
    else:
        total = shape.layers * layer
        formula = f"{tokens:,} tokens x {shape.layers} layers x {layer:,} bytes"
    parts = [Part(name="activations", bytes=tokens * total, formula=formula, exact=False, passing=True)]
    if config.precision == "autocast":
        copies = shape.matrices + (shape.embedding if not shape.tied else shape.embedding)
        parts.append(
            Part(
                name="bf16 copies",
                bytes=2 * copies,
                formula=f"autocast's of {copies:,} weights x 2 bytes",
                exact=False,
                passing=True,
            )
        )
    return parts


def _logits(config: LearnerConfig, shape: ModelShape, gpu: bool, trained_share: float) -> Part:
    tokens = config.micro_batch_tokens * trained_share
    half = config.precision != "fp32"
    if gpu and config.objective in ("sft", "cot"):
        each = 4 if half else 8  # the logits and their gradient (`learner.objectives.log_probs`)
        note = "logits and their gradient"
    else:
        each = (2 * 2 if half else 4) + 3 * 4
        note = "logits, and their softmax and gradient in fp32"
    whose = "all tokens" if trained_share == 1.0 else f"{trained_share:.0%} of the tokens"
    return Part(
        name="logits",
        bytes=tokens * shape.vocabulary * each,
        formula=f"{tokens:,.0f} positions ({whose} of a micro-batch) x {shape.vocabulary:,} x {each} bytes: {note}",
        exact=False,
        passing=True,
    )


def _cpu_cache(spec: PolicySpec, per_token: float) -> float:
    return per_token * (spec.max_model_len + 128) * spec.max_num_seqs
