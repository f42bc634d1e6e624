"""Task files of every format become the same tasks, and what is wrong is named by file and row."""

from __future__ import annotations

import datetime
import json
import logging
import os
import subprocess
import sys
from pathlib import Path

import pyarrow
import pytest
from pyarrow import parquet

from envs.base import TaskError
from envs.task_files import rows_of, stem_of
from envs.tasks import Columns, load_tasks

ROWS = [
    {"id": "a", "question": "Who?", "answer": "Ada", "aliases": ["Ada Lovelace"], "level": "hard"},
    {"id": "b", "question": "When?", "answer": "1843", "aliases": [], "level": "easy"},
]
ROOT = Path(__file__).parents[1]


def write(folder: Path, name: str, rows: list) -> Path:
    path = folder / name
    if path.suffix == ".parquet":
        parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    elif path.suffix == ".json":
        path.write_text(json.dumps({"metadata": {}, "examples": rows}))
    elif path.suffix == ".jsonl":
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    else:
        from datasets import Dataset

        Dataset.from_list(rows).save_to_disk(str(path))
    return path


@pytest.mark.parametrize("name", ["tasks.jsonl", "tasks.json", "tasks.parquet", "saved"])
def test_every_format_gives_the_same_tasks(tmp_path, name):
    first, second = load_tasks(write(tmp_path, name, ROWS), kind="factual", grader="f1")
    assert (first.id, first.question, first.answer, first.aliases) == ("a", "Who?", "Ada", ("Ada Lovelace",))
    assert (second.answer, second.kind, second.grader, second.metadata) == ("1843", "factual", "f1", {"level": "easy"})


def test_columns_may_have_other_names(tmp_path):
    rows = [{"problem": "1 + 1?", "solution": "It is\n#### 2", "unique": "x"}]
    columns = Columns(question="problem", answer="solution", id="unique", answer_after="####")
    [task] = load_tasks(write(tmp_path, "t.parquet", rows), columns=columns)
    assert (task.question, task.answer, task.id, task.metadata) == ("1 + 1?", "2", "x", {"solution": "It is"})


def test_answers_may_be_nested_and_several(tmp_path):
    rows = [{"question": "q", "answers": {"text": ["USA", "USA", "United States"], "start": [1, 1, 2]}}]
    [task] = load_tasks(write(tmp_path, "t.jsonl", rows), columns=Columns(answer="answers.text"))
    assert (task.answer, task.aliases, task.id) == ("USA", ("United States",), "t-0")


def test_numbered_ids_carry_the_name_of_the_file(tmp_path):
    rows = [{"id": 0, "question": "q", "answer": "a"}]
    ids = [load_tasks(write(tmp_path, name, rows))[0].id for name in ("one.jsonl", "two.parquet")]
    assert ids == ["one-0", "two-0"]


def test_metadata_is_plain_data(tmp_path):
    rows = [{"question": "q", "answer": 2.5, "when": datetime.date(2020, 1, 2), "image": b"\x00", "more": {"n": [1]}}]
    [task] = load_tasks(write(tmp_path, "t.parquet", rows))
    assert task.answer == "2.5" and task.metadata == {"when": "2020-01-02", "more": {"n": [1]}}


def test_json_lines_end_at_line_feeds_alone(tmp_path):
    path = tmp_path / "t.jsonl"
    path.write_bytes('\ufeff{"question": "a\u2028b\x85c", "answer": "d"}\r\n\n'.encode())
    [task] = load_tasks(path)
    assert task.question == "a\u2028b\x85c"


def test_unanswered_rows_of_the_papers_format_are_left_out_and_told(tmp_path, caplog):
    rows = [*ROWS, {"id": "c", "question": "Why?", "answer": None}, {"id": "d", "question": "How?", "answer": " "}]
    with caplog.at_level(logging.WARNING):
        assert [task.id for task in load_tasks(write(tmp_path, "p.json", rows))] == ["a", "b"]
    assert "left out 2 rows without an answer" in caplog.text and "p.json: example 2" in caplog.text
    with pytest.raises(TaskError, match="p.json: example 2: 'answer' must be"):
        load_tasks(tmp_path / "p.json", skip_unanswered=False)


def test_a_limit_reads_no_further_and_progress_is_told(tmp_path):
    path = write(tmp_path, "t.jsonl", [{"question": f"q{i}", "answer": "a"} for i in range(2500)])
    told: list[int] = []
    assert len(load_tasks(path, on_progress=told.append)) == 2500 and told == [1000, 2000, 2500]
    with open(path, "a") as file:
        file.write("not JSON")
    assert len(load_tasks(path, limit=3)) == 3


