"""What others say of a row's tokens: `TokenScores`, the inputs of every objective but cross entropy.

Entry i scores token i of the row, given the tokens before it. A policy that sampled the row says how likely it found
each token (`behaviour_logprobs`), a teacher says what it would have put there (`teacher_ids`, `teacher_logprobs`), and
a group of rollouts of one task says how much better than the others the row did (`advantage`).

The teacher's entries of one token are a set: distinct ids in any order, usually its k likeliest ones and the row's own
token. What they leave of the probability is the rest, which objectives treat as one more outcome.

Numpy alone: nothing here knows how scores are made or used.

Example::

    scores = TokenScores(teacher_ids=ids, teacher_logprobs=logprobs)       # both [n, k]
    scores.has                                                             # frozenset({"teacher"})
    scores.teacher_own(token_ids)                                          # [n] log p of the row's own tokens
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

ScoreKind = Literal["teacher", "behaviour", "advantage"]
"""What an objective can ask for: `teacher_ids` with `teacher_logprobs`, `behaviour_logprobs`, `advantage`."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class TokenScores:
    """Scores of one row of n tokens. Raises ValueError for arrays that do not fit together."""

    behaviour_logprobs: np.ndarray | None = None
    """[n] float32 log p of the policy that sampled the token; NaN where unknown (what it only read)."""
    teacher_ids: np.ndarray | None = None
    """[n, k] int32 ids that the teacher was asked about; -1 where there is none."""
    teacher_logprobs: np.ndarray | None = None
    """[n, k] float32 its log p of them at temperature 1; NaN where there is none."""
    advantage: float | None = None
    """Of the whole row, such as its reward less its group's mean."""

    def __post_init__(self) -> None:
        ids, logprobs = self.teacher_ids, self.teacher_logprobs
        if (ids is None) != (logprobs is None):
            raise ValueError("teacher_ids and teacher_logprobs belong together; give both or neither")
        if ids is not None and logprobs is not None:
            if ids.ndim != 2 or ids.shape != logprobs.shape:
                raise ValueError(
                    f"teacher_ids is {ids.shape} and teacher_logprobs {logprobs.shape}; both must be [n, k]"
                )
            if ((ids >= 0) != ~np.isnan(logprobs)).any():
                raise ValueError("teacher_ids must be -1 exactly where teacher_logprobs is NaN")
            if (logprobs > 1e-3).any():
                raise ValueError(f"teacher_logprobs has {np.nanmax(logprobs):g}; a log probability is at most 0")
        behaviour = self.behaviour_logprobs
        if behaviour is not None:
            if behaviour.ndim != 1:
                raise ValueError(f"behaviour_logprobs is {behaviour.shape}; it must be [n]")
            if (behaviour > 1e-3).any():
                raise ValueError(f"behaviour_logprobs has {np.nanmax(behaviour):g}; a log probability is at most 0")
            if ids is not None and len(ids) != len(behaviour):
                raise ValueError(f"behaviour_logprobs scores {len(behaviour)} tokens, teacher_ids {len(ids)}")

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, TokenScores):
            return NotImplemented
        return self.advantage == other.advantage and all(
            _same(getattr(self, name), getattr(other, name))
            for name in ("behaviour_logprobs", "teacher_ids", "teacher_logprobs")
        )

    def __hash__(self) -> int:
        return hash((self.tokens, self.advantage, self.has))

    @property
    def tokens(self) -> int | None:
        """n; None when only the advantage is known."""
        for array in (self.behaviour_logprobs, self.teacher_ids):
            if array is not None:
                return len(array)
        return None

    @property
    def has(self) -> frozenset[ScoreKind]:
        """What is there at all, for some token."""
        kinds: dict[ScoreKind, object] = {
            "teacher": self.teacher_ids,
            "behaviour": self.behaviour_logprobs,
            "advantage": self.advantage,
        }
        return frozenset(kind for kind, value in kinds.items() if value is not None)

    def teacher_own(self, token_ids: Sequence[int]) -> np.ndarray:
        """[n] float32 the teacher's log p of the row's own tokens; NaN where it was not asked about them."""
        own = np.full(len(token_ids), np.nan, np.float32)
        if self.teacher_ids is not None and self.teacher_logprobs is not None:
            at, column = np.nonzero(self.teacher_ids == np.asarray(token_ids)[:, None])
            own[at] = self.teacher_logprobs[at, column]
        return own


def missing_scores(
    scores: TokenScores | None,
    token_ids: Sequence[int],
    loss_weights: Sequence[float],
    needs: frozenset[ScoreKind],
) -> str | None:
    """Why a row cannot be trained by an objective that `needs` these scores; None when it can.

    Needed is: an advantage; behaviour log probabilities of every trained token; and of every trained token the
    teacher's log probability of that very token.
    """
    if not needs:
        return None
    if scores is None:
        return f"it has no scores; its objective needs {', '.join(sorted(needs))}"
    if scores.tokens not in (None, len(token_ids)):
        return f"its scores are of {scores.tokens} tokens, it has {len(token_ids)}"
    for kind in sorted(needs - scores.has):
        return f"it has no {kind} scores"
    trained = np.asarray(loss_weights) > 0
    if "advantage" in needs and not np.isfinite(scores.advantage or 0.0):
        return f"its advantage is {scores.advantage}"
    if "behaviour" in needs and scores.behaviour_logprobs is not None:
        unknown = int((trained & ~np.isfinite(scores.behaviour_logprobs)).sum())
        if unknown:
            return f"{unknown} of its {int(trained.sum())} trained tokens have no behaviour log probability"
    if "teacher" in needs:
        unknown = int((trained & ~np.isfinite(scores.teacher_own(token_ids))).sum())
        if unknown:
            return f"{unknown} of its {int(trained.sum())} trained tokens have no log probability of the teacher"
    return None


def _same(a: np.ndarray | None, b: np.ndarray | None) -> bool:
    if a is None or b is None:
        return a is b
    return a.shape == b.shape and bool(np.array_equal(a, b, equal_nan=True))
