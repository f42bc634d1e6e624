"""What a person sees of a job: the screen at several sizes, and the plain lines."""

from __future__ import annotations

import io
import re
from dataclasses import replace

import pytest
from live_samples import LEARNING, NOW_S, STARTED_S, collected, learned, learning_status, queued, scored_status, spent
from rich.console import Console

from launch.evaluation.intervals import score
from launch.evaluation.scoring import EvaluationError, watch_evaluation
from launch.live.lines import plain_line
from launch.live.status import JobStatus, Said, Stage
from launch.live.terminal import Screen
from launch.live.view import LiveView
from rollout.task_feed import CollectProgress


def drawn(status: JobStatus, width: int, height: int = 100, *, ascii_only: bool = False, **options) -> list[str]:
    screen = Screen(status, now_unix_s=options.pop("now_unix_s", NOW_S), **options)
    return [line.plain for line in screen.lines(width, height, ascii_only=ascii_only)]


def line_of(lines: list[str], name: str) -> str:
    (found,) = [line for line in lines if line.strip().startswith(name)]
    return found


@pytest.mark.parametrize("width", [40, 80, 100, 130, 200])
@pytest.mark.parametrize("status", [learning_status(), scored_status(), JobStatus()], ids=["learning", "scored", "new"])
def test_no_line_is_wider_than_the_terminal(status, width):
    console = Console(width=width, file=io.StringIO(), force_terminal=True, color_system=None, record=True)
    console.print(Screen(status, now_unix_s=NOW_S))
    lines = console.export_text().splitlines()
    assert lines and max(map(len, lines)) <= width


def test_eighty_columns_hold_all_that_matters():
    lines = drawn(learning_status(), 80)
    assert lines[0].startswith("starter-seed0  distill") and lines[0].endswith("running 04:32")
    assert lines[1] == f"▶ {LEARNING}"
    assert re.search(r"episodes  ━+─+ +2549/5500   46% 5 min left$", lines[2])
    assert re.search(r"training  ━+─+ +step 188   19% 11 min left$", lines[3])
    assert lines[4] == "· then evaluation: untrained, student"
    assert "2440 ok   100 found of earlier jobs   9 failed: engine 5, limit 4" in "\n".join(lines)
    assert "97.5%   arithmetic 99.2%   two_hop 96.0%" in line_of(lines, "success")
    assert "205/256   the learner is the slower side" in line_of(lines, "queue")
    assert re.search(r"0\.010 +█[▁-█]+   99\.2% correct", line_of(lines, "code"))
    assert "6%   $1.2034 of $20" in line_of(lines, "spent")
    assert [line.strip() for line in lines if line.strip().startswith("waits")] == [
        "waits     the endpoint asks for a pause",
        "waits     rollout waits for the learner: the queue is full",
    ]
    assert lines[-1] == "! [03:20] a rank of the learner died"


def test_wide_terminals_show_rollout_and_learning_side_by_side():
    lines = drawn(learning_status(), 200)
    (both,) = [line for line in lines if "2440 ok" in line]
    assert "loss" in both and both.index("2440 ok") < 100 < both.index("0.019")
    assert "about $" not in "".join(lines)  # the teacher's episodes tell no cost here
    assert len(lines) < len(drawn(learning_status(), 80))


@pytest.mark.parametrize("height", [6, 10, 16, 24])
@pytest.mark.parametrize("width", [80, 200])
def test_a_low_terminal_loses_what_matters_least(width, height):
    lines = drawn(learning_status(), width, height)
    assert len(lines) <= height
    text = "\n".join(lines)
    assert all(word in text for word in ("running 04:32", LEARNING, "2549/5500", "step 188"))
    if height >= 16:
        assert "97.5%" in text and "0.019" in text and "$1.2034" in text


def test_what_has_ended_shows_its_scores():
    lines = drawn(scored_status(), 100)
    assert f"✓ {LEARNING}  15:30  2380 of 2440 solved" in lines
    assert "✓ evaluation: untrained  00:47  2% solved   arithmetic 3%   two_hop 0%" in lines
    assert not any(line.strip().startswith(("loss", "queue", "training")) for line in lines)


def test_a_terminal_without_signs_gets_letters():
    lines = drawn(learning_status(), 80, ascii_only=True)
    assert "".join(lines).isascii() and "####" in lines[2]


def test_what_others_say_is_text_and_no_command():
    hostile = "\x1b[2J[bold]x[/bold]\nnew line " + "w" * 500
    stage = Stage(
        title=LEARNING,
        state="running",
        episodes=replace(collected(), last_failure=hostile, by_kind={hostile: (1, 1), "b": (1, 1)}),
        by_policy={hostile: collected(), "m": collected()},
    )
    status = replace(learning_status(), stages=(stage,), note=hostile, error=hostile, figures={hostile: hostile})
    for text in (*drawn(status, 80, watched=True), plain_line(status)):
        assert "\x1b" not in text and "\n" not in text
    assert any("[bold]x[/bold]" in line for line in drawn(status, 80))


