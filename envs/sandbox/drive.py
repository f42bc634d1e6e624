"""The driver's side of running steps: one loop that serves any number of confined processes at the same moment.

A `Process` is the driver's hold on one of them: its socket, and a pidfd to stop, continue and kill it. `run_steps`
sends each its code, answers its tool calls, and enforces the limits from outside; whatever a process sends or does
not send, the loop returns in bounded time with one `Execution` per step. A tool runs in a thread of its own, so that
neither a slow tool nor half a frame of one process delays another.
"""

from __future__ import annotations

import itertools
import json
import math
import os
import re
import secrets
import select
import signal
import socket
import struct
import threading
import time
from collections.abc import Sequence
from typing import Any

from envs.sandbox import wire
from envs.sandbox.execution import LIMITS, CallTool, Execution, SandboxError, SandboxLimits, ToolCall
from envs.tools import ToolError

GRACE_S = 0.5
"""Code that resists its own timer for this long is killed from outside."""
RESTARTED = "The interpreter was restarted: variables, functions and imports of earlier steps are gone."
_READ_BYTES = 1 << 16
_SHOWN_TIMES, _SHOWN_EVERY_S = 64, 0.02  # how often a process may tell what it has printed: at first, and then
_CONTROL = re.compile(r"[\x00-\x08\x0b-\x0c\x0e-\x1f\x7f-\x9f]")  # all but tab, line feed, carriage return
_serial = itertools.count(1)
_CLIP_SLACK_CHARS = 2000  # what the note of left-out characters, and an error's line, may add to a clipped text


class Process:
    """The driver's hold on one confined process, whose id the kernel put on its first frame."""

    def __init__(self, sock: socket.socket, pid: int, *, frame_bytes: int = wire.MAX_FRAME_BYTES) -> None:
        self.socket, self.pid = sock, pid
        self._pidfd = -1
        self._pidfd = os.pidfd_open(pid)
        self._inbox = wire.Inbox(frame_bytes)
        self._outbox = bytearray()
        self._paused = False
        sock.setblocking(False)

    def __del__(self) -> None:
        self.kill()

    @property
    def ended(self) -> bool:
        return self._pidfd < 0

    @property
    def pidfd(self) -> int:
        """Readable once the process has ended."""
        return self._pidfd

    @property
    def has_unsent(self) -> bool:
        return bool(self._outbox)

    def send(self, frame: bytes) -> None:
        """Queue a frame and write what the socket takes now. Raises `OSError` when the process has gone."""
        self._outbox += frame
        self.flush()

    def flush(self) -> None:
        while self._outbox:
            try:
                written = self.socket.send(self._outbox)
            except BlockingIOError:
                return
            del self._outbox[:written]

    def receive(self) -> list[dict[str, Any]] | None:
        """Frames that have arrived; None when the process has closed its side. Raises `wire.WireError`."""
        try:
            piece = self.socket.recv(_READ_BYTES)
        except BlockingIOError:
            return []
        except OSError:
            return None
        return self._inbox.feed(piece) if piece else None

    def cpu_s(self) -> float:
        """Processor time it has used so far; infinite when it has gone."""
        try:
            return time.clock_gettime((~self.pid << 3) | 2)  # MAKE_PROCESS_CPUCLOCK(pid, CPUCLOCK_SCHED)
        except OSError:
            return math.inf

    def pause(self) -> None:
        """Stop it between steps: code that got hold of it then has no time of its own."""
        if not self._paused:
            self._paused = self._signal(signal.SIGSTOP)

    def resume(self) -> None:
        if self._paused:
            self._signal(signal.SIGCONT)
            self._paused = False

    def kill(self) -> None:
        """SIGKILL and forget; may be called twice."""
        if self._pidfd >= 0:
            self._signal(signal.SIGKILL)
            os.close(self._pidfd)
            self._pidfd = -1
            self.socket.close()

    def _signal(self, number: int) -> bool:
        try:
            signal.pidfd_send_signal(self._pidfd, number)
        except ProcessLookupError:
            return False
        return True


