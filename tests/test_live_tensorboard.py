"""What the job tells TensorBoard, read back by TensorBoard."""

from __future__ import annotations

from dataclasses import replace

import pytest
from live_samples import NOW_S, STARTED_S, learning_status, scored_status
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from launch.live.tensorboard_sink import TensorBoardFigures, figures


def read(folder) -> EventAccumulator:
    events = EventAccumulator(str(folder))
    events.Reload()
    return events


def test_event_files_hold_the_figures_over_the_seconds_of_the_whole_run(tmp_path):
    sink = TensorBoardFigures(tmp_path / "tensorboard")
    sink.take(learning_status())
    sink.take(replace(scored_status(), updated_unix_s=NOW_S + 60))  # another stage: told at once
    sink.close()
    events = read(tmp_path / "tensorboard")
    (queue,) = events.Scalars("job/queue")
    assert (queue.step, queue.value, queue.wall_time) == (1272, 205.0, NOW_S)
    assert [event.step for event in events.Scalars("job/spent usd")] == [1272, 1332]
    (success,) = events.Scalars("rollouts/success")
    assert success.value == pytest.approx(2380 / 2440)
    (score,) = events.Scalars("scores/untrained/arithmetic")
    assert score.value == pytest.approx(0.03)


def test_a_job_that_goes_on_goes_on_in_its_curves(tmp_path):
    for later_s in (0, 5000):
        sink = TensorBoardFigures(tmp_path)
        sink.take(replace(learning_status(), updated_unix_s=NOW_S + later_s, started_unix_s=STARTED_S + later_s))
        sink.close()
    assert [event.step for event in read(tmp_path).Scalars("rollouts/episodes")] == [1272, 6272]


def test_it_is_told_now_and_then(tmp_path):
    sink = TensorBoardFigures(tmp_path)
    for _ in range(20):
        sink.take(learning_status())
    sink.close()
    assert len(read(tmp_path).Scalars("job/queue")) == 1


def test_figures_are_of_the_stage_that_runs():
    shown = figures(scored_status())
    assert shown["student/success arithmetic"] == pytest.approx(180 / 186)
    assert not any(name.startswith("rollouts/") for name in shown)
    assert shown["scores/untrained/two_hop"] == 0.0
