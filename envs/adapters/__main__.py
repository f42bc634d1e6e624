"""`python -m envs.adapters serve`: an env server from the command line.

    python -m envs.adapters serve --env code --port 8765 --tasks tasks.jsonl --tool my_tools:web_search
    python -m envs.adapters serve --env tool --mcp "python weather_server.py" --mcp http://host:8000/mcp

`--tool module:function` gives a typed function as a tool, `--mcp` all tools of an MCP server (a command or a URL), and
`--search module:function` what the env "search" searches with. It ends with SIGINT or SIGTERM.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib
import ipaddress
import os
import shlex
import signal
import sys
from typing import Any

from envs.adapters.http_server import ServerSettings, build_app, serve
from envs.base import EnvError, TaskError
from envs.mcp_tools import McpServer
from envs.registry import env_factory
from envs.tools import Tool

TOKEN_VARIABLE = "ENV_SERVER_TOKEN"


def main(arguments: list[str] | None = None) -> None:
    options = _parser().parse_args(arguments)
    with contextlib.ExitStack() as stack:
        try:
            _serve(options, stack)
        except KeyboardInterrupt:
            pass
        except (ValueError, TaskError, EnvError) as error:
            sys.exit(f"error: {error}")


def _serve(options: argparse.Namespace, stack: contextlib.ExitStack) -> None:
    token = os.environ.get(TOKEN_VARIABLE, "")
    if not token and not options.open and not _is_loopback(options.host):
        raise ValueError(
            f"--host {options.host} lets other machines in: set {TOKEN_VARIABLE} to what they must know, or say --open"
        )
    settings: dict[str, Any] = {} if options.env == "answer" else {"max_steps": options.max_steps}
    if options.env in ("code", "tool"):
        tools = [Tool.from_function(_load(name)) for name in options.tool]
        for server in options.mcp:
            by_url = server.startswith(("http://", "https://"))
            started = McpServer(url=server) if by_url else McpServer(command=shlex.split(server))
            tools += stack.enter_context(started).tools()
        settings["tools"] = tools
    elif options.tool or options.mcp:
        raise ValueError(f"env {options.env!r} calls no tools: leave out --tool and --mcp")
    if options.env == "search":
        if not options.search:
            raise ValueError("env 'search' needs --search module:function, which gives the results of a query as text")
        settings["search"] = _load(options.search)
    tasks = []
    if options.tasks:
        from envs.tasks import load_tasks

        tasks = load_tasks(options.tasks)
    limits = ServerSettings(max_sessions=options.max_sessions, idle_s=options.idle_s, token=token)
    factory = env_factory(options.env, **settings)
    factory().close()  # what cannot work fails now, not at the first reset
    # uvicorn ends in good order and then signals again, which by itself would end us before the servers above
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
    serve(build_app(factory, tasks=tasks, settings=limits, name=options.env), host=options.host, port=options.port)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m envs.adapters", description="Envs for other processes.")
    serving = parser.add_subparsers(required=True).add_parser("serve", help="envs behind HTTP, in OpenEnv's protocol")
    serving.add_argument("--env", default="code", choices=("answer", "code", "search", "tool"))
    serving.add_argument("--host", default="127.0.0.1")
    serving.add_argument("--port", type=int, default=8765, help="0 takes a free one")
    serving.add_argument("--tasks", help="task file, for resets that bring none")
    serving.add_argument("--tool", action="append", default=[], metavar="MODULE:FUNCTION")
    serving.add_argument("--mcp", action="append", default=[], metavar="COMMAND|URL")
    serving.add_argument("--search", metavar="MODULE:FUNCTION")
    serving.add_argument("--max-steps", type=int, default=5)
    serving.add_argument("--max-sessions", type=int, default=64)
    serving.add_argument("--idle-s", type=float, default=600.0)
    serving.add_argument("--open", action="store_true", help=f"no {TOKEN_VARIABLE} even on a host that others reach")
    return parser


def _load(name: str) -> Any:
    module, _, function = name.partition(":")
    try:
        return getattr(importlib.import_module(module), function)
    except (ImportError, AttributeError, ValueError) as error:
        raise ValueError(f"{name!r} is no module:function that can be imported: {error}") from None


def _is_loopback(host: str) -> bool:
    try:
        return host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


if __name__ == "__main__":
    sys.path.insert(0, os.getcwd())
    main()
