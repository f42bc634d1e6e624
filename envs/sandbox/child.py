"""Runs an agent's code, inside the confined process: semantics only. The confinement is already in force.

A step is compiled and run in one persistent `__main__`, as at an interactive prompt: what it prints is collected, the
value of a last expression is taken, an error is told in one or two lines. The import allow-list and the tools are
conveniences here; code that goes around them gains nothing, since all it reaches is its own process.

Trusted only until the first step: from then on this process may do anything that the kernel lets it do, and the driver
believes none of its frames further than as this episode's own result.
"""

from __future__ import annotations

import ast
import builtins
import collections
import ctypes
import io
import json
import os
import select
import signal
import socket
import sys
import time
import types
from collections.abc import Callable, Sequence
from typing import Any

from envs.sandbox import wire

_SHOWN_MESSAGE_CHARS = 1000
_SHOWN_LINE_CHARS = 160
_GRACE_REPEAT_S = 0.1
_AT_ONCE_S = 0.001
_SHOWN_AT_ONCE = 16
_SHOWN_EVERY_S = 0.05
# Kept here, so that code which changes the modules they come from does not lose its own step by it.
_dumps, _loads, _monotonic = json.dumps, json.loads, time.monotonic
_dup2, _exit, _close = os.dup2, os._exit, os.close
_signal, _setitimer, _getitimer, _mask = signal.signal, signal.setitimer, signal.getitimer, signal.pthread_sigmask
_wake_up = signal.set_wakeup_fd
_receive, _send, _socket = wire.receive, wire.send, socket.socket
_compile, _exec, _eval = compile, exec, eval
# Exact text of a subclass of str, and the true name of a type, whatever the code has defined over them.
_exact, _name_of_type = str.__str__, type.__dict__["__name__"].__get__
# The C library's fork, since this process has one thread and may not start another: Python's own would go on to renew
# locks that nobody else can hold and to seed `random` anew, and so copy some two hundred pages in each candidate.
_fork = ctypes.PyDLL(None, use_errno=True).fork
_every_fd = select.poll()
for _fd in range(3, 128):
    _every_fd.register(_fd, 0)


class FinalAnswer(BaseException):
    """Ends the step; not an `Exception`, so that `except Exception` in the code does not catch it."""


class StepLimit(BaseException):
    """Ends the step at a limit; `name` is what `Execution.limit` will say."""

    def __init__(self, name: str, message: str) -> None:
        super().__init__(message)
        self.name = name


class ToolError(Exception):
    """A tool could not do what it was asked; the message says why."""


def serve(frames: socket.socket, *, tool_names: Sequence[str], limits: dict[str, Any], modules: Sequence[str]) -> None:
    """Do what the driver asks until it goes away. A fork becomes a server by itself, on a socket of its own."""
    interpreter = Interpreter(frames, tool_names=tool_names, limits=limits, modules=modules)
    while (received := _receive(interpreter.frames)) is not None:
        message, fds = received
        if "run" in message:
            _send(interpreter.frames, interpreter.run(message["run"], message["key"]))
        elif "fork" in message:
            interpreter.fork_to(fds)


