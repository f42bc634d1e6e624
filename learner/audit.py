"""Proves the loss masks of training rows: every trained token is the assistant's, once, and the prompts are prefixes.

It decodes rather than trusts: what is checked comes from the tokenizer's decoder, the chat template and the
trajectory's own text and spans, not from the code that made the masks. For each trajectory that becomes a row:

- the row decodes to the chat template's text of the conversation;
- the prompt that the policy sees before each turn is, token for token, what the row has before that turn;
- each turn's tokens decode to its text, end with the stop token, and are the only trained ones;
- each trained token lies in the span that it is counted as (an observation, a question or a system prompt is none);
- once planned into micro-batches, packed and bucketed, every trained token is a target exactly once, behind its own
  prefix.

Example::

    report = audit(Ledger(folder).trajectories(), tokenizer, max_row_tokens=1024)
    assert report.ok, report.failures[0]
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np

from learner.examples import TRAINED_SPANS, Example, ExampleMaker, RefusedRow
from learner.packing import plan_step
from rollout.trajectory import Message, Span, SpanType, Trajectory

PLANNED_ROWS = 64
"""Rows that are planned together; masks do not depend on it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class AuditFailure:
    """A mask that is wrong."""

    key: str
    problem: str


@dataclass(slots=True)
class AuditReport:
    """What `audit` found; counts are tokens unless said otherwise."""

    trajectories: int = 0
    rows: int = 0
    """Trajectories that are trained on."""
    refused: Counter[str] = field(default_factory=Counter)
    """Reason -> trajectories."""
    trained: Counter[str] = field(default_factory=Counter)
    """Span type -> trained tokens."""
    read: Counter[str] = field(default_factory=Counter)
    """Span type -> tokens that are only read."""
    stop_tokens: int = 0
    """Trained stop tokens: one per turn."""
    turns: int = 0
    failures: list[AuditFailure] = field(default_factory=list)
    samples: list[Example] = field(default_factory=list)
    """The first rows, to be looked at."""

    @property
    def ok(self) -> bool:
        """Nothing is wrong, and something was looked at."""
        return not self.failures and self.rows > 0

    def to_json(self) -> str:
        return json.dumps(
            {
                "ok": self.ok,
                "trajectories": self.trajectories,
                "rows": self.rows,
                "refused": dict(self.refused),
                "trained_tokens": dict(self.trained),
                "read_tokens": dict(self.read),
                "turns": self.turns,
                "stop_tokens": self.stop_tokens,
                "failures": [{"key": failure.key, "problem": failure.problem} for failure in self.failures],
            }
        )


def audit(
    trajectories: Iterable[Trajectory],
    tokenizer: Any,
    *,
    max_row_tokens: int,
    system_prompt: str | None = None,
    samples: int = 2,
) -> AuditReport:
    """Check every row that the learner would make of `trajectories`, all spans weighing 1. Raises `RenderingError`."""
    maker = ExampleMaker(tokenizer, max_row_tokens=max_row_tokens, system_prompt=system_prompt)
    report = AuditReport()
    planned: list[Example] = []
    for trajectory in trajectories:
        report.trajectories += 1
        made = maker.make(trajectory)
        if isinstance(made, RefusedRow):
            report.refused[made.reason.value] += 1
            continue
        report.rows += 1
        if len(report.samples) < samples:
            report.samples.append(made)
        report.failures.extend(check_row(made, maker.messages(trajectory), maker))
        _count(made, maker, report)
        planned.append(made)
        if len(planned) == PLANNED_ROWS:
            report.failures.extend(_check_plans(planned, max_row_tokens))
            planned = []
    report.failures.extend(_check_plans(planned, max_row_tokens))
    return report


def check_row(example: Example, messages: list[Message], maker: ExampleMaker) -> Iterator[AuditFailure]:
    """What is wrong with one row of the conversation `messages`."""

    def failure(problem: str) -> AuditFailure:
        return AuditFailure(key=example.key, problem=problem)

    renderer, ids = maker.renderer, example.token_ids
    tokenizer, stop = renderer.tokenizer, renderer.stop_token
    conversation = [{"role": message.role, "content": message.content} for message in messages]
    text = tokenizer.apply_chat_template(conversation, tokenize=False, add_generation_prompt=False, return_dict=False)
    if not text.startswith(_decode(tokenizer, ids)):
        yield failure("the row does not decode to the chat template's text of the conversation")
    trained = np.asarray(example.loss_weights) > 0
    seen = np.zeros(len(ids), dtype=bool)
    for i, message in enumerate(messages):
        if message.role != "assistant":
            continue
        prompt = renderer.prompt(messages[:i])
        if ids[: len(prompt)] != prompt:
            yield failure(f"the prompt before message {i} is no prefix of the row")
            return
        end = _turn_end(ids, len(prompt), renderer.stop_token_id)
        if end is None or _decode(tokenizer, ids[len(prompt) : end]) != message.content + stop:
            yield failure(f"message {i} is not what the row has behind its prompt, or has no stop token")
            return
        if not trained[len(prompt) : end].all():
            where = len(prompt) + int(np.argmin(trained[len(prompt) : end]))
            what = "its stop token" if where == end - 1 else repr(_decode(tokenizer, ids[where : where + 1]))
            yield failure(f"message {i}: {what} is not trained")
        problem = _span_problem(tokenizer, example, len(prompt), end - 1, message)
        if problem:
            yield failure(f"message {i}: {problem}")
        seen[len(prompt) : end] = True
    outside = np.flatnonzero(trained & ~seen)
    if outside.size:
        at = int(outside[0])
        token = _decode(tokenizer, ids[at : at + 1])
        yield failure(f"{outside.size} tokens outside the assistant's turns are trained, first {token!r} at {at}")


