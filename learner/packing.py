"""From examples to the tensors of one optimizer step, for every rank: `plan_step`.

A step's rows are spread over the ranks, and each rank's rows over micro-batches, in one of two ways:

- "bucketed": rows of similar length side by side, padded on the right. No mask is needed (attention is causal and the
  padding comes last), which on a CPU is several times faster than a mask; the split that wastes least is found exactly.
- "packed": rows end to end in rows of `row_tokens` (best-fit decreasing, arXiv 2404.10830), positions restarting at 0.
  With no attention mask and no KV cache, transformers keeps packed rows apart by their positions.

Ranks get shares of nearly as many tokens, and every rank the same number of micro-batches (empty ones where it has less
to do): collectives stay in step. An example is never split, so what an objective needs of a whole row is in one
micro-batch. The loss is sum(weight * nll) / `total_weight`, both over the whole step, so it does not depend on ranks,
packing or micro-batches.

Example::

    plan = plan_step(examples, ranks=2, micro_batch_tokens=4096, row_tokens=1024, batching="bucketed")
    plan.ranks[0][0].input_ids.shape       # (rows, width)
"""

from __future__ import annotations

import heapq
import math
from bisect import bisect_left, insort
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import numpy as np

from learner.examples import TRAINED_SPANS, Example

if TYPE_CHECKING:
    from learner.token_scores import TokenScores

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
    lengths = [len(example) for example in examples]
    for example, length in zip(examples, lengths, strict=True):
        if length > row_tokens:
            raise ValueError(f"example {example.key!r} has {length} tokens; a row holds {row_tokens}")
    weights = [np.asarray(example.loss_weights) for example in examples]
    total_weight = math.fsum(float(row[1:].sum()) for row in weights)
    step = _Step(examples, lengths, [row.astype(np.float32) for row in weights], total_weight)
    batches: list[list[MicroBatch]] = []
    for share in shares(lengths, ranks):
        if batching == "packed":
            rows = [[share[i] for i in row] for row in best_fit([lengths[i] for i in share], row_tokens)]
            rows_each = max(1, micro_batch_tokens // row_tokens)
            groups = [rows[i : i + rows_each] for i in range(0, len(rows), rows_each)]
        else:
            groups = [[[i] for i in group] for group in bucket(share, lengths, micro_batch_tokens)]
        batches.append([_micro_batch(step, group, packed=batching == "packed") for group in groups])
    most = max(map(len, batches))
    return StepPlan(
        ranks=tuple(tuple(share) + (empty_micro_batch(),) * (most - len(share)) for share in batches),
        total_weight=total_weight,
        tokens=sum(lengths),
        trained_tokens=sum(int(np.count_nonzero(row[1:] > 0)) for row in weights),
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
        rows=np.zeros(1, np.int64),
        turns=np.zeros(1, np.int64),
    )


def shares(lengths: Sequence[int], ranks: int) -> list[list[int]]:
    """Indices into `lengths` per rank, longest first: each goes to the rank that has the fewest tokens so far.

    The ranks with most and fewest tokens differ by one row at most.
    """
    loads = [(0, rank) for rank in range(ranks)]
    given: list[list[int]] = [[] for _ in range(ranks)]
    for i in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        load, rank = loads[0]
        given[rank].append(i)
        heapq.heapreplace(loads, (load + lengths[i], rank))
    return given


def bucket(rows: Sequence[int], lengths: Sequence[int], micro_batch_tokens: int) -> list[list[int]]:
    """Split `rows`, indices into `lengths`, into micro-batches so that padding plus the cost of starting each is least
    (exact, over sorted lengths).

    A micro-batch holds at most `micro_batch_tokens` positions, padding included (a single longer row is its own).
    """
    rows = sorted(rows, key=lambda i: -lengths[i])
    best = [0.0] + [float("inf")] * len(rows)
    cut = [0] * (len(rows) + 1)
    for start, row in enumerate(rows):
        width = lengths[row]
        cost = best[start] + MICRO_BATCH_COST_TOKENS
        for end in range(start + 1, min(len(rows), start + max(1, micro_batch_tokens // width)) + 1):
            cost += width
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
    room: list[tuple[int, int]] = []  # (tokens left, bin), sorted
    for i in sorted(range(len(lengths)), key=lambda i: (-lengths[i], i)):
        at = bisect_left(room, (lengths[i], -1))
        if at < len(room):
            left, chosen = room.pop(at)
            bins[chosen].append(i)
        else:
            left, chosen = capacity, len(bins)
            bins.append([i])
        insort(room, (left - lengths[i], chosen))
    return bins


@dataclass(frozen=True, slots=True)
class _Step:
    """What the micro-batches of one step are made of."""

    examples: Sequence[Example]
    lengths: list[int]
    weights: list[np.ndarray]
    """[n] float32 of each example."""
    total_weight: float


def _micro_batch(step: _Step, rows: Sequence[Sequence[int]], *, packed: bool) -> MicroBatch:
    """One micro-batch of `rows`, each of one or more examples end to end, padded on the right."""
    width = max(sum(step.lengths[i] for i in row) for row in rows)
    input_ids = np.zeros((len(rows), width), np.int64)
    positions = np.zeros((len(rows), width), np.int64)
    here, chosen, selected, targets, spans = [], [], [], [], []
    for r, row in enumerate(rows):
        column = 0
        for i in row:
            example, n = step.examples[i], step.lengths[i]
            ids = np.asarray(example.token_ids, np.int64)
            input_ids[r, column : column + n] = ids
            positions[r, column : column + n] = np.arange(n)
            at = np.flatnonzero(step.weights[i][1:] > 0) + 1
            selected.append(r * width + column + at - 1)
            targets.append(ids[at])
            spans.append(np.asarray([_SPAN_INDEX[example.span_types[j]] for j in at.tolist()], np.int64))
            here.append(i)
            chosen.append(at)
            column += n
        positions[r, column:] = np.arange(width - column)  # the padding is one more sequence, seen by nobody
    return MicroBatch(
        input_ids=input_ids,
        position_ids=positions if packed else None,
        selected=np.concatenate(selected),
        targets=np.concatenate(targets),
        weights=np.concatenate([step.weights[i][at] for i, at in zip(here, chosen, strict=True)]),
        spans=np.concatenate(spans),
        tokens=sum(step.lengths[i] for i in here),
        rows=np.repeat(np.asarray(here, np.int64), [len(at) for at in chosen]),
        turns=np.concatenate(
            [np.asarray(step.examples[i].turns, np.int64)[at] for i, at in zip(here, chosen, strict=True)]
        ),
        step_weight=step.total_weight,
        step_rows=len(step.examples),
        **_scores([step.examples[i].scores for i in here], chosen),
    )


def _scores(scores: Sequence[TokenScores | None], chosen: Sequence[np.ndarray]) -> dict[str, np.ndarray]:
    """Those of the `chosen` tokens of each example, by field of `MicroBatch`; what none of them has is left out."""
    found: dict[str, np.ndarray] = {}
    if all(one is None for one in scores):
        return found
    ends = np.cumsum([len(at) for at in chosen]).tolist()
    pieces = [(one, at, slice(end - len(at), end)) for one, at, end in zip(scores, chosen, ends, strict=True) if one]
    widest = max((one.teacher_ids.shape[1] for one, _, _ in pieces if one.teacher_ids is not None), default=0)
    for one, at, where in pieces:
        if one.behaviour_logprobs is not None:
            filled = found.setdefault("behaviour_logprobs", np.full(ends[-1], np.nan, np.float32))
            filled[where] = one.behaviour_logprobs[at]
        if one.teacher_ids is not None and one.teacher_logprobs is not None:
            k = one.teacher_ids.shape[1]
            ids = found.setdefault("teacher_ids", np.full((ends[-1], widest), -1, np.int64))
            ids[where, :k] = one.teacher_ids[at]
            logprobs = found.setdefault("teacher_logprobs", np.full((ends[-1], widest), np.nan, np.float32))
            logprobs[where, :k] = one.teacher_logprobs[at]
        if one.advantage is not None:
            found.setdefault("advantages", np.full(ends[-1], np.nan, np.float32))[where] = one.advantage
    return found


_SPAN_INDEX = {span: i for i, span in enumerate(TRAINED_SPANS)}
