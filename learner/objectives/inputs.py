"""What objectives that work on scores share: `OnScores`, and what they ask of a row and of a micro-batch.

A row is looked at once, when it arrives: without the scores it is refused, with its reason. A token that the policy did
not sample (a given prefix, a stop token put behind a stop string) is then only read: there is nothing to weigh it by.

Example::

    fitted = scored_row(example, frozenset({"teacher", "behaviour"}))      # Example | RefusedRow
    behaviour = needed(batch, "behaviour_logprobs")                        # [n], 0 where nothing is trained
"""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Literal

import numpy as np

from learner.examples import Example, Refusal, RefusedRow
from learner.token_scores import ScoreKind, missing_scores

if TYPE_CHECKING:
    import torch

    from learner.objectives import TensorBatch


class OnScores:
    """Of objectives made of scores: no parameters of their own, and rows without what they need are refused."""

    needs: frozenset[ScoreKind]

    def parameters(self) -> tuple[()]:
        return ()

    def fit(self, example: Example) -> Example | RefusedRow:
        return scored_row(example, self.needs)


def scored_row(example: Example, needs: frozenset[ScoreKind]) -> Example | RefusedRow:
    """`example` with weight on sampled tokens alone where `needs` has "behaviour"; refused when it lacks a score."""
    scores = example.scores
    if "behaviour" in needs and scores is not None and scores.behaviour_logprobs is not None:
        sampled = np.isfinite(scores.behaviour_logprobs)
        if len(sampled) == len(example):
            weights = tuple(
                weight if known else 0.0 for weight, known in zip(example.loss_weights, sampled.tolist(), strict=True)
            )
            if not any(weights):
                return RefusedRow(example.key, Refusal.SCORES, "no trained token has a behaviour log probability")
            example = dataclasses.replace(example, loss_weights=weights)
    problem = missing_scores(scores, example.token_ids, example.loss_weights, needs)
    return example if problem is None else RefusedRow(example.key, Refusal.SCORES, problem)


def needed(batch: TensorBatch, name: Literal["behaviour_logprobs", "advantages"]) -> torch.Tensor:
    """[n] float32 that field, 0 where nothing is trained. Raises ValueError where a trained position has none."""
    return _trained(batch, getattr(batch, name), name)


def teacher_own(batch: TensorBatch) -> torch.Tensor:
    """[n] float32 the teacher's log p of the targets, 0 where nothing is trained. Raises ValueError where a trained
    position has none."""
    import torch

    own = None
    if batch.teacher_ids is not None and batch.teacher_logprobs is not None:
        found = batch.teacher_ids == batch.targets[:, None]
        own = torch.where(found, batch.teacher_logprobs, 0.0).sum(-1)
        own = torch.where(found.any(-1), own, torch.nan)
    return _trained(batch, own, "the teacher's log probability of the target")


def steps_of(batch: TensorBatch, per_token: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The turns that trained positions are in: the turn of each position [n], each turn's mean of `per_token` [turns],
    and the index of its row's first turn [turns]. Turns are in the order of row and turn."""
    import torch

    if batch.rows is None or batch.turns is None:
        raise ValueError("the micro-batch does not say which row and turn its positions are of")
    trained = (batch.weights > 0).float()
    pairs = torch.stack([batch.rows, batch.turns], -1)
    turns, of = torch.unique(pairs, dim=0, return_inverse=True)
    zeros = per_token.new_zeros(len(turns))
    counts = zeros.index_add(0, of, trained)
    means = zeros.index_add(0, of, per_token * trained) / counts.clamp(min=1.0)
    first = torch.searchsorted(turns[:, 0].contiguous(), turns[:, 0].contiguous())
    return of, means, first


def _trained(batch: TensorBatch, values: torch.Tensor | None, what: str) -> torch.Tensor:
    import torch

    trained = batch.weights > 0
    if values is None:
        values = torch.full_like(batch.weights, torch.nan)
    values = torch.where(trained, values, 0.0)
    lacking = int((~torch.isfinite(values)).sum())
    if lacking:
        raise ValueError(f"{lacking} of {int(trained.sum())} trained positions have no {what}")
    return values
