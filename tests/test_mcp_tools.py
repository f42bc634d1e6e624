"""Tools of real MCP servers, over stdio and HTTP: good, failing, slow, crashing and malformed ones."""

from __future__ import annotations

import pickle
import re
import socket
import subprocess
import sys
import textwrap
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from envs import make_env
from envs.base import EnvError, Task
from envs.mcp_tools import McpServer, McpSpec
from envs.tools import ToolError

ROOT = Path(__file__).parents[1]
SERVER = '''
import os, sys, time
from mcp.server.mcpserver import MCPServer
from mcp.server.mcpserver.exceptions import ToolError

server = MCPServer("things", log_level="ERROR")

@server.tool()
def add(a: int, b: int = 1) -> int:
    """Add two numbers."""
    return a + b

@server.tool(name="look-up")
def look_up(words: list[str]) -> dict[str, list[str]]:
    return {"found": [word.upper() for word in words]}

@server.tool(structured_output=False)
def tell(name: str) -> str:
    return f"hello {name}"

@server.tool()
def fail(why: str) -> str:
    raise ToolError(f"no such thing: {why}")

@server.tool()
def nap(seconds: float) -> str:
    time.sleep(seconds)
    return "awake"

@server.tool()
def crash() -> str:
    print("the disk is on fire", file=sys.stderr, flush=True)
    os._exit(3)

@server.tool()
def pid() -> int:
    return os.getpid()

if len(sys.argv) > 1:
    server.run("streamable-http", port=int(sys.argv[1]))
else:
    server.run()
'''


