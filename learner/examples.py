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
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from enum import StrEnum
from typing import Any

from rollout.rendering import Renderer, RenderingError, Row
from rollout.trajectory import Message, SpanType, Step, Trajectory

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
    else (another model's ids, or none) the text is tokenised. Raises `RenderingError` for a tokenizer without a
    provable chat template.
    """

    def __init__(
        self,
        tokenizer: Any,
        *,
        max_row_tokens: int,
        system_prompt: str | None = None,
        span_weights: Mapping[str, float] | None = None,
    ) -> None:
        self.renderer = Renderer(tokenizer)
        self.max_row_tokens = max_row_tokens
        self.system_prompt = system_prompt
        self._weights = {span: float((span_weights or {}).get(span.value, 1.0)) for span in TRAINED_SPANS}

    def make(self, trajectory: Trajectory) -> Example | RefusedRow:
        """The trajectory's row, or why there is none."""
        key = trajectory.key
        if not trajectory.trainable:
            return RefusedRow(key, Refusal.NOT_TRAINABLE, str(trajectory.stop_reason))
        if not trajectory.steps:
            return RefusedRow(key, Refusal.EMPTY, "no steps")
        for i, step in enumerate(trajectory.steps):
            if step.completion.finish_reason != "stop":
                return RefusedRow(key, Refusal.CUT_OFF, f"turn {i} ended by {step.completion.finish_reason!r}")
            if not step.completion.text:
                return RefusedRow(key, Refusal.EMPTY, f"turn {i} has no text")
            if not _spans_cover(step):
                return RefusedRow(
                    key, Refusal.SPANS, f"turn {i}: spans do not cover its {len(step.completion.text)} characters"
                )
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
        weights = tuple(
            self._weights[span] if trained else 0.0 for span, trained in zip(row.span_types, row.trained, strict=True)
        )
        if not any(weights):
            return RefusedRow(key, Refusal.NO_WEIGHT, "every trained span has weight 0")
        return Example(key, trajectory.task.id, trajectory.task.kind, row.token_ids, row.span_types, weights)

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
        if any(not 0 <= i < len(self.renderer.tokenizer) for i in ids):
            return False
        return (
            self.renderer.stop_token_id not in ids[:-1]
            and _decode(self.renderer, ids) == content + self.renderer.stop_token
        )

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
