"""The simulation of scale (`benchmarks/scale.py`): what it replays, how it measures, and a tiny run of it; and when a
worker records what has finished."""

from __future__ import annotations

import asyncio
import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from benchmarks.rollout_world import LocalFeed
from benchmarks.scale_delays import Delays, StepDelay, load, measure, teacher, to_json
from benchmarks.scale_figures import peak, pure, steady, whole
from benchmarks.scale_processes import DRIVER, Sample, sampled, spent
from benchmarks.scale_world import SimulatedPolicy, SleepingEnv, replayed, tasks
from rollout.episode import EpisodeSettings, run_episode
from rollout.ledger import LedgerWriter
from rollout.task_feed import EpisodeRequest, TaskFeed
from rollout.worker import FLUSH_MOST_S, FLUSH_S, RolloutWorker, flush_s

ROOT = Path(__file__).parents[1]


def delays_of(*episodes: tuple[float, ...]) -> Delays:
    """Each step's policy takes so long, its env half of it."""
    return Delays(
        source="a test",
        episodes=tuple(tuple(StepDelay(policy_s=s, env_s=s / 2) for s in steps) for steps in episodes),
    )


# -- what is replayed


def test_a_run_of_tasks_replays_every_measured_episode_once() -> None:
    delays = load()
    count = len(delays.episodes)
    second = [delays.episode(number) for number in range(count, 2 * count)]
    assert sorted(second, key=repr) == sorted(delays.episodes, key=repr)
    assert second != [delays.episode(number) for number in range(count)]


def test_an_assumed_teacher_is_slower_in_its_policy_alone() -> None:
    slow = teacher(delays_of((1.0, 2.0)), 5.0)
    assert "an assumption" in slow.source and "times 5" in slow.source
    assert slow.episodes == ((StepDelay(policy_s=5.0, env_s=0.5), StepDelay(policy_s=10.0, env_s=1.0)),)


def test_stragglers_of_a_measurement_are_left_out_of_the_assumption() -> None:
    assert len(teacher(delays_of((1.0,), (1.0,), (1.0,), (9.0,))).episodes) == 3


def test_episodes_that_are_under_way_at_the_start_replay_a_part() -> None:
    delays = {"a": delays_of((1.0, 3.0))}
    begun, whole_one = tasks("a", 2, begun=1)
    share = float(begun.id.partition("@")[2])
    assert 0 < share < 1
    assert replayed(delays, begun.question) == (
        0, [StepDelay(policy_s=share, env_s=share / 2), StepDelay(policy_s=3 * share, env_s=1.5 * share)]
    )  # fmt: skip
    assert replayed(delays, whole_one.id) == (1, list(delays["a"].episodes[0]))


def test_a_simulated_episode_is_recorded_with_the_delays_that_it_replays_and_can_be_measured_again(
    tmp_path: Path,
) -> None:
    delays = delays_of((0.02, 0.06, 0.04))
    act = run_episode(
        tasks("a", 1)[0],
        policy=SimulatedPolicy({"a": delays}),
        env=SleepingEnv({"a": delays}),
        settings=EpisodeSettings(max_steps=5),
    )
    trajectory = asyncio.run(act)
    assert trajectory.success and trajectory.trainable and len(trajectory.steps) == 3
    LedgerWriter(tmp_path / "ledger", "w").append([trajectory])
    (tmp_path / "again.json").write_text(to_json(measure(tmp_path / "ledger", "this test")))
    [again] = load(tmp_path / "again.json").episodes
    for step, expected in zip(again, delays.episodes[0], strict=True):
        assert step.policy_s >= expected.policy_s and step.env_s >= expected.env_s


def test_a_file_without_episodes_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "delays.json"
    path.write_text(json.dumps({"source": "nowhere"}))
    with pytest.raises(ValueError, match=r"delays\.json holds no measured delays: 'episodes'"):
        load(path)


# -- how it is measured


def test_the_steady_window_leaves_ramp_up_and_drain_out() -> None:
    # Two places, each with four episodes of 10 s, the second 5 s behind the first.
    times = [(place * 5.0 + 10.0 * i, place * 5.0 + 10.0 * (i + 1)) for place in (0, 1) for i in range(4)]
    window = steady(times, at_once=2)
    assert (window.began_s, window.ended_s) == (10.0, 35.0)
    assert window.episodes == 6
    assert whole(times).rate == 8 / 45.0


