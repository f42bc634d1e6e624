"""`python -m launch.serve` as a user runs it: what it refuses before anything starts, how it begins and ends."""

from __future__ import annotations

import asyncio
import os
import signal
import socket
import subprocess
import sys
from pathlib import Path

import psutil
import pytest
from openai import APIStatusError, AsyncOpenAI, DefaultHttpxClient, OpenAI
from serving_samples import run, small_plan, write_run

from launch.serve import main
from launch.serving.lifecycle import listen, run_service, url_of
from launch.serving.service import Service, ServiceSettings, State
from rollout.ledger import Ledger
from rollout.policy_spec import PolicySpec

ROOT = Path(__file__).parents[1]
pytestmark = pytest.mark.timeout(110)


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A run's folder, and its tasks."""
    folder = tmp_path_factory.mktemp("runs") / "small-run"
    return folder, write_run(folder)


def refused(capsys, *arguments):
    assert main(list(arguments)) == 2
    return capsys.readouterr().err


def lives(process):
    try:
        return process.status() != psutil.STATUS_ZOMBIE  # which nobody may have waited for
    except psutil.NoSuchProcess:
        return False


def test_what_cannot_be_served_is_refused_before_anything_starts(finished, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("EMPTY", " ")
    run = ["--run", str(finished[0])]
    teacher = [*run, "--policy", "teacher"]
    for arguments, message in [
        ([], "no finished run under runs/"),
        (["--run", str(tmp_path)], "holds no run: there is no config.json"),
        (run, "holds no student yet"),
        ([*run, "--student", str(tmp_path)], "is no Hugging Face folder"),
        ([*run, "--policy", "wizard"], "policy 'wizard' is unknown; there are student, teacher"),
        ([*run, "recipe=starter"], "a run has its own configuration"),
        ([*teacher, "--candidates", "65"], "candidates must be at most 64, not 65"),
        ([*teacher, "--places", "0"], "places must be above 0, not 0"),
        ([*teacher, "--line", "-1"], "line must not be negative"),
        ([*teacher, "--port", "70000"], "--port must be 0 to 65535, not 70000"),
        ([*teacher, "--engine", "steam"], "--engine 'steam' is unknown"),
        ([*teacher, "--host", "0.0.0.0"], "can be reached by others: name a variable that holds a key"),
        ([*teacher, "--api-key-env", "NOT_SET"], "that variable is not set, or empty"),
        ([*teacher, "--api-key-env", "EMPTY"], "that variable is not set, or empty"),
        ([*teacher, "--cors-origin", "chat.example"], "give an origin such as https://chat.example"),
        ([*teacher, "--ledger", str(finished[0])], "is no ledger; name a new folder"),
    ]:
        assert message in refused(capsys, *arguments), arguments


def test_a_port_that_is_taken_is_named(finished, capsys):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        told = refused(capsys, "--run", str(finished[0]), "--policy", "teacher", "--port", str(port))
    assert f"cannot listen at 127.0.0.1 port {port}: Address already in use" in told


def test_it_answers_records_and_ends_with_all_that_it_started(finished, tmp_path):
    folder, tasks = finished
    task = next(task for task in tasks if task.kind == "arithmetic")
    command = [sys.executable, "-m", "launch.serve", "--run", str(folder), "--policy", "teacher", "--port", "0"]
    environment = {**os.environ, "KEY": "secret", "PYTHONPATH": str(ROOT)}
    process = subprocess.Popen(
        [*command, "--api-key-env", "KEY", "--ledger", str(tmp_path / "ledger")],
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, cwd=tmp_path, env=environment,
        start_new_session=True,
    )  # fmt: skip
    try:
        first, second = process.stdout.readline(), process.stdout.readline()
        assert first.startswith("small-run-teacher at http://127.0.0.1:") and second.startswith("ready after")
        url = first.split(" at ")[1].split(",")[0]
        with OpenAI(base_url=url, api_key="secret", http_client=DefaultHttpxClient(verify=False)) as client:
            reply = client.chat.completions.create(
                model="small-run-teacher", messages=[{"role": "user", "content": task.question}]
            )
        assert reply.choices[0].message.content == task.answer
        children = psutil.Process(process.pid).children(recursive=True)
        assert children  # the sandbox
        process.send_signal(signal.SIGTERM)
        rest, _ = process.communicate(timeout=30)
        assert process.returncode == 0 and "Traceback" not in rest and task.question not in rest
        psutil.wait_procs(children, timeout=5)
        assert not [child for child in children if lives(child)]
    finally:
        process.kill()
        process.wait(10)
    [recorded] = Ledger(tmp_path / "ledger").trajectories()
    assert recorded.task.question == task.question and recorded.prediction == task.answer


def test_a_second_signal_ends_what_the_first_one_waits_for(signals_kept):
    said = []

    async def silent(reader, writer):
        await reader.read()

    async def scenario():
        async with await asyncio.start_server(silent, "127.0.0.1", 0) as endpoint:
            base_url = f"http://127.0.0.1:{endpoint.sockets[0].getsockname()[1]}/v1"
            spec = PolicySpec(kind="openai", model="m", base_url=base_url)
            service = Service(small_plan(spec=spec), ServiceSettings(model="m"))
            bound = listen("127.0.0.1", 0)
            running = asyncio.create_task(run_service(service, bound, drain_s=60, say=said.append))
            async with AsyncOpenAI(
                base_url=f"{url_of(bound, '127.0.0.1')}/v1", api_key="none", max_retries=0
            ) as client:
                await until(lambda: service.state is State.READY)
                message = {"role": "user", "content": "Who answers?"}
                asked = asyncio.create_task(client.chat.completions.create(model="m", messages=[message]))
                await until(lambda: service.running == 1)
                os.kill(os.getpid(), signal.SIGINT)
                await until(lambda: service.state is State.DRAINING)
                assert not asked.done()
                os.kill(os.getpid(), signal.SIGINT)
                with pytest.raises(APIStatusError, match="the server is shutting down"):
                    await asked
            return await running

    async def until(holds):
        async with asyncio.timeout(20):
            while not holds():
                await asyncio.sleep(0.01)

    assert run(scenario()) == 0
    assert said[-1] == "1 episodes were cut off"


@pytest.mark.slow
@pytest.mark.timeout(400)
def test_a_student_on_vllm_outlives_a_terminals_interrupt_until_its_answers_are_there(finished, tmp_path):
    """The engine has a process of its own, which Ctrl-C reaches too."""
    student = ROOT / "learner" / "base_student" / "checkpoint"
    command = [
        sys.executable,
        "-m",
        "launch.serve",
        "--run",
        str(finished[0]),
        "--student",
        str(student),
        "--port",
        "0",
    ]
    process = subprocess.Popen(
        [*command, "--engine", "own_process", "--model-name", "base", "--candidates", "4", "--drain-s", "150"],
        stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, cwd=tmp_path, start_new_session=True,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )  # fmt: skip
    try:
        url = process.stdout.readline().split(" at ")[1].split(",")[0]
        assert process.stdout.readline().startswith("ready after")
        with OpenAI(base_url=url, api_key="none", http_client=DefaultHttpxClient(verify=False)) as client:
            asked = client.chat.completions.create(
                model="base", messages=[{"role": "user", "content": finished[1][0].question}], stream=True,
                extra_body={"trajectory": True},
            )  # fmt: skip
            stream = iter(asked)
            first = next(stream)
            children = psutil.Process(process.pid).children(recursive=True)
            os.killpg(process.pid, signal.SIGINT)
            chunks = [first, *stream]
        assert chunks[-1].choices[0].finish_reason in ("stop", "length")
        told = [(chunk.model_extra or {}).get("agent", {}) for chunk in chunks]
        steps = [agent["step"] for agent in told if "step" in agent]
        assert steps and all(len(step["candidates"]) == 4 for step in steps)
        assert process.wait(60) == 0
        psutil.wait_procs(children, timeout=10)
        assert len(children) >= 2 and not [child for child in children if lives(child)]
    finally:
        process.kill()
        process.wait(10)
