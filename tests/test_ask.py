"""`python -m launch.ask`: one question or many, from here or over the network, for people and for programs."""

from __future__ import annotations

import asyncio
import fcntl
import io
import json
import os
import pty
import subprocess
import sys
import termios
import threading
from pathlib import Path

import pytest
from serving_samples import GatedPolicy, in_order, run, serving, write_run

from envs.pool import EnvHost, EnvSpec
from launch.ask import main
from launch.serving.ask_view import votes

ROOT = Path(__file__).parents[1]
pytestmark = pytest.mark.timeout(110)


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A run's folder, and its tasks."""
    folder = tmp_path_factory.mktemp("runs") / "small-run"
    return folder, write_run(folder)


@pytest.fixture(scope="module")
def host():
    host = EnvHost(EnvSpec(modules=("math",)))
    yield host
    host.close()


def test_a_held_out_question_is_answered_and_graded(finished, capsys):
    folder, tasks = finished
    task = next(task for task in tasks if task.kind == "arithmetic")
    assert main(["--run", str(folder), "--policy", "teacher", "--example", "arithmetic"]) == 0
    shown = " ".join(capsys.readouterr().out.split())
    assert f"answer: {task.answer} (final)" in shown and f"right answer: {task.answer}" in shown
    assert shown.index("step 1") < shown.index("step 2") < shown.index("final_answer(") < shown.index("answer: ")


def test_piped_questions_give_a_line_of_json_each(finished, capsys, monkeypatch):
    folder, tasks = finished
    task = next(task for task in tasks if task.kind == "arithmetic")
    monkeypatch.setattr(sys, "stdin", io.StringIO(f"{task.question}\n\nWho knows?\n"))
    assert main(["--run", str(folder), "--policy", "teacher", "--json"]) == 0
    answers = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [answer["question"] for answer in answers] == [task.question, "Who knows?"]
    assert answers[0]["answer"] == task.answer and answers[0]["steps"][0]["number"] == 1
    assert answers[0]["success"] is None  # nobody said what is right


def test_one_that_is_served_is_asked_with_its_votes(host, capsys):
    def reply(messages, i):
        return in_order(["final_answer(41)", "1 / 0", "final_answer(42)", "final_answer(42)"][i])(messages, i)

    async def scenario():
        async with serving(host, reply) as served:
            return await asyncio.to_thread(main, ["--url", served.url, "--candidates", "4", "What is it?"])

    assert run(scenario()) == 0
    shown = capsys.readouterr().out
    assert "votes: 2 of 4 for this; 1 for '41'; 1 failed" in shown and "answer: 42  (final)" in shown


def test_candidates_that_were_not_needed_are_told_apart_from_those_that_failed():
    def candidate(votes, ran):
        return {"votes": votes, "ran": ran, "observation": "x" if ran else ""}

    step = {"chosen": 0, "candidates": [candidate(2, True), candidate(2, True), candidate(0, False)]}
    assert votes(step) == "votes: 2 of 3 for this; 1 not run, as the vote was decided"


def test_what_a_server_refuses_is_told(host, capsys):
    async def scenario(*arguments, **settings):
        async with serving(host, **settings) as served:
            return await asyncio.to_thread(main, ["--url", served.url, *arguments])

    assert run(scenario("--candidates", "65", "q")) == 1
    assert "answered 400: candidates must be at most 64, not 65" in " ".join(capsys.readouterr().out.split())
    assert run(scenario("q", key="secret")) == 2
    assert "answered 401" in capsys.readouterr().err
    assert run(scenario("--model", "other", "q")) == 2
    assert "--model 'other' is not served at" in capsys.readouterr().err


@pytest.mark.slow  # two starts of Python and a terminal between them
@pytest.mark.timeout(300)
def test_in_a_terminal_an_answer_can_be_stopped_and_the_end_of_input_ends_it(host):
    waits = threading.Event()

    async def scenario():
        policy = GatedPolicy()
        async with serving(host, policy, places=1, line=0) as served:
            talking = asyncio.create_task(asyncio.to_thread(talk, served.url))
            await served.until(lambda: policy.asked == 1)
            waits.set()
            await served.until(lambda: policy.cancelled == 1)
            policy.gates.release()
            policy.gates.release()
            return await talking

    def talk(url):
        ours, theirs = pty.openpty()
        process = subprocess.Popen(
            [sys.executable, "-m", "launch.ask", "--url", url],
            stdin=theirs, stdout=theirs, stderr=theirs, cwd=ROOT, env={**os.environ, "TERM": "dumb"},
            start_new_session=True, preexec_fn=lambda: fcntl.ioctl(0, termios.TIOCSCTTY, 0),
        )  # fmt: skip
        os.close(theirs)
        whole = b""
        question = b"What is 6 times 7?\n"
        try:
            for until, say in [
                (b"> ", question), (b"7?", b""), (b"stopped", b""), (b"> ", question),
                (b"tool calls", b""), (b"> ", b"\x04"),
            ]:  # fmt: skip
                seen = b""
                while until not in seen:
                    seen += os.read(ours, 1)
                whole += seen
                os.write(ours, say)
                if until == b"7?":
                    waits.wait(100)
                    os.write(ours, b"\x03")
            return process.wait(100), whole.decode()
        finally:
            process.kill()
            os.close(ours)

    status, seen = run(scenario(), limit_s=250)
    assert status == 0 and "answer: 42" in seen.split("stopped")[1]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--url", "localhost:1", "q"], "'localhost:1' is no address"),
        (["--url", "http://127.0.0.1:1", "q"], "cannot be reached"),
        (["--url", "http://127.0.0.1:1", "--run", "x", "q"], "--run is for an agent of this machine"),
        (["--model", "x", "q"], "are for an agent at a --url"),
        (["--example", "two_hop", "q"], "not both"),
        (["--candidates", "0", "q"], "--candidates must be at least 1, not 0"),
        (["--run", "/nowhere/at/all", "q"], "holds no run"),
        ([" "], "the question is empty"),
    ],
)
def test_what_cannot_be_asked_is_told_at_once(arguments, message, capsys):
    try:
        status = main(arguments)
    except SystemExit as left:
        status = left.code
    assert status == 2 and message in capsys.readouterr().err


def test_an_unknown_kind_is_told_which_there_are(finished, capsys):
    assert main(["--run", str(finished[0]), "--policy", "teacher", "--example", "riddle"]) == 2
    assert "--example 'riddle': this run has arithmetic, two_hop" in capsys.readouterr().err
