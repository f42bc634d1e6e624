"""What is claimed of training rows, and how each claim is checked: `Claim`, `check_row`, `check_batches`.

A check takes the finished row apart again. It uses the chat template as it is (not its pieces), the tokenizer's decoder
(not its encoder), and the texts and spans of the trajectory.

Example::

    failures = list(check_row(example, maker.messages(trajectory), maker))
    failures[0].claim, failures[0].problem      # (Claim.STOPS, "message 2: its stop token is not trained")
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import Any, Literal

import numpy as np

from learner.examples import Example, ExampleMaker
from learner.packing import StepPlan, plan_step
from rollout.rendering import decoded_ends
from rollout.trajectory import Message, Span, SpanType


class Claim(StrEnum):
    """What an audit proves."""

    TEXT = "rows decode to the chat template's text"
    PREFIXES = "the prompt before each turn is a token prefix of its row"
    STOPS = "stop tokens are trained"
    READ = "no observation, question or system token is trained"
    COVERED = "every assistant token is covered once"
    TYPES = "each token lies in the span that it is counted as"
    WEIGHTS = "weights add up"
    BATCHES = "in batches each trained token is a target once, behind its own prefix"


@dataclass(frozen=True, slots=True, kw_only=True)
class AuditFailure:
    """A mask that is wrong."""

    key: str
    """The trajectory's."""
    claim: Claim
    problem: str


def check_row(example: Example, messages: list[Message], maker: ExampleMaker) -> Iterator[AuditFailure]:
    """What is wrong with one row of the conversation `messages`."""

    def failure(claim: Claim, problem: str) -> AuditFailure:
        return AuditFailure(key=example.key, claim=claim, problem=problem)

    renderer, ids, weights = maker.renderer, example.token_ids, example.loss_weights
    tokenizer, stop = renderer.tokenizer, renderer.stop_token
    if not len(ids) == len(weights) == len(example.span_types) == len(example.turns):
        yield failure(Claim.COVERED, "ids, span types, weights and turns are not of the same length")
        return
    if not _is_template_text(tokenizer, ids, messages):
        yield failure(Claim.TEXT, "the row does not decode to the chat template's text of the conversation")
    turn_of = [-1] * len(ids)
    turn = -1
    for i, message in enumerate(messages):
        if message.role != "assistant":
            continue
        turn += 1
        prompt = renderer.prompt(messages[:i])
        start = len(prompt)
        if ids[:start] != prompt:
            yield failure(Claim.PREFIXES, f"the prompt before message {i} is no prefix of the row")
            return
        end = _turn_end(ids, start, renderer.stop_token_id)
        if end is None or decode(tokenizer, ids[start:end]) != message.content + stop:
            yield failure(Claim.COVERED, f"message {i} is not what the row has behind its prompt, or has no stop token")
            return
        turn_of[start:end] = [turn] * (end - start)
        if weights[end - 1] <= 0:
            yield failure(Claim.STOPS, f"message {i}: its stop token is not trained")
        problem = _weight_problem(tokenizer, example, start, end - 1, maker)
        if problem:
            yield failure(Claim.WEIGHTS, f"message {i}: {problem}")
        problem = _span_problem(tokenizer, example, start, end - 1, message)
        if problem:
            yield failure(Claim.TYPES, f"message {i}: {problem}")
    outside = [j for j, (weight, of) in enumerate(zip(weights, turn_of, strict=True)) if weight != 0 and of < 0]
    if outside:
        token = decode(tokenizer, ids[outside[0] : outside[0] + 1])
        yield failure(
            Claim.READ,
            f"{len(outside)} tokens outside the assistant's turns are trained, first {token!r} at {outside[0]}",
        )
    if tuple(turn_of) != example.turns:
        at = next(j for j, (a, b) in enumerate(zip(turn_of, example.turns, strict=True)) if a != b)
        yield failure(Claim.COVERED, f"token {at} is counted to turn {example.turns[at]}, it is of {turn_of[at]}")


def _is_template_text(tokenizer: Any, ids: Sequence[int], messages: list[Message]) -> bool:
    """Whether the ids are the template's text of the conversation, up to what may follow the last stop token.

    Assistant turns are put in afterwards, as they were produced: a template may trim what it shows of them.
    """
    marks = {f"turn{i}of{len(messages)}{'x' * 16}": m.content for i, m in enumerate(messages) if m.role == "assistant"}
    said = iter(marks)
    shown = [
        {"role": message.role, "content": next(said) if message.role == "assistant" else message.content}
        for message in messages
    ]
    text = tokenizer.apply_chat_template(shown, tokenize=False, add_generation_prompt=False, return_dict=False)
    # A tokenizer may change what is read before it sees it, as Qwen's does (Unicode's form C).
    normalizer = getattr(getattr(tokenizer, "backend_tokenizer", None), "normalizer", None)
    texts = [text] if normalizer is None else [text, normalizer.normalize_str(text)]
    row = decode(tokenizer, ids)
    return any(_with_contents(text, marks).startswith(row) for text in texts)


