"""A learner that is killed in mid-step goes on from its last checkpoint and takes the steps it would have taken."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import learner_samples
import pytest
from learner_samples import ListSource, save_tiny_student, trajectory

from learner.arrival_log import ArrivalLog
from learner.base import LearnerError, RankLostError
from learner.config import LearnerConfig
from learner.examples import Refusal, RefusedRow
from learner.learner_actor import to_blame
from learner.trainer import Learner
from rollout.trajectory import Trajectory

ROWS = [trajectory(i) for i in range(24)]


class ShuffledSource:
    """Brings the same trajectories in another order each time it is made, as a ledger and a queue do."""

    def __init__(self, seed: int) -> None:
        rows = list(ROWS)
        random.Random(seed).shuffle(rows)
        self._rows = ListSource(rows, batch=5)

    def next(self, max_trajectories: int, timeout_s: float) -> list[Trajectory] | None:
        return self._rows.next(max_trajectories, timeout_s)


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_student(tmp_path_factory.mktemp("student"))


def config_of(base: Path, out: Path, **changes: Any) -> LearnerConfig:
    settings: dict[str, Any] = {
        "epochs": 2,
        "tokens_per_step": 1000,
        "micro_batch_tokens": 1024,
        "max_row_tokens": 512,
        "warmup_steps": 2,
        "expected_trajectories": len(ROWS),
        "checkpoint_every_steps": 2,
        "precision": "fp32",
        "optimizer": "adamw",
        "collective_timeout_s": 30.0,
    }
    return LearnerConfig(model_path=str(base), output_dir=str(out), **{**settings, **changes})


def curve(out: Path) -> list[tuple[int, float]]:
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    return [(line["step"], line["loss"]) for line in lines]


# -- what arrived comes again in the same order


def arrivals(keys: str) -> list[RefusedRow]:
    return [RefusedRow(key, Refusal.EMPTY) for key in keys]


def keys_of(rows: list[RefusedRow]) -> str:
    return "".join(row.key for row in rows)


def test_what_arrived_before_is_taken_first_and_in_its_first_order(tmp_path: Path) -> None:
    log: ArrivalLog[RefusedRow] = ArrivalLog(tmp_path / "log", resume=True)
    assert keys_of(log.in_order(arrivals("cabb"))) == "cabb"
    log.close()
    again: ArrivalLog[RefusedRow] = ArrivalLog(tmp_path / "log", resume=True)
    assert [keys_of(again.in_order(arrivals(key))) for key in "abxcb"] == ["", "", "", "cab", "bx"]
    again.close()
    third: ArrivalLog[RefusedRow] = ArrivalLog(tmp_path / "log", resume=True)
    assert keys_of(third.in_order(arrivals("xbabc"))) == "cabbx"
    third.close()


def test_what_does_not_come_again_holds_nothing_up(tmp_path: Path) -> None:
    log: ArrivalLog[RefusedRow] = ArrivalLog(tmp_path / "log", resume=True)
    log.in_order(arrivals("abc"))
    log.close()
    again: ArrivalLog[RefusedRow] = ArrivalLog(tmp_path / "log", resume=True)
    assert keys_of(again.in_order(arrivals("xcb"))) == ""
    assert keys_of(again.give_up_waiting()) == "bcx"
    assert keys_of(again.in_order(arrivals("y"))) == "y"
    again.close()


def test_a_torn_last_line_and_an_earlier_run_are_passed_over(tmp_path: Path) -> None:
    path = tmp_path / "log"
    path.write_text('"a"\n"b"\n"c')
    ArrivalLog(path, resume=True).close()
    assert path.read_text() == '"a"\n"b"\n'
    ArrivalLog(path, resume=False).close()
    assert path.read_text() == ""


# -- one process


def test_a_learner_stopped_within_the_stream_does_not_depend_on_the_order_of_the_second_time(
    base: Path, tmp_path: Path
) -> None:
    Learner(config_of(base, tmp_path / "whole"), ShuffledSource(1)).run()
    learner = Learner(config_of(base, tmp_path / "cut"), ShuffledSource(1), on_progress=lambda at: learner.stop())
    assert not learner.run().done
    assert Learner(config_of(base, tmp_path / "cut"), ShuffledSource(2)).run().resumed_from_step == 1
    assert curve(tmp_path / "cut") == curve(tmp_path / "whole")


CHILD = """
import os, signal, sys, threading
sys.path[:0] = [{root!r}, {tests!r}]
from pathlib import Path
from test_learner_restarts import ShuffledSource, config_of
from learner.trainer import Learner

