"""A row that makes the gradient NaN: its steps are skipped and counted, it is named, and at the n-th the run stops."""

from __future__ import annotations

import dataclasses
import json
import math
from pathlib import Path
from typing import Any

import pytest
from learner_samples import ListSource, save_tiny_student, trajectory, turn

from learner.base import LearnerError, Progress
from learner.config import ConfigError, LearnerConfig
from learner.examples import Example, ExampleMaker
from learner.objectives import OBJECTIVES, ObjectiveLoss
from learner.objectives.sft import SftObjective
from learner.trainer import Learner

ROWS = [trajectory(i) for i in range(12)]
BAD = dataclasses.replace(
    ROWS[5], steps=(turn("Zebras jump over quiet foxes, why?", "print(1)", "Observation:\n1"), ROWS[5].steps[-1])
)
ROWS[5] = BAD


class Poisoned(SftObjective):
    """Cross entropy that is NaN wherever `token` is to be produced, as a damaged row's might be."""

    def __init__(self, *, token: int) -> None:
        self._token = token

    def loss(self, logits: Any, batch: Any) -> ObjectiveLoss:
        import torch

        whole = super().loss(logits, batch)
        factor = torch.where(batch.targets == self._token, math.nan, 1.0)
        return ObjectiveLoss(
            total=whole.total * factor.prod(),
            per_token=whole.per_token * factor,
            correct=whole.correct,
        )


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_student(tmp_path_factory.mktemp("student"))


@pytest.fixture(scope="module")
def token(base: Path) -> int:
    """One that the student has to produce in `BAD` alone."""
    from transformers import AutoTokenizer

    maker = ExampleMaker(AutoTokenizer.from_pretrained(base), max_row_tokens=512)
    tokens: dict[str, set[int]] = {}
    for row in ROWS:
        made = maker.make(row)
        assert isinstance(made, Example)
        trained = zip(made.token_ids, made.loss_weights, strict=True)
        tokens[row.key] = {token for token, weight in trained if weight}
    return min(tokens.pop(BAD.key).difference(*tokens.values()))


def config_of(base: Path, out: Path, token: int, **changes: Any) -> LearnerConfig:
    settings: dict[str, Any] = {
        "epochs": 3,
        "tokens_per_step": 1000,
        "micro_batch_tokens": 2048,
        "max_row_tokens": 512,
        "warmup_steps": 2,
        "objective": "poisoned",
        "objective_options": {"token": token},
    }
    return LearnerConfig(model_path=str(base), output_dir=str(out), **{**settings, **changes})


@pytest.fixture(autouse=True)
def poisoned(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(OBJECTIVES, "poisoned", f"{__name__}:Poisoned")


def test_a_bad_step_is_skipped_and_counted_and_training_goes_on(base: Path, tmp_path: Path, token: int) -> None:
    steps: list[Progress] = []
    final = Learner(config_of(base, tmp_path, token), ListSource(ROWS), on_progress=steps.append).run()
    skipped = [i for i, step in enumerate(steps) if not math.isfinite(step.loss)]
    assert len(skipped) == final.skipped_steps == 3  # once in each pass
    finite = [step.loss for step in steps if math.isfinite(step.loss)]
    assert final.done and finite[-1] < finite[0]
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [line["loss"] is None for line in lines] == [not math.isfinite(step.loss) for step in steps]
    assert lines[-1]["skipped_steps"] == 3


def test_the_nth_bad_step_ends_the_run_and_names_the_row_even_after_a_resume(
    base: Path, tmp_path: Path, token: int
) -> None:
    config = config_of(base, tmp_path, token, max_skipped_steps=2, checkpoint_every_steps=1)
    first: list[Progress] = []

    def until_one_is_skipped(progress: Progress) -> None:
        first.append(progress)
        if progress.skipped_steps:
            learner.stop()

    learner = Learner(config, ListSource(ROWS), on_progress=until_one_is_skipped)
    assert learner.run().skipped_steps == 1
    with pytest.raises(LearnerError, match="max_skipped_steps is 2") as caught:
        Learner(config, ListSource(ROWS)).run()
    named = [row.key for row in ROWS if row.key in str(caught.value)]
    assert named == [BAD.key]


def test_an_objective_that_needs_scores_is_refused_without_any(base: Path, tmp_path: Path) -> None:
    config = config_of(base, tmp_path, 0, objective="opd", objective_options={})
    with pytest.raises(ConfigError, match="objective 'opd' needs teacher scores of every row; name a folder"):
        Learner(config, ListSource(ROWS))
    with pytest.raises(ConfigError, match="scores: .*holds no scores"):
        Learner(
            config_of(base, tmp_path, 0, objective="sft", objective_options={}, scores=str(tmp_path)), ListSource([])
        )
