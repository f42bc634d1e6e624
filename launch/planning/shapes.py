"""The shapes of models, as far as memory and work depend on them; nothing is loaded or downloaded.

A shape comes from a folder's `config.json`, from that of a model that is in the local Hugging Face cache, or from the
table below; what none of them has is unknown, and said to be. Counted are dense decoders of the Llama family (Qwen2,
Qwen3, Llama, Mistral): other architectures are counted as transformers builds them, without weights.

Example::

    shape = shape_of("Qwen/Qwen2.5-32B-Instruct")
    shape.parameters                      # 32,763,876,352
    shape.kv_bytes_per_token(2)           # 262,144: keys and values of 64 layers, 8 heads, 128 numbers of 2 bytes
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

_FAMILY = ("qwen2", "qwen3", "llama", "mistral")
_HIDDEN_LIMIT = 1 << 20


class UnknownShapeError(ValueError):
    """Nothing here says what that model is like; the message says what would."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Linear:
    """One matrix of a layer."""

    name: str
    """As modules are named, such as "q_proj"."""
    rows: int
    columns: int
    """In, out."""
    bias: bool = False

    @property
    def parameters(self) -> int:
        return self.rows * self.columns


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelShape:
    """A decoder."""

    source: str
    """Where the numbers are from, for people."""
    layers: int
    hidden: int
    heads: int
    kv_heads: int
    head_dim: int
    intermediate: int
    vocabulary: int
    tied: bool
    """Whether the head is the embedding."""
    attention_bias: bool = False
    """Of q, k and v, as in Qwen2; `output_bias`: of o too, as Llama's `attention_bias`."""
    output_bias: bool = False
    mlp_bias: bool = False
    head_norms: bool = False
    """Norms of q and k, as in Qwen3."""
    quantized_bytes: float | None = None
    """Bytes of a weight where the folder's are quantized."""
    counted: int | None = None
    """All parameters, of an architecture that is not of the family; the fields above are then what its config says."""
    longest: int | None = None
    """Tokens that it was made for (`max_position_embeddings`)."""

    @property
    def linears(self) -> tuple[Linear, ...]:
        """Of one layer."""
        h, q, kv, f = self.hidden, self.heads * self.head_dim, self.kv_heads * self.head_dim, self.intermediate
        return (
            Linear(name="q_proj", rows=h, columns=q, bias=self.attention_bias),
            Linear(name="k_proj", rows=h, columns=kv, bias=self.attention_bias),
            Linear(name="v_proj", rows=h, columns=kv, bias=self.attention_bias),
            Linear(name="o_proj", rows=q, columns=h, bias=self.output_bias),
            Linear(name="gate_proj", rows=h, columns=f, bias=self.mlp_bias),
            Linear(name="up_proj", rows=h, columns=f, bias=self.mlp_bias),
            Linear(name="down_proj", rows=f, columns=h, bias=self.mlp_bias),
        )

    @property
    def matrices(self) -> int:
        """Parameters of the layers' matrices: what Muon steps on."""
        return self.layers * sum(each.parameters for each in self.linears)

    @property
    def embedding(self) -> int:
        return self.vocabulary * self.hidden

    @property
    def vectors(self) -> int:
        """Biases and norms."""
        per_layer = sum(each.columns for each in self.linears if each.bias) + 2 * self.hidden
        return self.layers * (per_layer + 2 * self.head_dim * self.head_norms) + self.hidden

    @property
    def parameters(self) -> int:
        """A head that is the embedding is counted once."""
        if self.counted is not None:
            return self.counted
        return self.matrices + self.vectors + self.embedding * (1 if self.tied else 2)

    def adapters(self, rank: int, target: str) -> int:
        """Parameters of LoRA's adapters on `target`: "all-linear" (of the layers, as PEFT does) or names by commas."""
        names = {name.strip() for name in target.split(",")}
        chosen = [each for each in self.linears if target == "all-linear" or each.name in names]
        return self.layers * sum(rank * (each.rows + each.columns) for each in chosen)

    def kv_bytes_per_token(self, width: int, *, tensor_parallel: int = 1, pipeline_parallel: int = 1) -> float:
        """Bytes of keys and values that a token has on one GPU; `width`: bytes of a number. Of the pipeline's stages,
        the one with most layers; heads that are fewer than GPUs are on several."""
        layers = -(-self.layers // pipeline_parallel)
        heads = max(1.0, self.kv_heads / tensor_parallel)
        return 2 * layers * heads * self.head_dim * width


def _qwen2_5(size: str, hidden: int, f: int, layers: int, heads: int, kv: int, tied: bool) -> ModelShape:
    return ModelShape(
        source=f"built-in table: config.json of Qwen/Qwen2.5-{size}",
        layers=layers, hidden=hidden, heads=heads, kv_heads=kv, head_dim=hidden // heads, intermediate=f,
        vocabulary=151936 if tied else 152064, tied=tied, attention_bias=True, longest=32768,
    )  # fmt: skip


QWEN2_5 = {
    "0.5B": _qwen2_5("0.5B", 896, 4864, 24, 14, 2, True),
    "1.5B": _qwen2_5("1.5B", 1536, 8960, 28, 12, 2, True),
    "3B": _qwen2_5("3B", 2048, 11008, 36, 16, 2, True),
    "7B": _qwen2_5("7B", 3584, 18944, 28, 28, 4, False),
    "14B": _qwen2_5("14B", 5120, 13824, 48, 40, 8, False),
    "32B": _qwen2_5("32B", 5120, 27648, 64, 40, 8, False),
    "72B": _qwen2_5("72B", 8192, 29568, 80, 64, 8, False),
}
"""https://huggingface.co/Qwen/Qwen2.5-<size>/blob/main/config.json; the -Instruct models have the same."""


def shape_of(model: str) -> ModelShape:
    """Of a folder, a model in the local cache, or one of the table. Raises `UnknownShapeError`."""
    if model == "base_student":
        from learner.base_student import BASE_STUDENT_FOLDER

        return _of_file(Path(BASE_STUDENT_FOLDER) / "config.json")
    if (Path(model) / "config.json").is_file():
        return _of_file(Path(model) / "config.json")
    if cached := _in_cache(model):
        return _of_file(cached)
    size = model.removeprefix("Qwen/Qwen2.5-").removesuffix("-Instruct")
    if model.startswith("Qwen/Qwen2.5-") and size in QWEN2_5:
        return QWEN2_5[size]
    raise UnknownShapeError(
        f"the shape of {model!r} is unknown: it is neither a folder with a config.json, nor in the local Hugging Face "
        "cache, nor in the built-in table (Qwen/Qwen2.5-0.5B to -72B); put its config.json in a folder and name that"
    )


def shape_of_config(config: Mapping[str, Any], source: str) -> ModelShape:
    """Of a `config.json`. Raises `UnknownShapeError`."""
    kind = config.get("model_type", "")
    text = config.get("text_config")
    if kind not in _FAMILY and isinstance(text, Mapping):
        raise UnknownShapeError(f"{source} is of a model with more than text ({kind}); its memory is not estimated")
    try:
        hidden, heads = int(config["hidden_size"]), int(config["num_attention_heads"])
        shape = ModelShape(
            source=source,
            layers=int(config["num_hidden_layers"]),
            hidden=hidden,
            heads=heads,
            kv_heads=int(config.get("num_key_value_heads") or heads),
            head_dim=int(config.get("head_dim") or hidden // heads),
            intermediate=int(config["intermediate_size"]),
            vocabulary=int(config["vocab_size"]),
            tied=bool(config.get("tie_word_embeddings", False)),
            attention_bias=kind == "qwen2" or bool(config.get("attention_bias", False)),
            output_bias=kind in ("llama", "qwen3") and bool(config.get("attention_bias", False)),
            mlp_bias=bool(config.get("mlp_bias", False)),
            head_norms=kind == "qwen3",
            quantized_bytes=_quantized(config),
            counted=None if kind in _FAMILY else _counted(config, source),
            longest=config.get("max_position_embeddings"),
        )
    except (KeyError, TypeError, ValueError) as error:
        if isinstance(error, UnknownShapeError):
            raise
        raise UnknownShapeError(f"{source} says too little of the model: {error!r}") from None
    if not 0 < shape.hidden < _HIDDEN_LIMIT or shape.layers < 1:
        raise UnknownShapeError(f"{source} has hidden_size {shape.hidden} and {shape.layers} layers")
    return shape


def _of_file(path: Path) -> ModelShape:
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UnknownShapeError(f"{path} cannot be read: {error}") from None
    return shape_of_config(config, str(path))


def _in_cache(model: str) -> Path | None:
    if model.count("/") != 1:
        return None
    try:
        from huggingface_hub import try_to_load_from_cache

        found = try_to_load_from_cache(model, "config.json")
    except (ImportError, ValueError):
        return None
    return Path(found) if isinstance(found, str) else None


def _quantized(config: Mapping[str, Any]) -> float | None:
    """Bytes of a weight, scales included, by the methods' own documentation."""
    method = config.get("quantization_config")
    if not isinstance(method, Mapping):
        return None
    bits = method.get("bits") or method.get("w_bit") or (4 if method.get("load_in_4bit") else 0)
    if not bits:
        bits = 8 if str(method.get("quant_method", "")).startswith("fp8") or method.get("load_in_8bit") else 16
    return float(bits) / 8 + (0.03125 if bits < 8 else 0.0)  # a scale of 16 bits and a zero for each 64 or 128 weights


def _counted(config: Mapping[str, Any], source: str) -> int:
    """All parameters, as transformers builds that model without memory for them."""
    try:
        import torch
        from transformers import AutoConfig, AutoModelForCausalLM

        made = AutoConfig.for_model(**config)
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(made)
    except Exception as error:
        kind = config.get("model_type")
        raise UnknownShapeError(f"{source} is of a {kind!r}, which cannot be counted: {error}") from None
    return sum(parameter.numel() for parameter in model.parameters())
