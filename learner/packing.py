"""From examples to the tensors of one optimizer step, for every rank: `plan_step`.

A step's rows are spread over the ranks, and each rank's rows over micro-batches, in one of two ways:

- "bucketed": rows of similar length side by side, padded on the right. No mask is needed (attention is causal and the
  padding comes last), which on a CPU is several times faster than a mask; the split that wastes least is found exactly.
- "packed": rows end to end in rows of `row_tokens` (best-fit decreasing, arXiv 2404.10830), positions restarting at 0.
  With no attention mask and no KV cache, transformers keeps packed rows apart by their positions.

Every rank gets the same number of micro-batches (empty ones where it has less to do): collectives stay in step. The
loss is sum(weight * nll) / `total_weight`, both over the whole step, so it does not depend on ranks, packing or
micro-batches.

Example::

    plan = plan_step(examples, ranks=2, micro_batch_tokens=4096, row_tokens=1024, batching="bucketed")
    plan.ranks[0][0].input_ids.shape       # (rows, width)
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from learner.examples import TRAINED_SPANS, Example

MICRO_BATCH_COST_TOKENS = 96
"""What starting one more micro-batch costs, in tokens of work (measured on a CPU core with the 2 M student)."""


@dataclass(frozen=True, slots=True)
class MicroBatch:
    """What one rank runs forward and backward at once. Arrays, so that it pickles cheaply."""

    input_ids: np.ndarray
    """[rows, width] int64; padding is 0."""
    position_ids: np.ndarray | None
    """[rows, width] int64 when packed (each example starts at 0), else None."""
    selected: np.ndarray
    """[n] int64 flat positions (row * width + column) whose next token is trained."""
    targets: np.ndarray
    """[n] int64 those next tokens."""
    weights: np.ndarray
    """[n] float32 their loss weights."""
    spans: np.ndarray
    """[n] int64 their span types, as indices into `TRAINED_SPANS`."""
    tokens: int
    """Tokens that are not padding."""
    rows: np.ndarray | None = None
    """[n] int64 the example of each, as its index in what `plan_step` was given. An example is never split."""
    turns: np.ndarray | None = None
    """[n] int64 the assistant turn of each, counted from 0 in its example."""
    behaviour_logprobs: np.ndarray | None = None
    """[n] float32 log p of each target for the policy that sampled it; NaN where unknown."""
    teacher_ids: np.ndarray | None = None
    """[n, k] int64 what the teacher was asked about at each; -1 where there is none."""
    teacher_logprobs: np.ndarray | None = None
    """[n, k] float32 its log p of them; NaN where there is none."""
    advantages: np.ndarray | None = None
    """[n] float32 that of each one's example; NaN where unknown."""
    step_weight: float | None = None
    """The step's `total_weight`, by which the sum of the losses is divided."""
    step_rows: int | None = None
    """Examples of the step."""


@dataclass(frozen=True, slots=True)
class StepPlan:
    """One optimizer step."""

    ranks: tuple[tuple[MicroBatch, ...], ...]
    """[ranks][micro-batches], as many for every rank."""
    total_weight: float
    """Sum of the loss weights of all ranks and micro-batches."""
    tokens: int
    trained_tokens: int
    rows: int


def fill_step(lengths: Sequence[int], tokens_per_step: int) -> int | None:
    """How many of the first rows make a full step; None while there is room for more (or nothing is there)."""
    total = 0
    for i, length in enumerate(lengths):
        if i and total + length > tokens_per_step:
            return i
        total += length
    return len(lengths) if total >= tokens_per_step else None


def plan_step(
    examples: Sequence[Example],
    *,
    ranks: int,
    micro_batch_tokens: int,
    row_tokens: int,
    batching: Literal["bucketed", "packed"],
) -> StepPlan:
    """Spread `examples` over ranks and micro-batches. Raises ValueError for an example longer than `row_tokens`."""
    for example in examples:
        if len(example) > row_tokens:
            raise ValueError(f"example {example.key!r} has {len(example)} tokens; a row holds {row_tokens}")
    ordered = sorted(examples, key=len, reverse=True)
    shares: list[list[Example]] = [[] for _ in range(ranks)]
    for i, example in enumerate(ordered):  # there and back again, so that shares are alike in number and length
        turn, place = divmod(i, ranks)
        shares[place if turn % 2 == 0 else ranks - 1 - place].append(example)
    if batching == "packed":
        batches = [_packed(share, micro_batch_tokens, row_tokens) for share in shares]
    else:
        batches = [[_padded(group) for group in bucket(share, micro_batch_tokens)] for share in shares]
    most = max((len(share) for share in batches), default=0)
    padded = tuple(tuple(share) + (empty_micro_batch(),) * (most - len(share)) for share in batches)
    weights = [weight for example in examples for weight in example.loss_weights[1:]]
    return StepPlan(
        ranks=padded,
        total_weight=float(sum(weights)),
        tokens=sum(len(example) for example in examples),
        trained_tokens=sum(weight > 0 for weight in weights),
        rows=len(examples),
    )


