"""New weights for running policies: loaded in place and proven on a real engine, started anew where they must be,
refused with the numbers; and one version for many workers by a deadline."""

from __future__ import annotations

import asyncio
import dataclasses
import json
import os
import pickle
import signal
from collections.abc import Coroutine, Iterator
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import pytest
from learner_samples import save_tiny_student

from rollout.policy import PolicyError, Sampling
from rollout.scoring import TransformersScorer
from rollout.trajectory import FailureClass, Message
from rollout.weight_loading import CHECK_FILE, Loaded, LogprobCheck, WeightLoader, Weights, WeightsRefused
from rollout.weight_sync import WeightSync, WeightSyncError, WorkerAwayError, WorkerBusyError

pytestmark = pytest.mark.timeout(180)
T = TypeVar("T")


def run(coroutine: Coroutine[Any, Any, T]) -> T:
    async def limited() -> T:
        return await asyncio.wait_for(coroutine, 120)

    return asyncio.run(limited())


# -- one policy, a real engine


def other_weights(source: Path, folder: Path) -> Path:
    """A model of the same shape as `source` with weights of its own."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    torch.manual_seed(5)
    model: Any = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32)
    with torch.no_grad():
        for weight in model.parameters():
            weight.add_(torch.randn_like(weight), alpha=0.05)
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(source).save_pretrained(folder)
    return folder


def write_check(folder: Path, says: Path, *, tolerance: float = 1e-3) -> Path:
    """Put into `folder` what the model in `says` gives two rows."""
    scorer = TransformersScorer(str(says), dtype="float32")
    rows = [scorer.tokenizer(text)["input_ids"] for text in ("Copy: silver 4.", "x = 3\nprint(x + 12)")]
    scores = run(scorer.score(rows, 0))
    logprobs = [[None, *each.own[1:].tolist()] for each in scores]
    check = {"rows": rows, "logprobs": logprobs, "tolerance": tolerance, "mean_tolerance": tolerance / 10}
    (folder / CHECK_FILE).write_text(json.dumps(check))
    return folder


class Engine:
    """The file's one engine, as a worker has it; counts how often it was started."""

    def __init__(self, model: Path) -> None:
        from rollout.vllm_policy import VllmPolicy

        self.starts = 0

        def build(weights: Weights | None) -> VllmPolicy:
            self.starts += 1
            folder = str(model) if weights is None else weights.folder
            version = "" if weights is None else weights.version
            return VllmPolicy(
                folder, name="student", dtype="float32", max_model_len=256, max_num_seqs=4, kv_cache_bytes=16 << 20,
                weights_version=version,
            )  # fmt: skip

        self.loader = WeightLoader(build(None), build)

    def says(self, row: list[int]) -> np.ndarray:
        """[n - 1] log-probabilities of the row's tokens behind the first."""
        return run(self.loader.policy.score(row))[1][:, 0]


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A model, and another of its shape."""
    root = tmp_path_factory.mktemp("models")
    first = save_tiny_student(root / "first")
    return write_check(first, first), write_check(other := other_weights(first, root / "other"), other)


@pytest.fixture(scope="module")
def engine(folders: tuple[Path, Path]) -> Iterator[Engine]:
    pytest.importorskip("vllm")
    engine = Engine(folders[0])
    yield engine
    run(engine.loader.policy.close())


def transformers_says(folder: Path, row: list[int]) -> np.ndarray:
    return run(TransformersScorer(str(folder), dtype="float32").score([row], 0))[0].own[1:]


ROW = [5, 17, 300, 42, 900, 7, 8, 1200]


def test_weights_in_place_change_what_the_engine_says_to_what_the_model_says(engine, folders):
    before = engine.says(ROW)
    loaded = run(engine.loader.load(Weights(str(folders[1]), "other")))
    after = engine.says(ROW)
    assert (loaded.how, engine.loader.policy.weights_version, engine.starts) == ("in place", "other", 1)
    assert loaded.difference is not None and loaded.difference.largest < 1e-3
    assert np.abs(after - before).max() > 0.1
    assert after == pytest.approx(transformers_says(folders[1], ROW), abs=1e-3)
    [completion] = run(engine.loader.policy.complete([Message(role="user", content="Hi")], Sampling(max_tokens=4)))
    assert completion.weights_version == "other"


def test_a_version_that_is_there_is_not_loaded_again(engine, folders):
    run(engine.loader.load(Weights(str(folders[1]), "other")))
    assert run(engine.loader.load(Weights("nowhere", "other"))).how == "had them"


def test_weights_that_the_engine_cannot_take_change_nothing(engine, folders, tmp_path):
    run(engine.loader.load(Weights(str(folders[1]), "other")))
    with pytest.raises(PolicyError, match="no Hugging Face model folder"):
        run(engine.loader.load(Weights(str(tmp_path), "empty")))
    assert engine.loader.policy.weights_version == "other"
    assert engine.says(ROW) == pytest.approx(transformers_says(folders[1], ROW), abs=1e-3)


def test_weights_that_are_not_what_the_learner_has_are_refused_with_the_numbers(engine, folders, tmp_path):
    """Their check is of another model: neither a reload nor a new engine can make it true."""
    run(engine.loader.load(Weights(str(folders[1]), "other")))
    starts = engine.starts
    wrong = write_check(other_weights(folders[1], tmp_path / "wrong"), folders[1])
    with pytest.raises(WeightsRefused, match=r"'wrong' are refused: of \d+ log-probabilities the largest difference"):
        run(engine.loader.load(Weights(str(wrong), "wrong")))
    assert engine.starts == starts + 1
    assert engine.loader.policy.weights_version == "other"
    assert engine.says(ROW) == pytest.approx(transformers_says(folders[1], ROW), abs=1e-3)


def test_an_engine_that_cannot_be_loaded_in_place_is_started_anew(engine, folders):
    version = "first again" if engine.loader.policy.weights_version != "first again" else "first"
    starts = engine.starts
    run(engine.loader.policy.close())  # a dead engine loads nothing
    loaded = run(engine.loader.load(Weights(str(folders[0]), version)))
    assert (loaded.how, engine.starts, engine.loader.policy.weights_version) == ("started anew", starts + 1, version)
    assert "closed" in loaded.why_anew
    assert engine.says(ROW) == pytest.approx(transformers_says(folders[0], ROW), abs=1e-3)


# -- the check


def check_of(*logprobs: list[float]) -> LogprobCheck:
    return LogprobCheck(
        rows=tuple(tuple(range(len(row))) for row in logprobs),
        logprobs=tuple(map(tuple, logprobs)),
        tolerance=0.5,
        mean_tolerance=0.2,
    )


NAN = float("nan")


def test_the_largest_difference_is_found_where_it_is():
    difference = check_of([NAN, -1.0, -2.0], [NAN, NAN, -3.0]).difference(
        [np.array([NAN, -1.1, -2.0]), np.array([NAN, -99.0, -3.4])]
    )
    assert (difference.row, difference.token, difference.tokens) == (1, 2, 3)
    assert (difference.largest, difference.mean) == pytest.approx((0.4, 0.5 / 3))


def test_what_is_no_number_is_never_within_tolerance():
    check = check_of([NAN, -1.0])
    assert not check.accepts(check.difference([np.array([NAN, NAN])]))


def test_many_small_differences_are_refused_by_their_mean():
    check = check_of([NAN, *[-1.0] * 10])
    assert check.accepts(check.difference([np.array([NAN, -1.4, *[-1.0] * 9])]))
    assert not check.accepts(check.difference([np.array([NAN, *[-1.3] * 10])]))


def test_the_version_before_is_told_from_rounding():
    before, now = check_of([NAN, -1.0, -2.0, -3.0]), check_of([NAN, -1.01, -2.02, -3.01])
    check = dataclasses.replace(now, before=before)
    rounded = check.difference([np.array([NAN, -1.03, -2.0, -3.02])])
    stale = check.difference([np.array([NAN, -1.001, -2.002, -3.0])])
    assert stale.largest < rounded.largest
    assert check.accepts(rounded) and not check.accepts(stale)


@pytest.mark.parametrize(
    "text", ["{", '{"rows": [[1, 2]], "logprobs": [[null]], "tolerance": 1, "mean_tolerance": 1}', '{"rows": []}']
)
def test_a_check_that_cannot_be_used_is_no_check_passed(tmp_path, text):
    (tmp_path / CHECK_FILE).write_text(text)
    with pytest.raises(PolicyError, match="is no check of log-probabilities"):
        LogprobCheck.read(tmp_path)


def test_a_policy_without_weights_of_its_own_says_so():
    from rollout.policy import ScriptedPolicy

    policy = ScriptedPolicy(lambda messages, i: "")
    with pytest.raises(PolicyError, match="'scripted' has no weights that can change"):
        run(WeightLoader(policy, lambda weights: policy).load(Weights("folder", "v1")))


# -- many workers


class MadeUpWorker:
    """Takes what it is handed after `pause_s`, or raises what `script` says, one after another."""

    def __init__(self, name: str, *script: Exception, pause_s: float = 0.0) -> None:
        self.name, self.pause_s, self.script = name, pause_s, list(script)
        self.has, self.restarts = "", 0

    async def load(self, weights: Weights) -> Loaded:
        await asyncio.sleep(self.pause_s)
        if self.script:
            raise self.script.pop(0)
        self.has = weights.version
        return Loaded(how="in place")

    async def restart(self) -> None:
        self.restarts += 1


def test_every_worker_has_the_version_and_the_receipt_says_so():
    workers = [MadeUpWorker("w0"), MadeUpWorker("w1")]
    receipt = WeightSync(workers).publish(Path("folder"), "v1")
    assert receipt.took == ("w0", "w1") and not receipt.left_out
    assert [worker.has for worker in workers] == ["v1", "v1"]
    assert str(receipt).startswith("v1 on 2 workers in 0.")


def test_a_worker_that_misses_the_deadline_is_named_and_restarted_and_holds_nobody_up():
    slow = MadeUpWorker("slow", pause_s=60)
    receipt = WeightSync([MadeUpWorker("w0"), slow], deadline_s=0.2).publish(Path("folder"), "v1")
    assert receipt.took == ("w0",)
    assert receipt.left_out == {"slow": "not done within deadline_s=0.2: restarted"}
    assert (slow.restarts, slow.has) == (1, "")


def test_it_may_be_left_out_alone():
    slow = MadeUpWorker("slow", pause_s=60)
    receipt = WeightSync([MadeUpWorker("w0"), slow], deadline_s=0.2, late="exclude").publish(Path("folder"), "v1")
    assert receipt.left_out == {"slow": "not done within deadline_s=0.2"} and slow.restarts == 0


def test_a_worker_that_is_busy_or_away_is_asked_again():
    worker = MadeUpWorker("w0", WorkerBusyError("busy"), WorkerAwayError("away"))
    assert WeightSync([worker], deadline_s=30).publish(Path("folder"), "v1").took == ("w0",)


def test_a_worker_that_stays_busy_is_left_alone():
    worker = MadeUpWorker("busy", *[WorkerBusyError("it evaluates")] * 99)
    receipt = WeightSync([worker, MadeUpWorker("w1")], deadline_s=0.6).publish(Path("folder"), "v1")
    assert receipt.left_out == {"busy": "not done within deadline_s=0.6: it evaluates"} and worker.restarts == 0


def test_a_version_that_nobody_takes_is_an_error_with_each_reason():
    workers = [MadeUpWorker("w0", PolicyError("too far apart")), MadeUpWorker("w1", PolicyError("no such folder"))]
    with pytest.raises(WeightSyncError, match="'v1': w0: too far apart; w1: no such folder"):
        WeightSync(workers).publish(Path("folder"), "v1")


def test_nobody_to_hand_weights_to_is_refused():
    with pytest.raises(ValueError, match="no worker"):
        WeightSync([])


def test_errors_cross_processes_whole():
    error = pickle.loads(pickle.dumps(WorkerBusyError("it evaluates")))
    assert (str(error), error.failure_class) == ("it evaluates", FailureClass.INPUT)


# -- workers as Ray actors


@pytest.mark.slow
def test_a_ray_worker_that_hangs_is_restarted_and_the_next_version_finds_it(ray_cluster):
    from rollout.weight_sync import RayWorker

    class Actor:
        """As `RolloutActor`: hangs at version "v1"."""

        async def load_weights(self, weights: Weights) -> Loaded:
            if weights.version == "refused":
                raise WeightsRefused("too far apart")
            await asyncio.sleep(600 if weights.version == "v1" else 0)
            return Loaded(how="in place")

    actor = ray_cluster.remote(Actor).options(num_cpus=0, max_restarts=-1).remote()
    worker = RayWorker(actor, "w0")
    sync = WeightSync([worker], deadline_s=60)
    try:
        assert sync.publish(Path("folder"), "v0").took == ("w0",)
        with pytest.raises(WeightSyncError, match="w0: not done within deadline_s=0.5: restarted"):
            WeightSync([worker], deadline_s=0.5).publish(Path("folder"), "v1")
        assert pickle.loads(pickle.dumps(sync)).publish(Path("folder"), "v2").took == ("w0",)
        with pytest.raises(WeightSyncError, match="w0: too far apart"):
            sync.publish(Path("folder"), "refused")
    finally:
        ray_cluster.kill(actor)


@pytest.mark.slow
def test_a_real_worker_takes_a_version_and_takes_it_again_after_its_process_was_killed(ray_cluster, folders):
    pytest.importorskip("vllm")
    from rollout.collector import start_rollout_actors, stop_rollout_actors
    from rollout.policy_spec import PolicySpec
    from rollout.weight_sync import RayWorker

    spec = PolicySpec(
        kind="vllm", name="student", model=str(folders[0]), dtype="float32", max_model_len=256, max_num_seqs=4,
        kv_cache_bytes=16 << 20,
    )  # fmt: skip
    actors = start_rollout_actors(spec, count=1)
    sync = WeightSync([RayWorker(actors[0], "w0")], deadline_s=90)
    try:
        first = sync.publish(folders[1], "other").loaded["w0"]
        assert first.how == "in place" and first.difference is not None and first.difference.largest < 1e-3
        assert sync.publish(folders[1], "other").loaded["w0"].how == "had them"
        os.kill(ray_cluster.get(actors[0].pid.remote(), timeout=30), signal.SIGKILL)  # it is gone when this returns
        assert sync.publish(folders[1], "other").loaded["w0"].how == "in place"
    finally:
        stop_rollout_actors(actors)