def _with_contents(text: str, marks: dict[str, str]) -> str:
    """`text` with each mark replaced by its content; "" when one is not there."""
    whole: list[str] = []
    for mark, content in marks.items():
        before, found, text = text.partition(mark)
        if not found:
            return ""
        whole += [before, content]
    return "".join([*whole, text])


def _turn_end(ids: tuple[int, ...], start: int, stop_id: int) -> int | None:
    """Behind the first stop token from `start` on."""
    try:
        return ids.index(stop_id, start) + 1
    except ValueError:
        return None


def _weight_problem(tokenizer: Any, example: Example, start: int, end: int, maker: ExampleMaker) -> str | None:
    """Whether each token of a turn weighs what its span weighs."""
    for j in range(start, end):
        span, weight = example.span_types[j], example.loss_weights[j]
        wanted = maker.weights.get(span, 0.0)
        if weight != wanted:
            token = repr(decode(tokenizer, example.token_ids[j : j + 1]))
            return f"{token} is not trained" if weight == 0 else f"{token} weighs {weight}, a {span} token {wanted}"
    return None


def _span_problem(tokenizer: Any, example: Example, start: int, end: int, message: Message) -> str | None:
    """Whether each token of a turn is counted as a span that it lies in, by the characters it decodes to."""
    spans = message.spans or (Span(type=SpanType.FORMAT, start=0, end=len(message.content)),)
    before = 0
    for j, after in enumerate(decoded_ends(tokenizer, example.token_ids[start:end]), start):
        first = before if after > before else max(0, after - 1)  # some tokens end no character: they are part of one
        types = {span.type for span in spans if span.start < max(after, first + 1) and span.end > first}
        if example.span_types[j] not in types:
            token = decode(tokenizer, example.token_ids[j : j + 1])
            return f"token {token!r} is counted as {example.span_types[j]}, but lies in {sorted(types)}"
        before = after
    if example.span_types[end] is not SpanType.FORMAT:
        return f"the stop token is counted as {example.span_types[end]}"
    return None


def check_batches(
    examples: list[Example], row_tokens: int, planner: Callable[..., StepPlan] = plan_step
) -> Iterator[AuditFailure]:
    """Every trained token is a target once, where its own prefix precedes it, and weighs the same, in both ways of
    batching."""
    if not examples:
        return
    wanted: Counter[int] = Counter()
    for example in examples:
        chain = _chain(example.token_ids, starts=())
        wanted.update(chain[j] for j, weight in enumerate(example.loss_weights) if weight > 0)
    total = math.fsum(weight for example in examples for weight in example.loss_weights)
    ways: tuple[Literal["bucketed", "packed"], ...] = ("bucketed", "packed")
    for batching in ways:
        plan = planner(examples, ranks=2, micro_batch_tokens=4 * row_tokens, row_tokens=row_tokens, batching=batching)
        where = f"{batching} batches of {len(examples)} rows from here on"
        got: Counter[int] = Counter()
        weight_sum = 0.0
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
                    weight_sum += float(weight)
        lost, extra = (wanted - got).total(), (got - wanted).total()
        if lost or extra:
            yield AuditFailure(
                key=examples[0].key,
                claim=Claim.BATCHES,
                problem=f"{where}: {lost} trained tokens are missing or behind another prefix, {extra} are too many",
            )
        if not (math.isclose(weight_sum, total, rel_tol=1e-5) and math.isclose(plan.total_weight, total)):
            yield AuditFailure(
                key=examples[0].key,
                claim=Claim.WEIGHTS,
                problem=f"{where}: targets weigh {weight_sum:g}, the step {plan.total_weight:g}, the rows {total:g}",
            )


def _chain(ids: Iterable[int], starts: Iterable[int]) -> list[int]:
    """For each position the hash of the ids up to it, from the last of `starts` (or the beginning) on."""
    chain, beginnings, value = [], set(starts), 0
    for i, token in enumerate(ids):
        value = hash((0 if i in beginnings else value, token))
        chain.append(value)
    return chain


def decode(tokenizer: Any, ids: Iterable[int]) -> str:
    """The ids' text, special tokens included, nothing tidied up."""
    return tokenizer.decode(list(ids), skip_special_tokens=False, clean_up_tokenization_spaces=False)