def empty_micro_batch() -> MicroBatch:
    """Takes part in every collective and weighs nothing."""
    return MicroBatch(
        input_ids=np.zeros((1, 2), np.int64),
        position_ids=None,
        selected=np.zeros(1, np.int64),
        targets=np.zeros(1, np.int64),
        weights=np.zeros(1, np.float32),
        spans=np.zeros(1, np.int64),
        tokens=0,
    )


def bucket(examples: Sequence[Example], micro_batch_tokens: int) -> list[list[Example]]:
    """Split rows into micro-batches so that padding plus the cost of starting each is least (exact, over sorted
    lengths).

    A micro-batch holds at most `micro_batch_tokens` positions, padding included (a single longer row is its own).
    """
    rows = sorted(examples, key=len, reverse=True)
    best = [0.0] + [float("inf")] * len(rows)
    cut = [0] * (len(rows) + 1)
    for start in range(len(rows)):
        width = len(rows[start])
        for end in range(start + 1, len(rows) + 1):
            area = (end - start) * width
            if area > micro_batch_tokens and end > start + 1:
                break
            cost = best[start] + area + MICRO_BATCH_COST_TOKENS
            if cost < best[end]:
                best[end], cut[end] = cost, start
    groups, end = [], len(rows)
    while end:
        groups.append(rows[cut[end] : end])
        end = cut[end]
    return groups[::-1]


def best_fit(lengths: Sequence[int], capacity: int) -> list[list[int]]:
    """Best-fit decreasing: indices into `lengths` per bin, no bin above `capacity`."""
    bins: list[list[int]] = []
    room: list[int] = []
    for i in sorted(range(len(lengths)), key=lambda i: (-lengths[i], i)):
        fits = [b for b in range(len(bins)) if room[b] >= lengths[i]]
        if fits:
            best = min(fits, key=lambda b: (room[b], b))
            bins[best].append(i)
            room[best] -= lengths[i]
        else:
            bins.append([i])
            room.append(capacity - lengths[i])
    return bins


def _packed(examples: Sequence[Example], micro_batch_tokens: int, row_tokens: int) -> list[MicroBatch]:
    bins = [[examples[i] for i in row] for row in best_fit([len(example) for example in examples], row_tokens)]
    rows_each = max(1, micro_batch_tokens // row_tokens)
    return [_rows(bins[i : i + rows_each], packed=True) for i in range(0, len(bins), rows_each)]


def _padded(examples: Sequence[Example]) -> MicroBatch:
    return _rows([[example] for example in examples], packed=False)


def _rows(rows: Sequence[Sequence[Example]], *, packed: bool) -> MicroBatch:
    """One micro-batch of `rows`, each of one or more examples end to end, padded on the right."""
    width = max(sum(len(example) for example in row) for row in rows)
    input_ids = np.zeros((len(rows), width), np.int64)
    positions = np.zeros((len(rows), width), np.int64)
    selected, targets, weights, spans = [], [], [], []
    for r, row in enumerate(rows):
        column = 0
        for example in row:
            n = len(example)
            ids = np.asarray(example.token_ids, np.int64)
            input_ids[r, column : column + n] = ids
            positions[r, column : column + n] = np.arange(n)
            weight = np.asarray(example.loss_weights, np.float32)
            at = np.flatnonzero(weight[1:] > 0)
            selected.append(r * width + column + at)
            targets.append(ids[at + 1])
            weights.append(weight[at + 1])
            spans.append(np.asarray([_SPAN_INDEX[example.span_types[j + 1]] for j in at], np.int64))
            column += n
        positions[r, column:] = np.arange(width - column)  # the padding is one more sequence, seen by nobody
    return MicroBatch(
        input_ids=input_ids,
        position_ids=positions if packed else None,
        selected=np.concatenate(selected),
        targets=np.concatenate(targets),
        weights=np.concatenate(weights),
        spans=np.concatenate(spans),
        tokens=sum(len(example) for row in rows for example in row),
    )


_SPAN_INDEX = {span: i for i, span in enumerate(TRAINED_SPANS)}
