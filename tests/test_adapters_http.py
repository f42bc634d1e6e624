"""The env server over real sockets: our client, OpenEnv's wire format, limits, and the command line."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from envs import env_factory
from envs.adapters.http_client import HttpEnv
from envs.adapters.http_server import ServerSettings, build_app, serving
from envs.base import EnvError, ObservationKind, Task
from envs.check import check_env
from envs.tools import Tool

ROOT = Path(__file__).parents[1]
TASK = Task(id="t1", question="What is 40 + 2?", answer="42", kind="sum", aliases=("forty-two",), metadata={"a": 1})
OWN = [Task(id=f"own{n}", question=f"What is {n}?", answer=str(n), kind="same") for n in range(3)]


def slow(seconds: float) -> str:
    """Take long."""
    time.sleep(seconds)
    return "done"


def broken(word: str) -> str:
    """Break."""
    raise OSError("the disk is gone")


MEETING = threading.Barrier(2, timeout=30)


def meet(name: str) -> str:
    """Wait for the other."""
    MEETING.wait()
    return name


TOOLS = [Tool.from_function(slow), Tool.from_function(broken), Tool.from_function(meet)]


def call(name: str, /, **arguments: Any) -> str:
    return json.dumps({"name": name, "arguments": arguments})


@pytest.fixture(scope="module")
def url() -> Iterator[str]:
    settings = ServerSettings(max_sessions=4, max_body_bytes=5000)
    with serving(build_app(env_factory("tool", tools=TOOLS), tasks=OWN, settings=settings)) as url:
        yield url


@pytest.fixture
def env(url: str) -> Iterator[HttpEnv]:
    env = HttpEnv(url)
    yield env
    env.close()


def post(url: str, body: bytes, **headers: str) -> tuple[int, dict[str, Any]]:
    request = urllib.request.Request(url, body, {"Content-Type": "application/json", **headers})
    try:
        with urllib.request.urlopen(request, timeout=20) as response:
            return response.status, json.load(response)
    except urllib.error.HTTPError as error:
        return error.code, json.load(error)


def get(url: str) -> dict[str, Any]:
    with urllib.request.urlopen(url, timeout=20) as response:
        return json.load(response)


def test_code_env_behind_the_server_keeps_the_contract():
    actions = ["x = globals().get('x', 0) + 1\nprint(x)", "1/0", "final_answer(42)"]
    with serving(build_app(env_factory("code", modules=["math"], max_steps=3))) as url:
        check_env(lambda: HttpEnv(url), [TASK], actions)


def test_whole_task_arrives(env: HttpEnv):
    observation, info = env.reset(TASK, seed=3)
    assert (observation.text, info["seed"]) == ("What is 40 + 2?", 3)
    result = env.step(call("final_answer", answer="Forty-Two"))
    assert (result.reward, result.terminated, result.observation.kind) == (1.0, True, ObservationKind.FINAL)


def test_servers_own_tasks(env: HttpEnv):
    assert env.reset_to_own(task_id="own2")[0].text == "What is 2?"
    assert env.reset_to_own(seed=4)[0].text == "What is 1?"
    with pytest.raises(ValueError, match="there is no task 'own9' here; there are 3"):
        env.reset_to_own(task_id="own9")


def test_failures_of_the_env_are_env_errors(env: HttpEnv):
    env.reset(TASK, seed=0)
    with pytest.raises(EnvError, match="the disk is gone"):
        env.step(call("broken", word="x"))
    assert env.step(call("slow", seconds=0)).observation.valid


def test_env_that_hangs_is_given_up_and_a_new_one_can_be_had():
    settings = ServerSettings(max_sessions=1, step_s=2)
    with serving(build_app(env_factory("tool", tools=TOOLS), settings=settings)) as url:
        env = HttpEnv(url)
        env.reset(TASK, seed=0)
        with pytest.raises(EnvError, match="did not answer within 2 s; the episode is lost"):
            env.step(call("slow", seconds=6))
        with pytest.raises(EnvError, match="is not there"):
            env.step(call("slow", seconds=0))
        env.reset(TASK, seed=0)
        assert env.step(call("slow", seconds=0)).observation.valid
        env.close()


def test_step_may_be_given_less_time(url: str):
    episode_id = post(f"{url}/reset", b"{}")[1]["metadata"]["episode_id"]
    body = {"episode_id": episode_id, "action": {"text": call("slow", seconds=0.5)}, "timeout_s": 0.1}
    status, told = post(f"{url}/step", json.dumps(body).encode())
    assert status == 503 and "did not answer within 0.1 s" in told["error"]["message"]


def test_two_episodes_at_the_same_moment_do_not_wait_for_one_another(url: str):
    envs = [HttpEnv(url) for _ in range(2)]
    for each in envs:
        each.reset(TASK, seed=0)
    results: list[Any] = []
    threads = [
        threading.Thread(target=lambda e=each, n=name: results.append(e.step(call("meet", name=n))))
        for each, name in zip(envs, "ab", strict=True)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(40)
    assert [result.observation.valid for result in results] == [True, True]
    for each in envs:
        each.close()


def test_sessions_are_limited_and_given_back(url: str):
    envs = [HttpEnv(url) for _ in range(5)]
    for each in envs[:4]:
        each.reset(TASK, seed=0)
    with pytest.raises(EnvError, match="all 4 sessions are taken"):
        envs[4].reset(TASK, seed=0)
    envs[0].close()
    envs[4].reset(TASK, seed=0)
    for each in envs:
        each.close()
    assert get(f"{url}/health")["active_sessions"] == 0


def test_idle_episodes_are_closed():
    with serving(build_app(env_factory("answer"), settings=ServerSettings(idle_s=0.2))) as url:
        env = HttpEnv(url)
        env.reset(TASK, seed=0)
        deadline = time.monotonic() + 20
        while get(f"{url}/health")["active_sessions"] and time.monotonic() < deadline:
            time.sleep(0.05)
        with pytest.raises(EnvError, match="is not there: .* idle for 0.2 s"):
            env.step("42")


def test_server_that_is_gone_is_an_env_error():
    with serving(build_app(env_factory("answer"))) as url:
        env = HttpEnv(url)
        env.reset(TASK, seed=0)
    with pytest.raises(EnvError, match="cannot be reached"):
        env.step("42")
    env.close()
    with pytest.raises(EnvError, match="cannot be reached"):
        HttpEnv(url)


def test_token_is_wanted():
    with serving(build_app(env_factory("answer"), settings=ServerSettings(token="secret"))) as url:
        with pytest.raises(EnvError, match="Authorization"):
            HttpEnv(url)
        env = HttpEnv(url, token="secret")
        env.reset(TASK, seed=0)
        assert env.step("42").reward == 1.0


@pytest.mark.parametrize(
    ("path", "body", "status", "says"),
    [
        ("reset", b"{", 400, "not JSON"),
        ("reset", b"[" * 4000, 400, "not JSON"),
        ("reset", b"[1]", 400, "must be a JSON object, not [1]"),
        ("reset", b'{"seed": -1}', 400, "'seed' must be a whole number of at least 0, not -1"),
        ("reset", b'{"task": {"question": "q"}}', 400, "the task's 'answer' must be a string, not None"),
        ("reset", b'{"task": {"question": "q", "answer": "a", "reply": 1}}', 400, "no field 'reply'"),
        ("reset", b'{"task": {"question": "q", "answer": "a", "grader": "x"}}', 400, "grader 'x' is unknown"),
        ("reset", b'{"pad": "' + b"x" * 6000 + b'"}', 413, "longer than 5000 bytes"),
        ("step", b'{"action": {"text": "x"}}', 400, "'episode_id' is needed"),
        ("step", b'{"action": {"text": "x"}, "episode_id": "no"}', 404, "episode 'no' is not there"),
    ],
)
def test_bad_requests_are_told_what_is_wrong(url: str, path: str, body: bytes, status: int, says: str):
    got, told = post(f"{url}/{path}", body)
    assert got == status and says in told["error"]["message"]


def test_bad_actions_are_told_what_is_wrong(url: str):
    episode_id = post(f"{url}/reset", b"{}")[1]["metadata"]["episode_id"]
    body = {"episode_id": episode_id, "action": {"text": call("slow", seconds=0)}, "timeout_s": 0}
    status, told = post(f"{url}/step", json.dumps(body).encode())
    assert status == 400 and "'timeout_s' must be a positive number, not 0" in told["error"]["message"]
    for action, says in [('"x"', 'an action is {"text": "..."}'), ('{"code": "x"}', "an action is")]:
        body = f'{{"episode_id": "{episode_id}", "action": {action}}}'
        status, told = post(f"{url}/step", body.encode())
        assert status == 400 and says in told["error"]["message"]
    assert post(f"{url}/close", f'{{"episode_id": "{episode_id}"}}'.encode())[0] == 200


def test_page_in_a_browser_cannot_post(url: str):
    assert post(f"{url}/reset", b"{}", **{"Content-Type": "text/plain"})[0] == 400


def test_openenvs_http_wire_format(url: str):
    _, told = post(f"{url}/reset", b'{"seed": 0, "episode_id": "mine"}')
    assert {key: told[key] for key in ("observation", "reward", "done")} == {
        "observation": {"text": "What is 0?", "kind": "ok"}, "reward": None, "done": False,
    }  # fmt: skip
    assert get(f"{url}/state?episode_id=mine")["step_count"] == 0
    action = {"action": {"text": call("final_answer", answer="0")}, "episode_id": "mine", "timeout_s": 5}
    _, told = post(f"{url}/step", json.dumps(action).encode())
    assert {key: told[key] for key in ("observation", "reward", "done")} == {
        "observation": {"text": "0", "kind": "final"}, "reward": 1.0, "done": True,
    }  # fmt: skip
    assert get(f"{url}/state?episode_id=mine")["step_count"] == 1
    assert get(f"{url}/health")["status"] == "healthy"
    assert get(f"{url}/schema")["action"]["required"] == ["text"]
    post(f"{url}/close", b'{"episode_id": "mine"}')


def test_openenvs_websocket_wire_format(url: str):
    from websockets.asyncio.client import connect

    async def talk() -> list[dict[str, Any]]:
        async with connect(url.replace("http", "ws") + "/ws", proxy=None) as socket:

            async def ask(message: Any) -> dict[str, Any]:
                await socket.send(message if isinstance(message, str) else json.dumps(message))
                return json.loads(await asyncio.wait_for(socket.recv(), 20))

            told = [
                await ask({"type": "step", "data": {"text": "x"}}),
                await ask("junk"),
                await ask({"type": "dance"}),
                await ask({"type": "reset", "data": {"seed": 2}}),
                await ask({"type": "step", "data": {"text": call("slow", seconds=0)}}),
                await ask({"type": "state"}),
                await ask({"type": "step", "data": {"text": call("final_answer", answer="2")}}),
            ]
            await socket.send('{"type": "close"}')
            return told

    told = asyncio.run(talk())
    assert [message["type"] for message in told] == [
        *["error"] * 3,
        "observation",
        "observation",
        "state",
        "observation",
    ]
    assert [message["data"]["code"] for message in told[:3]] == ["SESSION_ERROR", "INVALID_JSON", "UNKNOWN_TYPE"]
    assert told[3]["data"]["observation"]["text"] == "What is 2?"
    assert told[5]["data"]["step_count"] == 1
    assert (told[6]["data"]["reward"], told[6]["data"]["done"]) == (1.0, True)
    deadline = time.monotonic() + 20
    while get(f"{url}/health")["active_sessions"] and time.monotonic() < deadline:
        time.sleep(0.02)
    assert get(f"{url}/health")["active_sessions"] == 0


def test_websocket_of_a_page_in_a_browser_is_refused(url: str):
    from websockets.asyncio.client import connect
    from websockets.exceptions import InvalidStatus

    async def talk() -> None:
        async with connect(url.replace("http", "ws") + "/ws", proxy=None, origin="http://evil.example"):  # type: ignore
            pass

    with pytest.raises(InvalidStatus):
        asyncio.run(talk())


# -- the command line


def command(*arguments: str) -> list[str]:
    return [sys.executable, "-m", "envs.adapters", "serve", *arguments]


def test_command_serves_until_it_is_told_to_end(tmp_path: Path):
    (tmp_path / "my_search.py").write_text("def look(query: str) -> str:\n    return f'Doc about {query}'\n")
    (tmp_path / "tasks.jsonl").write_text('{"id": "a", "question": "Who?", "answer": "Ada"}\n')
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    process = subprocess.Popen(
        command("--env", "search", "--search", "my_search:look", "--tasks", "tasks.jsonl", "--port", "0"),
        cwd=tmp_path, env=environment, stdout=subprocess.PIPE, text=True,
    )  # fmt: skip
    try:
        assert process.stdout is not None
        line = process.stdout.readline()
        env = HttpEnv(line.removeprefix("env server at ").strip())
        assert env.reset_to_own()[0].text == "Who?"
        assert env.step("<search>Ada</search>").observation.text == "<information>Doc about Ada</information>"
        assert env.step("<answer>Ada</answer>").reward == 1.0
        env.close()
        process.send_signal(signal.SIGTERM)
        assert process.wait(30) == 0
    finally:
        process.kill()
        process.wait(10)
        process.stdout.close()  # type: ignore[union-attr]


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--env", "search"], "needs --search module:function"),
        (["--env", "answer", "--tool", "json:dumps"], "calls no tools"),
        (["--env", "code", "--tool", "no_such_module:f"], "'no_such_module:f' is no module:function"),
        (["--env", "answer", "--host", "0.0.0.0"], "lets other machines in"),
        (["--env", "answer", "--tasks", "nowhere.jsonl"], "task file 'nowhere.jsonl' does not exist"),
    ],
)
def test_command_says_what_is_wrong(arguments: list[str], says: str, capsys: pytest.CaptureFixture[str]):
    from envs.adapters.__main__ import main

    with pytest.raises(SystemExit) as error:
        main(["serve", *arguments])
    assert says in str(error.value)


def test_taken_port_is_an_env_error():
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        with pytest.raises(EnvError, match="is the port taken"):
            with serving(build_app(env_factory("answer")), port=taken.getsockname()[1]):
                pass
