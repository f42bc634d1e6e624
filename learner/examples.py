"""From a `Trajectory` to an `Example`: token ids, what each token is, and how much it weighs in the loss.

Fails closed: a row whose trained tokens cannot be proven to be the assistant's own text plus its stop tokens is a
`RefusedRow` with a reason that can be counted; it is never silently trained on. Only the student's tokens are trained
on (loss masking of observations as in arXiv 2505.17612 section 3); span types follow arXiv 2505.13820.

Example::

    maker = ExampleMaker(tokenizer, max_row_tokens=1024)
    made = maker.make(trajectory)                 # Example | RefusedRow
    if isinstance(made, Example):
        made.loss_weights[-1]                     # 1.0 when the row ends with its stop token
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import Any

import numpy as np

from learner.difficulty import Difficulty
from learner.rollout_scores import teacher_of_rollout
from learner.token_scores import TokenScores
from rollout.rendering import Renderer, RenderingError, Row
from rollout.trajectory import Message, SpanType, Step, Trajectory

Scorer = Callable[[str, tuple[int, ...]], TokenScores | None]
"""(trajectory key, the row's token ids) -> what is known of its tokens, arrays over the whole row; None: nothing."""


TRAINED_SPANS = (SpanType.THOUGHT, SpanType.CODE, SpanType.ANSWER, SpanType.FORMAT)
"""What a token that the student must produce can be."""


class Refusal(StrEnum):
    """Why a trajectory is not trained on."""

    NOT_TRAINABLE = "not_trainable"
    EMPTY = "empty"
    CUT_OFF = "cut_off"
    SPANS = "spans_do_not_cover"
    RENDERING = "rendering"
    MASK = "mask_not_proven"
    TOO_LONG = "too_long"
    NO_WEIGHT = "no_weight"
    SCORES = "scores_do_not_fit"
    NOT_SAMPLED = "not_sampled"
    OBJECTIVE = "not_for_this_objective"


@dataclass(frozen=True, slots=True)
class Example:
    """One conversation as a training row."""

    key: str
    """The trajectory's."""
    task_id: str
    kind: str
    token_ids: tuple[int, ...]
    """[n]"""
    span_types: tuple[SpanType, ...]
    """[n]"""
    loss_weights: tuple[float, ...]
    """[n] 0 for what the student only reads; the first is always 0."""
    turns: tuple[int, ...] = ()
    """[n] 0, 1, ... the assistant turn that each token belongs to, its stop token included; -1 for what is only read.
    Left out: the unbroken stretches of weight are the turns."""
    scores: TokenScores | None = None
    """What other policies say of its tokens; None: nothing is known."""
    difficulty: float | None = None
    """Larger is harder; None: unknown, or not asked for."""

    def __post_init__(self) -> None:
        if not self.turns:
            object.__setattr__(self, "turns", turns_of([weight > 0 for weight in self.loss_weights]))

    def __len__(self) -> int:
        return len(self.token_ids)


@dataclass(frozen=True, slots=True)
class RefusedRow:
    """A trajectory that is not trained on."""

    key: str
    reason: Refusal
    detail: str = ""


class ExampleMaker:
    """Makes examples for one student.

    `system_prompt`: the student's own; "" for none; None keeps the trajectory's. `span_weights`: span type -> weight of
    its trained tokens, 1 where absent. Sampled token ids are kept when this tokenizer decodes them to the turn's text,
    else (another model's ids, or none) the text is tokenised; where they are kept, their log-probabilities are too (the
    "behaviour" of the row's scores). `scorer` adds what a teacher or a reward says; `difficulty` rates each row.

    `successes_only`: a student that imitates learns from what solved its task. Else it learns from its own rollouts,
    right or wrong: failed, cut off and unparsable turns are kept, and what was sampled is trained alone (no given
    beginning of a turn, no stop token that was never chosen). Refused are then rows without the student's own ids, and
    still what leaks its guide and what failed by our fault.

    Raises `RenderingError` for a tokenizer without a provable chat template.
    """

    def __init__(
        self,
        tokenizer: Any,
        *,
        max_row_tokens: int,
        system_prompt: str | None = None,
        span_weights: Mapping[str, float] | None = None,
        scorer: Scorer | None = None,
        difficulty: Difficulty | None = None,
        successes_only: bool = True,
    ) -> None:
        self.renderer = Renderer(tokenizer)
        self.max_row_tokens = max_row_tokens
        self.system_prompt = system_prompt
        self._scorer = scorer
        self._difficulty = difficulty
        self._successes_only = successes_only
        self.weights = {span: float((span_weights or {}).get(span.value, 1.0)) for span in TRAINED_SPANS}
        """Of a trained token, by its span type."""

    def make(self, trajectory: Trajectory) -> Example | RefusedRow:
        """The trajectory's row, or why there is none."""
        key = trajectory.key
        if self._difficulty is not None:
            self._difficulty.observe(trajectory)
        refused = self._unfit(trajectory)
        if refused is not None:
            return refused
        messages = self.messages(trajectory)
        try:
            row = self.renderer.row(messages)
        except RenderingError as error:
            return RefusedRow(key, Refusal.RENDERING, str(error))
        if len(row) > self.max_row_tokens:
            return RefusedRow(key, Refusal.TOO_LONG, f"{len(row)} tokens, above max_row_tokens {self.max_row_tokens}")
        problem = self._mask_problem(messages, row)
        if problem:
            return RefusedRow(key, Refusal.MASK, problem)
        trained = row.trained
        if not self._successes_only:
            for i, message in enumerate(m for m in messages if m.role == "assistant"):
                if message.token_ids is None:
                    return RefusedRow(key, Refusal.NOT_SAMPLED, f"turn {i} has no token ids of this tokenizer")
            trained = _sampled(trajectory, row)
        weights = tuple(self.weights[span] if on else 0.0 for span, on in zip(row.span_types, trained, strict=True))
        if not any(weights):
            return RefusedRow(key, Refusal.NO_WEIGHT, "no token was sampled, or every trained span has weight 0")
        try:
            scores = self._scores(trajectory, messages, row)
        except ValueError as error:
            return RefusedRow(key, Refusal.SCORES, str(error))
        return Example(
            key,
            trajectory.task.id,
            trajectory.task.kind,
            row.token_ids,
            row.span_types,
            weights,
            turns=turns_of(row.trained),
            scores=scores,
            difficulty=None if self._difficulty is None else self._difficulty.of(trajectory, len(row)),
        )

    def _unfit(self, trajectory: Trajectory) -> RefusedRow | None:
        """Why it is not even rendered."""
        key = trajectory.key
        reason = _not_a_success(trajectory) if self._successes_only else _not_a_sample(trajectory)
        if reason:
            return RefusedRow(key, Refusal.NOT_TRAINABLE, reason)
        if not trajectory.steps:
            return RefusedRow(key, Refusal.EMPTY, "no steps")
        for i, step in enumerate(trajectory.steps):
            if self._successes_only and step.completion.finish_reason != "stop":
                return RefusedRow(key, Refusal.CUT_OFF, f"turn {i} ended by {step.completion.finish_reason!r}")
            if self._successes_only and not step.completion.text:
                return RefusedRow(key, Refusal.EMPTY, f"turn {i} has no text")
            if not _spans_cover(step):
                return RefusedRow(
                    key, Refusal.SPANS, f"turn {i}: spans do not cover its {len(step.completion.text)} characters"
                )
        return None

    def messages(self, trajectory: Trajectory) -> list[Message]:
        """The conversation as the student shall learn it: its own system prompt, ids only where they are the
        student's."""
        messages = [self._as_sampled(message) for message in trajectory.messages()]
        if self.system_prompt is None:
            return messages
        if messages and messages[0].role == "system":
            messages = messages[1:]
        return [Message(role="system", content=self.system_prompt), *messages] if self.system_prompt else messages

    def _as_sampled(self, message: Message) -> Message:
        if message.role != "assistant" or message.token_ids is None:
            return message
        ids, stop = message.token_ids, self.renderer.stop_token_id
        if not ids or ids[-1] != stop:
            # A stop string ended the turn before the stop token was sampled; the student is to end its turns itself.
            ids = (*ids, stop)
        return dataclasses.replace(message, token_ids=ids if self._decodes_to(ids, message.content) else None)

    def _decodes_to(self, ids: tuple[int, ...], content: str) -> bool:
        """Whether the ids are this text and one stop token at its end, for this tokenizer."""
        vocabulary = len(self.renderer.tokenizer)
        if any(not 0 <= i < vocabulary for i in ids):
            return False
        return (
            self.renderer.stop_token_id not in ids[:-1]
            and _decode(self.renderer, ids) == content + self.renderer.stop_token
        )

    def _scores(self, trajectory: Trajectory, messages: list[Message], row: Row) -> TokenScores | None:
        """The scorer's; where it brings none, the behaviour's log-probabilities and the likeliest tokens that the
        rollout kept. Raises ValueError for scores that are not this row's."""
        scores = None if self._scorer is None else self._scorer(trajectory.key, row.token_ids)
        found = scores or TokenScores()
        if found.behaviour_logprobs is None:
            found = dataclasses.replace(found, behaviour_logprobs=_behaviour_logprobs(trajectory, messages, row))
        if found.teacher_ids is None and self._successes_only:  # else the one who acted is the student itself
            kept = teacher_of_rollout(trajectory, messages, trained_runs(row.trained), len(row))
            if kept is not None:
                found = dataclasses.replace(found, teacher_ids=kept[0], teacher_logprobs=kept[1])
        if not found.has:
            return scores
        _check_fit(found, len(row), len(self.renderer.tokenizer))
        return found

    def _mask_problem(self, messages: list[Message], row: Row) -> str | None:
        """Why the row's mask is not exactly the assistant's turns, or None."""
        runs = list(trained_runs(row.trained))
        turns = [message.content for message in messages if message.role == "assistant"]
        if len(runs) != len(turns):
            return f"{len(runs)} trained stretches for {len(turns)} assistant turns"
        if row.trained[0]:
            return "the first token is trained, though nothing comes before it"
        for i, ((start, end), text) in enumerate(zip(runs, turns, strict=True)):
            if _decode(self.renderer, row.token_ids[start:end]) != text + self.renderer.stop_token:
                return f"the trained tokens of turn {i} do not decode to its text and stop token"
            wrong = set(row.span_types[start:end]) - set(TRAINED_SPANS)
            if wrong:
                return f"turn {i} has trained tokens of type {sorted(wrong)}"
        return None


def turns_of(trained: Sequence[bool]) -> tuple[int, ...]:
    """[n] the number of the unbroken stretch that each True is in, -1 for False."""
    turns, turn, before = [], -1, False
    for on in trained:
        turn += on and not before
        turns.append(turn if on else -1)
        before = on
    return tuple(turns)


def _not_a_success(trajectory: Trajectory) -> str:
    """Why a student does not imitate it; "" when it does."""
    if trajectory.trainable:
        return ""
    if trajectory.failure is not None or trajectory.leaks:
        return _not_a_sample(trajectory)
    if not trajectory.success:
        return f"no success, stopped by {trajectory.stop_reason}"
    return "a turn could not be parsed"


def _not_a_sample(trajectory: Trajectory) -> str:
    """Why a student does not even learn from it as a sample; "" when it does."""
    if trajectory.failure is not None:
        return f"failed: {trajectory.failure.message}"
    return f"speaks of a guide that the student does not see: {trajectory.leaks[0]}" if trajectory.leaks else ""


def _sampled(trajectory: Trajectory, row: Row) -> list[bool]:
    """[n] which tokens of a row of sampled ids its policy chose."""
    sampled = [False] * len(row)
    for step, (start, _) in zip(trajectory.steps, trained_runs(row.trained), strict=True):
        completion = step.completion
        end = start + len(completion.token_ids or ())
        count = len(completion.logprobs) if completion.logprobs else completion.completion_tokens
        begin = max(start, end - count)
        sampled[begin:end] = [True] * (end - begin)
    return sampled


def _behaviour_logprobs(trajectory: Trajectory, messages: list[Message], row: Row) -> np.ndarray | None:
    """[n] float32 log-probabilities of the sampled tokens of the row, NaN elsewhere; None when none is known."""
    said = [message for message in messages if message.role == "assistant"]
    logprobs, known = np.full(len(row), np.nan, np.float32), False
    for step, message, (start, _) in zip(trajectory.steps, said, trained_runs(row.trained), strict=True):
        ids, of_turn = step.completion.token_ids, step.completion.logprobs
        if message.token_ids is None or ids is None or not of_turn:
            continue
        if len(of_turn) > len(ids):
            raise ValueError(f"a turn has {len(of_turn)} log-probabilities for {len(ids)} tokens")
        end = start + len(ids)  # a stop token that was not sampled comes behind them and has none
        logprobs[end - len(of_turn) : end], known = of_turn, True
    return logprobs if known else None


def _check_fit(scores: TokenScores, tokens: int, vocabulary: int) -> None:
    """Raises ValueError for scores of another row, or of a teacher with another vocabulary."""
    if scores.tokens not in (None, tokens):
        raise ValueError(f"the scores are of {scores.tokens} tokens, the row has {tokens}")
    largest = -1 if scores.teacher_ids is None else int(scores.teacher_ids.max(initial=-1))
    if largest >= vocabulary:
        raise ValueError(
            f"the teacher's scores name token {largest}, the student's tokenizer has {vocabulary} tokens; "
            "a teacher that scores tokens must share the student's vocabulary"
        )


def trained_runs(trained: tuple[bool, ...]) -> Iterator[tuple[int, int]]:
    """[start, end) of each unbroken stretch of True."""
    start = None
    for i, on in enumerate((*trained, False)):
        if on and start is None:
            start = i
        elif not on and start is not None:
            yield start, i
            start = None


def _decode(renderer: Renderer, ids: tuple[int, ...]) -> str:
    return renderer.tokenizer.decode(list(ids), skip_special_tokens=False, clean_up_tokenization_spaces=False)


def _spans_cover(step: Step) -> bool:
    """Spans in order, without gap or overlap, of types that a student may produce; none at all is one span."""
    position = 0
    for span in step.spans:
        if span.start != position or span.end < span.start or span.type not in TRAINED_SPANS:
            return False
        position = span.end
    return not step.spans or position == len(step.completion.text)