def test_a_watched_job_that_is_silent_is_told():
    status = replace(learning_status(), written_unix_s=NOW_S)
    assert "silent for 4 min: is it alive?" in drawn(status, 80, watched=True, now_unix_s=NOW_S + 240)[0]
    assert "running" in drawn(status, 80, watched=True, now_unix_s=NOW_S + 5)[0]
    done = replace(status, state="done")
    assert drawn(done, 80, watched=True, now_unix_s=NOW_S + 9999)[0].endswith("done 04:32")


def test_a_loss_that_is_not_finite_is_told():
    status = replace(learning_status(), learning=replace(learned(), loss=float("nan")))
    assert "not finite" in line_of(drawn(status, 80), "loss")


# -- plain lines


def plain_view(**options) -> tuple[LiveView, io.StringIO]:
    out = io.StringIO()
    return LiveView(Console(file=out, highlight=False, soft_wrap=True), **options), out


def told(view: LiveView, **options) -> None:
    view.update(episodes=replace(collected(565), total=5500, found=0, succeeded=565, failed=0, failures={}, workers={}),
                queue=queued(), learning=learned(8), **options)  # fmt: skip


def test_where_there_is_no_terminal_a_line_comes_now_and_then():
    view, out = plain_view()
    with view, view.stage(LEARNING):
        for _ in range(5):
            told(view)
        told(view, last=True)
    lines = out.getvalue().splitlines()
    assert lines[0] == f"[00:00] {LEARNING}"
    assert len(lines) == 3
    assert re.fullmatch(
        r"\[00:00\]   episodes 565/5500; success 565/565; queue 205/256; step 8; trained 19%; loss 0\.019; "
        r"correct 99\.3%; tokens/s 3333; MFU 12\.3%; memory 2\.8 GiB; held-out loss 0\.030; "
        r"waited 25 s \(9% of learning\)",
        lines[1],
    )


def test_an_evaluation_has_a_line_of_its_own():
    view, out = plain_view()
    with view, view.stage("evaluation: student"):
        seen = CollectProgress(total=400, recorded=400, succeeded=372, completion_tokens=7000, elapsed_s=2.0)
        view.update(episodes=seen)
    assert out.getvalue().splitlines()[1] == "[00:00]   episodes 400/400; success 372/400; tokens/s 3500"


def test_a_collection_tells_failures_costs_and_waits():
    view, out = plain_view(job="collect")
    with view, view.stage("collecting"):
        view.update(episodes=collected(), spent=spent())
    line = out.getvalue().splitlines()[1]
    assert "episodes 2549/5500 (100 found); success 2380/2440; tokens/s 1169; failed engine 5, limit 4" in line
    assert "the last the endpoint does not answer within 60 s" in line
    assert "spent $1.2034 of $20, 202,000 tokens, 3,000 requests; waits the endpoint asks for a pause" in line


def test_other_jobs_show_figures_of_their_own():
    view, out = plain_view(job="score")
    with view.stage("scoring"):
        view.show({"rows": "12", "tokens/s": "900"})
    assert out.getvalue().splitlines() == ["[00:00] scoring", "[00:00]   rows 12; tokens/s 900"]


# -- the view


class Kept:
    """A sink that keeps what it is handed."""

    def __init__(self) -> None:
        self.seen: list[JobStatus] = []
        self.closed = False

    def take(self, status: JobStatus) -> None:
        self.seen.append(status)

    def close(self) -> None:
        self.closed = True


def test_stages_wait_run_and_end():
    sink = Kept()
    view, _ = plain_view(stages=["a", "b"], sinks=[sink])
    with view:
        with view.stage("a"):
            told(view)
        with view.stage("b"):
            assert view.status.current.title == "b"
            assert not view.status.current.learns
        with pytest.raises(ValueError), view.stage("c"):
            raise ValueError
    ended = [("a", "done"), ("b", "done"), ("c", "failed")]
    assert [(stage.title, stage.state) for stage in view.status.stages] == ended
    assert sink.seen[0].stages[0].state == "waiting"
    assert sink.seen[-1].state == "done" and sink.closed


@pytest.mark.parametrize(
    ("error", "state", "why"),
    [(ValueError("the disk\nis full"), "failed", "the disk is full"), (KeyboardInterrupt(), "interrupted", "")],
)
def test_how_a_job_ended_is_told(error, state, why):
    sink = Kept()
    view, _ = plain_view(sinks=[sink])
    with pytest.raises(type(error)), view:
        raise error
    assert (sink.seen[-1].state, sink.seen[-1].error) == (state, why)


def test_a_job_that_stopped_before_the_end_is_not_done():
    view, _ = plain_view()
    with view:
        view.conclude("the spend cap is used up")
    assert (view.status.state, view.status.error) == ("failed", "the spend cap is used up")


