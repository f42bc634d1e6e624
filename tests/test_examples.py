"""learner.examples and learner.audit: masks are exact, and whatever cannot be proven is refused with its reason."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
from learner_samples import TOKENIZER, trajectory, turn

from envs.base import ObservationKind
from learner.audit import audit, check_row
from learner.examples import TRAINED_SPANS, Example, ExampleMaker, Refusal, RefusedRow
from rollout.trajectory import Span, SpanType, Step, Trajectory


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(TOKENIZER)


@pytest.fixture(scope="module")
def maker(tokenizer: Any) -> ExampleMaker:
    return ExampleMaker(tokenizer, max_row_tokens=1024)


def example_of(maker: ExampleMaker, of: Trajectory) -> Example:
    made = maker.make(of)
    assert isinstance(made, Example), made
    return made


def refusal_of(maker: ExampleMaker, of: Trajectory) -> Refusal:
    made = maker.make(of)
    assert isinstance(made, RefusedRow), made
    return made.reason


def with_first_step(of: Trajectory, **changes: Any) -> Trajectory:
    return dataclasses.replace(of, steps=(dataclasses.replace(of.steps[0], **changes), *of.steps[1:]))


def with_completion(of: Trajectory, **changes: Any) -> Trajectory:
    return with_first_step(of, completion=dataclasses.replace(of.steps[0].completion, **changes))


def test_trained_tokens_are_the_assistants_text_and_stop_tokens(maker: ExampleMaker) -> None:
    one = trajectory(1, system_prompt="Be brief.")
    made = example_of(maker, one)
    trained = [i for i, weight in zip(made.token_ids, made.loss_weights, strict=True) if weight]
    said = "".join(step.completion.text + maker.renderer.stop_token for step in one.steps)
    assert maker.renderer.tokenizer.decode(trained) == said


def test_stop_tokens_of_the_user_and_system_turns_are_not_trained(maker: ExampleMaker) -> None:
    made = example_of(maker, trajectory(1, system_prompt="Be brief."))
    stops = [w for i, w in zip(made.token_ids, made.loss_weights, strict=True) if i == maker.renderer.stop_token_id]
    assert stops == [0.0, 0.0, 1.0, 0.0, 1.0]  # system, question, turn, observation, turn


def test_every_trained_token_has_a_trained_span_type(maker: ExampleMaker) -> None:
    made = example_of(maker, trajectory(2))
    types = {span for span, weight in zip(made.span_types, made.loss_weights, strict=True) if weight}
    assert types == {SpanType.THOUGHT, SpanType.CODE, SpanType.FORMAT} and types <= set(TRAINED_SPANS)


def test_span_weights_scale_their_tokens_alone(tokenizer: Any) -> None:
    made = example_of(ExampleMaker(tokenizer, max_row_tokens=1024, span_weights={"code": 0.5}), trajectory(1))
    weights = {(span, weight) for span, weight in zip(made.span_types, made.loss_weights, strict=True) if weight}
    assert weights == {(SpanType.CODE, 0.5), (SpanType.THOUGHT, 1.0), (SpanType.FORMAT, 1.0)}


def test_the_students_system_prompt_replaces_or_removes_the_teachers(tokenizer: Any) -> None:
    one = trajectory(1, system_prompt="You are a very large model.")
    own = ExampleMaker(tokenizer, max_row_tokens=1024, system_prompt="Act.")
    none = ExampleMaker(tokenizer, max_row_tokens=1024, system_prompt="")
    assert tokenizer.decode(example_of(own, one).token_ids).startswith("<|im_start|>system\nAct.<|im_end|>")
    assert tokenizer.decode(example_of(none, one).token_ids).startswith("<|im_start|>user\nA farm has")


def test_sampled_ids_of_this_tokenizer_are_kept(maker: ExampleMaker) -> None:
    one = trajectory(1)
    text = one.steps[0].completion.text
    ids = [i for character in text for i in maker.renderer.tokenizer(character, add_special_tokens=False)["input_ids"]]
    made = example_of(maker, with_completion(one, token_ids=(*ids, maker.renderer.stop_token_id)))
    assert len(made) > len(example_of(maker, one))
    assert ",".join(map(str, ids)) in ",".join(map(str, made.token_ids))


def test_ids_without_a_stop_token_get_one_that_is_trained(maker: ExampleMaker) -> None:
    one = trajectory(1)
    ids = tuple(maker.renderer.tokenizer(one.steps[0].completion.text, add_special_tokens=False)["input_ids"])
    assert example_of(maker, with_completion(one, token_ids=ids)) == example_of(maker, one)


def test_ids_of_another_tokenizer_are_replaced_by_the_texts(maker: ExampleMaker) -> None:
    one = trajectory(1)
    foreign = (151_644, 7, 9, 151_645)
    assert example_of(maker, with_completion(one, token_ids=foreign)) == example_of(maker, one)


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (lambda one: dataclasses.replace(one, success=False), Refusal.NOT_TRAINABLE),
        (lambda one: with_first_step(one, observation_kind=ObservationKind.PARSE_ERROR), Refusal.NOT_TRAINABLE),
        (lambda one: dataclasses.replace(one, steps=()), Refusal.EMPTY),
        (lambda one: with_completion(one, finish_reason="length"), Refusal.CUT_OFF),
        (lambda one: with_first_step(one, spans=one.steps[0].spans[:-1]), Refusal.SPANS),
        (lambda one: with_first_step(one, spans=one.steps[0].spans[1:]), Refusal.SPANS),
        (
            lambda one: with_first_step(one, spans=(Span(type=SpanType.OBSERVATION, start=0, end=len(text_of(one))),)),
            Refusal.SPANS,
        ),
    ],
)
def test_what_cannot_be_masked_exactly_is_refused(maker: ExampleMaker, make: Any, reason: Refusal) -> None:
    assert refusal_of(maker, make(trajectory(3))) == reason


def text_of(one: Trajectory) -> str:
    return one.steps[0].completion.text


def test_too_long_and_weightless_rows_are_refused(tokenizer: Any) -> None:
    assert refusal_of(ExampleMaker(tokenizer, max_row_tokens=64), trajectory(1)) == Refusal.TOO_LONG
    silent = {span.value: 0.0 for span in TRAINED_SPANS}
    nothing = ExampleMaker(tokenizer, max_row_tokens=1024, span_weights=silent)
    assert refusal_of(nothing, trajectory(1)) == Refusal.NO_WEIGHT


def test_a_turn_that_spells_the_stop_token_never_trains_it_in_the_middle(maker: ExampleMaker) -> None:
    one = trajectory(1)
    step: Step = turn("Say <|im_end|> now.", "print(1)", "Observation:\n1")
    made = maker.make(dataclasses.replace(one, steps=(step, *one.steps[1:])))
    if isinstance(made, Example):
        stop = maker.renderer.stop_token_id
        assert sum(i == stop for i, w in zip(made.token_ids, made.loss_weights, strict=True) if w) == 2
    else:
        assert made.reason in (Refusal.RENDERING, Refusal.MASK)


def test_audit_proves_good_rows_and_counts_them(tokenizer: Any) -> None:
    rows = [trajectory(i, system_prompt="Be brief." if i % 2 else "") for i in range(8)]
    report = audit([*rows, trajectory(9, success=False)], tokenizer, max_row_tokens=1024)
    assert report.ok, report.failures
    assert (report.rows, report.turns, report.stop_tokens) == (8, 16, 16)
    assert report.refused == {"not_trainable": 1}
    assert report.trained["observation"] == report.trained["user"] == report.trained["system"] == 0


def test_audit_of_nothing_is_not_ok(tokenizer: Any) -> None:
    assert not audit([trajectory(1, success=False)], tokenizer, max_row_tokens=1024).ok


def shifted(made: Example, by: int) -> Example:
    weights = made.loss_weights
    return dataclasses.replace(made, loss_weights=(*weights[-by:], *weights[:-by]) if by else weights)


@pytest.mark.parametrize(
    ("break_it", "said"),
    [
        (lambda made: shifted(made, 1), "not trained"),
        (lambda made: dataclasses.replace(made, loss_weights=(1.0,) * len(made)), "outside the assistant's turns"),
        (lambda made: dataclasses.replace(made, loss_weights=(*made.loss_weights[:-1], 0.0)), "its stop token"),
        (lambda made: dataclasses.replace(made, token_ids=(*made.token_ids[:-1], 17)), "stop token"),
        (lambda made: dataclasses.replace(made, token_ids=(17, *made.token_ids[1:])), "no prefix"),
        (
            lambda made: dataclasses.replace(
                made, span_types=tuple(SpanType.CODE if s is SpanType.THOUGHT else s for s in made.span_types)
            ),
            "is counted as code",
        ),
    ],
)
def test_audit_finds_a_wrong_mask(maker: ExampleMaker, break_it: Any, said: str) -> None:
    one = trajectory(4)
    made = example_of(maker, one)
    assert not list(check_row(made, maker.messages(one), maker))
    problems = [failure.problem for failure in check_row(break_it(made), maker.messages(one), maker)]
    assert any(said in problem for problem in problems), problems


def test_audit_command_reads_a_ledger_and_exits_with_its_verdict(
    tmp_path: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    from launch.audit import main
    from rollout.ledger import LedgerWriter

    LedgerWriter(tmp_path / "good", writer="a").append([trajectory(i) for i in range(3)])
    LedgerWriter(tmp_path / "bad", writer="a").append([trajectory(1, success=False)])
    assert main([str(tmp_path / "good"), "--tokenizer", str(TOKENIZER), "--rows", "1"]) == 0
    assert "Every mask is proven" in capsys.readouterr().out
    assert main([str(tmp_path / "bad"), "--tokenizer", str(TOKENIZER)]) == 1
    assert main([str(tmp_path / "none"), "--tokenizer", str(TOKENIZER)]) == 1
