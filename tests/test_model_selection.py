"""Validation as the run goes on, the best student kept, and a run that ends when no better one comes."""

from __future__ import annotations

import json
import math
import threading
import time
from pathlib import Path
from typing import Any

import pytest
from learner_samples import ListSource, save_tiny_student, trajectory

from learner.base import Progress
from learner.config import ConfigError, LearnerConfig
from learner.model_selection import BestStudent, copy_folder, recover_folder, replace_folder
from learner.trainer import Learner

ROWS = [trajectory(i) for i in range(16)]


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_student(tmp_path_factory.mktemp("student"))


def config_of(base: Path, out: Path, **changes: Any) -> LearnerConfig:
    settings: dict[str, Any] = {
        "epochs": 3,
        "tokens_per_step": 1000,
        "max_row_tokens": 512,
        "warmup_steps": 2,
        "validation_share": 0.3,
        "optimizer": "adamw",
        "precision": "fp32",
    }
    return LearnerConfig(model_path=str(base), output_dir=str(out), **{**settings, **changes})


def chooser(folder: Path, by: str = "validation_loss", patience: int = 0) -> BestStudent:
    return BestStudent(
        config_of(
            folder,
            folder,
            best_by=by,
            patience=patience,
            score_every_steps=1 if by == "rollout_score" else 0,
        ),
        folder=folder,
    )


def put(folder: Path, text: str) -> Path:
    folder.mkdir(parents=True)
    (folder / "model").write_text(text)
    return folder


# -- the choice


def test_the_lowest_loss_is_the_best_and_nan_is_never(tmp_path: Path) -> None:
    best = chooser(tmp_path)
    said = [best.measured(step, loss, rows=5) for step, loss in enumerate([2.0, 1.5, math.nan, 1.6, 1.4])]
    assert said == [True, True, False, False, True] and (best.step, best.value) == (4, 1.4)


def test_a_loss_over_more_rows_takes_the_place_of_one_over_fewer(tmp_path: Path) -> None:
    best = chooser(tmp_path)
    assert best.measured(1, 0.5, rows=2) and best.measured(2, 1.5, rows=9) and not best.measured(3, 1.6, rows=9)
    assert (best.step, best.value) == (2, 1.5)


def test_patience_counts_measurements_without_a_better_one(tmp_path: Path) -> None:
    best = chooser(tmp_path, patience=2)
    ended = []
    for step, loss in enumerate([2.0, 2.1, 1.9, 1.95, 2.0]):
        best.measured(step, loss, rows=5)
        ended.append(best.exhausted)
    assert ended == [False, False, False, False, True]


def test_scores_may_come_late_and_in_any_order(tmp_path: Path) -> None:
    best = chooser(tmp_path, "rollout_score")
    for step in (10, 20, 30):
        folder = best.hand_out(step)
        assert folder is not None and best.hand_out(step) is None
        put(folder, f"student {step}")
    best.scored(20, 0.5)
    best.scored(10, 0.4)
    best.scored(99, 1.0)
    assert (best.folder / "model").read_text() == "student 20" and list(best.pending) == [30]
    again = chooser(tmp_path, "rollout_score")
    again.restore(json.loads(json.dumps(best.state())))
    again.scored(30, 0.6)
    assert (again.folder / "model").read_text() == "student 30" and (again.step, again.value) == (30, 0.6)
    assert not list((tmp_path / "candidates").iterdir())


def test_a_kill_while_folders_change_places_loses_neither(tmp_path: Path) -> None:
    old, new = put(tmp_path / "best", "old"), put(tmp_path / "candidate", "new")
    old.rename(tmp_path / ".old-best")  # a kill between the two renames
    recover_folder(tmp_path / "best")
    assert (old / "model").read_text() == "old"
    replace_folder(new, old)
    assert (old / "model").read_text() == "new" and not new.exists()
    copy_folder(old, tmp_path / "student")
    assert (tmp_path / "student" / "model").read_text() == "new" and sorted(p.name for p in tmp_path.iterdir()) == [
        "best",
        "student",
    ]


# -- in a run


def test_held_out_rows_are_measured_every_n_steps_and_at_the_end_of_each_pass(base: Path, tmp_path: Path) -> None:
    steps: list[Progress] = []
    config = config_of(base, tmp_path, epochs=2, validate_every_steps=2)
    Learner(config, ListSource(ROWS), on_progress=steps.append).run()
    losses = [step.validation_loss for step in steps]
    changed = [i + 1 for i, (a, b) in enumerate(zip([None, *losses], losses, strict=False)) if a != b]
    passes = [i + 1 for i, (a, b) in enumerate(zip([0, *[s.epoch for s in steps]], steps, strict=False)) if a < b.epoch]
    assert changed == sorted({*range(2, len(steps) + 1, 2), *passes})
    assert all(step.validation_accuracy is not None for step in steps[1:])


