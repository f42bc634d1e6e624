"""`launch.score` on a real small teacher: what is stored is what the teacher says of the very rows that the learner
makes; a run goes on where it was; scores of other rows are refused."""

from __future__ import annotations

import asyncio
import pickle
from pathlib import Path

import numpy as np
import pytest
from learner_samples import TOKENIZER, save_tiny_student, trajectory

from launch.score import main
from learner.examples import Example, ExampleMaker, RefusedRow
from learner.stored_scores import ScoreWriter, StoredScores, StoredScoresError
from rollout.ledger import Ledger, LedgerWriter
from rollout.scoring import TransformersScorer

TOP_K = 3


@pytest.fixture(scope="module")
def teacher(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_student(tmp_path_factory.mktemp("models") / "teacher")


@pytest.fixture(scope="module")
def maker() -> ExampleMaker:
    from transformers import AutoTokenizer

    return ExampleMaker(AutoTokenizer.from_pretrained(TOKENIZER), max_row_tokens=1024)


def ledger_of(folder: Path, numbers: range) -> Path:
    LedgerWriter(folder, writer=f"w{numbers.start}").append([trajectory(i) for i in numbers])
    return folder


def score(ledger: Path, teacher: Path, *more: str) -> int:
    options = ["--student", str(TOKENIZER), "--top-k", str(TOP_K), "--engine", "transformers", "--dtype", "float32"]
    return main([str(ledger), "--teacher", str(teacher), *options, *more])


def example_of(maker: ExampleMaker, i: int) -> Example:
    made = maker.make(trajectory(i))
    assert isinstance(made, Example)
    return made


def test_a_ledgers_rows_get_what_the_teacher_says_of_their_trained_tokens(tmp_path, teacher, maker):
    ledger = ledger_of(tmp_path / "ledger", range(3))
    assert score(ledger, teacher) == 0
    stored = pickle.loads(pickle.dumps(StoredScores(ledger / "scores" / "teacher")))
    assert (stored.top_k, len(stored)) == (TOP_K, 3)
    example = example_of(maker, 1)
    scores = stored(example.key, example.token_ids)
    assert scores is not None and scores.teacher_ids is not None and scores.teacher_logprobs is not None
    trained = np.asarray(example.loss_weights) > 0
    [expected] = asyncio.run(TransformersScorer(str(teacher), dtype="float32").score([example.token_ids], TOP_K))
    assert (scores.teacher_ids[trained] == expected.ids[trained]).all()
    assert scores.teacher_logprobs[trained] == pytest.approx(expected.logprobs[trained], abs=1e-5, nan_ok=True)
    assert (scores.teacher_ids[~trained] == -1).all()
    assert scores.teacher_own(example.token_ids)[trained] == pytest.approx(expected.own[trained], abs=1e-5)


def test_scores_beside_its_shards_are_no_part_of_a_ledger(tmp_path, teacher):
    ledger = ledger_of(tmp_path / "ledger", range(2))
    score(ledger, teacher)
    assert Ledger(ledger).validate().ok
    assert len(list(Ledger(ledger).trajectories())) == 2


def test_a_run_scores_what_no_run_before_it_did(tmp_path, teacher, capsys):
    ledger = ledger_of(tmp_path / "ledger", range(2))
    assert score(ledger, teacher) == 0
    ledger_of(ledger, range(2, 5))
    assert score(ledger, teacher) == 0
    assert "rows 3; scored before 2" in capsys.readouterr().out
    assert len(StoredScores(ledger / "scores" / "teacher")) == 5


def test_scores_of_other_ids_are_refused_and_the_row_is_not_trained_on(tmp_path, teacher, maker):
    ledger = ledger_of(tmp_path / "ledger", range(1))
    assert score(ledger, teacher, "--system-prompt", "Another prompt.") == 0
    stored = StoredScores(ledger / "scores" / "teacher")
    example = example_of(maker, 0)
    with pytest.raises(StoredScoresError, match="are of a row with other token ids"):
        stored(example.key, example.token_ids)
    made = ExampleMaker(maker.renderer.tokenizer, max_row_tokens=1024, scorer=stored).make(trajectory(0))
    assert isinstance(made, RefusedRow) and made.reason == "scores_do_not_fit"


def test_the_learner_is_handed_the_scores_of_its_rows_and_none_of_others(tmp_path, teacher, maker):
    ledger = ledger_of(tmp_path / "ledger", range(1))
    score(ledger, teacher)
    stored = StoredScores(ledger / "scores" / "teacher")
    scoring = ExampleMaker(maker.renderer.tokenizer, max_row_tokens=1024, scorer=stored)
    scored, unscored = scoring.make(trajectory(0)), scoring.make(trajectory(7))
    assert isinstance(scored, Example) and scored.scores is not None and "teacher" in scored.scores.has
    assert isinstance(unscored, Example) and unscored.scores is None


def test_a_teacher_with_another_tokenizer_is_refused_before_it_scores(tmp_path, teacher, capsys):
    from transformers import AutoTokenizer

    other = save_tiny_student(tmp_path / "other")
    tokenizer = AutoTokenizer.from_pretrained(other)
    tokenizer.add_tokens(["<tool>"])
    tokenizer.save_pretrained(other)
    ledger = ledger_of(tmp_path / "ledger", range(1))
    assert score(ledger, other) == 2
    assert "teacher and student do not share a tokenizer: 1 of 3,073 tokens differ" in capsys.readouterr().err
    assert not list(ledger.glob("scores/*/*.parquet"))


def test_scores_of_another_k_are_not_mixed(tmp_path, teacher, capsys):
    ledger = ledger_of(tmp_path / "ledger", range(1))
    assert score(ledger, teacher) == 0
    assert score(ledger, teacher, "--top-k", "5") == 2
    assert "with top_k 3, not of" in capsys.readouterr().err


def test_a_folder_without_scores_and_a_damaged_part_are_named(tmp_path):
    with pytest.raises(StoredScoresError, match="holds no scores"):
        StoredScores(tmp_path)
    (tmp_path / "part-0.parquet").write_bytes(b"PAR1")
    with pytest.raises(StoredScoresError, match="part-0.parquet cannot be read"):
        StoredScores(tmp_path)


def test_what_was_added_is_on_disk_after_a_flush_and_not_before(tmp_path):
    writer = ScoreWriter(tmp_path, teacher="t", top_k=1)
    ids, logprobs = np.array([[-1, -1], [5, 6]]), np.array([[np.nan, np.nan], [-0.1, -2.0]])
    writer.add("k", (1, 5), ids, logprobs, np.array([False, True]))
    assert not list(tmp_path.iterdir())
    writer.flush()
    scores = StoredScores(tmp_path)("k", (1, 5))
    assert scores is not None and scores.teacher_ids is not None
    assert scores.teacher_ids.tolist() == [[-1, -1], [5, 6]]