def greet(sock: socket.socket, deadline: float) -> tuple[int, dict[str, Any]]:
    """Wait for the first frame on a socket with SO_PASSCRED; returns the sender's process id and the frame.

    Raises `SandboxError` when nothing (whole) comes before `deadline` (of `time.monotonic`).
    """
    inbox = wire.Inbox()
    size = struct.calcsize("3i")
    try:
        while True:
            sock.settimeout(max(0.001, deadline - time.monotonic()))
            piece, ancillary, _, _ = sock.recvmsg(_READ_BYTES, socket.CMSG_SPACE(size))
            if not piece:
                raise SandboxError("a sandboxed process ended before it said hello")
            pids = [
                struct.unpack("3i", content[:size])[0]
                for _, kind, content in ancillary
                if kind == socket.SCM_CREDENTIALS
            ]
            frames = inbox.feed(piece)
            if frames and pids:
                return pids[0], frames[0]
    except TimeoutError:
        raise SandboxError("a sandboxed process did not say hello in time") from None
    except (OSError, wire.WireError) as error:
        raise SandboxError(f"a sandboxed process could not be greeted: {error}") from None


class _Wake:
    """Wakes the loop from a tool's thread; safe to use after the loop has ended and its descriptor is reused."""

    def __init__(self) -> None:
        self.fd = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        self._lock = threading.Lock()
        self._open = True

    def set(self) -> None:
        with self._lock:
            if self._open:
                os.eventfd_write(self.fd, 1)

    def clear(self) -> None:
        os.eventfd_read(self.fd)

    def close(self) -> None:
        with self._lock:
            self._open = False
            os.close(self.fd)


class SharedCall:
    """One run of a tool, in a thread of its own, and all the steps that wait for it."""

    def __init__(self, call_tool: CallTool, name: str, args: list, kwargs: dict[str, Any], wake: _Wake) -> None:
        self.reply: bytes | None = None
        self.ok = False
        self.failure: BaseException | None = None
        self._wake = wake
        thread = threading.Thread(
            target=self._run, args=(call_tool, name, args, kwargs), name=f"tool-{name}", daemon=True
        )
        thread.start()

    def _run(self, call_tool: CallTool, name: str, args: list, kwargs: dict[str, Any]) -> None:
        try:
            try:
                value = call_tool(name, args, kwargs)
                try:
                    reply = wire.encode({"value": value})
                except wire.WireError as error:
                    raise ToolError(f"the answer of {name}() is too long: {error}") from None
                self.ok = True
            except ToolError as error:
                reply = wire.encode({"error": str(error)[:4000]})
            self.reply = reply
        except BaseException as error:  # crosses to the thread that waits, and is raised there
            self.failure = error
        self._wake.set()


CallKey = tuple[str, str, int]
"""Name, arguments as JSON, and which of a step's calls with these it is."""


class _Step:
    """One step of one process, while it runs."""

    def __init__(self, process: Process, code: str) -> None:
        self.process, self.code = process, code
        # Late frames of an earlier step, and those that code writes to a descriptor that it finds, do not carry it.
        self.key = f"{next(_serial):x}-{secrets.token_hex(8)}"
        self.shown = ""
        self.shown_times = 0
        self.exceeded_at: float | None = None
        self.started = time.monotonic()
        self.cpu_start_s = process.cpu_s()
        self.waited_s = 0.0
        self.asked: float | None = None
        self.pending: tuple[str, str, SharedCall] | None = None
        self.calls: list[ToolCall] = []
        self.seen: dict[tuple[str, str], int] = {}
        self.execution: Execution | None = None

    def wall_s(self, now: float) -> float:
        return (self.asked if self.asked is not None else now) - self.started - self.waited_s


def run_steps(
    processes: Sequence[Process],
    codes: Sequence[str],
    call_tool: CallTool,
    *,
    limits: SandboxLimits,
    tool_names: Sequence[str],
    shared: dict[CallKey, SharedCall],
) -> list[Execution]:
    """Run one code in each process, all at the same moment; equal tool calls of different processes are made once.

    `shared` holds the calls that were made from the same state before, and those of this run afterwards.

    Processes that end or must be killed are killed here, and their `Execution.limit` says why; the others are left
    paused.
    Raises what `call_tool` raises beyond `ToolError`, and `SandboxError` for a tool that takes longer than `tool_s`;
    the processes are then in the middle of a step, and the caller must kill them.
    """
    wake = _Wake()
    try:
        return _Loop(processes, codes, call_tool, limits, tool_names, shared, wake).run()
    finally:
        wake.close()


