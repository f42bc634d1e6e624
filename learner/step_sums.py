"""What a step tells: losses and hits by span type, added up on the device and fetched once.

`StepSums` is fed each micro-batch's loss; nothing waits for the device until `to_list`, so that tracking costs a step
next to nothing. Ranks add their lists up element by element; the list has a slot for each rank's memory, since a sum
is the only thing that the ranks exchange.

Example::

    sums = StepSums(device, rank=0, ranks=1)
    for batch in batches:
        sums.add(objective.loss(logits, batch), batch)
    totals = StepTotals.of(backend.sum_over_ranks(sums.to_list()), ranks=1, names=sums.names)
    totals.loss_by_span["code"]
"""

from __future__ import annotations

import resource
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from learner.examples import TRAINED_SPANS

if TYPE_CHECKING:
    import torch

    from learner.objectives import ObjectiveLoss, TensorBatch

SPANS = len(TRAINED_SPANS)


class StepSums:
    """One rank's sums over the micro-batches of a step, in float64 on `device`."""

    def __init__(self, device: torch.device, *, rank: int, ranks: int) -> None:
        import torch

        self._torch = torch
        self._device, self._rank, self._ranks = device, rank, ranks
        self._total = torch.zeros((), dtype=torch.float64, device=device)
        self._by_span = torch.zeros((3, SPANS), dtype=torch.float64, device=device)
        """Losses, hits, tokens."""
        self._metrics: dict[str, torch.Tensor] | None = None

    @property
    def names(self) -> tuple[str, ...]:
        """Of the objective's own metrics."""
        return tuple(sorted(self._metrics or {}))

    def add(self, result: ObjectiveLoss, batch: TensorBatch) -> None:
        """Raises ValueError for an objective whose metrics are others than those of the micro-batch before."""
        torch = self._torch
        with torch.no_grad():
            self._total += result.total.detach()
            counted = batch.weights > 0
            correct = result.correct if result.correct is not None else torch.zeros_like(counted)
            rows = torch.stack(
                # Not a product: what a filling position has may be infinite.
                [torch.where(counted, result.per_token.double(), 0.0), (counted & correct).double(), counted.double()]
            )
            self._by_span.index_add_(1, batch.spans, rows)
            metrics = {name: value.detach().double() for name, value in result.metrics.items()}
        if self._metrics is None:
            self._metrics = metrics
        elif self._metrics.keys() != metrics.keys():
            raise ValueError(f"an objective's metrics were {sorted(self._metrics)}, now they are {sorted(metrics)}")
        else:
            self._metrics = {name: value + metrics[name] for name, value in self._metrics.items()}

    def to_list(self) -> list[float]:
        """Waits for the device."""
        metrics = [(self._metrics or {})[name].reshape(1) for name in self.names]
        values = self._torch.cat([self._total.reshape(1), self._by_span.reshape(-1), *metrics]).tolist()
        memory = [0.0] * self._ranks
        memory[self._rank] = peak_memory_mb(self._device)
        return [*values, *memory]


@dataclass(frozen=True, slots=True, kw_only=True)
class StepTotals:
    """A step over all ranks."""

    total: float
    """Sum of weight * loss."""
    loss_by_span: Mapping[str, float]
    """Unweighted mean per span type that occurred."""
    accuracy_by_span: Mapping[str, float]
    """Share of the trained tokens that no other token is likelier than."""
    accuracy: float
    metrics: Mapping[str, float]
    """The objective's own, as means over the trained tokens."""
    peak_memory_mb: float
    """Of the rank that needs most."""

    @classmethod
    def of(cls, values: Sequence[float], *, ranks: int, names: Sequence[str]) -> StepTotals:
        """`values`: the ranks' `StepSums.to_list`, added up."""
        losses, hits, counts = (values[1 + i * SPANS : 1 + (i + 1) * SPANS] for i in range(3))
        own = values[1 + 3 * SPANS : len(values) - ranks]
        spans = [span.value for span in TRAINED_SPANS]
        tokens = max(1.0, sum(counts))
        return cls(
            total=values[0],
            loss_by_span={span: loss / n for span, loss, n in zip(spans, losses, counts, strict=True) if n},
            accuracy_by_span={span: hit / n for span, hit, n in zip(spans, hits, counts, strict=True) if n},
            accuracy=sum(hits) / tokens,
            metrics={name: value / tokens for name, value in zip(names, own, strict=True)},
            peak_memory_mb=max(values[-ranks:]),
        )


def peak_memory_mb(device: torch.device) -> float:
    """The most that this process has held so far: of the GPU's memory, or on a CPU, resident, in MiB."""
    if device.type == "cuda":
        import torch

        return torch.cuda.max_memory_allocated(device) / 2**20
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / (2**20 if sys.platform == "darwin" else 2**10)
