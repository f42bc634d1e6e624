"""What a student is trained for: one file per method, each an `Objective`, found by name.

| name | trains on | scores it needs | loss of a token |
|---|---|---|---|
| `sft` | a teacher's rows | none | cross entropy |
| `cot` | chain-of-thought rows | none | cross entropy |
| `span` | a teacher's rows | teacher, where there are | divergence from the teacher on thoughts, else cross entropy |
| `opd` | the student's own rows | teacher, behaviour | reverse KL, from the sampled token or over k tokens |
| `sod` | the student's own rows | teacher, behaviour | as `opd`, less where student and teacher have drifted apart |
| `grpo` | the student's own rows | advantage, behaviour | clipped policy gradient |

Example::

    objective = make_objective("opd", max_ratio=2.0)
    row = objective.fit(example)               # Example, or RefusedRow with the reason
    loss = objective.loss(logits, batch)       # loss.total is a sum; the trainer divides by the step's total weight
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from importlib import import_module
from inspect import signature
from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    import numpy as np
    import torch

    from learner.examples import Example, RefusedRow
    from learner.packing import MicroBatch
    from learner.token_scores import ScoreKind

OBJECTIVES = {
    "sft": "learner.objectives.sft:SftObjective",
    "cot": "learner.objectives.cot:CotObjective",
    "span": "learner.objectives.span:SpanObjective",
    "opd": "learner.objectives.opd:OpdObjective",
    "sod": "learner.objectives.sod:SodObjective",
    "grpo": "learner.objectives.grpo:GrpoObjective",
}
"""Name -> where it is; imported when it is asked for."""


@dataclass(slots=True)
class TensorBatch:
    """A micro-batch on the device; n is the number of trained positions. The rest is as in `MicroBatch`."""

    targets: torch.Tensor
    """[n] int64"""
    weights: torch.Tensor
    """[n] float32; 0 for a position that only fills an empty micro-batch."""
    spans: torch.Tensor
    """[n] int64 indices into `learner.examples.TRAINED_SPANS`"""
    rows: torch.Tensor | None = None
    """[n] int64"""
    turns: torch.Tensor | None = None
    """[n] int64"""
    behaviour_logprobs: torch.Tensor | None = None
    """[n] float32, NaN where unknown"""
    teacher_ids: torch.Tensor | None = None
    """[n, k] int64, -1 where there is none"""
    teacher_logprobs: torch.Tensor | None = None
    """[n, k] float32, NaN where there is none"""
    advantages: torch.Tensor | None = None
    """[n] float32, NaN where unknown"""
    step_weight: float | None = None
    """What the trainer divides the sum of the step's losses by."""
    step_rows: int | None = None

    @classmethod
    def of(cls, batch: MicroBatch, to_device: Callable[[np.ndarray], torch.Tensor]) -> TensorBatch:
        """`batch` with its arrays moved by `to_device`, such as `DeepSpeedBackend.to_device`."""

        def moved(array: np.ndarray | None) -> torch.Tensor | None:
            return None if array is None else to_device(array)

        return cls(
            targets=to_device(batch.targets),
            weights=to_device(batch.weights),
            spans=to_device(batch.spans),
            rows=moved(batch.rows),
            turns=moved(batch.turns),
            behaviour_logprobs=moved(batch.behaviour_logprobs),
            teacher_ids=moved(batch.teacher_ids),
            teacher_logprobs=moved(batch.teacher_logprobs),
            advantages=moved(batch.advantages),
            step_weight=batch.step_weight,
            step_rows=batch.step_rows,
        )


@dataclass(slots=True)
class ObjectiveLoss:
    """What an objective makes of one micro-batch."""

    total: torch.Tensor
    """Scalar: sum over trained positions of weight * loss, with gradient."""
    per_token: torch.Tensor
    """[n] unweighted, detached: for the metrics per span type."""
    correct: torch.Tensor | None = None
    """[n] bool: no token is likelier than the target for the student."""
    metrics: Mapping[str, torch.Tensor] = field(default_factory=dict)
    """Name -> scalar, detached: a sum over trained positions, to be divided by the step's trained tokens."""


class Objective(Protocol):
    """One training method."""

    name: str
    needs: frozenset[ScoreKind]
    """The scores it works on: what a run must give its examples."""
    falls_back: bool
    """A row without them is trained by cross entropy; else `fit` refuses it."""
    successes_only: bool
    """It imitates its rows, so they must be right; else it learns from failed ones too."""

    def fit(self, example: Example) -> Example | RefusedRow:
        """The row as it is to be trained: the same, or with less weight on some tokens, or why it cannot be."""
        ...

    def loss(self, logits: torch.Tensor, batch: TensorBatch) -> ObjectiveLoss:
        """`logits`: [n, vocabulary] of the student at the trained positions. Raises ValueError where `batch` lacks what
        is needed."""
        ...

    def parameters(self) -> Iterable[torch.nn.Parameter]:
        """Its own, to be trained with the student's without decay; none for most."""
        ...


def make_objective(name: str, **options: Any) -> Objective:
    """The objective of that name; its options are its class's. Raises ValueError, naming those there are."""
    if name not in OBJECTIVES:
        raise ValueError(f"objective is {name!r}; use one of {', '.join(map(repr, sorted(OBJECTIVES)))}")
    module, _, attribute = OBJECTIVES[name].partition(":")
    made = getattr(import_module(module), attribute)
    known = [option for option in signature(made).parameters if option not in ("args", "kwargs")]
    for option in options:
        if option not in known:
            there_are = ", ".join(map(repr, known)) or "none"
            raise ValueError(f"objective {name!r} has no option {option!r}; there are {there_are}")
    return made(**options)


def is_likeliest(logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """[n] bool: no token has a higher logit than the target. Much cheaper than argmax on a CPU; ties count."""
    logits = logits.detach()
    return logits.gather(-1, targets[:, None])[:, 0] >= logits.amax(-1)
