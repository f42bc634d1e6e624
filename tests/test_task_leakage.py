"""Train and test must not share questions, however they are written, and different questions stay different."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from envs.base import Task, TaskError
from envs.task_leakage import check_disjoint, overlaps, question_key, without_overlap


def task(name: str, question: str) -> Task:
    return Task(id=name, question=question, answer="1", kind="k")


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("What  is it?", "what is IT"),
        ("Who wrote 'The Iliad'?", "who wrote “Iliad” ?"),
        ("What is the capital of France?", "What is capital of France"),
        ("A state-of-the-art model?", "State of the art model"),
        ("How many of 1,000 are left?", "How many of 1000 are left?"),
        ("Is \N{LATIN SMALL LIGATURE FI}ne?", "is fine?"),
        ("Caf\u00e9 or Cafe\u0301?", "CAF\u00c9 or caf\u00e9"),
        ("What is 3 \N{MINUS SIGN} 2?", "What is 3 - 2"),
        ("Find  $x+1$.", "find $x+1$"),
        ("\u3000Where\u00a0now?", "Where now?"),
    ],
)
def test_the_same_question_is_seen(one, other):
    assert question_key(one) == question_key(other)


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("What is 3 - 2?", "What is 3 + 2?"),
        ("What is 32?", "What is 3.2?"),
        ("What is 3*2?", "What is 3/2?"),
        ("What is 3×2?", "What is 3÷2?"),
        ("Simplify $x-y$", "Simplify $x/y$"),
        ("Find $a + b$", "Find $b$"),
        ("Solve $(x+1)^2$", "Solve $x+1^2$"),
        ("Who was Ann?", "Who was Anna?"),
        ("?", "!"),
    ],
)
def test_different_questions_stay_different(one, other):
    assert question_key(one) != question_key(other)


@given(st.text())
def test_any_text_has_a_key_and_keys_are_stable(text):
    assert question_key(f"  {text} ") == question_key(text)


def test_a_shared_question_is_an_error_that_names_both_ids():
    train = [task("a", "What  is it?"), task("c", "Who?"), task("e", "Why?")]
    with pytest.raises(TaskError, match="'b' has the same question as training task 'a': train and test must share"):
        check_disjoint(train, [task("b", "what is IT?")])
    with pytest.raises(TaskError, match="; 1 more: 'c' and 'd'$"):
        check_disjoint(train, [task("b", "what is IT?"), task("d", "The who?")])


def test_different_splits_pass():
    check_disjoint([task("a", "What?")], [task("b", "Who?")])


@pytest.mark.parametrize("test", [[task("a", "Who?")], [task("b", "Who?"), task("b", "Why?")]])
def test_ids_must_differ_across_files(test):
    with pytest.raises(TaskError, match=r"id '[ab]' belongs to two tasks"):
        check_disjoint([task("a", "What?")], test)


def test_overlap_is_found_and_can_be_left_out():
    train, test = [task("a", "What?"), task("b", "Who?")], [task("c", "The what"), task("d", "When?")]
    assert overlaps(train, test) == [("a", "c")]
    assert [kept.id for kept in without_overlap(train, test)] == ["b"]
