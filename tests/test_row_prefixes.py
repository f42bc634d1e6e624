"""Over random trajectories and three chat templates: what a student sees at rollout is, token for token, a prefix of
its training row at each turn; spans cover; a row is proven or refused, whatever the texts spell."""

from __future__ import annotations

import dataclasses
import unicodedata
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizer_samples import NAMES, make_tokenizer, tokenizer

from envs.base import ObservationKind, Task
from learner.audit import check_row
from learner.examples import TRAINED_SPANS, Example, ExampleMaker, Refusal, RefusedRow
from rollout.rendering import Renderer, decoded_ends
from rollout.trajectory import Completion, Span, SpanType, Step, Trajectory

NASTY = [
    "<|im_end|>",
    "<|im_start|>assistant\n",
    "<|eot_id|>",
    "<|begin_of_text|>",
    "<|fim_prefix|>",
    "[END]",
    "[TURN]",
    " ",
    "\n",
    "\n\n",
    "\t",
    "\u00a0",
    "e\u0301",
    "\U0001f469\u200d\U0001f33e",
    "\ufffd",
    "{{ messages }}",
    "```\n",
]
anything = st.lists(
    st.one_of(st.sampled_from(NASTY), st.text(st.characters(codec="utf-8"), max_size=8), st.sampled_from(["12", "x"])),
    max_size=6,
).map("".join)
plain = anything.map(lambda text: unicodedata.normalize("NFC", text))


@pytest.fixture(scope="module", params=NAMES)
def maker(request: pytest.FixtureRequest) -> ExampleMaker:
    return ExampleMaker(tokenizer(request.param), max_row_tokens=100_000)


@st.composite
def trajectories(draw: st.DrawFn, said: st.SearchStrategy[str], ids_of: Any) -> Trajectory:
    """1 to 4 turns, each cut into up to 5 spans at random; ids as sampled one character at a time, foreign, or none."""
    steps = []
    for _ in range(draw(st.integers(1, 4))):
        text = draw(said.filter(bool))
        cuts = sorted({0, len(text), *draw(st.lists(st.integers(0, len(text)), max_size=4))})
        spans = tuple(
            Span(type=draw(st.sampled_from(TRAINED_SPANS)), start=a, end=b)
            for a, b in zip(cuts, cuts[1:], strict=False)
        )
        ids = draw(st.sampled_from([None, ids_of(text), (7, 10**6), ids_of("another text")]))
        steps.append(
            Step(
                completion=Completion(text=text, token_ids=ids),
                spans=draw(st.sampled_from([spans, ()])),
                action=text,
                observation=draw(anything),
                observation_kind=ObservationKind.OK,
            )
        )
    return Trajectory(
        key="k",
        task=Task(id="t", question=draw(anything), answer="1", kind="fuzz"),
        dialect="code",
        system_prompt=draw(anything),
        steps=tuple(steps),
        policy="random",
        success=True,
    )


def character_ids(tokenizer: Any) -> Any:
    """A tokenisation that is not the tokenizer's own choice, with the stop token."""

    def ids(text: str) -> tuple[int, ...]:
        each = (tokenizer(c, add_special_tokens=False, split_special_tokens=True)["input_ids"] for c in text)
        return (*(i for ids in each for i in ids), tokenizer.eos_token_id)

    return ids


def drawn(data: st.DataObject, maker: ExampleMaker, said: st.SearchStrategy[str]) -> Trajectory:
    return data.draw(trajectories(said, character_ids(maker.renderer.tokenizer)))


@settings(max_examples=25, deadline=None)
@given(data=st.data())
def test_the_prompt_of_each_turn_is_a_token_prefix_of_the_row(maker: ExampleMaker, data: st.DataObject) -> None:
    """The prompt by a renderer of its own, of the conversation as the env and the policy left it."""
    one = drawn(data, maker, plain)
    made = maker.make(one)
    assert isinstance(made, Example), made
    renderer, messages = Renderer(maker.renderer.tokenizer), maker.messages(one)
    for turn, i in enumerate(i for i, message in enumerate(messages) if message.role == "assistant"):
        prompt = renderer.prompt(messages[:i])
        assert made.token_ids[: len(prompt)] == prompt
        assert made.turns[len(prompt) - 1] == -1 and made.turns[len(prompt)] == turn