class Collected:
    """Stands where a `Collection` stands: its episodes are done at the second look."""

    actors, waiting, awaits_more = (), 0, False

    def __init__(self, stopped: str = "") -> None:
        self.looks, self.closed, self.stopped = 0, False, stopped

    def poll(self, timeout_s: float) -> bool:
        self.looks += 1
        return self.looks == 2

    def progress(self) -> CollectProgress:
        return CollectProgress(total=4, recorded=2 * self.looks, succeeded=self.looks, stopped=self.stopped)

    def close(self) -> None:
        self.closed = True


def test_an_evaluation_is_watched_to_its_end_and_its_scores_stay():
    sink, collection = Kept(), Collected()
    view, _ = plain_view(sinks=[sink])
    with view:
        watch_evaluation(collection, view, "evaluation: student", policy="student")  # pyright: ignore[reportArgumentType]
        view.scored("evaluation: student", {"arithmetic": score(2, 4)})
    assert collection.closed
    (stage,) = sink.seen[-1].stages
    assert (stage.state, stage.by_policy["student"].recorded, stage.scores["arithmetic"].mean) == ("done", 4, 0.5)


def test_an_evaluation_that_is_stopped_is_told_and_closed():
    collection = Collected(stopped="the spend cap is used up")
    view, _ = plain_view()
    with pytest.raises(EvaluationError, match="spend cap"):
        watch_evaluation(collection, view, "evaluation: student")  # pyright: ignore[reportArgumentType]
    assert collection.closed and view.status.stages[0].state == "failed"


def test_warnings_stay_while_other_lines_pass():
    view, out = plain_view()
    view.warn("a rank died")
    for i in range(20):
        view.say(f"line {i}")
    assert [each.text for each in view.status.warnings] == ["a rank died"]
    assert [each.text for each in view.status.said if not each.warning] == [f"line {i}" for i in range(12, 20)]
    assert out.getvalue().count("\n") == 21


def test_each_step_is_one_point_of_the_curves_and_earlier_ones_are_recalled():
    view, _ = plain_view()
    view.recall([{"all": 3.0, "code": 2.0}, {"all": 2.5, "code": 1.5}])
    with view.stage(LEARNING):
        for step in (0, 1, 1, 1, 2):
            view.update(learning=replace(learned(step), loss=1.0 / (step + 1)))
    assert view.status.trails["all"] == pytest.approx((3.0, 2.5, 1 / 2, 1 / 3))
    assert view.status.trails["code"] == pytest.approx((2.0, 1.5, 0.01, 0.01))


def test_what_is_left_follows_the_pace(monkeypatch):
    view, _ = plain_view()
    now_s = 0.0
    monkeypatch.setattr("launch.live.view.time.monotonic", lambda: now_s)
    with view.stage("collecting"):
        for now_s in (0.0, 10.0, 20.0):
            done = int(now_s)
            view.update(episodes=CollectProgress(total=100, recorded=done, completion_tokens=done * 50, elapsed_s=99.0))
        stage = view.status.current
        assert stage.episodes_left_s == pytest.approx(80.0)
        assert stage.completion_tokens_per_s == pytest.approx(50.0)


def test_a_terminal_shows_the_screen_and_keeps_the_lines_above_it():
    out = io.StringIO()
    console = Console(file=out, force_terminal=True, width=80, height=24, color_system=None)
    with LiveView(console, run="r", job="distill", stages=["evaluation: student"]) as view:
        with view.stage(LEARNING):
            told(view, last=True)
            view.say("a line that stays")
    text = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", out.getvalue())
    assert "[00:00] a line that stays" in text
    assert re.search(r"episodes  ━+─+ +565/5500", text)
    last = text[text.rindex("r  distill") :]
    assert "done 00:00" in last and f"✓ {LEARNING}" in last and "\x1b[?25h" in out.getvalue()  # the cursor is back


def test_results_come_below_the_last_picture():
    out = io.StringIO()
    console = Console(file=out, force_terminal=True, width=80, height=24, color_system=None)
    with LiveView(console, run="r", job="distill") as view:
        with view.stage(LEARNING):
            told(view)
        view.conclude()
        view.console.print("the table")
    text = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", out.getvalue())
    assert text.rindex("done 00:00") < text.rindex(f"✓ {LEARNING}") < text.index("the table")


def test_a_view_of_nothing_shows_nothing():
    out = io.StringIO()
    with LiveView(Console(file=out, force_terminal=True, width=80, height=24, color_system=None)) as view:
        view.console.print("the table")
    assert out.getvalue() == "the table\n"


def test_said_lines_tell_when():
    lines = drawn(replace(learning_status(), said=(Said(unix_s=STARTED_S + 61, text="hello"),)), 80, watched=True)
    assert lines[-1] == "  [01:01] hello"