@pytest.fixture(scope="module")
def script(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("mcp") / "things_server.py"
    path.write_text(SERVER)
    return path


@pytest.fixture(scope="module")
def server(script: Path) -> Iterator[McpServer]:
    with McpServer(command=[sys.executable, str(script)], call_s=20) as server:
        yield server


@pytest.fixture(scope="module")
def tools(server: McpServer) -> dict[str, Any]:
    return {tool.name: tool for tool in server.tools()}


def free_port() -> int:
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        return sock.getsockname()[1]


def program(source: str) -> list[str]:
    return [sys.executable, "-c", textwrap.dedent(source)]


def is_running(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def test_schema_and_description_are_the_servers(tools: dict[str, Any]):
    assert tools["add"].description == "Add two numbers."
    assert list(tools["add"].parameters["properties"]) == ["a", "b"]
    assert tools["add"].parameters["required"] == ["a"]


def test_results_are_structured_where_the_server_says_so_and_text_elsewhere(tools: dict[str, Any]):
    assert tools["add"].call([2], {"b": 3}) == 5
    assert tools["look_up"].call([["x", "y"]], {}) == {"found": ["X", "Y"]}
    assert tools["tell"].call(["Ada"], {}) == "hello Ada"


def test_tools_error_is_the_models_mistake(tools: dict[str, Any]):
    with pytest.raises(ToolError, match="no such thing: unicorn"):
        tools["fail"].call(["unicorn"], {})
    with pytest.raises(ToolError, match=r"add\(\) argument 'a' must be integer, got str 'two'"):
        tools["add"].call(["two"], {})
    with pytest.raises(ToolError, match="'words' must be array of string, got list"):
        tools["look_up"].call([[1]], {})


def test_threads_call_at_the_same_moment(tools: dict[str, Any]):
    results: list[int] = []
    threads = [threading.Thread(target=lambda n=n: results.append(tools["add"].call([n], {}))) for n in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(20)
    assert sorted(results) == list(range(1, 9))


def test_agents_code_calls_the_tools(server: McpServer):
    env = make_env("code", tools=server.tools(only=["add", "fail"]))
    try:
        env.reset(Task(id="t", question="2 + 40?", answer="42", kind="sum"), seed=0)
        assert "no such thing: x" in env.step("fail('x')").observation.text
        assert env.step("final_answer(add(2, b=40))").reward == 1.0
    finally:
        env.close()


def test_slow_call_is_ours_and_the_server_goes_on(script: Path):
    with McpServer(command=[sys.executable, str(script)], call_s=3) as server:
        tools = {tool.name: tool for tool in server.tools()}
        began = time.monotonic()
        with pytest.raises(EnvError, match=r"did not answer 'nap' within 3 s"):
            tools["nap"].call([60.0], {})
        assert time.monotonic() - began < 30
        assert tools["add"].call([1], {}) == 2


def test_crash_is_ours_and_the_next_call_finds_a_new_server(script: Path):
    with McpServer(command=[sys.executable, str(script)], call_s=20) as server:
        tools = {tool.name: tool for tool in server.tools()}
        first = tools["pid"].call([], {})
        with pytest.raises(EnvError, match="did not answer 'crash'.*the disk is on fire"):
            tools["crash"].call([], {})
        second = tools["pid"].call([], {})
        assert second != first and is_running(second)
    assert not is_running(second)
    with pytest.raises(EnvError, match="was closed"):
        tools["add"].call([1], {})


HAND_WRITTEN = """
import json, os, signal, sys, time

def say(**message):
    print(json.dumps({"jsonrpc": "2.0", **message}), flush=True)

for line in sys.stdin:
    message = json.loads(line)
    method, number = message.get("method"), message.get("id")
    if method == "initialize":
        say(id=number, result={"protocolVersion": "2025-06-18", "capabilities": {"tools": {}},
                               "serverInfo": {"name": "hand-written", "version": "1"}})
    elif method == "tools/list":
        names = ["pid", "malformed", "junk"]
        say(id=number, result={"tools": [{"name": name, "inputSchema": {"type": "object"}} for name in names]})
    elif method == "tools/call" and message["params"]["name"] == "pid":
        say(id=number, result={"content": [{"type": "text", "text": str(os.getpid())}]})
    elif method == "tools/call" and message["params"]["name"] == "malformed":
        say(id=number, result={"content": "this should be a list"})
    elif method == "tools/call":
        print("Traceback: something broke", flush=True)
    elif number is not None:
        say(id=number, error={"code": -32601, "message": "no such method"})
"""
"""An MCP server without the SDK, which starts at once and may do what the SDK would not."""


def test_close_ends_a_server_that_ignores_its_end():
    stubborn = "import signal\nsignal.signal(signal.SIGTERM, signal.SIG_IGN)" + HAND_WRITTEN + "time.sleep(60)"
    server = McpServer(command=program(stubborn))
    [tool] = server.tools(only=["pid"])
    pid = int(tool.call([], {}))
    server.close()
    assert not is_running(pid)


def test_server_ends_with_our_process():
    code = f"""
        from envs.mcp_tools import McpServer
        server = McpServer(command={program(HAND_WRITTEN)!r})
        print(server.tools(only=["pid"])[0].call([], {{}}))
    """
    done = subprocess.run(program(code), cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    assert not is_running(int(done.stdout))


def test_a_server_that_hangs_ends_when_our_process_is_killed():
    code = f"""
        import os, signal
        from envs.mcp_tools import McpServer
        server = McpServer(command={program(HAND_WRITTEN + "time.sleep(60)")!r})
        print(server.tools(only=["pid"])[0].call([], {{}}), flush=True)
        os.kill(os.getpid(), signal.SIGKILL)
    """
    done = subprocess.run(program(code), cwd=ROOT, capture_output=True, text=True, timeout=60)
    deadline = time.monotonic() + 10
    while is_running(int(done.stdout)):
        assert time.monotonic() < deadline
        time.sleep(0.05)


NO_MCP = {
    "exits": ("import sys; print('out of memory', file=sys.stderr); sys.exit(1)", "out of memory"),
    "junk": ("while True: print('la la la')", "within 1 s|could not be started"),
    "silent": ("import time; time.sleep(60)", "within 1 s|TimeoutError"),
    "wrong_json": (
        'import sys\nfor line in sys.stdin: print(\'{"jsonrpc": "2.0", "id": 0, "result": 5}\', flush=True)',
        "",
    ),
}
"""Programs that are no MCP servers, and what is said of each."""


@pytest.fixture(scope="module")
def said_of() -> dict[str, str]:
    """What starting each of them ends with; at the same moment, since most must be waited for."""

    def start(source: str) -> str:
        began = time.monotonic()
        with pytest.raises(EnvError) as caught:
            McpServer(command=program(source), start_s=1)
        assert time.monotonic() - began < 30
        return str(caught.value)

    with ThreadPoolExecutor() as threads:
        return dict(zip(NO_MCP, threads.map(start, [source for source, _ in NO_MCP.values()]), strict=True))


@pytest.mark.parametrize("kind", NO_MCP)
def test_server_that_speaks_no_mcp_is_ours(said_of: dict[str, str], kind: str):
    _, says = NO_MCP[kind]
    assert re.search(f"could not be started.*({says})|did not start", said_of[kind])


def test_missing_program_is_named():
    with pytest.raises(EnvError, match="no-such-program.*could not be started: FileNotFoundError"):
        McpServer(command=["no-such-program"])


def test_malformed_result_is_ours():
    with McpServer(command=program(HAND_WRITTEN), call_s=1) as server:
        malformed, junk = server.tools(only=["malformed", "junk"])
        with pytest.raises(EnvError, match="did not answer 'malformed'"):
            malformed.call([], {})
        with pytest.raises(EnvError, match="did not answer 'junk' within 1 s"):
            junk.call([], {})


def test_http_server(script: Path):
    port = free_port()
    serve = [sys.executable, str(script), str(port)]
    process = subprocess.Popen(serve, stderr=subprocess.DEVNULL)
    try:
        with connect(f"http://127.0.0.1:{port}/mcp") as server:
            tools = {tool.name: tool for tool in server.tools()}
            assert tools["add"].call([2], {}) == 3
            with pytest.raises(ToolError, match="no such thing"):
                tools["fail"].call(["x"], {})
            with pytest.raises(EnvError, match="did not answer 'nap' within 3 s"):
                tools["nap"].call([60.0], {})
            process.kill()
            process.wait(10)
            with pytest.raises(EnvError):
                tools["add"].call([2], {})
            process = subprocess.Popen(serve, stderr=subprocess.DEVNULL)
            assert answer_of(tools["add"], 2) == 3
    finally:
        process.kill()
        process.wait(10)


def answer_of(tool: Any, *args: Any) -> Any:
    """Once the server is back."""
    deadline = time.monotonic() + 60
    while True:
        try:
            return tool.call(list(args), {})
        except EnvError:
            if time.monotonic() > deadline:
                raise
            time.sleep(0.2)


def connect(url: str) -> McpServer:
    """Once the server's process listens."""
    deadline = time.monotonic() + 30
    while True:
        try:
            return McpServer(url=url, call_s=3, start_s=10)
        except EnvError:
            if time.monotonic() > deadline:
                raise
            time.sleep(0.2)


def test_http_server_that_is_none_is_ours():
    with pytest.raises(EnvError, match="could not be started"):
        McpServer(url=f"http://127.0.0.1:{free_port()}/mcp", start_s=5)


def test_env_host_starts_the_servers_of_its_spec():
    from pydantic import TypeAdapter

    from envs.pool import EnvHost, EnvSpec

    plain = {"name": "tool", "mcp_servers": [{"command": program(HAND_WRITTEN)}], "stateless_tools": False}
    spec = pickle.loads(pickle.dumps(TypeAdapter(EnvSpec).validate_python(plain)))
    host = EnvHost(spec)
    try:
        assert not host.can_preview()
        host.reset(0, Task(id="t", question="?", answer="!", kind="none"), 0)
        result = host.step(0, '{"name": "pid", "arguments": {}}')
        pid = int(result.info["results"][0])
        assert is_running(pid)
    finally:
        host.close()
    assert not is_running(pid)


def test_settings_are_checked():
    with pytest.raises(ValueError, match="either a command or a url"):
        McpSpec()
    with pytest.raises(ValueError, match="must be a list"):
        McpServer(command="python server.py")
    with pytest.raises(ValueError, match="must begin with http"):
        McpSpec(url="localhost:8000")
    with pytest.raises(ValueError, match="call_s=0 must be positive"):
        McpSpec(url="http://x/mcp", call_s=0)


def test_unknown_tool_is_named(server: McpServer):
    with pytest.raises(ValueError, match="has no tool 'subtract'; it has add,"):
        server.tools(only=["subtract"])


def test_importing_is_light():
    code = "import sys, envs.mcp_tools; sys.exit('mcp' in sys.modules)"
    assert subprocess.run(program(code), cwd=ROOT, timeout=30).returncode == 0
