"""Tools of any MCP server: `McpServer` starts or reaches one and gives its tools as `envs.tools.Tool`s.

The official SDK speaks the protocol (stdio and streamable HTTP); it is asynchronous, so each server has an event loop
in a thread of its own, and the tools are plain blocking functions that any number of threads may call. A tool that
reports an error has told of the model's mistake (`ToolError`). A server that does not start, does not answer in time,
breaks off or answers with something else than MCP is our own failure (`EnvError`); the next call connects anew. A
server that was started here ends with `close()`, and with this process.

Example::

    with McpServer(command=["python", "weather_server.py"], call_s=20) as server:
        env = make_env("code", tools=server.tools())

Not supported: prompts, resources, sampling and elicitation; a server that asks for them during a call fails that call.
Spec: https://modelcontextprotocol.io/specification
"""

from __future__ import annotations

import asyncio
import concurrent.futures
import contextlib
import logging
import math
import os
import re
import shutil
import sys
import tempfile
import threading
import weakref
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import IO, Any

from envs.base import EnvError
from envs.tools import Tool, ToolError

_STOP_S = 12.0
"""The SDK gives a server 2 s to end by itself, 2 s after SIGTERM, and 2 s after SIGKILL."""
_SLACK_S = 5.0
"""How much later than its own deadline a call is given up from outside."""
_MAX_PAGES = 100
_STDERR_BYTES = 500
_STDERR_KEPT_BYTES = 1 << 20
_UNTIL_WE_DIE = """
import ctypes, os, signal, sys
ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG, which exec keeps
if os.getppid() == int(sys.argv[1]):  # else it is too late already
    os.execvp(sys.argv[2], sys.argv[2:])
"""
_INVALID_PARAMS = -32602  # JSON-RPC: the arguments are wrong, which is the caller's mistake
_CONNECTION_CLOSED = -32000  # the SDK's own code


@dataclass(frozen=True, slots=True, kw_only=True)
class McpSpec:
    """Which server, and how long it may take; picklable. Either `command` or `url`."""

    command: tuple[str, ...] = ()
    """Program and arguments of a stdio server. It gets PATH, HOME and the like of our environment, and `env`."""
    url: str = ""
    """Endpoint of a streamable HTTP server, as `http://host:8000/mcp`."""
    env: Mapping[str, str] = field(default_factory=dict)
    """More environment variables of a stdio server."""
    cwd: str | None = None
    headers: Mapping[str, str] = field(default_factory=dict)
    """HTTP headers, for authorization."""
    start_s: float = 30.0
    """Longest wait for the server to start, and for its list of tools."""
    call_s: float = 60.0
    """Longest wait for the result of one call."""

    def __post_init__(self) -> None:
        if isinstance(self.command, str):
            raise ValueError(f"command={self.command!r} must be a list: the program and each argument by itself")
        if bool(self.command) == bool(self.url):
            raise ValueError(f"an MCP server has either a command or a url, not {self.command!r} and {self.url!r}")
        if self.url and not self.url.startswith(("http://", "https://")):
            raise ValueError(f"url={self.url!r} must begin with http:// or https://")
        for name in ("start_s", "call_s"):
            if getattr(self, name) <= 0:
                raise ValueError(f"{name}={getattr(self, name)!r} must be positive")

    def __str__(self) -> str:
        return f"MCP server {self.url or ' '.join(self.command)}"