def _turn_end(ids: tuple[int, ...], start: int, stop_id: int) -> int | None:
    """Behind the first stop token from `start` on."""
    try:
        return ids.index(stop_id, start) + 1
    except ValueError:
        return None


def _span_problem(tokenizer: Any, example: Example, start: int, end: int, message: Message) -> str | None:
    """Whether each token of a turn is counted as a span that it lies in, by the characters it decodes to."""
    spans = message.spans or (Span(type=SpanType.FORMAT, start=0, end=len(message.content)),)
    before = 0
    for j in range(start, end):
        after = len(_decode(tokenizer, example.token_ids[start : j + 1]))
        types = {span.type for span in spans if span.start < max(after, before + 1) and span.end > before}
        if example.span_types[j] not in types and after > before:
            token = _decode(tokenizer, example.token_ids[j : j + 1])
            return f"token {token!r} is counted as {example.span_types[j].value}, but lies in {sorted(types)}"
        before = after
    if example.span_types[end] is not SpanType.FORMAT:
        return f"the stop token is counted as {example.span_types[end].value}"
    return None


def _check_plans(examples: list[Example], row_tokens: int) -> Iterator[AuditFailure]:
    """Every trained token is a target once, where its own prefix precedes it, in both ways of batching."""
    if not examples:
        return
    wanted: Counter[int] = Counter()
    for example in examples:
        chain = _chain(example.token_ids, starts=())
        wanted.update(chain[j] for j, weight in enumerate(example.loss_weights) if weight > 0)
    ways: tuple[Literal["bucketed", "packed"], ...] = ("bucketed", "packed")
    for batching in ways:
        plan = plan_step(examples, ranks=2, micro_batch_tokens=4 * row_tokens, row_tokens=row_tokens, batching=batching)
        got: Counter[int] = Counter()
        for batch in (batch for rank in plan.ranks for batch in rank):
            rows, width = batch.input_ids.shape
            chains = []
            for r in range(rows):
                starts = () if batch.position_ids is None else np.flatnonzero(batch.position_ids[r] == 0).tolist()
                chains.append(_chain(batch.input_ids[r].tolist(), starts))
            for at, target, weight in zip(batch.selected, batch.targets, batch.weights, strict=True):
                if weight > 0:
                    row, column = divmod(int(at), width)
                    got[hash((chains[row][column], int(target)))] += 1
        lost, extra = (wanted - got).total(), (got - wanted).total()
        if lost or extra:
            yield AuditFailure(
                key=examples[0].key,
                problem=f"{batching} batches of {len(examples)} rows from here on: {lost} trained tokens are missing "
                f"or behind another prefix, {extra} are too many",
            )


def _chain(ids: Iterable[int], starts: Iterable[int]) -> list[int]:
    """For each position the hash of the ids up to it, from the last of `starts` (or the beginning) on."""
    chain, beginnings, value = [], set(starts), 0
    for i, token in enumerate(ids):
        value = hash((0 if i in beginnings else value, token))
        chain.append(value)
    return chain


def _count(example: Example, maker: ExampleMaker, report: AuditReport) -> None:
    stop = maker.renderer.stop_token_id
    for token, span, weight in zip(example.token_ids, example.span_types, example.loss_weights, strict=True):
        if weight > 0:
            report.trained[span.value] += 1
            report.stop_tokens += token == stop
        else:
            report.read[span.value] += 1
    starts = zip((0.0, *example.loss_weights), example.loss_weights, strict=False)
    report.turns += sum(before == 0 and weight > 0 for before, weight in starts)
    unknown = set(report.trained) - {span.value for span in TRAINED_SPANS}
    if unknown:
        report.failures.append(AuditFailure(key=example.key, problem=f"trains on {sorted(unknown)}"))


def _decode(tokenizer: Any, ids: Iterable[int]) -> str:
    return tokenizer.decode(list(ids), skip_special_tokens=False, clean_up_tokenization_spaces=False)
