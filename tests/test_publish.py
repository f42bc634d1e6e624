"""Weights of a running learner: each version proves itself, the newest is handed on beside the training, and what
nobody needs is removed. The last test ends at a real vLLM engine."""

from __future__ import annotations

import asyncio
import shutil
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from learner_samples import ListSource, save_tiny_student, trajectory

from learner.base import Progress
from learner.config import LearnerConfig, LoraConfig
from learner.publish import Publications, hold
from learner.trainer import Learner
from rollout.scoring import TransformersScorer
from rollout.weight_loading import Loaded, LogprobCheck, WeightLoader, Weights
from rollout.weight_sync import WeightSync

pytestmark = pytest.mark.timeout(180)
ROWS = [trajectory(i) for i in range(20)]


class Recorder:
    """A publisher that keeps a copy of what it was handed; `before` is called with each version first."""

    def __init__(self, folder: Path, before: Callable[[str], None] = lambda version: None) -> None:
        self.folder, self.before, self.versions = folder, before, []

    def publish(self, folder: Path, version: str) -> str:
        self.before(version)
        shutil.copytree(folder, self.folder / version)
        self.versions.append(version)
        return f"{version} copied"


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_student(tmp_path_factory.mktemp("models") / "base")


def learner_of(base: Path, out: Path, publisher: Any, **settings: Any) -> Learner:
    config = LearnerConfig(
        model_path=str(base), output_dir=str(out), epochs=2, tokens_per_step=1024, warmup_steps=0, precision="fp32",
        publish_every_steps=3, publish_tolerance=0.01, **settings,
    )  # fmt: skip
    return Learner(config, ListSource(ROWS), publisher=publisher)


def scored(folder: Path, rows: Any) -> list[np.ndarray]:
    scores = asyncio.run(TransformersScorer(str(folder), dtype="float32").score(rows, 0))
    return [each.own for each in scores]


@pytest.mark.parametrize(
    "lora", [None, pytest.param(LoraConfig(rank=4), marks=pytest.mark.slow)], ids=["full", "lora"]
)
def test_a_version_holds_the_whole_model_of_its_step_and_what_that_says(base, tmp_path, lora):
    recorder = Recorder(tmp_path / "copies")
    learner = learner_of(base, tmp_path / "out", recorder, lora=lora)
    learner.run()
    assert learner._publications is not None and learner._publications.wait(30)
    checks = []
    for version in recorder.versions:
        folder = tmp_path / "copies" / version
        check = LogprobCheck.read(folder)
        assert check is not None and check.tolerance == 0.01
        difference = check.difference(scored(folder, check.rows))
        assert difference.largest < 1e-3 and difference.tokens > 50
        checks.append(check)
    assert len(checks) >= 2
    assert checks[0].rows == checks[1].rows
    assert checks[0].before is None
    assert checks[1].before is not None and str(checks[1].before.logprobs) == str(checks[0].logprobs)
    apart = checks[0].difference([np.array(row) for row in checks[1].logprobs])
    assert apart.largest > 0.01, "the student learns between two versions, and a stale one would be found"


def test_a_student_that_is_handed_out_to_be_scored_proves_itself_too(base, tmp_path):
    config = LearnerConfig(
        model_path=str(base), output_dir=str(tmp_path), epochs=1, tokens_per_step=1024, precision="fp32",
        validation_share=0.2, best_by="rollout_score", score_every_steps=2, score_timeout_s=0.1,
    )  # fmt: skip
    final = Learner(config, ListSource(ROWS)).run()
    folder = Path(final.candidates["2"])
    check = LogprobCheck.read(folder)
    assert check is not None
    assert check.difference(scored(folder, check.rows)).largest < 1e-3


def test_training_goes_on_while_a_version_is_handed_over_and_only_the_newest_is_next(base, tmp_path):
    released = threading.Event()
    recorder = Recorder(tmp_path / "copies", before=lambda version: released.wait(60) and None)
    learner = learner_of(base, tmp_path / "out", recorder)
    final = learner.run()
    assert final.step >= 9 and recorder.versions == []
    released.set()
    assert learner._publications is not None and learner._publications.wait(30)
    last = f"step-{final.step // 3 * 3:07d}"
    assert recorder.versions == ["step-0000003", last]
    assert learner.progress().published == last
    assert learner.progress().publish_told == f"{last} copied"


def test_a_publisher_that_fails_ends_nothing_and_is_told_of(base, tmp_path):
    def refuse(version: str) -> None:
        raise RuntimeError("no worker took the weights")

    learner = learner_of(base, tmp_path / "out", Recorder(tmp_path / "copies", before=refuse))
    final: Progress = learner.run()
    assert learner._publications is not None and learner._publications.wait(30)
    at = learner.progress()
    assert final.done and at.published == ""
    assert at.publish_failures >= 1 and at.publish_told.endswith(": no worker took the weights")


