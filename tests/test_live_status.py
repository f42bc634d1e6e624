"""The status of a job: as data, as a file, and the numbers that are made of what came before."""

from __future__ import annotations

import json
import math
import threading
from dataclasses import replace
from pathlib import Path

import pytest
from live_samples import NOW_S, STARTED_S, learned, learning_status, scored_status

from launch.live.drawing import clock, duration, sparkline
from launch.live.paces import Pace, Trail
from launch.live.status import VERSION, StatusError, from_json, printable, to_json
from launch.live.status_file import StatusFile, began_before, read_status


@pytest.mark.parametrize("status", [learning_status(), scored_status()], ids=["learning", "scored"])
def test_a_status_survives_its_file(status):
    assert from_json(to_json(status)) == status


def test_numbers_that_are_not_finite_survive_as_json(tmp_path):
    status = replace(learning_status(), learning=replace(learned(), loss=math.nan, grad_norm=math.inf))
    plain = json.loads(to_json(status), parse_constant=lambda name: pytest.fail(f"{name} is no JSON"))
    assert plain["learning"]["loss"] == "NaN"
    again = from_json(to_json(status)).learning
    assert math.isnan(again.loss) and again.grad_norm == math.inf


def test_fields_of_a_newer_writer_are_passed_over():
    plain = json.loads(to_json(learning_status()))
    plain["later"] = plain["learning"]["later"] = 1
    assert from_json(json.dumps(plain)) == learning_status()


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "no JSON"),
        ("[]", "names no version"),
        ('{"scores": {}}', "names no version"),
        (f'{{"version": {VERSION + 1}}}', f"reads up to {VERSION}"),
        ('{"version": 1, "learning": {"step": "many"}}', "learning.step"),
    ],
)
def test_what_is_no_status_is_refused_by_name(text, said):
    with pytest.raises(StatusError, match=said):
        from_json(text)


def test_the_file_holds_the_last_status(tmp_path):
    file = StatusFile(tmp_path)
    file.take(learning_status())
    file.take(replace(scored_status(), state="done"))
    file.close()
    status = read_status(tmp_path)
    assert (status.state, status.stages) == ("done", scored_status().stages)
    assert status.written_unix_s > NOW_S
    assert began_before(tmp_path) == STARTED_S - 1000
    assert [path.name for path in tmp_path.iterdir()] == ["status.json"]


def test_readers_never_see_a_part_of_the_file(tmp_path):
    file, ended = StatusFile(tmp_path), threading.Event()
    long = replace(learning_status(), figures={str(i): "x" * 1000 for i in range(300)})

    def write() -> None:
        for i in range(60):
            file._storage.replace("status.json", to_json(replace(long, pid=i)))
        ended.set()

    file._storage.replace("status.json", to_json(long))
    writer = threading.Thread(target=write)
    writer.start()
    seen = 0
    while not ended.is_set():
        assert len(read_status(tmp_path).figures) == 300
        seen += 1
    writer.join()
    file.close()
    assert seen


def test_a_folder_that_is_gone_ends_no_job(tmp_path):
    file = StatusFile(tmp_path / "gone")
    file.take(learning_status())
    file.close()
    with pytest.raises(StatusError, match="holds no status.json: give the folder of a job"):
        read_status(tmp_path / "gone")


def test_a_folder_of_something_else_is_told(tmp_path: Path):
    (tmp_path / "status.json").write_text("{}")
    with pytest.raises(StatusError, match=r"status\.json: it is no status of a job"):
        read_status(tmp_path)
    assert began_before(tmp_path) is None


def test_a_pace_is_that_of_late():
    pace = Pace()
    for second in range(400):
        pace.add(100.0 * min(second, 100) + max(0, second - 100), at_s=float(second))
    assert pace.per_s == pytest.approx(1.0, rel=0.05)  # it was 100 at first
    assert pace.left_s(pace._last + 50) == pytest.approx(50, rel=0.05)


def test_a_pace_says_nothing_before_it_knows():
    pace = Pace()
    assert pace.per_s is None and pace.left_s(10) is None
    pace.add(0, at_s=0.0)
    pace.add(5, at_s=1.0)
    assert pace.left_s(10) is None
    pace.add(5, at_s=100.0)
    pace.add(5, at_s=400.0)
    assert pace.left_s(10) is None  # it stands still
    assert pace.left_s(5) == 0.0


def test_a_pace_that_shrinks_begins_again():
    pace = Pace()
    pace.add(1000, at_s=0.0)
    pace.add(0, at_s=10.0)
    pace.add(20, at_s=20.0)
    assert pace.per_s == 2.0


def test_a_trail_keeps_the_whole_curve_in_few_points():
    trail = Trail(least=50)
    for i in range(10_000):
        trail.add(float(i))
    assert 50 <= len(trail.points) <= 101
    assert list(trail.points) == sorted(trail.points)
    assert trail.points[0] < 200 and trail.points[-1] > 9800


def test_a_trail_leaves_out_what_is_not_finite():
    trail = Trail()
    for value in (1.0, math.nan, math.inf, 3.0):
        trail.add(value)
    assert trail.points == (1.0, 3.0)


def test_a_sparkline_falls_with_a_loss_over_decades():
    drawn = sparkline([10.0 ** -(i / 10) for i in range(50)], 10)
    assert drawn == "".join(sorted(drawn, reverse=True)) and len(drawn) == 10 and len(set(drawn)) > 5
    assert sparkline([], 10) == sparkline([math.nan], 10) == "" and sparkline([1.0, 1.0], 10) == "▁▁"


def test_durations_read_as_people_say_them():
    assert [duration(s) for s in (45, 720, 12_000, 200_000)] == ["45 s", "12 min", "3.3 h", "2.3 days"]
    assert [clock(s) for s in (272, 3872, 180_000)] == ["04:32", "1:04:32", "2d 02:00:00"]


def test_what_others_said_cannot_steer_a_terminal():
    assert printable("a\x1b[31m\r\nb\x07\x9b1m  c") == "a [31m b 1m c"
