"""The base student's shape and its first weights: a plain Qwen2 whose attention starts out able to copy ("mimetic").

Ordinary random weights spend their first millions of tokens on finding out that attention can copy. Here layer 0 starts
by looking one, two or three tokens back (through the query and key biases and RoPE) and notes what stood there; layer 1
starts as induction heads, which find where the last tokens stood before and copy what came next. The idea is that of
mimetic initialisation (Trockman & Kolter, arXiv 2305.09828); everything stays trainable.

    >>> build_model(model_config(tokenizer), seed=0).num_parameters()     # 2.07 million
"""

import math
from typing import TYPE_CHECKING, Any

from learner.base_student.generic_text import END_OF_TEXT, TURN_END

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase, Qwen2Config, Qwen2ForCausalLM

HIDDEN, LAYERS, HEAD = 192, 4, 64
FEED_FORWARD = 448
ROPE_BASE = 10_000.0
MAX_POSITIONS = 2048


def model_config(tokenizer: "PreTrainedTokenizerBase") -> "Qwen2Config":
    """The configuration; the vocabulary is rounded up to a multiple of 64."""
    from transformers import Qwen2Config

    return Qwen2Config(
        vocab_size=(len(tokenizer) + 63) // 64 * 64,
        hidden_size=HIDDEN,
        intermediate_size=FEED_FORWARD,
        num_hidden_layers=LAYERS,
        num_attention_heads=HIDDEN // HEAD,
        num_key_value_heads=HIDDEN // HEAD,
        max_position_embeddings=MAX_POSITIONS,
        rms_norm_eps=1e-6,
        tie_word_embeddings=True,
        rope_parameters={"rope_type": "default", "rope_theta": ROPE_BASE},
        bos_token_id=None,
        eos_token_id=tokenizer.get_vocab()[TURN_END],
        pad_token_id=tokenizer.get_vocab()[END_OF_TEXT],
        use_cache=True,
    )


def build_model(config: "Qwen2Config", seed: int) -> "Qwen2ForCausalLM":
    """A Qwen2 with mimetic first weights, fp32, in training mode."""
    import torch
    from torch import nn
    from transformers import Qwen2ForCausalLM

    torch.manual_seed(seed)
    model = Qwen2ForCausalLM(config)
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, nn.Linear) and module.weight is not model.model.embed_tokens.weight:
                nn.init.normal_(module.weight, std=0.6 * module.in_features**-0.5)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
        nn.init.normal_(model.model.embed_tokens.weight, std=0.04)
        layers: Any = model.model.layers
        for i, layer in enumerate(layers):
            scale = (2 * config.num_hidden_layers) ** -0.5
            layer.self_attn.o_proj.weight.mul_(scale * (0.3 if i >= 2 else 1.0))
            layer.mlp.down_proj.weight.mul_(scale * 0.1)
        _prepare_copying(model)
    return model.train()


def _prepare_copying(model: "Qwen2ForCausalLM") -> None:
    """Set layer 0 to note the tokens one to three back, layer 1 to copy what followed the same tokens before."""
    import torch

    config = model.config
    hidden, heads = config.hidden_size, config.num_attention_heads
    head, half = hidden // heads, hidden // heads // 2
    frequency = ROPE_BASE ** (-torch.arange(0, head, 2).float() / head)  # [head / 2], radians per token

    def orthonormal_rows() -> torch.Tensor:  # [head, hidden]
        return torch.linalg.qr(torch.randn(hidden, head))[0].T

    token, written = orthonormal_rows(), [orthonormal_rows() for _ in range(4)]  # written[k]: what stood k tokens back
    layers: Any = model.model.layers
    layer0, layer1 = layers[0].self_attn, layers[1].self_attn
    fast, slow = (frequency > 0.15).float(), (frequency < 0.02).nonzero()[:, 0]
    # Biases alone give a score that peaks at a fixed offset: the query's is the key's, turned by that offset.
    peak = torch.cat([fast, fast]) * (40 * math.sqrt(head) / (2 * fast.sum())) ** 0.5
    for h in range(heads):
        rows = slice(h * head, (h + 1) * head)
        offset = h % 3 + 1
        angle = torch.cat([frequency, frequency]) * offset
        turned = torch.cat([-peak[half:], peak[:half]])
        layer0.q_proj.bias[rows] = peak * angle.cos() - turned * angle.sin()
        layer0.k_proj.bias[rows] = peak
        layer0.q_proj.weight[rows] *= 0.2
        layer0.k_proj.weight[rows] *= 0.2
        layer0.v_proj.weight[rows] = token
        layer0.o_proj.weight[:, rows] = 0.04 * written[offset].T
    # Slowly turning dimensions compare content whatever the distance: now against what stood before there.
    dims = torch.cat([slow, slow + half])
    strength = 1.5 * (9 * math.sqrt(head) / len(dims)) ** 0.5
    for h in range(heads):
        rows = slice(h * head, (h + 1) * head)
        depth = h % min(3, heads) + 1  # how many of the last tokens this head compares
        layer1.q_proj.weight[rows] *= 0.2
        layer1.k_proj.weight[rows] *= 0.2
        for r, d in enumerate(dims.tolist()):
            back = r % depth
            layer1.q_proj.weight[h * head + d] = strength * (token[r] if back == 0 else 1.5 * written[back][r])
            layer1.k_proj.weight[h * head + d] = strength * 1.5 * written[back + 1][r]
        copied = orthonormal_rows()
        layer1.v_proj.weight[rows] = copied
        layer1.o_proj.weight[:, rows] = 0.2 * copied.T