@pytest.mark.slow
@pytest.mark.parametrize("zero_stage", [2, 3])
def test_all_ranks_take_part_in_a_version(ray_cluster, base, tmp_path, zero_stage):
    from learner.learner_actor import LearnerGroup

    class Copy:
        """Pickled to rank 0 by value, as it is no part of a module that Ray's workers import."""

        def publish(self, folder: Path, version: str) -> str:
            shutil.copytree(folder, tmp_path / "copies" / version)
            return ""

    class Source:
        def __init__(self) -> None:
            self.left = list(ROWS)

        def next(self, max_trajectories: int, timeout_s: float) -> Any:
            given, self.left = self.left[:max_trajectories], self.left[max_trajectories:]
            return given or None

    config = LearnerConfig(
        model_path=str(base), output_dir=str(tmp_path / "out"), epochs=1, tokens_per_step=1024, precision="fp32",
        ranks=2, zero_stage=zero_stage, optimizer="adamw", publish_every_steps=3,
    )  # fmt: skip
    group = LearnerGroup.start(config, Source(), publisher=Copy())
    try:
        group.run()
        group.result(timeout_s=120)
    finally:
        group.shutdown()
    check = LogprobCheck.read(tmp_path / "copies" / "step-0000003")
    assert check is not None
    assert check.difference(scored(tmp_path / "copies" / "step-0000003", check.rows)).largest < 1e-3


def write(publications: Publications, step: int) -> Path:
    publications.folder(step).mkdir(parents=True)
    publications.offer(step)
    assert publications.wait(10)
    return publications.folder(step)


class Silent:
    def publish(self, folder: Path, version: str) -> str:
        return ""


def test_old_versions_are_removed_but_for_those_that_somebody_holds(tmp_path):
    publications = Publications(tmp_path, Silent(), keep=2)
    first, second = write(publications, 100), write(publications, 200)
    with hold(second, by="evaluation", for_s=60):
        third, fourth, fifth = (write(publications, step) for step in (300, 400, 500))
        assert [path.exists() for path in (first, second, third, fourth, fifth)] == [False, True, False, True, True]
    sixth = write(publications, 600)
    assert sorted(tmp_path.iterdir()) == [fifth, sixth]


def test_a_hold_that_was_never_given_back_ends(tmp_path):
    publications = Publications(tmp_path, Silent(), keep=1)
    held = hold(first := write(publications, 1), by="gone", for_s=-1)
    held.__enter__()
    write(publications, 2)
    assert not first.exists()


def test_the_version_in_use_stays_while_newer_ones_are_refused(tmp_path):
    class First:
        def publish(self, folder: Path, version: str) -> str:
            if version != "step-0000001":
                raise RuntimeError("refused")
            return ""

    publications = Publications(tmp_path, First(), keep=1)
    first = write(publications, 1)
    for step in (2, 3):
        write(publications, step)
    assert first.exists() and publications.status().version == "step-0000001"
    assert publications.status().failed == 2


# -- to an engine


class Engine:
    """A worker of this process: vLLM with the student that training began with."""

    name = "w0"

    def __init__(self, base: Path) -> None:
        from rollout.vllm_policy import VllmPolicy

        def build(weights: Weights | None) -> VllmPolicy:
            model = str(base) if weights is None else weights.folder
            return VllmPolicy(model, dtype="float32", max_model_len=512, max_num_seqs=4, kv_cache_bytes=16 << 20)

        self.loader = WeightLoader(build(None), build)

    async def load(self, weights: Weights) -> Loaded:
        return await self.loader.load(weights)

    async def restart(self) -> None:
        raise AssertionError("it is not late")


@pytest.fixture(scope="module")
def engine(base: Path) -> Iterator[Engine]:
    pytest.importorskip("vllm")
    engine = Engine(base)
    yield engine
    asyncio.run(engine.loader.policy.close())


def test_a_learner_that_runs_brings_its_weights_to_an_engine_that_runs(base, tmp_path, engine):
    learner = learner_of(base, tmp_path / "out", WeightSync([engine], deadline_s=60))
    row = list(range(40, 60))
    before = asyncio.run(engine.loader.policy.score(row))[1][:, 0]
    learner.run()
    assert learner._publications is not None and learner._publications.wait(60)
    at = learner.progress()
    assert at.publish_failures == 0 and at.published == engine.loader.policy.weights_version
    assert at.publish_told.startswith(f"{at.published} on 1 worker in ")
    assert float(at.publish_told.rpartition("largest difference ")[2]) < 1e-3
    after = asyncio.run(engine.loader.policy.score(row))[1][:, 0]
    [expected] = scored(tmp_path / "out" / "published" / at.published, [row])
    assert after == pytest.approx(expected[1:], abs=1e-3)
    assert np.abs(after - before).max() > 0.01
