"""Causal attention for packed rows, without a mask: each example attends to itself alone because it is run alone.

transformers keeps packed examples apart too, by a block mask made from the position ids (with sdpa and eager; its flash
attention only when a batch is one row). A mask costs memory and work quadratic in the row, and shuts out the fast
kernels. Here the examples are told apart by where positions restart at 0, and attention is run

- on a GPU in half precision: by `torch.nn.attention.varlen`, the flash-attention kernel for many lengths in one call;
- elsewhere: example by example.

`use_packed_attention` switches a model over and proves it: packed examples must come out as they do alone, and the
GPU's kernel must give the values and gradients that going example by example gives; else the model keeps its attention
and its block mask. Plain causal attention only: no sliding window, no capping, no dropout.

Example::

    use_packed_attention(model, device=device, half=True)        # a transformers model; True when it runs on this
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

NAME = "apprentice_packed_rows"


@dataclass(frozen=True, slots=True)
class _Segments:
    """Where examples begin and end in a micro-batch's rows laid end to end."""

    edges: torch.Tensor
    """[examples + 1] int32"""
    longest: int
    ends: tuple[int, ...]
    """[examples + 1] the same as numbers."""


def use_packed_attention(model: Any, *, device: torch.device, half: bool) -> bool:
    """Switch `model` over; False, and nothing changed, where it would not compute the same. `device`: where it will be
    trained; `half`: with products in bf16."""
    import torch
    from transformers import AttentionInterface, AttentionMaskInterface

    config = model.config
    kinds = set(getattr(config, "layer_types", None) or ["full_attention"])
    if (
        kinds != {"full_attention"}
        or getattr(config, "attn_logit_softcapping", None)
        or getattr(config, "attention_dropout", 0.0)
    ):
        return False
    before = config._attn_implementation
    AttentionInterface.register(NAME, _attention)
    AttentionMaskInterface.register(NAME, lambda *args, **kwargs: None)
    training = model.training
    model.eval()
    try:
        model.set_attn_implementation(NAME)
        with torch.no_grad():
            switched = config._attn_implementation == NAME and _examples_stay_apart(model)
        if switched and device.type == "cuda" and half:
            switched = _kernel_agrees(config, device)
    except (RuntimeError, ImportError, TypeError, ValueError):
        switched = False  # no kernel for this GPU or head size, or layers that are not told the positions
    model.train(training)
    if not switched:
        model.set_attn_implementation(before)
    return switched


def _examples_stay_apart(model: Any) -> bool:
    """Whether two examples in one row, and two such rows, come out as each does alone."""
    import torch

    ids = torch.arange(4, 20, device=model.device) % model.config.vocab_size
    lengths = (9, 4, 3)
    alone = list(ids.split(lengths))
    counts = [torch.arange(n, device=ids.device) for n in (*lengths, 2)]
    packed = torch.stack([torch.cat([alone[0], ids[:2]]), torch.cat([*alone[1:], ids[:2], ids[:2]])])
    positions = torch.stack([torch.cat([counts[0], counts[3]]), torch.cat([*counts[1:], counts[3]])])

    def run(input_ids: torch.Tensor, position_ids: torch.Tensor) -> torch.Tensor:
        found = model.get_decoder()(
            input_ids=input_ids, position_ids=position_ids, attention_mask=None, use_cache=False
        )
        return found.last_hidden_state

    hidden = run(packed, positions)
    together = [hidden[0, :9], hidden[1, :4], hidden[1, 4:7]]
    apart = [run(one[None], count[None])[0] for one, count in zip(alone, counts, strict=False)]
    return all(map(_alike, together, apart))


def _kernel_agrees(config: Any, device: torch.device) -> bool:
    """Whether the GPU's kernel has the values and gradients of going example by example, for heads such as these."""
    import torch

    heads = config.num_attention_heads
    key_heads = getattr(config, "num_key_value_heads", None) or heads
    head = getattr(config, "head_dim", None) or config.hidden_size // heads
    positions = torch.cat([torch.arange(n, device=device) for n in (37, 90, 1)])[None]
    generator = torch.Generator(device=device).manual_seed(0)
    query, key, value, wanted = (
        torch.randn((1, count, 128, head), generator=generator, device=device, dtype=torch.bfloat16)
        for count in (heads, key_heads, key_heads, heads)
    )
    parts = [part.requires_grad_() for part in (query, key, value)]
    outputs = [
        _attention(None, parts[0], parts[1], parts[2], None, position_ids=positions)[0],
        _one_by_one(parts[0], parts[1], parts[2], _segments(positions, 1), None),
    ]
    grads = [torch.autograd.grad((output * wanted.transpose(1, 2)).sum(), parts) for output in outputs]
    return all(map(_alike, (outputs[0], *grads[0]), (outputs[1], *grads[1])))


