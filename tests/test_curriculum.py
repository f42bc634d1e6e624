"""learner.curriculum, row_order and difficulty: rows by difficulty, each once a pass, the same after a resume."""

from __future__ import annotations

import dataclasses
import json
import random
import statistics
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from learner_samples import TOKENIZER, ListSource, save_tiny_student, trajectory

from learner.config import ConfigError, CurriculumConfig, LearnerConfig
from learner.curriculum import Curriculum, make_ordering
from learner.difficulty import Length, Steps, StreamFailureRate, make_difficulty, read_success_rates
from learner.examples import Example, ExampleMaker
from learner.row_order import Ascending, Paced, Shuffled
from learner.trainer import Learner
from rollout.ledger import LedgerWriter
from rollout.trajectory import SpanType, Trajectory


def row(i: int, difficulty: float | None = None) -> Example:
    return Example(
        f"key-{i:03d}",
        f"task-{i}",
        "sums",
        (1, 2, 3, 4),
        (SpanType.CODE,) * 4,
        (0.0, 0.0, 1.0, 1.0),
        difficulty=difficulty,
    )


def rows(n: int) -> list[Example]:
    """Of difficulty 0 to n - 1, not in this order."""
    hard = list(range(n))
    random.Random(0).shuffle(hard)
    return [row(i, float(difficulty)) for i, difficulty in enumerate(hard)]


def run(curriculum: Curriculum, arriving: list[Example], steps: int | None = None) -> list[Example]:
    """The rows of so many steps, or of all; `arriving` comes one row before each step, as from a slow stream."""
    taken: list[Example] = []
    left, done = list(arriving), 0
    while not curriculum.done and (steps is None or done < steps):
        if left:
            curriculum.add(left.pop(0), arrived=1)
        elif not curriculum.stream_ended:
            curriculum.end_stream()
        step = curriculum.take()
        taken += step
        done += bool(step)
    return taken


def curriculum(epochs: int = 2, **config: Any) -> Curriculum:
    return Curriculum(
        tokens_per_step=100,
        rows_per_step=2,
        seed=3,
        epochs=epochs,
        ordering=make_ordering(CurriculumConfig(**config)) if config else None,
    )


def hardness(taken: list[Example]) -> list[float]:
    return [each.difficulty or 0.0 for each in taken]


# -- orders


@pytest.mark.parametrize("order", [Shuffled(), Ascending(), Paced(0.3)])
def test_an_order_has_each_key_once_however_they_come(order: Any) -> None:
    difficulties = {f"k{i}": None if i % 5 == 0 else float(i % 7) for i in range(60)}
    arranged = order.arrange(difficulties, seed=1, epoch=2)
    backwards = dict(reversed(list(difficulties.items())))
    assert sorted(arranged) == sorted(difficulties)
    assert arranged == order.arrange(backwards, seed=1, epoch=2) != order.arrange(difficulties, seed=1, epoch=3)


def test_ascending_puts_unknown_rows_into_the_middle() -> None:
    difficulties = {"easy": 0.0, "harder": 1.0, "hard": 2.0, "unknown": None}
    arranged = Ascending().arrange(difficulties, seed=0, epoch=0)
    assert arranged[0] == "easy" and arranged[-1] == "hard"


