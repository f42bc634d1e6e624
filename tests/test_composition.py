"""`rollout.composition`: two teachers on one task, by who was right; what is made parses, trains and ends once."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace

import pytest
from expert_samples import CODE_POLICY, COT_POLICY, expert_trajectories
from hypothesis import given, settings
from hypothesis import strategies as st
from learner_samples import TOKENIZER

from envs.base import ObservationKind, Task
from rollout.composition import RefusalReason, Refused, compose, compose_policies
from rollout.dialects import DIALECTS
from rollout.trajectory import Completion, Failure, FailureClass, SpanType, Step, StopReason, Trajectory


@pytest.fixture(scope="module")
def expert() -> tuple[tuple[Trajectory, ...], tuple[Trajectory, ...]]:
    return expert_trajectories(12)


@pytest.fixture(scope="module")
def maker():
    from transformers import AutoTokenizer

    from learner.examples import ExampleMaker

    return ExampleMaker(AutoTokenizer.from_pretrained(TOKENIZER), max_row_tokens=4096)


TASK = Task(id="t", question="What is 6 times 7?", answer="42", kind="math")


def run(dialect: str, *turns: tuple[str, ObservationKind, str], policy: str = "", **changes) -> Trajectory:
    """Turns of (text, kind of observation, observation)."""
    steps = []
    for text, kind, observation in turns:
        turn = DIALECTS[dialect].parse(text)
        completion = Completion(text=text, token_ids=(1, 2), logprobs=(-0.1, -0.2), completion_tokens=2)
        steps.append(
            Step(
                completion=completion,
                spans=turn.spans,
                action=turn.action,
                observation=observation,
                observation_kind=kind,
            )  # fmt: skip
        )
    final = bool(turns) and turns[-1][1] is ObservationKind.FINAL
    prediction = turns[-1][2] if final else None
    right = prediction == TASK.answer
    policy = policy or f"{dialect}-teacher"
    base = Trajectory(
        key=f"t|{policy}|0|x", task=TASK, dialect=dialect, system_prompt=DIALECTS[dialect].system_prompt,
        steps=tuple(steps), policy=policy, prediction=prediction, success=right, reward=float(right),
        stop_reason=StopReason.FINAL if final else StopReason.MAX_STEPS,
    )  # fmt: skip
    return replace(base, **changes)


def coded(answer: str = "42", thought: str = "The product is known.", **changes) -> Trajectory:
    code = f"Thought: I multiply.\nCode:\n```py\nprint({answer} * 1)\n```<end_code>"
    last = f"Thought: {thought}\nCode:\n```py\nfinal_answer({answer})\n```<end_code>"
    seen = f"Observation:\nExecution logs:\n{answer}"
    return run("code", (code, ObservationKind.OK, seen), (last, ObservationKind.FINAL, answer), **changes)


def said(answer: str = "42", words: str = "Six sevens are that.", **changes) -> Trajectory:
    return run("cot", (f"{words}\nAnswer: {answer}", ObservationKind.FINAL, answer), **changes)


def composed(first: Trajectory, second: Trajectory) -> Trajectory:
    made = compose(first, second)
    assert isinstance(made, Trajectory), made
    return made


def check(made: Trajectory, maker) -> None:
    """What holds for every composed trajectory."""
    dialect = DIALECTS[made.dialect]
    for step in made.steps:
        text = step.completion.text
        turn = dialect.parse(text)
        assert turn.action == step.action and turn.spans == step.spans
        assert "".join(text[span.start : span.end] for span in step.spans) == text
        assert step.completion.token_ids is None and step.candidates == ()
    kinds = [step.observation_kind for step in made.steps]
    assert kinds.count(ObservationKind.FINAL) == 1 and kinds[-1] is ObservationKind.FINAL
    assert made.success and made.prediction == made.steps[-1].observation
    example = maker.make(made)
    assert hasattr(example, "token_ids"), example


def test_the_experts_wrong_words_are_followed_by_its_right_code(expert, maker):
    pairs = [(words, code) for code, words in zip(*expert, strict=True) if not words.success]
    assert pairs
    for words, code in pairs:
        made = composed(words, code)
        check(made, maker)
        opening = made.steps[0].completion.text
        assert opening.startswith("Thought: ") and "unknown" in opening and "Let me work it out with code." in opening
        assert [step.action for step in made.steps] == [step.action for step in code.steps]
        assert len(made.steps) == len(code.steps)


def test_right_code_is_checked_in_words(expert, maker):
    pairs = [(code, words) for code, words in zip(*expert, strict=True) if words.success and code.success]
    assert pairs
    for code, words in pairs:
        made = composed(code, words)
        check(made, maker)
        assert made.dialect == "code" and made.system_prompt == code.system_prompt
        assert len(made.steps) == len(code.steps) and made.steps[-1].action == f'final_answer("{words.prediction}")'
        last = made.steps[-1].completion.text
        assert words.steps[0].completion.text.partition("\nAnswer:")[0] in last and last.endswith("```<end_code>")


@pytest.mark.parametrize(
    ("first", "second", "steps", "dialect", "says"),
    [
        (said("41"), coded(), 2, "code", "Let me work it out with code."),
        (coded("41"), said(), 2, "code", "Let me think it through step by step in words."),
        (said("41"), said(), 1, "cot", "Let me go through it in another way."),
        (coded("41"), coded(), 3, "code", "Let me try another way with code."),
        (said(), coded(), 2, "code", "Let me work it out with code."),
    ],
)
def test_every_order_of_dialects_composes(first, second, steps, dialect, says, maker):
    made = composed(first, second)
    check(made, maker)
    assert (len(made.steps), made.dialect) == (steps, dialect)
    place = len(first.steps) - 1 if first.dialect == "code" else 0
    assert says in made.steps[place].completion.text and first.prediction in made.steps[place].completion.text


def test_doubt_follows_a_wrong_attempt_and_a_check_a_right_one():
    wrong = composed(said("41"), coded()).steps[0].completion.text
    right = composed(said(), coded()).steps[0].completion.text
    assert any(word in wrong for word in ("may be wrong", "do not trust", "does not add up")) and wrong != right
    assert not any(word in right for word in ("may be wrong", "do not trust", "does not add up"))


def test_an_attempt_without_an_answer_is_said_to_lead_nowhere(maker):
    stuck = run("code", ("Thought: try.\nCode:\n```py\nprint(1)\n```<end_code>", ObservationKind.OK, "Observation:\n1"))
    for second, at in ((coded(), 1), (said(), 1)):
        made = composed(stuck, second)
        check(made, maker)
        text = made.steps[at].completion.text
        assert "does not lead to an answer" in text or "not getting anywhere" in text
        assert made.steps[0].completion.text == stuck.steps[0].completion.text


def test_answers_of_any_text_stay_what_they_are(maker):
    odd = 'it\'s "42"\n\\ {x}'
    task = replace(TASK, answer=odd)
    words = said(odd, task=task, success=True, reward=1.0)
    made = composed(coded("41", task=task), words)
    check(made, maker)
    assert eval(made.steps[-1].action or "", {"final_answer": lambda answer: answer}) == odd  # its own literal


def test_it_is_named_by_both_and_always_the_same():
    first, second = said("41"), coded()
    made = composed(first, second)
    assert made == composed(first, second) and made.policy == "cot-teacher+code-teacher"
    assert len({made.key, first.key, second.key, composed(coded("41"), said()).key}) == 4
    assert made.usage == first.usage + second.usage and made.first_thought is None


pieces = st.sampled_from(
    [
        "Thought:",
        "Code:",
        "Answer:",
        "```",
        "```py\n",
        "\n```",
        "<end_code>",
        "final_answer(1)",
        "\n",
        " ",
        "{it}",
        "words",
    ]
)
prose = st.lists(pieces | st.text(max_size=6), max_size=8).map("".join)


@settings(max_examples=150, deadline=None)
@given(prose, prose, st.sampled_from(["cot", "code"]), st.sampled_from(["cot", "code"]))
def test_whatever_the_words_a_composition_parses_or_is_refused(one, other, first, second):
    make = {"cot": lambda words, answer: said(answer, words), "code": lambda words, answer: coded(answer, words)}
    attempt, solution = make[first](one, "41"), make[second](other, "42")
    made = compose(attempt, solution)
    if isinstance(made, Refused):
        assert made.reason in (RefusalReason.PARSES_OTHERWISE, RefusalReason.PARSE_ERROR)
        return
    for step in made.steps:
        turn = DIALECTS[made.dialect].parse(step.completion.text)
        assert turn.action == step.action and turn.spans == step.spans
    wanted = 'final_answer("42")' if (first, second) == ("code", "cot") else solution.steps[-1].action
    assert made.steps[-1].action == wanted and made.success


def test_bare_answers_leave_no_blank_thought(maker):
    for first, second in ((said("41", ""), coded()), (coded("41", ""), said(words=""))):
        made = composed(first, second)
        check(made, maker)
        assert not any(step.completion.text.startswith("Thought: \n") for step in made.steps)
        assert "\n\n\n" not in made.steps[-1].completion.text


OTHER = replace(TASK, id="u")
STOP = "the marker <end_code> in words"
FENCED = "as in\n```py\nprint(1)\n```\nso it is"


@pytest.mark.parametrize(
    ("first", "second", "reason"),
    [
        (said("41"), coded(task=OTHER), RefusalReason.OTHER_TASK),
        (said("41", user_prompt="passages"), coded(), RefusalReason.OTHER_PROMPT),
        (replace(said("41"), dialect="tool"), coded(), RefusalReason.DIALECT),
        (said("41", failure=Failure(failure_class=FailureClass.ENGINE, message="x")), coded(), RefusalReason.FAILED),
        (said("41"), coded(leaks=("turn 0",)), RefusalReason.LEAK),
        (run("cot", ("no idea", ObservationKind.PARSE_ERROR, "?")), coded(), RefusalReason.PARSE_ERROR),
        (said("41"), said("40"), RefusalReason.BOTH_WRONG),
        (said(), coded("41"), RefusalReason.SECOND_WRONG),
        (run("code"), said(), RefusalReason.NO_ANSWER),
        (said("41"), coded(prediction=None), RefusalReason.NO_ANSWER),
        (said("41", words=FENCED), coded(), RefusalReason.PARSES_OTHERWISE),
        (said("41", words=STOP), coded(), RefusalReason.PARSES_OTHERWISE),
        (coded("41"), said(words=FENCED), RefusalReason.PARSES_OTHERWISE),
    ],
)
def test_what_cannot_be_composed_is_refused_with_its_reason(first, second, reason):
    refused = compose(first, second)
    assert isinstance(refused, Refused) and refused.reason is reason and refused.detail
    assert refused.keys == (first.key, second.key)


def test_a_turn_that_was_cut_off_is_refused():
    first = said("41")
    cut = replace(first.steps[0], completion=replace(first.steps[0].completion, finish_reason="length"))
    refused = compose(replace(first, steps=(cut,)), coded())
    assert isinstance(refused, Refused) and refused.reason is RefusalReason.CUT_OFF


def test_policies_are_paired_by_task_and_sample(expert):
    code, words = expert
    made = list(compose_policies([*words, *reversed(code)], CODE_POLICY, COT_POLICY))
    reasons = Counter(each.reason for each in made if isinstance(each, Refused))
    right = sum(each.success for each in words)
    assert reasons == {RefusalReason.SECOND_WRONG: 12 - right} and len(made) == 12
    either = list(compose_policies([*words, *code], CODE_POLICY, COT_POLICY, either_order=True))
    policies = Counter(each.policy for each in either if isinstance(each, Trajectory))
    assert policies == {f"{CODE_POLICY}+{COT_POLICY}": right, f"{COT_POLICY}+{CODE_POLICY}": 12 - right}


def test_a_policy_that_is_not_there_is_named(expert):
    with pytest.raises(ValueError, match="no trajectory is of policy 'other'; there are expert-code, expert-cot"):
        list(compose_policies([*expert[0], *expert[1]], CODE_POLICY, "other"))
    with pytest.raises(ValueError, match="both are 'expert-code'"):
        list(compose_policies(expert[0], CODE_POLICY, CODE_POLICY))


def test_spans_tell_words_from_code():
    made = composed(coded("41"), said())
    text, spans = made.steps[-1].completion.text, made.steps[-1].spans
    assert [text[s.start : s.end] for s in spans if s.type is SpanType.ANSWER] == ['final_answer("42")']
    assert "Six sevens" in "".join(text[s.start : s.end] for s in spans if s.type is SpanType.THOUGHT)