def watch(progress):
    if progress.step == {kill_at}:  # in the midst of the step that comes next
        threading.Timer(progress.step_s / 2, os.kill, (os.getpid(), signal.SIGKILL)).start()

Learner(config_of(Path({base!r}), Path({out!r})), ShuffledSource({seed}), on_progress=watch).run()
"""


def run_in_child(base: Path, out: Path, *, seed: int, kill_at: int) -> int:
    root = Path(__file__).resolve().parent.parent
    code = CHILD.format(
        root=str(root), tests=str(root / "tests"), base=str(base), out=str(out), seed=seed, kill_at=kill_at
    )
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.run([sys.executable, "-c", code], env=environment, timeout=240, capture_output=True).returncode


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_a_job_killed_twice_in_mid_step_has_the_curve_of_an_uninterrupted_one(base: Path, tmp_path: Path) -> None:
    Learner(config_of(base, tmp_path / "whole"), ShuffledSource(0)).run()
    whole = curve(tmp_path / "whole")
    assert len(whole) >= 9
    for seed, kill_at in ((0, 3), (1, 7)):  # within the stream, within the second pass
        assert run_in_child(base, tmp_path / "cut", seed=seed, kill_at=kill_at) == -signal.SIGKILL
        assert curve(tmp_path / "cut") == whole[: len(curve(tmp_path / "cut"))]
    assert run_in_child(base, tmp_path / "cut", seed=2, kill_at=-1) == 0
    assert curve(tmp_path / "cut") == whole


# -- ranks as Ray actors


def group_of(ray_cluster: Any, config: LearnerConfig) -> Any:
    from learner.learner_actor import LearnerGroup

    ray_cluster.cloudpickle.register_pickle_by_value(learner_samples)
    return LearnerGroup.start(config, ListSource(ROWS, batch=4, pause_s=0.1))


def kill_when(group: Any, rank: int, *, step: int) -> None:
    """SIGKILL to the rank's process once so many steps are done."""
    process = group.process_ids()[rank]
    deadline = time.monotonic() + 120
    while group.progress().step < step:
        assert not group.finished() and time.monotonic() < deadline
        time.sleep(0.02)
    os.kill(process, signal.SIGKILL)


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize("rank", [0, 1], ids=["the head of the group", "another rank"])
def test_a_killed_rank_is_started_again_and_the_curve_is_that_of_an_uninterrupted_run(
    ray_cluster: Any, base: Path, tmp_path: Path, rank: int
) -> None:
    Learner(config_of(base, tmp_path / "one", zero_stage=2, epochs=8), ListSource(ROWS)).run()
    group = group_of(ray_cluster, config_of(base, tmp_path / "two", zero_stage=2, epochs=8, ranks=2))
    try:
        group.run()
        kill_when(group, rank, step=5)
        deadline = time.monotonic() + 200
        while not group.finished(timeout_s=1.0):
            assert group.progress().step >= 0 and time.monotonic() < deadline
        final = group.result(timeout_s=1.0)
    finally:
        group.shutdown()
    assert final.done and final.restarts == 1 and final.resumed_from_step >= 4
    one, two = curve(tmp_path / "one"), curve(tmp_path / "two")
    assert [step for step, _ in two] == [step for step, _ in one]
    assert [loss for _, loss in two] == pytest.approx([loss for _, loss in one], abs=1e-4)


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_a_node_that_is_to_go_costs_no_more_than_since_the_notice(ray_cluster: Any, base: Path, tmp_path: Path) -> None:
    config = config_of(base, tmp_path, zero_stage=2, epochs=16, ranks=2, checkpoint_every_steps=1000)
    group = group_of(ray_cluster, config)
    here = ray_cluster.get_runtime_context().get_node_id()
    checkpoints, deadline = tmp_path / "checkpoints", time.monotonic() + 200
    try:
        group.run()
        while group.progress().step < 3:
            assert not group.finished() and time.monotonic() < deadline
        assert not group.prepare_for_loss(["f" * len(here)])
        assert group.prepare_for_loss([here]) and not group.prepare_for_loss([here])
        while not list(checkpoints.glob("step-*")):
            assert not group.finished() and time.monotonic() < deadline
        kill_when(group, 1, step=0)
        while not group.finished(timeout_s=1.0):
            assert group.progress().step >= 0 and time.monotonic() < deadline
        final = group.result(timeout_s=1.0)
    finally:
        group.shutdown()
    assert final.done and final.restarts == 1 and final.resumed_from_step >= 3