def test_a_run_that_ends_within_a_pass_measures_its_last_student(base: Path, tmp_path: Path) -> None:
    final = Learner(config_of(base, tmp_path, epochs=None, max_tokens=3500), ListSource(ROWS)).run()
    last = json.loads((tmp_path / "metrics.jsonl").read_text().splitlines()[-1])
    assert (last["step"], last["validation_loss"]) == (final.step, final.validation_loss)


def test_the_best_student_by_validation_loss_is_the_final_one(base: Path, tmp_path: Path) -> None:
    from safetensors.torch import load_file

    steps: list[Progress] = []
    # A rate that is far too high from the second pass on: the first students are the best.
    config = config_of(
        base,
        tmp_path,
        lr=3e-1,
        warmup_steps=40,
        schedule="constant",
        validate_every_steps=1,
        best_by="validation_loss",
        final_student="best",
    )
    final = Learner(config, ListSource(ROWS), on_progress=steps.append).run()
    measured = [step.validation_loss for step in steps if step.validation_loss is not None]
    assert final.best_value == min(measured) < measured[-1]
    assert final.best_step is not None and final.best_step < final.step
    facts = json.loads(Path(str(final.student_dir), "training.json").read_text())["facts"]
    assert facts["optimizer steps"] == final.best_step
    student, best = (load_file(Path(str(f)) / "model.safetensors") for f in (final.student_dir, final.best_dir))
    assert all((student[name] == best[name]).all() for name in best)


def test_a_run_ends_early_when_no_better_student_comes(base: Path, tmp_path: Path) -> None:
    config = config_of(
        base,
        tmp_path,
        epochs=30,
        lr=1.0,
        warmup_steps=20,
        schedule="constant",
        validate_every_steps=1,
        best_by="validation_loss",
        patience=3,
    )
    final = Learner(config, ListSource(ROWS)).run()
    assert final.stopped_early and final.done and final.epoch < 30
    assert final.best_step == final.step - 3
    assert Learner(config, ListSource(ROWS)).run().step == final.step  # done: not trained again


def test_the_best_student_by_score_is_chosen_while_training_goes_on(base: Path, tmp_path: Path) -> None:
    config = config_of(
        base, tmp_path, best_by="rollout_score", score_every_steps=2, final_student="best", score_timeout_s=60.0
    )
    learner = Learner(config, ListSource(ROWS))
    told: dict[str, float] = {}
    over = threading.Event()

    def judge() -> None:
        """Finds the student of step 4 best, in its own time."""
        while not over.is_set():
            for step, folder in learner.progress().candidates.items():
                if step not in told and Path(folder, "model.safetensors").exists():
                    told[step] = 1.0 / (1 + abs(int(step) - 4))
                    learner.report_score(int(step), told[step])
            time.sleep(0.02)

    thread = threading.Thread(target=judge)
    thread.start()
    try:
        final = learner.run()
    finally:
        over.set()
        thread.join()
    assert set(told) >= {"2", "4", str(final.step)} and final.step > 6
    assert (final.best_step, final.best_value) == (4, 1.0) and not final.candidates
    facts = json.loads(Path(str(final.student_dir), "training.json").read_text())["facts"]
    assert facts["optimizer steps"] == 4


def test_scores_that_never_come_end_the_wait_and_not_the_run(base: Path, tmp_path: Path) -> None:
    config = config_of(
        base,
        tmp_path,
        epochs=1,
        best_by="rollout_score",
        score_every_steps=2,
        final_student="best",
        score_timeout_s=0.5,
    )
    final = Learner(config, ListSource(ROWS)).run()
    assert final.done and final.best_step is None and final.candidates
    assert Path(str(final.student_dir), "model.safetensors").exists()


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"best_by": "validation_loss", "validation_share": 0.0}, "nothing is held out; set validation_share"),
        ({"best_by": "rollout_score"}, "best_by 'rollout_score' needs it"),
        ({"final_student": "best"}, "final_student is 'best' with best_by 'none'"),
        ({"patience": 2}, "patience is 2 with best_by 'none'"),
        ({"best_by": "luck"}, "best_by is 'luck'; use one of"),
        ({"validate_every_steps": 5, "validation_share": 0.0}, "validate_every_steps is 5 but nothing is held out"),
    ],
)
def test_what_a_choice_needs_is_said(tmp_path: Path, changes: Any, said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        config_of(tmp_path, tmp_path, **changes)