class McpServer:
    """One server, connected at once. Raises `EnvError` when it cannot be started or reached within `start_s`."""

    def __init__(
        self,
        *,
        command: Sequence[str] = (),
        url: str = "",
        env: Mapping[str, str] | None = None,
        cwd: str | None = None,
        headers: Mapping[str, str] | None = None,
        start_s: float = 30.0,
        call_s: float = 60.0,
    ) -> None:
        self.spec = McpSpec(
            command=command if isinstance(command, str) else tuple(command),  # type: ignore[arg-type]
            url=url, env=dict(env or {}), cwd=cwd, headers=dict(headers or {}), start_s=start_s, call_s=call_s,
        )  # fmt: skip
        self._lock = threading.Lock()
        self._closed = False
        self._connection = _Connection(self.spec)

    @classmethod
    def from_spec(cls, spec: McpSpec) -> McpServer:
        return cls(
            command=spec.command, url=spec.url, env=spec.env, cwd=spec.cwd, headers=spec.headers,
            start_s=spec.start_s, call_s=spec.call_s,
        )  # fmt: skip

    def tools(self, *, only: Sequence[str] | None = None) -> list[Tool]:
        """The server's tools, or those named in `only`, in that order. They work until `close()`.

        A name that is no Python identifier gets `_` for what is none ("read-file" is `read_file`). A result is the
        tool's structured content where it has some (`{"result": x}` around a plain value is taken off), else its
        text. Raises `EnvError` when the server cannot tell, `ValueError` for a name it does not have and for two
        tools that would share a name.
        """
        tools: dict[str, Tool] = {}
        for listed in self._ask(lambda connection: connection.list_tools()):
            tool = self._tool(listed)
            if tool.name in tools:
                raise ValueError(f"{self.spec} has two tools that would be called {tool.name!r}")
            tools[tool.name] = tool
        if only is None:
            return list(tools.values())
        missing = [name for name in only if name not in tools]
        if missing:
            raise ValueError(f"{self.spec} has no tool {missing[0]!r}; it has {', '.join(sorted(tools)) or 'none'}")
        return [tools[name] for name in only]

    def close(self) -> None:
        """End the connection, and the process if there is one; may be called twice."""
        with self._lock:
            self._closed = True
            connection = self._connection
        connection.close()

    def __enter__(self) -> McpServer:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def _tool(self, listed: Any) -> Tool:
        """`listed` is the SDK's `Tool`."""

        def call(**arguments: Any) -> Any:
            return self._ask(lambda connection: connection.call_tool(listed.name, arguments))

        schema = dict(listed.input_schema or {})
        schema.setdefault("properties", {})
        name = re.sub(r"\W", "_", listed.name)
        return Tool(
            name=name if name.isidentifier() else f"tool_{name}",
            description=listed.description or listed.title or "",
            parameters=schema,
            function=call,
        )

    def _ask(self, question: Callable[[_Connection], Any]) -> Any:
        with self._lock:
            if self._closed:
                raise EnvError(f"{self.spec} was closed")
            if self._connection.lost:
                self._connection.close()
                self._connection = _Connection(self.spec)
            connection = self._connection
        return question(connection)


