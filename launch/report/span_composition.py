"""What the rows that a student is trained on are made of, by span type: in tokens of the student's tokenizer where that
is at hand, else in characters.

Contents of messages alone are counted, each for itself as `rollout.rendering` does; the template's own tokens are not.
The proof of every single mask is `python -m learner.audit`.

Example::

    composition = compose(trajectories, tokenizer_folder(config, run), config["learner"])
    composition.unit, composition.trained["thought"], composition.read["observation"]
"""

from __future__ import annotations

from bisect import bisect_left
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any, Literal

from rollout.trajectory import Message, SpanType, Trajectory


@dataclass(slots=True)
class Composition:
    """Sums over some rows."""

    unit: Literal["tokens", "characters"]
    rows: int = 0
    trained: Counter[str] = field(default_factory=Counter)
    """span type -> what the student has to produce."""
    read: Counter[str] = field(default_factory=Counter)
    """span type -> what it only reads."""
    weights: dict[str, float] = field(default_factory=dict)
    """span type -> weight in the loss, where it is not 1."""

    def to_json(self) -> dict[str, Any]:
        return {
            "unit": self.unit,
            "rows": self.rows,
            "trained": dict(self.trained),
            "read": dict(self.read),
            "weights": self.weights,
        }


def compose(trajectories: Sequence[Trajectory], folder: Path | None, learner: Mapping[str, Any]) -> Composition | None:
    """`learner`: the run's settings of that name. None where there is nothing to count."""
    if not trajectories:
        return None
    weights = {str(span): float(weight) for span, weight in (learner.get("span_weights") or {}).items()}
    encode = None if folder is None else _encoder(folder)
    composition = Composition(
        unit="characters" if encode is None else "tokens", rows=len(trajectories), weights=weights
    )
    for trajectory in trajectories:
        for message in trajectory.messages():
            counts = composition.trained if message.role == "assistant" else composition.read
            starts = range(len(message.content)) if encode is None else encode(message.content)
            _count(counts, message, starts)
    return composition


def tokenizer_folder(config: Mapping[str, Any] | None, run: Path | None) -> Path | None:
    """The student's, or its base's where it is on this machine."""
    if config is None or run is None:
        return None
    places = [run / "learner" / "student"]
    base = str(config.get("learner", {}).get("model_path", ""))
    if base == "base_student":
        from learner.base_student import BASE_STUDENT_FOLDER

        places.append(Path(BASE_STUDENT_FOLDER))
    elif base:
        places.append(Path(base))
    return next((place for place in places if (place / "tokenizer.json").is_file()), None)


def _encoder(folder: Path) -> Callable[[str], Sequence[int]] | None:
    """Text to the first character of each of its tokens; None where the tokenizer cannot be read."""
    try:
        from tokenizers import Tokenizer

        tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    except Exception:  # whatever that library raises for a file of another version: characters are told instead
        return None
    tokenizer.no_truncation()
    tokenizer.no_padding()
    return lambda text: [start for start, _ in tokenizer.encode(text, add_special_tokens=False).offsets]


def _count(counts: Counter[str], message: Message, starts: Sequence[int]) -> None:
    if not message.spans:
        own = SpanType.THOUGHT if message.role == "assistant" else SpanType(message.role)
        counts[own.value] += len(starts)
        return
    bounds = [0, *(bisect_left(starts, span.end) for span in message.spans)]
    for span, (begin, end) in zip(message.spans, pairwise(bounds), strict=True):
        counts[span.type.value] += end - begin