class Interpreter:
    """One persistent `__main__` and the step that runs in it."""

    def __init__(
        self, frames: socket.socket, *, tool_names: Sequence[str], limits: dict[str, Any], modules: Sequence[str]
    ) -> None:
        self.frames = frames
        self._limits, self._modules = limits, tuple(modules)
        self._steps = 0
        self._sources: dict[str, list[str]] = {}
        self._calls = 0
        self._armed = False
        self._settled = False  # since the last step
        self._key = ""
        self._exceeded: tuple[str, str] | None = None  # name and message of the limit that this step has met
        self._final: str | None = None
        self._is_final = False
        main = types.ModuleType("__main__")
        sys.modules["__main__"] = main
        self._globals = main.__dict__
        self._builtins = {**vars(builtins), "__import__": self._import}
        self._given: dict[str, Any] = {name: self._tool(name) for name in tool_names}
        self._given["final_answer"] = self._final_answer
        self._given["ToolError"] = ToolError
        # for numbers of many digits, which agents print; quadratic work stays below a second
        sys.set_int_max_str_digits(100_000)
        sys.stdin = io.StringIO("")

    def fork_to(self, fds: list[int]) -> None:
        """Fork once per socket; each fork serves on its own. Returns in all of them. Raises `OSError`.

        What all forks would do is done before them: every page that a fork writes to is copied.
        """
        self._settle()
        hello = wire.encode({"hello": True})
        sockets = {*fds, self.frames.fileno()}
        not_open = {fd for fd, event in _every_fd.poll(0) if event & select.POLLNVAL}
        others = [fd for fd in range(3, 128) if fd not in sockets and fd not in not_open]
        while fds:
            fd = fds.pop()
            pid = _fork()
            if pid < 0:
                raise OSError(ctypes.get_errno(), "fork")
            if pid == 0:
                for sibling in fds:
                    _close(sibling)
                self.move_to(fd, others)
                self.frames.sendall(hello)
                return
            _close(fd)

    def move_to(self, fd: int, others: Sequence[int]) -> None:
        """Serve on another socket: what a fresh candidate does first.

        `others`, all descriptors but the sockets, are turned into /dev/null, since a file opened before the fork shares
        its offset with the siblings.
        """
        self._settled = True
        self.frames.close()
        # family, type and protocol are given, since asking the descriptor for them is not allowed any more
        self.frames = _socket(socket.AF_UNIX, socket.SOCK_STREAM, 0, fileno=fd)
        for other in others:
            _dup2(0, other)

    def run(self, code: str, key: str) -> dict[str, Any]:
        """Run one step; returns the frame that tells of it. The driver takes frames with this `key` only."""
        self._steps += 1
        self._key = key
        if not self._settled:
            self._settle()
        self._settled = False
        filename = f"<step {self._steps}>"
        self._sources[filename] = code.splitlines()
        self._final, self._is_final = None, False
        output = Output(self._limits["output_chars"], self._show)
        sys.stdout = sys.stderr = output
        self._globals.update(self._given)  # code that assigned to a tool's name does not lose the tool
        value: str | None = None
        problem: BaseException | None = None
        try:
            self._arm(self._limits["wall_s"], self._limits["cpu_s"])
            try:
                result = self._execute(code, filename)
                value = None if result is None else _exact(str(result))
                del result
            finally:
                self._disarm()
        except FinalAnswer:
            pass
        except BaseException as error:
            problem = error
        self._disarm()  # a timer may have gone off just before the first one
        if self._exceeded is not None and not isinstance(problem, StepLimit):
            problem = StepLimit(*self._exceeded)  # the code, or a destructor, has caught it
        limit = (
            problem.name if isinstance(problem, StepLimit) else "memory" if isinstance(problem, MemoryError) else None
        )
        shown = None if problem is None else self._describe(problem, filename)
        problem = None  # the traceback holds the frames, and they hold what the step made
        clip_chars = self._limits["output_chars"]
        return {
            "key": key,
            "stdout": output.text(),
            "value": None if value is None else clip(value, clip_chars),
            "error": shown,
            "limit": limit,
            "final": None if self._final is None else clip(self._final, clip_chars),
            "is_final": self._is_final,
        }

    def _execute(self, code: str, filename: str) -> Any:
        tree: Any = _compile(code, filename, "exec", ast.PyCF_ONLY_AST, dont_inherit=True)
        last = tree.body.pop() if tree.body and isinstance(tree.body[-1], ast.Expr) else None
        _exec(_compile(tree, filename, "exec", dont_inherit=True), self._globals)
        if isinstance(last, ast.Expr):
            return _eval(_compile(ast.Expression(last.value), filename, "eval", dont_inherit=True), self._globals)
        return None

    def _settle(self) -> None:
        """Take back what an earlier step may have left in the way of this one."""
        self._exceeded = None
        _signal(signal.SIGALRM, self._on_timer)
        _signal(signal.SIGPROF, self._on_timer)
        _signal(signal.SIGCHLD, signal.SIG_IGN)
        _mask(signal.SIG_SETMASK, ())
        _wake_up(-1)
        sys.settrace(None)
        sys.setprofile(None)
        self._globals["__builtins__"] = self._builtins
        self._builtins["__import__"] = self._import

    def _show(self, printed: str) -> None:
        """Tell the driver what is printed so far: it has that if the process must be killed."""
        armed, self._armed = self._armed, False  # half a frame would end the episode
        try:
            _send(self.frames, {"key": self._key, "shown": printed})
        finally:
            self._armed = armed

    # limits

    def _arm(self, wall_s: float, cpu_s: float) -> None:
        self._armed = True
        # The timers repeat: an exception raised inside a destructor is swallowed. The driver kills what resists them
        # all.
        _setitimer(signal.ITIMER_PROF, cpu_s, _GRACE_REPEAT_S)
        _setitimer(signal.ITIMER_REAL, wall_s, _GRACE_REPEAT_S)

    def _disarm(self) -> None:
        self._armed = False
        _setitimer(signal.ITIMER_REAL, 0)
        _setitimer(signal.ITIMER_PROF, 0)

    def _on_timer(self, number: int, frame: object) -> None:
        if not self._armed:
            return
        if self._exceeded is None:
            if number == signal.SIGALRM:
                self._exceeded = "wall time", f"the step was stopped after {self._limits['wall_s']:g} s"
            else:
                self._exceeded = "cpu time", f"the step was stopped after {self._limits['cpu_s']} s of processor time"
        raise StepLimit(*self._exceeded)  # again, where the code has caught it

    # what the code is given

    def _final_answer(self, answer: Any = None) -> None:
        """Give the answer to the task; this ends the episode."""
        if self._exceeded is not None:  # too late: the step has ended, though the code has caught that
            raise StepLimit(*self._exceeded)
        if not self._is_final:
            self._final = _exact(str(answer))
            self._is_final = True
        raise FinalAnswer

    def _tool(self, name: str) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            return self._call(name, args, kwargs)

        call.__name__ = call.__qualname__ = name
        return call

    def _call(self, name: str, args: tuple, kwargs: dict[str, Any]) -> Any:
        try:
            text = _dumps([args, kwargs], default=_plain, allow_nan=False)
        except (TypeError, ValueError, RecursionError) as error:
            raise TypeError(f"{name}() takes JSON values (str, numbers, bool, None, list, dict): {error}") from None
        if len(text) > wire.MAX_ARGUMENT_CHARS:
            raise TypeError(
                f"{name}() got {len(text)} characters of arguments; at most {wire.MAX_ARGUMENT_CHARS} are allowed"
            )
        if self._exceeded is not None:
            raise StepLimit(*self._exceeded)
        plain_args, plain_kwargs = _loads(text)
        self._calls += 1
        call = {"key": self._key, "call": self._calls, "name": name, "args": plain_args, "kwargs": plain_kwargs}
        wall_left, _ = _getitimer(signal.ITIMER_REAL)
        armed, self._armed = self._armed, False  # the wait for a tool is not the step's time
        _setitimer(signal.ITIMER_REAL, 0)
        try:
            _send(self.frames, call)
            received = _receive(self.frames)
        finally:
            self._armed = armed
            if armed:
                _setitimer(signal.ITIMER_REAL, max(wall_left, _AT_ONCE_S), _GRACE_REPEAT_S)
        if received is None:
            _exit(0)
        reply = received[0]
        if "value" in reply:
            return reply["value"]
        if "limit" in reply:
            self._exceeded = reply["limit"], reply["error"]
            if self._armed:  # and again, if the code catches this one
                _setitimer(signal.ITIMER_REAL, _GRACE_REPEAT_S, _GRACE_REPEAT_S)
            raise StepLimit(*self._exceeded)
        raise ToolError(reply["error"])

    def _import(self, name: str, globals: Any = None, locals: Any = None, fromlist: Any = (), level: int = 0) -> Any:
        if level == 0 and (name in self._modules or name.partition(".")[0] in self._modules):
            return builtins.__import__(name, globals, locals, fromlist, level)
        allowed = ", ".join(self._modules)
        raise ImportError(f"import of {name or 'a relative module'} is not allowed; these modules are: {allowed}")

    # what the code is told

    def _describe(self, error: BaseException, filename: str) -> str:
        try:
            message = _exact(str(error) if not isinstance(error, SyntaxError) else str(error.msg))
        except BaseException:
            message = "(its message cannot be shown)"
        if isinstance(error, MemoryError) and not message:
            message = f"the step needs more than {self._limits['memory_mb']} MB"
        name = "Stopped" if isinstance(error, StepLimit) else _name_of_type(type(error))
        text = clip(f"{name}: {message}" if message else name, _SHOWN_MESSAGE_CHARS)
        try:
            return text + self._where(error, filename)
        except Exception:  # attributes that the code has put over the real ones
            return text

    def _where(self, error: BaseException, filename: str) -> str:
        """The innermost line of the agent's own code that the error came through."""
        place: tuple[str, int | None] | None = None
        if isinstance(error, SyntaxError) and error.filename == filename:
            place = filename, error.lineno
        trace = error.__traceback__
        while trace is not None:
            if trace.tb_frame.f_code.co_filename in self._sources:
                place = trace.tb_frame.f_code.co_filename, trace.tb_lineno
            trace = trace.tb_next
        if place is None:
            return ""
        source, number = place[0], place[1] or 0
        lines = self._sources[source]
        line = lines[number - 1].strip()[:_SHOWN_LINE_CHARS] if 0 < number <= len(lines) else ""
        earlier = "" if source == filename else f" of {source.strip('<>')}"
        return f"\n  line {number}{earlier}: {line}"


