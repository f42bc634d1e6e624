"""Rows of task files are checked; graders that are pure functions agree with their definitions; Wilson intervals."""

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from envs.base import Task, TaskError
from envs.grading import grade, grade_many
from envs.tasks import load_tasks
from launch.evaluation.intervals import score


def write(path, *rows):
    path.write_text("\n".join(row if isinstance(row, str) else json.dumps(row) for row in rows))
    return path


def test_jsonl_rows_become_tasks(tmp_path):
    path = write(
        tmp_path / "a.jsonl",
        {"question": "q1", "answer": 4.5},
        "",
        {"id": "x", "question": "q2", "answer": "b", "level": 3},
    )
    first, second = load_tasks(path, kind="math", grader="numeric")
    assert (first.id, first.answer, first.kind, first.grader) == ("a-0", "4.5", "math", "numeric")
    assert second.id == "x" and second.metadata == {"level": 3}


def test_the_papers_files_load(tmp_path):
    path = tmp_path / "p.json"
    path.write_text(
        json.dumps({"metadata": {}, "examples": [{"id": 7, "question": "q", "answer": "a", "type": "bridge"}]})
    )
    [task] = load_tasks(path)
    assert task.id == "p-7" and task.metadata == {"type": "bridge"}


@pytest.mark.parametrize(
    ("row", "complaint"),
    [
        ('{"question": ', r":2: not JSON"),
        ("[1]", r":2: a task is a JSON object, not list"),
        ('{"answer": "a"}', r":2: 'question' must be a non-empty string, not missing; the columns are answer"),
        ('{"question": "q", "answer": ""}', r":2: 'answer' must be"),
        ('{"question": "q", "answer": true}', r":2: 'answer' must be"),
        ('{"question": "q", "answer": "a", "aliases": "b"}', r":2: 'aliases' must be a list of strings"),
        ('{"question": "q", "answer": "a", "grader": "vibes"}', r":2: grader 'vibes' is unknown; there are"),
        ('{"id": "bad-0", "question": "q", "answer": "a"}', r":2: id 'bad-0' was already used at .*:1"),
    ],
)
def test_a_bad_row_is_named_by_file_and_line(tmp_path, row, complaint):
    path = write(tmp_path / "bad.jsonl", {"question": "fine", "answer": "fine"}, row)
    with pytest.raises(TaskError, match=complaint):
        load_tasks(path)


def test_missing_and_empty_files_are_refused(tmp_path):
    with pytest.raises(TaskError, match="does not exist"):
        load_tasks(tmp_path / "none.jsonl")
    with pytest.raises(TaskError, match="holds no task"):
        load_tasks(write(tmp_path / "empty.jsonl", ""))


@pytest.mark.parametrize(
    ("grader", "answer", "prediction", "right"),
    [
        ("exact", "The Silver Harbor", "silver harbor!", True),
        ("exact", "Paris", "London", False),
        ("exact", "42", "42", True),
        ("exact", "42", "42.0", False),
        ("numeric", "42", "42.0", True),
        ("numeric", "1,234.5", "$1234.5", True),
        ("numeric", "42", "43", False),
        ("numeric", "42", "nan", False),
        ("numeric", "blue", "Blue", True),
        ("numeric", "42", "", False),
        ("numeric", "42", r"\boxed{42}", True),
        ("numeric", "-3", "\N{MINUS SIGN}3", True),
        ("numeric", "12", "12%", True),
        ("numeric", "0.0000672", "6.72e-05", True),
        ("numeric", "2.3333333333333335", "7/3", True),
        ("numeric", "2.3333333333333335", "2.3333", True),
        ("numeric", "2.3333333333333335", "2.33", False),
        ("numeric", "42", "41.99999999999", True),
        ("numeric", "42", "42.001", False),
        ("numeric", "123456789012", "123456789013", False),
        ("numeric", "0.5", "1e999", False),
        ("numeric", "0.5", "1/0", False),
        ("numeric", "0.0001", "0", False),
        ("exact", "A", "The", False),
        ("exact", "A", "a", True),
        ("exact", "+", "-", False),
    ],
)
def test_graders(grader, answer, prediction, right):
    task = Task(id="t", question="q", answer=answer, kind="k", grader=grader)
    assert grade(task, prediction) == float(right)


def test_aliases_count():
    task = Task(id="t", question="q", answer="United States", aliases=("USA",), kind="k")
    assert grade(task, "usa") == 1.0


@pytest.mark.parametrize(
    ("answer", "prediction", "score"),
    [
        ("President Richard Nixon", "Richard Nixon", 0.8),
        ("the seven seas", "Seven Seas", 1.0),
        ("x x b", "b b", 0.4),
        ("yes", "yes", 1.0),
        ("yes", "yes it is", 0.0),
        ("no one", "no", 0.0),
        ("Paris", "London", 0.0),
        ("Paris", "", 0.0),
        ("A", "A", 1.0),
        ("A", "The", 0.0),
    ],
)
def test_f1_is_hotpotqas(answer, prediction, score):
    task = Task(id="t", question="q", answer=answer, kind="k", grader="f1")
    assert grade(task, prediction) == pytest.approx(score)


def test_f1_takes_the_best_alias():
    task = Task(id="t", question="q", answer="United States of America", aliases=("USA",), kind="k", grader="f1")
    assert grade(task, "the USA") == 1.0


def test_many_answers_are_graded_in_order():
    tasks = [Task(id=str(i), question="q", answer=str(i % 3), kind="k", grader="numeric") for i in range(3000)]
    answers = ((task, None if i % 7 == 0 else "1") for i, task in enumerate(tasks))
    assert list(grade_many(answers)) == [float(i % 3 == 1 and i % 7 != 0) for i in range(3000)]


def test_an_error_of_ours_ends_the_grading_of_many():
    task = Task(id="t", question="q", answer="1", kind="k", grader="no-such")
    with pytest.raises(KeyError, match="no-such"):
        list(grade_many([(task, "1")] * 5))


@pytest.mark.parametrize("grader", ["exact", "f1", "numeric"])
def test_a_megabyte_is_no_answer(grader):
    task = Task(id="t", question="q", answer="17", kind="k", grader=grader)
    assert grade(task, "17 " * 400_000) == 0.0


WRITTEN = st.one_of(
    st.text(),
    st.text(alphabet="0123456789.,+-eE%$/\\frac{}"),
    st.sampled_from(["1e999", "-" * 50_000, "9" * 50_000, "\ud800", "\x00", "1/" + "9" * 5000]),
)


@given(WRITTEN, st.sampled_from(["exact", "f1", "numeric"]), st.sampled_from(["17", "0.5", "The", "yes"]))
def test_graders_never_raise_on_what_a_model_wrote(prediction, grader, answer):
    assert 0.0 <= grade(Task(id="t", question="q", answer=answer, kind="k", grader=grader), prediction) <= 1.0


def test_wilson_interval_has_its_published_values():
    """Newcombe 1998 (https://doi.org/10.1002/(SICI)1097-0258(19980430)17:8<857::AID-SIM777>3.0.CO;2-E), table I,
    method 3."""
    for successes, n, low, high in [
        (81, 263, 0.2553, 0.3662),
        (15, 148, 0.0624, 0.1605),
        (0, 20, 0.0, 0.1611),
        (1, 29, 0.0061, 0.1718),
    ]:
        result = score(successes, n)
        assert (round(result.low, 4), round(result.high, 4)) == (low, high)


def test_a_score_needs_tasks():
    with pytest.raises(ValueError, match="0 of 0"):
        score(0, 0)
