"""New weights into a running policy, and proof that it acts with them: `WeightLoader`.

Weights come as a Hugging Face folder of the policy's own architecture. Whoever exported them may have put a
`logprob_check.json` beside them: rows of token ids, and the log-probabilities that the model which was exported gives
them. The policy then has to give the same, within the tolerances that the file states: silent differences (a tied head
that a reload leaves as it was, an adapter that was not merged, weights of another version) are found here and not in a
score weeks later. The file:

    {"rows": [[1, 5, 9], ...], "logprobs": [[null, -0.5, null], ...], "tolerance": 2.0, "mean_tolerance": 0.1,
     "before": [[null, -0.7, null], ...]}

with the log-probability of each token given those before it, null where it is not compared. Two float32 models agree to
1e-4; where one of them computes in bfloat16 the largest of two thousand differences is 0.2 to 0.6 and their mean 0.005
to 0.04, and one optimizer step of a large rate takes them 10 and 1.6 apart (the 2 M parameter student, 16 rows).
Late in training a version is nearer to the one before than that: `before`, what the version before said, tells an
engine that still has it from one that rounds, whatever the tolerances.

Weights are loaded in place; where that fails, or what was loaded fails the check, the engine is started anew from the
folder. Weights that fail the check then too are refused, and the policy goes back to those that it had.

Example::

    loader = WeightLoader(policy, build)
    loaded = await loader.load(Weights("runs/a/learner/published/step-0000200", "step-0000200"))
    loaded.how, loaded.difference                # "in place", Difference(largest=0.0004, ...)
"""

from __future__ import annotations

import asyncio
import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np

from rollout.policy import PolicyError
from rollout.trajectory import FailureClass

CHECK_FILE = "logprob_check.json"
CHECK_TIMEOUT_S = 300.0
"""For all rows of a check together; they are few, but an engine may have much to do."""


class WeightsRefused(PolicyError):
    """The policy does not say what the exported model says; the message has the numbers."""


@dataclass(frozen=True, slots=True)
class Weights:
    """Weights to act with instead of those that the policy was started with (same architecture, vLLM only)."""

    folder: str
    """A Hugging Face folder."""
    version: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Difference:
    """Between what a policy and an exported model say of the same tokens."""

    largest: float
    """Of the absolute differences of log-probabilities; infinite where the policy gave something that is no number."""
    mean: float
    tokens: int
    row: int
    """Where the largest is."""
    token: int
    is_before: bool = False
    """The policy is much nearer to the version before."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Loaded:
    """How a policy came to its weights."""

    how: Literal["had them", "in place", "started anew"]
    difference: Difference | None = None
    """None: the folder has no check."""
    why_anew: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class LogprobCheck:
    """What an exported model says of a few rows."""

    rows: tuple[tuple[int, ...], ...]
    logprobs: tuple[tuple[float, ...], ...]
    """As long as the rows; NaN where nothing is compared."""
    tolerance: float
    """Largest difference of a log-probability that rounding explains."""
    mean_tolerance: float
    """The same of their mean."""
    before: LogprobCheck | None = None
    """What the version before says of the same rows."""

    @classmethod
    def read(cls, folder: str | Path) -> LogprobCheck | None:
        """The folder's; None when it has none. Raises `PolicyError` for one that cannot be used."""
        path = Path(folder) / CHECK_FILE
        if not path.exists():
            return None
        try:
            found = json.loads(path.read_text(encoding="utf-8"))
            check = cls._of(found, found["logprobs"])
            if found.get("before") is not None:
                check = replace(check, before=cls._of(found, found["before"]))
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise PolicyError(f"{path} is no check of log-probabilities: {error!r}", FailureClass.INPUT) from error
        return check

    @classmethod
    def _of(cls, found: Mapping[str, Any], told: Sequence[Sequence[float | None]]) -> LogprobCheck:
        rows = tuple(tuple(int(token) for token in row) for row in found["rows"])
        logprobs = tuple(tuple(math.nan if value is None else float(value) for value in row) for row in told)
        if [len(row) for row in rows] != [len(row) for row in logprobs]:
            raise ValueError("rows and log-probabilities are of different lengths")
        if not any(value == value for row in logprobs for value in row):
            raise ValueError("nothing is compared")
        tolerance, mean_tolerance = float(found["tolerance"]), float(found["mean_tolerance"])
        return cls(rows=rows, logprobs=logprobs, tolerance=tolerance, mean_tolerance=mean_tolerance)

    def accepts(self, difference: Difference) -> bool:
        within = difference.largest <= self.tolerance and difference.mean <= self.mean_tolerance
        return within and not difference.is_before

    def difference(self, scored: Sequence[np.ndarray]) -> Difference:
        """`scored`: for each row [n] log-probabilities of its tokens, whatever for those that are not compared."""
        worst, where, total, tokens = -1.0, (0, 0), 0.0, 0
        for i, (ours, theirs) in enumerate(zip(self.logprobs, scored, strict=True)):
            expected = np.asarray(ours)
            compared = ~np.isnan(expected)
            if not compared.any():
                continue
            apart = np.abs(np.where(compared, np.asarray(theirs, np.float64), 0.0) - np.where(compared, expected, 0.0))
            apart = np.where(np.isfinite(apart), apart, np.inf)
            total, tokens = total + float(apart.sum()), tokens + int(compared.sum())
            at = int(apart.argmax())
            if apart[at] > worst:
                worst, where = float(apart[at]), (i, at)
        mean = total / tokens
        # Rounding brings nobody nearer to another version than to one's own, let alone twice as near.
        is_before = self.before is not None and self.before.difference(scored).mean < mean / 2
        return Difference(
            largest=worst, mean=mean, tokens=tokens, row=where[0], token=where[1], is_before=is_before
        )