class Output(io.TextIOBase):
    """Where prints go: keeps the head and the tail of what was written, whatever its length.

    `show` is given all of it so far: at once for the first lines, now and then for what follows.
    """

    def __init__(self, limit_chars: int, show: Callable[[str], object]) -> None:
        self._show = show
        self._showing = False
        self._shown_at_once = 0
        self._show_next_at = _monotonic() + _SHOWN_EVERY_S
        self._half = max(1, limit_chars // 2)
        self._head: list[str] = []
        self._head_room = self._half
        self._tail: collections.deque[str] = collections.deque()
        self._tail_chars = 0
        self._dropped = 0

    def writable(self) -> bool:
        return True

    @property
    def encoding(self) -> str:  # type: ignore[override]
        return "utf-8"

    def write(self, text: str, /) -> int:
        if not isinstance(text, str):
            raise TypeError(f"write() argument must be str, not {type(text).__name__}")
        rest = text = _exact(text)
        if self._head_room:
            self._head.append(rest[: self._head_room])
            rest = rest[self._head_room :]
            self._head_room -= len(self._head[-1])
        if rest:
            kept = rest[-self._half :]
            self._dropped += len(rest) - len(kept)
            self._tail.append(kept)
            self._tail_chars += len(kept)
            while self._tail_chars - len(self._tail[0]) >= self._half:
                gone = len(self._tail.popleft())
                self._tail_chars -= gone
                self._dropped += gone
        now = _monotonic()
        at_once = self._shown_at_once < _SHOWN_AT_ONCE and text.endswith("\n")
        if (at_once or now >= self._show_next_at) and not self._showing:
            self._shown_at_once += at_once
            self._show_next_at = now + _SHOWN_EVERY_S
            self._showing = True  # what a destructor prints meanwhile must not come in between
            try:
                self._show(self.text())
            finally:
                self._showing = False
        return len(text)

    def text(self) -> str:
        """All of it, or the head, a note of how much is left out, and the tail."""
        tail = "".join(self._tail)
        surplus = max(0, len(tail) - self._half)
        return _join("".join(self._head), self._dropped + surplus, tail[surplus:])


def clip(text: str, limit_chars: int) -> str:
    """The text, or its head and tail with a note of how much is left out between them."""
    half = max(1, limit_chars // 2)
    if len(text) <= 2 * half:
        return text
    return _join(text[:half], len(text) - 2 * half, text[-half:])


def _join(head: str, dropped: int, tail: str) -> str:
    return f"{head}\n... ({dropped} characters left out) ...\n{tail}" if dropped else head + tail


def _plain(value: Any) -> Any:
    """numpy's scalars and arrays, and sets, as JSON knows them."""
    if hasattr(value, "tolist"):
        return value.tolist()
    if isinstance(value, (set, frozenset, collections.deque)):
        return list(value)
    raise TypeError(f"not a {type(value).__name__}")