class _Connection:
    """One SDK client in one thread with one event loop; `lost` once it is of no more use."""

    def __init__(self, spec: McpSpec) -> None:
        self._spec = spec
        self._state = _State(spec)
        self._thread = threading.Thread(target=self._state.run, name=f"mcp {spec}"[:60], daemon=True)
        self._thread.start()
        # Runs at the end of the process, too; holds no reference to this object.
        self._finalizer = weakref.finalize(self, _stop, self._state, self._thread)
        try:
            self._state.ready.result(spec.start_s + _SLACK_S)
        except concurrent.futures.TimeoutError:
            self.close()
            raise EnvError(f"{spec} did not start within {spec.start_s:g} s{self._state.stderr_tail()}") from None
        except Exception as error:
            self.close()
            raise EnvError(f"{spec} could not be started: {_reason(error)}{self._state.stderr_tail()}") from error

    @property
    def lost(self) -> bool:
        return self._state.lost or not self._thread.is_alive()

    def list_tools(self) -> list[Any]:
        return self._run(self._state.list_tools(), self._spec.start_s, "did not list its tools")

    def call_tool(self, name: str, arguments: dict[str, Any]) -> Any:
        result = self._run(self._state.call_tool(name, arguments), self._spec.call_s, f"did not answer {name!r}")
        if result.is_error:
            raise ToolError(_text(result) or f"{name} failed and did not say why")
        structured = result.structured_content
        if structured is None:
            return _text(result)
        # The SDK's servers wrap a plain value, as structured content was an object in earlier versions.
        wrapped = isinstance(structured, dict) and set(structured) == {"result"}
        return structured["result"] if wrapped else structured

    def close(self) -> None:
        self._finalizer()

    def _run(self, work: Any, limit_s: float, what: str) -> Any:
        """The result of a coroutine of the loop. Raises `ToolError` and `EnvError` alone."""
        from mcp import MCPError

        state, spec = self._state, self._spec
        try:
            future = asyncio.run_coroutine_threadsafe(work, state.loop())
        except RuntimeError as error:  # the loop has ended
            work.close()
            state.lost = True
            raise EnvError(f"{spec} has ended{state.stderr_tail()}") from error
        try:
            result = future.result(limit_s + _SLACK_S)
        except MCPError as error:
            if error.code == _INVALID_PARAMS:
                state.failed = False
                raise ToolError(error.message) from error
            state.fail(surely=error.code == _CONNECTION_CLOSED)
            raise EnvError(f"{spec} {what}: {error.message}{state.stderr_tail()}") from error
        except (TimeoutError, concurrent.futures.TimeoutError) as error:
            future.cancel()
            state.fail()
            raise EnvError(f"{spec} {what} within {limit_s:g} s{state.stderr_tail()}") from error
        except concurrent.futures.CancelledError as error:
            state.lost = True
            raise EnvError(f"{spec} was closed during a call") from error
        except Exception as error:
            state.fail()
            raise EnvError(f"{spec} {what}: {_reason(error)}{state.stderr_tail()}") from error
        state.failed = False
        return result


class _State:
    """What lives in the thread of the event loop."""

    def __init__(self, spec: McpSpec) -> None:
        self._spec = spec
        self.ready: concurrent.futures.Future[None] = concurrent.futures.Future()
        self.lost = False
        self.failed = False
        """The last call failed, and not by the model's mistake."""
        self._loop: asyncio.AbstractEventLoop | None = None
        self._stopping: asyncio.Event | None = None
        self._client: Any = None
        self._stderr = tempfile.TemporaryFile("a+b")

    def run(self) -> None:
        try:
            asyncio.run(self._serve())
        except BaseException as error:
            if not self.ready.done():
                self.ready.set_exception(error if isinstance(error, Exception) else RuntimeError(repr(error)))
        finally:
            self.lost = True

    def fail(self, *, surely: bool = False) -> None:
        """A call failed. Others may be under way, so one failure is one failure; two in a row, or `surely`, are a
        connection that is broken."""
        self.lost = self.lost or self.failed or surely
        self.failed = True

    def loop(self) -> asyncio.AbstractEventLoop:
        if self._loop is None or self._loop.is_closed():
            raise RuntimeError("the event loop has ended")
        return self._loop

    def stop(self) -> None:
        """Ask the loop to end; from any thread."""
        loop, stopping = self._loop, self._stopping
        if loop is not None and stopping is not None:
            with contextlib.suppress(RuntimeError):  # the loop has ended already
                loop.call_soon_threadsafe(stopping.set)

    async def _serve(self) -> None:
        import anyio
        from mcp import Client

        sdk = logging.getLogger("mcp.client")
        if sdk.level == logging.NOTSET:  # it logs a traceback for every line that is no message
            sdk.setLevel(logging.CRITICAL)
        self._loop, self._stopping = asyncio.get_running_loop(), asyncio.Event()
        # The SDK shields the end of the server's process from anyio's scopes, not from asyncio's timeouts; and scopes
        # must nest, so this one stays open all the time and only its deadline goes.
        with anyio.move_on_after(self._spec.start_s) as scope:
            async with Client(_transport(self._spec, self._stderr), cache=None) as self._client:
                scope.deadline = math.inf
                self.ready.set_result(None)
                await self._stopping.wait()
                self.lost = True
        if not self.ready.done():
            raise TimeoutError(f"it did not answer within {self._spec.start_s:g} s")

    async def list_tools(self) -> list[Any]:
        import anyio

        tools: list[Any] = []
        cursor = None
        with anyio.fail_after(self._spec.start_s):
            for _ in range(_MAX_PAGES):
                page = await self._client.list_tools(cursor=cursor)
                tools += page.tools
                cursor = page.next_cursor
                if not cursor:
                    return tools
        raise RuntimeError(f"the list of tools has more than {_MAX_PAGES} pages")

    async def call_tool(self, name: str, arguments: dict[str, Any]) -> Any:
        import anyio

        if os.fstat(self._stderr.fileno()).st_size > _STDERR_KEPT_BYTES:
            os.ftruncate(self._stderr.fileno(), 0)  # the server appends
        with anyio.fail_after(self._spec.call_s):
            return await self._client.call_tool(name, arguments)

    def stderr_tail(self) -> str:
        """The last that a stdio server wrote to standard error, for an error message."""
        try:
            number = self._stderr.fileno()  # shared with the server, whose place in the file must not move
            size = os.fstat(number).st_size
            text = os.pread(number, _STDERR_BYTES, max(0, size - _STDERR_BYTES)).decode(errors="replace").strip()
        except (OSError, ValueError):
            return ""
        return f"; its standard error ends with: {text}" if text else ""