def test_episodes_that_only_wait_take_the_place_that_is_free_first() -> None:
    assert pure([3.0, 1.0, 1.0, 2.0], 2) == [(0.0, 3.0), (0.0, 1.0), (1.0, 2.0), (2.0, 4.0)]


def test_the_peak_counts_what_overlaps() -> None:
    assert peak([(0.0, 2.0), (1.0, 3.0), (2.0, 4.0), (2.5, 5.0)]) == 3


def test_too_few_episodes_are_never_in_a_steady_state() -> None:
    with pytest.raises(ValueError, match="2 episodes, 2 at once at most: .* give two for each place"):
        steady([(0.0, 1.0), (0.0, 1.0)], at_once=2)


def test_processor_time_is_told_by_role_between_two_moments() -> None:
    def sample(at_s: float, feed_s: float) -> Sample:
        return Sample(
            unix_s=at_s, cpu_s={"feed": feed_s}, processes={}, pss_mb={}, machine_s=2 * at_s, machine_free_mb=0.0
        )

    samples = [sample(0.0, 1.0), sample(10.0, 2.0), sample(20.0, 5.0), sample(30.0, 50.0)]
    assert spent(samples, 9.0, 21.0) == {"feed": 3.0, "machine": 20.0, "wall": 10.0}


def test_this_process_is_seen_from_another_one_at_work() -> None:
    with sampled(every_s=0.2) as samples:
        before = os.times()
        while (now := os.times()).user + now.system - before.user - before.system < 0.6:
            sum(range(10_000))
    assert samples[-1].cpu_s[DRIVER] - samples[0].cpu_s[DRIVER] > 0.1
    assert samples[0].pss_mb[DRIVER] > 1


# -- when a worker records


def test_what_finished_waits_a_tenth_of_its_time_within_bounds() -> None:
    assert [flush_s(seconds) for seconds in (0.0, 10.0, 1000.0)] == [FLUSH_S, 1.0, FLUSH_MOST_S]


class NothingYet(LocalFeed):
    """Has nothing for `seconds`, then says that this was all."""

    def __init__(self, seconds: float) -> None:
        super().__init__(TaskFeed([]))
        self._until_s = time.monotonic() + seconds
        self.asked = 0

    async def next(self, worker: str, count: int) -> list[EpisodeRequest] | None:
        self.asked += 1
        return [] if time.monotonic() < self._until_s else None


def test_workers_without_work_ask_less_and_less_often(tmp_path: Path) -> None:
    feed, delays = NothingYet(1.5), {"a": delays_of((0.1,))}
    worker = RolloutWorker(
        name="w", policy=SimulatedPolicy(delays), envs=[SleepingEnv(delays) for _ in range(8)],
        settings=EpisodeSettings(), feed=feed, ledger=LedgerWriter(tmp_path / "ledger", "w"),
    )  # fmt: skip
    assert asyncio.run(worker.run()) == 0
    assert 2 <= feed.asked <= 6  # every fifth of a second would be 8


# -- the whole


@pytest.mark.slow
def test_a_tiny_simulation_loses_nothing_and_prints_its_table(tmp_path: Path) -> None:
    measured = delays_of((0.3, 0.2), (0.5,), (0.4, 0.3))
    (tmp_path / "delays.json").write_text(to_json(measured))
    command = [
        sys.executable, "benchmarks/scale.py", "--delays-file", str(tmp_path / "delays.json"), "--factor", "5",
        "--workers", "1,2", "--student-workers", "2", "--slots", "10", "--student-rounds", "12", "--rounds", "4",
        "--sample-s", "0.2",
        "--json", str(tmp_path / "rows.json"), "--picture", str(tmp_path / "scale.png"),
    ]  # fmt: skip
    ran = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=600)
    assert ran.returncode == 0, ran.stderr
    assert "teacher: 2 workers, 80 episodes" in ran.stdout
    rows = {row["what"]: row for row in json.loads((tmp_path / "rows.json").read_text())["rows"]}
    assert rows["episodes under way at one moment, at most"]["measured"] == 20
    assert rows["2 workers: linear, beside 1"]["measured"] > 1 / 2
    assert (tmp_path / "scale.png").read_bytes().startswith(b"\x89PNG")