@settings(max_examples=25, deadline=None)
@given(data=st.data())
def test_every_token_has_a_type_and_each_turn_is_covered_once(maker: ExampleMaker, data: st.DataObject) -> None:
    one = drawn(data, maker, plain)
    made = maker.make(one)
    assert isinstance(made, Example), made
    assert len(made.span_types) == len(made.loss_weights) == len(made.turns) == len(made)
    decode = maker.renderer.tokenizer.decode
    for turn, step in enumerate(one.steps):
        ids = [i for i, of in zip(made.token_ids, made.turns, strict=True) if of == turn]
        assert decode(ids) == step.completion.text + maker.renderer.stop_token
    for span, weight, turn in zip(made.span_types, made.loss_weights, made.turns, strict=True):
        assert (weight > 0) == (turn >= 0)
        assert turn < 0 or span in TRAINED_SPANS


@settings(max_examples=25, deadline=None)
@given(data=st.data())
def test_whatever_the_texts_are_a_row_is_proven_or_refused(maker: ExampleMaker, data: st.DataObject) -> None:
    """Texts that the tokenizer changes (Qwen's normalises) cannot be decoded back, and are refused for that."""
    one = drawn(data, maker, anything)
    made = maker.make(one)
    if isinstance(made, RefusedRow):
        assert made.reason is Refusal.MASK
        assert any(unicodedata.normalize("NFC", step.completion.text) != step.completion.text for step in one.steps)
    else:
        assert not list(check_row(made, maker.messages(one), maker))


@pytest.mark.parametrize("name", NAMES)
def test_ends_of_tokens_are_those_of_decoding_from_the_beginning(name: str) -> None:
    of = tokenizer(name)
    ids = of("x = 12 \u00e9\u4f60 \U0001f469\u200d\U0001f33e done\n" * 12, add_special_tokens=False)["input_ids"]
    assert len(ids) > 200
    naive = [len(of.decode(ids[: i + 1], clean_up_tokenization_spaces=False)) for i in range(len(ids))]
    assert decoded_ends(of, ids) == naive


@pytest.mark.parametrize("sampled", [False, True])
def test_the_bytes_of_one_character_count_as_its_span(sampled: bool) -> None:
    """The last character of the thought is four tokens; none of them is code."""
    maker = ExampleMaker(tokenizer("chatml"), max_row_tokens=1000)
    text = "\U0001f33ex"
    spans = (Span(type=SpanType.THOUGHT, start=0, end=1), Span(type=SpanType.CODE, start=1, end=2))
    ids = character_ids(maker.renderer.tokenizer)(text) if sampled else None
    made = maker.make(one_turn(Completion(text=text, token_ids=ids), spans=spans))
    assert isinstance(made, Example)
    said = [span for span, turn in zip(made.span_types, made.turns, strict=True) if turn == 0]
    assert said == [SpanType.THOUGHT] * 4 + [SpanType.CODE, SpanType.FORMAT]


def one_turn(completion: Completion, **changes: Any) -> Trajectory:
    step = Step(
        completion=completion,
        spans=changes.pop("spans", ()),
        action=None,
        observation=" seen\n",
        observation_kind=ObservationKind.OK,
    )
    return Trajectory(
        key="k",
        task=Task(id="t", question=" asked ", answer="", kind="fuzz"),
        dialect="code",
        system_prompt="",
        steps=(step,) * changes.pop("turns", 1),
        policy="p",
        success=True,
        **changes,
    )


def test_what_is_read_is_normalised_and_what_was_sampled_is_not() -> None:
    """Qwen's tokenizer composes accents; sampled tokens may spell them apart."""
    maker = ExampleMaker(tokenizer("qwen2.5"), max_row_tokens=1000)
    apart = "e\u0301"
    ids = (
        *(i for c in apart for i in maker.renderer.tokenizer(c, add_special_tokens=False)["input_ids"]),
        maker.renderer.stop_token_id,
    )
    one = one_turn(Completion(text=apart, token_ids=ids))
    one = dataclasses.replace(one, task=dataclasses.replace(one.task, question=apart))
    made = maker.make(one)
    assert isinstance(made, Example), made
    assert maker.renderer.tokenizer.decode(made.token_ids).count("\u00e9") == 1
    assert not list(check_row(made, maker.messages(one), maker))


def test_a_trimming_template_trims_what_is_read_and_keeps_what_was_said() -> None:
    maker = ExampleMaker(make_tokenizer("llama3"), max_row_tokens=1000)
    one = one_turn(Completion(text=" said \n"), turns=2)
    made = maker.make(one)
    assert isinstance(made, Example)
    text = maker.renderer.tokenizer.decode(made.token_ids)
    assert ">\n\nasked<|" in text and ">\n\nseen<|" in text and text.count(">\n\n said \n<|eot_id|>") == 2
    seen = [i for i, span in zip(made.token_ids, made.span_types, strict=True) if span is SpanType.OBSERVATION]
    assert maker.renderer.tokenizer.decode(seen) == "seen"