def _stop(state: _State, thread: threading.Thread) -> None:
    state.stop()
    thread.join(_STOP_S)


@contextlib.asynccontextmanager
async def _transport(spec: McpSpec, stderr: IO[bytes]) -> AsyncIterator[Any]:
    """The SDK's pair of streams to the server."""
    if spec.url:
        import httpx2
        from mcp.client.streamable_http import streamable_http_client

        # The connection may stay silent as long as a call may take.
        timeout = httpx2.Timeout(spec.start_s, read=max(spec.start_s, spec.call_s) + _SLACK_S)
        async with httpx2.AsyncClient(headers=dict(spec.headers), timeout=timeout) as http:
            async with streamable_http_client(spec.url, http_client=http) as streams:
                yield streams
        return
    from mcp.client.stdio import StdioServerParameters, stdio_client

    program, *arguments = _mortal(spec) if sys.platform == "linux" else spec.command
    parameters = StdioServerParameters(command=program, args=arguments, env=dict(spec.env), cwd=spec.cwd)
    async with stdio_client(parameters, errlog=stderr) as streams:  # type: ignore[arg-type]
        yield streams


def _mortal(spec: McpSpec) -> list[str]:
    """The command, made to end when we are killed: a server may hang, and would not see that its input has ended.

    Raises `FileNotFoundError`, which the command itself could only tell on standard error.
    """
    program = spec.command[0]
    if "/" in program:
        found = os.path.exists(os.path.join(spec.cwd or "", program))
    else:
        found = shutil.which(program, path=spec.env.get("PATH", os.environ.get("PATH"))) is not None
    if not found:
        raise FileNotFoundError(2, os.strerror(2), program)
    return [sys.executable, "-I", "-S", "-c", _UNTIL_WE_DIE, str(os.getpid()), *spec.command]


def _text(result: Any) -> str:
    """The blocks of a `CallToolResult` as text; what is no text is named."""
    parts = []
    for block in result.content:
        resource = getattr(block, "resource", None)
        text = getattr(block, "text", None) or getattr(resource, "text", None)
        kind = getattr(block, "mime_type", None) or getattr(resource, "mime_type", None) or block.type
        parts.append(text if text is not None else f"[{block.type}: {kind}]")
    return "\n".join(parts)


def _reason(error: BaseException) -> str:
    """The first real error of nested groups, in one line."""
    while isinstance(error, BaseExceptionGroup) and error.exceptions:
        error = error.exceptions[0]
    text = str(error).strip().splitlines()
    return f"{type(error).__name__}: {text[0]}" if text else type(error).__name__