class WeightLoader:
    """A policy of this process whose weights change.

    `build` makes the policy anew, with the given weights or, for None, with those that it was started with; it is
    called in a thread, when the policy before is closed. `policy` is the one to act with now: ask for it each time.
    """

    def __init__(self, policy: Any, build: Callable[[Weights | None], Any]) -> None:
        self.policy, self._build = policy, build
        self._accepted: Weights | None = None
        self._turn = asyncio.Lock()

    async def load(self, weights: Weights) -> Loaded:
        """Act with `weights` from now on; what runs goes on with them where they can be loaded in place.

        Raises `PolicyError` (INPUT) for a folder that this policy cannot take, or a policy without weights of its own,
        and `WeightsRefused`; the policy then has what it had before.
        """
        async with self._turn:
            if self.policy.weights_version == weights.version:
                return Loaded(how="had them")
            if not hasattr(self.policy, "update_weights"):
                raise PolicyError(f"policy {self.policy.name!r} has no weights that can change", FailureClass.INPUT)
            check = LogprobCheck.read(weights.folder)
            loaded = await self._checked(weights, check)
            self._accepted = weights
            return loaded

    async def _checked(self, weights: Weights, check: LogprobCheck | None) -> Loaded:
        try:
            await self.policy.update_weights(weights.folder, weights.version)
            difference = await self._difference(check)
            if check is None or difference is None or check.accepts(difference):
                return Loaded(how="in place", difference=difference)
            why = _words(difference, check)
        except PolicyError as error:
            if error.failure_class is FailureClass.INPUT:
                raise  # nothing was loaded
            why = str(error)
        try:
            await self._start_anew(weights)
            difference = await self._difference(check)
        except PolicyError as error:
            await self._go_back()
            raise PolicyError(
                f"weights {weights.version!r} could not be loaded in place ({why}), nor by starting the engine anew: "
                f"{error}"
            ) from error
        if check is not None and difference is not None and not check.accepts(difference):
            await self._go_back()
            raise WeightsRefused(
                f"weights {weights.version!r} are refused: {_words(difference, check)}, with an engine that was "
                "started with them too"
            )
        return Loaded(how="started anew", difference=difference, why_anew=why)

    async def _difference(self, check: LogprobCheck | None) -> Difference | None:
        if check is None:
            return None
        scored = []
        for row in check.rows:
            _, logprobs = await self.policy.score(row, 0, timeout_s=CHECK_TIMEOUT_S)
            scored.append(np.concatenate([[np.nan], logprobs[:, 0]]))
        return check.difference(scored)

    async def _start_anew(self, weights: Weights | None) -> None:
        await self.policy.close()
        self.policy = await asyncio.to_thread(self._build, weights)

    async def _go_back(self) -> None:
        """To what was accepted last; without it, to what the policy was started with."""
        try:
            if self._accepted is not None and Path(self._accepted.folder).is_dir():
                await self.policy.update_weights(self._accepted.folder, self._accepted.version)
                return
        except PolicyError:
            pass  # started anew, then
        still_there = self._accepted is not None and Path(self._accepted.folder).is_dir()
        self._accepted = self._accepted if still_there else None
        await self._start_anew(self._accepted)


def _words(difference: Difference, check: LogprobCheck) -> str:
    return (
        f"of {difference.tokens} log-probabilities the largest difference is {difference.largest:.4g} (row "
        f"{difference.row}, token {difference.token}), their mean {difference.mean:.4g}; {check.tolerance:g} and "
        f"{check.mean_tolerance:g} are tolerated"
        + ("; it says what the version before says" if difference.is_before else "")
    )
