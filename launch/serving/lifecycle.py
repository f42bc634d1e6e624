"""A service from its first second to its last: listen, load, answer, drain, end.

It listens before the model is loaded, so that whoever asks is told to wait. SIGINT or SIGTERM: no new questions, what
is under way has `drain_s` to end, then everything that was started is ended; a second one cuts the wait short. When the
engine dies the server ends with status 1, for whoever supervises it to start it again.
"""

from __future__ import annotations

import asyncio
import contextlib
import multiprocessing
import os
import signal
import socket
import sys
import time
from collections.abc import Callable
from typing import Any

from envs.base import EnvError
from launch.serving.agent import Agent
from launch.serving.app import build_app
from launch.serving.service import Service
from rollout.policy import PolicyError

Say = Callable[[str], None]
_LAST_S = 5.0
"""For connections to take what was sent to them, once all episodes are over."""


def listen(host: str, port: int) -> socket.socket:
    """A socket that nobody else has; port 0 takes a free one. Raises `OSError` that names both."""
    try:
        family = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0][0]
        bound = socket.socket(family, socket.SOCK_STREAM)
        try:
            bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            bound.bind((host, port))
        except OSError:
            bound.close()
            raise
    except OSError as error:
        raise OSError(f"cannot listen at {host} port {port}: {error.strerror or error}") from None
    return bound


def url_of(bound: socket.socket, host: str) -> str:
    port = bound.getsockname()[1]
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


async def run_service(service: Service, bound: socket.socket, *, drain_s: float, say: Say) -> int:
    """Until a signal comes or the engine dies; returns the exit status. Belongs to the main thread."""
    stop, hurry = asyncio.Event(), asyncio.Event()

    def asked() -> None:
        (hurry if stop.is_set() else stop).set()

    loop = asyncio.get_running_loop()
    for number in (signal.SIGINT, signal.SIGTERM):
        loop.add_signal_handler(number, asked)
    server = server_for(service)
    serving = asyncio.create_task(server.serve(sockets=[bound]))
    settings = service.settings
    began = time.monotonic()
    loading = asyncio.create_task(
        Agent.start(service.plan, places=settings.places, line=settings.line, wait_s=settings.wait_s)
    )
    try:
        stopping = asyncio.create_task(stop.wait())
        await asyncio.wait({loading, stopping, serving}, return_when=asyncio.FIRST_COMPLETED)
        if not loading.done():
            await _give_up_loading(loading, server, serving, service)
            say("ended while it was loading")
            leave(0 if stop.is_set() else 1)
        service.ready(loading.result())
        say(f"ready after {time.monotonic() - began:.0f} s")
        failed = asyncio.create_task(service.failed.wait())
        await asyncio.wait({stopping, failed, serving}, return_when=asyncio.FIRST_COMPLETED)
        if service.running or service.waiting:
            say(f"ending: {service.running} episodes have {drain_s:g} s; once more ends them at once")
        draining = asyncio.create_task(service.drain(drain_s))
        hurrying = asyncio.create_task(hurry.wait())
        await asyncio.wait({draining, hurrying}, return_when=asyncio.FIRST_COMPLETED)
        cut = await draining if draining.done() else await _cut(service, draining)
        if cut:
            say(f"{cut} episodes were cut off")
        for task in (stopping, failed, hurrying):
            task.cancel()
    except (EnvError, PolicyError, ValueError, OSError) as error:  # from loading
        print(f"error: {error}", file=sys.stderr)
        await _end(server, serving)
        await service.close()
        return 2
    await _end(server, serving)
    await service.close()
    return 1 if service.failed.is_set() else 0


def server_for(service: Service) -> Any:
    import uvicorn

    config = uvicorn.Config(
        build_app(service),
        lifespan="off",
        log_level="warning",
        access_log=False,
        server_header=False,
        timeout_keep_alive=75,
        timeout_graceful_shutdown=int(_LAST_S),
    )
    server = uvicorn.Server(config)
    # Signals are handled here: uvicorn would raise them again after its own shutdown, before ours.
    setattr(server, "capture_signals", contextlib.nullcontext)  # noqa: B010  (a method of uvicorn's)
    return server


async def _cut(service: Service, draining: asyncio.Task[int]) -> int:
    draining.cancel()
    await asyncio.wait({draining})
    return await service.drain(0)


async def _end(server: Any, serving: asyncio.Task[None]) -> None:
    server.should_exit = True
    done, _ = await asyncio.wait({serving}, timeout=3 * _LAST_S)
    if not done:
        server.force_exit = True
        serving.cancel()


async def _give_up_loading(loading: asyncio.Task[Agent], server: Any, serving: Any, service: Service) -> None:
    loading.cancel()
    await asyncio.wait({loading}, timeout=_LAST_S)
    await _end(server, serving)
    await service.close()


def leave(status: int) -> None:
    """End this process at once, with what it started: a model is being loaded in a thread that cannot be stopped,
    perhaps into a process that does not know us yet."""
    for child in multiprocessing.active_children():
        child.kill()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)