def test_paced_begins_with_the_easiest_share_and_grows() -> None:
    """A row that comes when the share t of n is taken is among the sqrt(t (1 - c^2) + c^2) n easiest."""
    n, c = 200, 0.25
    arranged = Paced(c).arrange({f"k{i}": float(i) for i in range(n)}, seed=0, epoch=0)
    ranks = [int(key[1:]) for key in arranged]
    assert all(rank < (t / n * (1 - c * c) + c * c) ** 0.5 * n + 1 for t, rank in enumerate(ranks))
    assert ranks != sorted(ranks)
    assert statistics.mean(ranks[: n // 4]) < statistics.mean(ranks[-n // 4 :]) - n / 4


# -- passes


def test_later_passes_come_easiest_first_and_the_first_as_it_comes() -> None:
    arriving = rows(10)
    taken = run(curriculum(order="ascending"), arriving)
    assert taken[:10] == arriving
    assert hardness(taken[10:]) == sorted(hardness(arriving))


def test_windows_order_the_first_pass() -> None:
    arriving = rows(10)
    taken = hardness(run(curriculum(epochs=1, order="ascending", window_rows=4), arriving))
    come = hardness(arriving)
    assert taken == sorted(come[:4]) + sorted(come[4:8]) + sorted(come[8:])


def test_after_the_ordered_passes_come_shuffled_ones() -> None:
    arriving = rows(10)
    ordered = run(curriculum(epochs=3, order="ascending", ordered_passes=2), arriving)
    plain = run(curriculum(epochs=3), arriving)
    assert ordered[20:] == plain[20:] and ordered[10:20] != plain[10:20]


@pytest.mark.parametrize("config", [{}, {"order": "ascending", "window_rows": 4}, {"order": "paced", "window_rows": 5}])
@pytest.mark.parametrize("steps", range(1, 14))
def test_a_resumed_run_takes_what_was_left_in_the_same_order(config: dict[str, Any], steps: int) -> None:
    arriving = rows(9)
    whole = run(curriculum(epochs=3, **config), arriving)
    first = curriculum(epochs=3, **config)
    before = run(first, arriving, steps)
    second = curriculum(epochs=3, **config)
    second.restore(json.loads(json.dumps(first.state())))
    assert [*before, *run(second, arriving)] == whole
    assert len(whole) == 27


def test_a_resume_with_another_order_is_refused() -> None:
    state = curriculum(order="ascending").state()
    with pytest.raises(ValueError, match="the curriculum is None, the checkpoint's run had Ascending"):
        curriculum().restore(state)


def test_rows_of_an_open_window_count_as_waiting() -> None:
    held = curriculum(order="ascending", window_rows=8)
    for each in rows(5):
        held.add(each, arrived=1)
    assert held.waiting == 5 and held.take() == []


# -- difficulty


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(TOKENIZER)


def made(tokenizer: Any, difficulty: Any, of: Trajectory) -> Example:
    example = ExampleMaker(tokenizer, max_row_tokens=1024, difficulty=difficulty).make(of)
    assert isinstance(example, Example), example
    return example


def test_steps_and_length_are_read_off_the_row(tokenizer: Any) -> None:
    one = trajectory(1)
    assert made(tokenizer, Steps(), one).difficulty == 2
    assert made(tokenizer, Length(), one).difficulty == len(made(tokenizer, None, one))
    assert made(tokenizer, None, one).difficulty is None


def test_the_streams_rates_count_what_is_refused_too(tokenizer: Any) -> None:
    rates = StreamFailureRate()
    maker = ExampleMaker(tokenizer, max_row_tokens=1024, difficulty=rates)
    runs = [dataclasses.replace(trajectory(1, success=i == 0), key=f"run-{i}") for i in range(4)]
    examples = [maker.make(each) for each in (*runs, runs[0])]
    assert isinstance(examples[0], Example)
    assert rates.latest(examples[0]) == 0.75


def test_rates_are_read_from_a_ledger_as_an_evaluation_leaves_it(tmp_path: Path, tokenizer: Any) -> None:
    runs = [dataclasses.replace(trajectory(1, success=i == 0), key=f"run-{i}") for i in range(4)]
    LedgerWriter(tmp_path / "ledger", writer="a").append([*runs, trajectory(2)])
    LedgerWriter(tmp_path / "ledger", writer="b").append(runs[:1])
    assert read_success_rates(tmp_path / "ledger") == {"task-0001": 0.25, "task-0002": 1.0}
    difficulty = make_difficulty("student_success", rates=str(tmp_path / "ledger"))
    assert made(tokenizer, difficulty, trajectory(1)).difficulty == 0.75
    assert made(tokenizer, difficulty, trajectory(3)).difficulty is None


def test_rates_are_read_from_json(tmp_path: Path) -> None:
    (tmp_path / "rates.json").write_text('{"a": 0.5}')
    (tmp_path / "runs.jsonl").write_text('{"task_id": "a", "success": true}\n{"task_id": "a", "success": false}\n')
    assert read_success_rates(tmp_path / "rates.json") == read_success_rates(tmp_path / "runs.jsonl") == {"a": 0.5}


@pytest.mark.parametrize(
    ("name", "text", "complaint"),
    [
        ("rates.json", '{"a": 1.5}', r"'a' is 1.5; it must be in \[0, 1\]"),
        ("rates.json", "[]", "no success rates in"),
        ("runs.jsonl", '{"task": "a"}', "no success rates in"),
        ("none.parquet", "x", "cannot be read as Parquet"),
        ("folder/x", "", "has no shards"),
    ],
)
def test_rates_that_cannot_be_read_are_named(tmp_path: Path, name: str, text: str, complaint: str) -> None:
    path = tmp_path / name
    path.parent.mkdir(exist_ok=True)
    path.write_text(text)
    with pytest.raises(ConfigError, match=complaint):
        read_success_rates(path if path.parent == tmp_path else path.parent)


@pytest.mark.parametrize(
    ("config", "complaint"),
    [
        ({"order": "hardest"}, "curriculum.order is 'hardest'"),
        ({"by": "luck"}, "curriculum.by is 'luck'"),
        ({"order": "paced", "start_share": 0.0}, "curriculum.start_share is 0.0"),
        ({"order": "paced", "by": "student_success"}, "without curriculum.rates"),
        ({"order": "paced", "by": "teacher_success", "window_rows": 8}, "known only after the first pass"),
    ],
)
def test_settings_that_cannot_work_are_named(config: Any, complaint: str) -> None:
    with pytest.raises(ConfigError, match=complaint):
        CurriculumConfig(**config)


# -- in a run


def test_a_learner_trains_in_the_curriculums_order(tmp_path: Path) -> None:
    """Two passes, a row a step: by length, each row is at least as long as the one before it. The window is larger than
    what the learner takes in ahead of its steps."""
    base = save_tiny_student(tmp_path / "base")
    config = LearnerConfig(
        model_path=str(base),
        output_dir=str(tmp_path / "out"),
        epochs=2,
        rows_per_step=1,
        precision="fp32",
        ahead_rows=4,
        curriculum=CurriculumConfig(order="ascending", by="length", window_rows=12),
    )
    tokens = [0]
    learner = Learner(
        config, ListSource([trajectory(i) for i in range(12)]), on_progress=lambda at: tokens.append(at.tokens)
    )
    learner.run()
    lengths = [after - before for before, after in pairwise(sorted(set(tokens)))]
    assert len(lengths) == 24
    assert lengths[:12] == lengths[12:] == sorted(lengths[:12]) and len(set(lengths)) > 3