class DeadlySource:
    """Ends the process that it is brought to, so many times; then it is a `ListSource`."""

    def __init__(self, marks: Path, times: int) -> None:
        self._marks, self._times = marks, times

    def __reduce__(self) -> tuple[Any, ...]:
        return _die_or_bring, (self._marks, self._times)


def _die_or_bring(marks: Path, times: int) -> ListSource:
    marks.mkdir(exist_ok=True)
    if (died := len(list(marks.iterdir()))) < times:
        (marks / str(died)).touch()
        os.kill(os.getpid(), signal.SIGKILL)
    return ListSource(ROWS)


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_a_rank_that_dies_while_it_is_started_is_started_again(ray_cluster: Any, base: Path, tmp_path: Path) -> None:
    from learner.learner_actor import LearnerGroup

    for module in (learner_samples, sys.modules[__name__]):
        ray_cluster.cloudpickle.register_pickle_by_value(module)
    config = config_of(base, tmp_path / "once", ranks=2, restarts=1)
    group = LearnerGroup.start(config, DeadlySource(tmp_path / "deaths", 1))
    try:
        group.run()
        final = group.result(timeout_s=200)
    finally:
        group.shutdown()
    assert final.done and final.restarts == 1
    with pytest.raises(LearnerError, match="a rank of the learner died while it was started"):
        LearnerGroup.start(config_of(base, tmp_path / "twice", restarts=1), DeadlySource(tmp_path / "more", 2))


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_ranks_that_die_too_often_end_the_run(ray_cluster: Any, base: Path, tmp_path: Path) -> None:
    group = group_of(ray_cluster, config_of(base, tmp_path, zero_stage=2, epochs=1000, ranks=2, restarts=1))
    try:
        group.run()
        kill_when(group, 1, step=5)
        deadline = time.monotonic() + 200
        while group.progress().resumed_from_step == 0:  # those of the first time know nothing of a resume
            assert not group.finished(timeout_s=0.5) and time.monotonic() < deadline
        kill_when(group, 1, step=8)
        with pytest.raises(LearnerError, match="rank 1 of the learner failed .and was started again 1 times before"):
            group.result(timeout_s=60)
    finally:
        group.shutdown()


def test_a_death_is_blamed_before_what_it_caused() -> None:
    from ray.exceptions import ActorDiedError, RayTaskError

    def raised(error: Exception) -> Exception:
        return RayTaskError("run", "", error).as_instanceof_cause()

    died, lost = ActorDiedError(), raised(RankLostError("rank 0 lost another rank"))
    assert to_blame({0: lost, 1: died}) == (1, died, True)
    assert to_blame({0: raised(RuntimeError("Connection closed")), 1: died}) == (1, died, True)
    own = raised(LearnerError("no full step of trajectories came"))
    assert to_blame({0: own, 1: lost}) == (0, own, False)
    assert to_blame({0: lost, 1: lost}) == (0, lost, True)