@pytest.mark.parametrize(
    ("row", "complaint"),
    [
        ({"question": "q"}, "row 1: 'answer' must be .* not missing; the columns are question"),
        ({"question": "q", "answer": []}, "row 1: 'answer' must be .* not \\[\\]"),
        ({"question": "q", "answer": float("nan")}, "row 1: 'answer' must be .* not nan"),
        ({"question": " ", "answer": "a"}, "row 1: 'question' must be a non-empty string, not ' '"),
        ({"question": "q", "answer": "a", "id": 1.5}, "row 1: 'id' must be a string or a whole number, not 1.5"),
    ],
)
def test_a_bad_row_is_named(tmp_path, row, complaint, monkeypatch):
    monkeypatch.setattr("envs.tasks.rows_of", lambda path: iter([("row 0", ROWS[0]), ("row 1", row)]))
    with pytest.raises(TaskError, match=complaint):
        load_tasks("anything")


def test_an_answer_without_its_mark_is_named(tmp_path):
    with pytest.raises(TaskError, match="t.jsonl:1: 'answer' has no answer after '####': 'Ada'"):
        load_tasks(write(tmp_path, "t.jsonl", ROWS), columns=Columns(answer_after="####"))


@pytest.mark.parametrize(
    ("content", "complaint"),
    [
        (b'{"question": "q", "answer": "a"}\n{"question"', r"t.jsonl:2: not JSON: .* at column"),
        (b"\xff\xfe", r"t.jsonl:1: not UTF-8: byte 0 is 0xff"),
        (b'{"question": "q", "answer": ' + b"9" * 5000 + b"}", "t.jsonl:1: not usable JSON"),
        (b"[" * 100_000, "t.jsonl:1: not (usable )?JSON"),
    ],
)
def test_a_bad_line_is_named(tmp_path, content, complaint):
    path = tmp_path / "t.jsonl"
    path.write_bytes(content)
    with pytest.raises(TaskError, match=complaint):
        load_tasks(path)


def test_what_is_no_task_file_is_named(tmp_path):
    (tmp_path / "a.csv").write_text("question,answer")
    (tmp_path / "b.parquet").write_text("no Parquet")
    (tmp_path / "c.json").write_text('{"tasks": []}')
    for name, complaint in {
        "none.jsonl": "none.jsonl' does not exist",
        "a.csv": "a.csv' has no known format; there are .jsonl",
        "b.parquet": "b.parquet: not readable as Parquet after row 0",
        "c.json": 'c.json:1: expected {"examples"',
        "": "is no saved data set: it holds none of",
    }.items():
        with pytest.raises(TaskError, match=complaint):
            list(rows_of(tmp_path / name))


def test_a_saved_data_set_with_splits_asks_for_one(tmp_path):
    from datasets import Dataset, DatasetDict

    rows = Dataset.from_list(ROWS)
    folder = tmp_path / "saved"
    DatasetDict({"train": rows.select([0]), "test": rows.select([1])}).save_to_disk(str(folder))
    assert [task.id for task in load_tasks(f"{folder}:test")] == ["b"]
    with pytest.raises(TaskError, match="has the splits train, test; name one as .*saved:train"):
        load_tasks(folder)
    with pytest.raises(TaskError, match="has no split 'dev'; there are train, test"):
        load_tasks(f"{folder}:dev")


OFFLINE = """
import sys
from envs.tasks import load_tasks
from envs.base import TaskError
for name in sys.argv[1:]:
    try:
        print(name, [task.answer for task in load_tasks(name)])
    except TaskError as error:
        print("TaskError:", error)
"""


def test_hub_names_are_loaded_and_say_clearly_when_there_is_no_network(tmp_path):
    """A folder stands in for a repository of the hub; `datasets` treats both alike."""
    folder = tmp_path / "data"
    folder.mkdir()
    for split, row in zip(("train", "test"), ROWS, strict=True):
        write(folder, f"{split}.jsonl", [row])
    names = [f"hf:{folder}:test", f"hf:{folder}", f"hf:{folder}:validation", "hf:nobody/nothing:train"]
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path / "home"), "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, "-c", OFFLINE, *names], capture_output=True, text=True, env=environment, timeout=100
    )
    loaded, splits, unknown, missing = done.stdout.splitlines()
    assert loaded.endswith(":test ['1843']")
    assert "has the splits train, test; name one as" in splits
    assert "cannot be loaded: ValueError: Unknown split" in unknown
    assert "'hf:nobody/nothing:train' is not in the local cache and the hub cannot be reached" in missing
    assert "save_to_disk(folder), and give that folder here" in missing


@pytest.mark.parametrize(
    ("source", "stem"), [("a/b.jsonl", "b"), ("hf:openai/gsm8k:main:test", "gsm8k-main-test"), ("hf:squad", "squad")]
)
def test_sources_have_short_names(source, stem):
    assert stem_of(source) == stem


def test_a_hub_name_with_too_many_parts_is_refused():
    with pytest.raises(TaskError, match="expected hf:owner/name"):
        load_tasks("hf:a/b:c:d:e")