def _alike(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Within rounding; attention that leaks between examples is off by far more."""
    limit = 1e-4 if a.element_size() == 4 else 0.03
    a, b = a.detach().float(), b.detach().float()
    return bool((a - b).abs().max() <= limit * b.abs().max())


def _attention(
    module: Any,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    position_ids: torch.Tensor | None = None,
    **_: Any,
) -> tuple[torch.Tensor, None]:
    """query: [rows, heads, width, head]; key, value: [rows, key heads, width, head]; position_ids: [rows or 1, width]
    -> [rows, width, heads, head]."""
    if attention_mask is not None or dropout:
        raise ValueError("packed attention takes neither mask nor dropout; use sdpa")
    if position_ids is None:
        raise ValueError("packed attention was given no positions; use sdpa")
    rows, heads, width, head = query.shape
    segments = _segments(position_ids, rows)
    query, key = query.to(value.dtype), key.to(value.dtype)  # rotation leaves them in fp32 under autocast
    if query.is_cuda and value.element_size() == 2:
        flat = [part.transpose(1, 2).reshape(rows * width, -1, head) for part in (query, key, value)]
        return _varlen(flat, segments, scaling).view(rows, width, heads, head), None
    return _one_by_one(query, key, value, segments, scaling), None


def _varlen(flat: list[torch.Tensor], segments: _Segments, scaling: float | None) -> torch.Tensor:
    """[tokens, heads, head] of query, key and value [tokens, heads or key heads, head]."""
    from torch.nn.attention.varlen import varlen_attn

    query, key, value = flat
    found = varlen_attn(
        query,
        key,
        value,
        segments.edges,
        segments.edges,
        segments.longest,
        segments.longest,
        scale=scaling,
        window_size=(-1, 0),  # causal
        enable_gqa=query.shape[1] != key.shape[1],
    )
    assert not isinstance(found, tuple)
    return found


def _one_by_one(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, segments: _Segments, scaling: float | None
) -> torch.Tensor:
    """[rows, width, heads, head]"""
    import torch
    from torch.nn.functional import scaled_dot_product_attention

    rows, _, width, _ = query.shape
    mixed: list[list[torch.Tensor]] = [[] for _ in range(rows)]
    for start, end in pairwise(segments.ends):
        row, begin = divmod(start, width)
        part = slice(begin, begin + end - start)
        found = scaled_dot_product_attention(
            query[row : row + 1, :, part],
            key[row : row + 1, :, part],
            value[row : row + 1, :, part],
            is_causal=True,
            scale=scaling,
            enable_gqa=query.shape[1] != key.shape[1],
        )
        mixed[row].append(found.transpose(1, 2))
    return torch.cat([torch.cat(row, 1) for row in mixed])


def _segments(position_ids: torch.Tensor, rows: int) -> _Segments:
    """Worked out once for all layers: they are given the same tensor."""
    import torch
    from torch.utils.weak import WeakTensorKeyDictionary

    global _known
    if _known is None:
        _known = WeakTensorKeyDictionary()
    segments = _known.get(position_ids)
    if segments is None or segments.ends[-1] != rows * position_ids.shape[1]:
        flat = position_ids.expand(rows, -1).reshape(-1)
        starts = (flat == 0).nonzero()[:, 0].tolist()
        if not starts or starts[0] != 0:
            raise ValueError("packed positions must begin at 0")
        ends = (*starts, len(flat))
        edges = torch.tensor(ends, dtype=torch.int32, device=flat.device)
        segments = _known[position_ids] = _Segments(edges, max(b - a for a, b in pairwise(ends)), ends)
    return segments


_known: Any = None
"""Position ids -> their segments, for as long as the tensor lives."""