class _Loop:
    def __init__(
        self,
        processes: Sequence[Process],
        codes: Sequence[str],
        call_tool: CallTool,
        limits: SandboxLimits,
        tool_names: Sequence[str],
        shared: dict[CallKey, SharedCall],
        wake: _Wake,
    ) -> None:
        self._call_tool, self._limits, self._tool_names, self._wake = call_tool, limits, frozenset(tool_names), wake
        # A call of an earlier loop that has not come back would wake nobody: it is made again.
        self._shared = {key: call for key, call in shared.items() if call.reply is not None}
        self._all_shared = shared
        self._poller = select.poll()
        self._poller.register(wake.fd, select.POLLIN)
        self._by_fd: dict[int, _Step] = {}
        self._steps: list[_Step] = []
        for process, code in zip(processes, codes, strict=True):
            process.resume()
            step = _Step(process, code)
            self._steps.append(step)
            for fd in (process.socket.fileno(), process.pidfd):
                self._by_fd[fd] = step
                self._poller.register(fd, select.POLLIN)
            self._send(step, wire.encode({"run": code, "key": step.key}))

    def run(self) -> list[Execution]:
        while any(step.execution is None for step in self._steps):
            for fd, event in self._poller.poll(self._sleep_ms()):
                if fd == self._wake.fd:
                    self._wake.clear()
                    continue
                step = self._by_fd.get(fd)
                if step is not None and step.execution is None:
                    self._on_event(step, fd, event)
            self._deliver()
        return [step.execution for step in self._steps if step.execution is not None]

    def _sleep_ms(self) -> int:
        """Kill what is over its limits; returns how long nothing else needs to be looked at."""
        now, limits = time.monotonic(), self._limits
        nearest = math.inf
        for step in self._steps:
            if step.execution is not None:
                continue
            if step.asked is not None:
                left = step.asked + limits.tool_s - now
                if left <= 0 and step.pending is not None:
                    raise SandboxError(f"tool {step.pending[0]} did not answer in {limits.tool_s:g} s")
            else:
                left = limits.wall_s + GRACE_S - step.wall_s(now)
                if left <= 0:
                    self._kill(step, "wall time", f"the step was killed after {limits.wall_s:g} s")
                    continue
                if step.exceeded_at is not None:
                    left = min(left, step.exceeded_at + GRACE_S - now)
                    if left <= 0:
                        self._kill(step, "tool calls", self._too_many_calls())
                        continue
            # one thread uses no more processor time than time goes by, so nothing need be looked at sooner
            cpu_left = limits.cpu_s + GRACE_S - (step.process.cpu_s() - step.cpu_start_s)
            if -math.inf < cpu_left <= 0:
                self._kill(step, "cpu time", f"the step was killed after {limits.cpu_s} s of processor time")
                continue
            nearest = min(nearest, left, cpu_left if cpu_left > 0 else math.inf)
        return 0 if nearest is math.inf else math.ceil(max(0.0, nearest) * 1000)

    def _on_event(self, step: _Step, fd: int, event: int) -> None:
        process = step.process
        if fd == process.pidfd:
            self._poller.unregister(fd)
            self._on_frames(step)  # what it said last
            if step.execution is None:
                self._died(step)
            return
        if event & select.POLLOUT:
            self._send(step, b"")
        if event & (select.POLLIN | select.POLLHUP | select.POLLERR) and step.execution is None:
            self._on_frames(step)

    def _on_frames(self, step: _Step) -> None:
        try:
            frames = step.process.receive()
        except wire.WireError:
            frames = None
        if frames is None:
            self._died(step)
            return
        for frame in frames:
            if step.execution is not None:
                return  # nothing counts after the end of the step
            if frame.get("key") != step.key:
                self._died(step)
            elif "call" in frame:
                self._on_call(step, frame)
            elif "shown" in frame:
                self._on_shown(step, frame["shown"])
            else:
                self._on_done(step, frame)

    def _on_shown(self, step: _Step, text: Any) -> None:
        """What the step has printed so far."""
        step.shown_times += 1
        often = step.shown_times > _SHOWN_TIMES + (time.monotonic() - step.started) / _SHOWN_EVERY_S
        if not isinstance(text, str) or often or len(text) > self._limits.output_chars + _CLIP_SLACK_CHARS:
            self._died(step)
            return
        step.shown = text

    def _too_many_calls(self) -> str:
        return f"the step made more than {self._limits.tool_calls} tool calls"

    def _on_call(self, step: _Step, frame: dict[str, Any]) -> None:
        name, args, kwargs = frame.get("name"), frame.get("args"), frame.get("kwargs")
        if (
            not isinstance(name, str)
            or name not in self._tool_names
            or not isinstance(args, list)
            or not isinstance(kwargs, dict)
            or step.asked is not None
        ):
            self._died(step)
            return
        if len(step.calls) >= self._limits.tool_calls:
            if step.exceeded_at is None:
                step.exceeded_at = time.monotonic()
            self._send(step, wire.encode({"limit": "tool calls", "error": self._too_many_calls()}))
            return
        try:
            call = {"args": args, "kwargs": kwargs}
            text = _whole(json.dumps(call, ensure_ascii=False, sort_keys=True, allow_nan=False))
            cleaned = json.loads(text)
        except (RecursionError, ValueError):  # nested too deep, or an infinite number
            self._died(step)
            return
        # The n-th equal call of one candidate is shared with the n-th of the others, never with its own: a tool that
        # answers differently the second time does so in a preview as it does in a run.
        times = step.seen[name, text] = step.seen.get((name, text), 0) + 1
        key = (name, text, times)
        if key not in self._shared:
            call = SharedCall(self._call_tool, name, cleaned["args"], cleaned["kwargs"], self._wake)
            self._shared[key] = self._all_shared[key] = call
        step.asked = time.monotonic()
        step.pending = (name, text, self._shared[key])

    def _deliver(self) -> None:
        """Send the answers of tools that have come back to the steps that wait for them."""
        for step in self._steps:
            if step.execution is not None or step.pending is None or step.asked is None:
                continue
            name, text, call = step.pending
            if call.failure is not None:
                raise call.failure
            if call.reply is None:
                continue
            waited_s = time.monotonic() - step.asked
            step.calls.append(ToolCall(name=name, args=text, ok=call.ok, wall_s=waited_s))
            step.waited_s += waited_s
            step.asked = step.pending = None
            self._send(step, call.reply)

    def _on_done(self, step: _Step, frame: dict[str, Any]) -> None:
        text_chars = self._limits.output_chars + _CLIP_SLACK_CHARS
        stdout, value, error, limit, final = (frame.get(key) for key in ("stdout", "value", "error", "limit", "final"))
        is_final = frame.get("is_final")
        texts_fit = all(text is None or isinstance(text, str) for text in (stdout, value, error, final))
        if (
            not texts_fit
            or stdout is None
            or not isinstance(is_final, bool)
            or (limit is not None and limit not in LIMITS)
        ):
            self._died(step)
            return
        step.process.pause()
        if step.exceeded_at is not None and limit is None:  # the code has caught that and gone on
            limit, is_final = "tool calls", False
            error = error or f"Stopped: {self._too_many_calls()}"
        self._finish(
            step,
            Execution(
                stdout=_clean(stdout, text_chars),
                value=None if value is None else _clean(value, text_chars),
                error=None if error is None else _clean(error, text_chars),
                limit=limit,
                final=_clean(final or "", text_chars) if is_final else None,
                is_final=is_final,
                tool_calls=tuple(step.calls),
                wall_s=step.wall_s(time.monotonic()),
            ),
        )

    def _send(self, step: _Step, frame: bytes) -> None:
        try:
            step.process.send(frame)
        except OSError:
            self._died(step)
            return
        events = select.POLLIN | (select.POLLOUT if step.process.has_unsent else 0)
        self._poller.modify(step.process.socket, events)

    def _died(self, step: _Step) -> None:
        self._kill(step, "died", "the interpreter ended in the middle of the step")

    def _kill(self, step: _Step, limit: str, what: str) -> None:
        error = f"Killed: {what}. {RESTARTED}"
        wall_s = step.wall_s(time.monotonic())
        calls = tuple(step.calls)
        self._finish(
            step, Execution(stdout=_clean(step.shown), error=error, limit=limit, tool_calls=calls, wall_s=wall_s)
        )
        step.process.kill()

    def _finish(self, step: _Step, execution: Execution) -> None:
        for fd in (step.process.socket.fileno(), step.process.pidfd):
            self._by_fd.pop(fd, None)
            try:
                self._poller.unregister(fd)
            except KeyError:  # its end was already seen
                pass
        step.execution = execution


def _clean(text: str, limit_chars: int | None = None) -> str:
    """Text that every tokenizer, file and terminal takes: no control characters, no lone surrogates, bounded."""
    return _CONTROL.sub("\ufffd", _whole(text[:limit_chars]))


def _whole(text: str) -> str:
    return text if text.isascii() else text.encode("utf-8", "replace").decode("utf-8")
