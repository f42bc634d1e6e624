"""What a model card says of a run: of the training, and of what it was trained on.

Plain names and numbers, JSON-able; `learner.export` makes the card of them.

Example::

    training_facts(progress, ranks=2)["optimizer steps"]
    data_facts(progress, examples)["refused"]                  # {"too_long": 3}
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from typing import Any

from learner.base import Progress
from learner.examples import Example


def training_facts(progress: Progress, *, ranks: int) -> dict[str, Any]:
    facts = {
        "optimizer steps": progress.step,
        "tokens": progress.tokens,
        "trained tokens": progress.trained_tokens,
        "rows": progress.rows,
        "passes over the trajectories": progress.epoch,
        "last loss": progress.loss,
        "token accuracy": progress.accuracy,
        "validation loss": "none held out" if progress.validation_loss is None else progress.validation_loss,
        "tokens per second": round(progress.tokens_per_s),
        "ranks": ranks,
    }
    if progress.skipped_steps:
        facts["steps skipped for a gradient that is not finite"] = progress.skipped_steps
    return facts


def data_facts(progress: Progress, examples: Iterable[Example]) -> dict[str, Any]:
    """`examples`: those that were trained on."""
    kinds = Counter(row.kind for row in examples)
    return {
        "trajectories": progress.trajectories,
        "trained on": progress.examples,
        "held out": progress.held_out,
        "refused": dict(progress.refused),
        "trained on, by kind of task": dict(sorted(kinds.items())),
    }
