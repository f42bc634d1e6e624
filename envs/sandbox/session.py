"""`Sandbox` and `Session`: the driver's side of running an agent's Python in CPython, confined by the kernel.

A `Sandbox` owns one zygote (see `zygote.py`) and starts sessions; a `Session` is one episode: a persistent
interpreter that runs steps in place, or k candidate steps in k forks of itself, of which one may become the state.
The driver never imports, unpickles, compiles or evaluates anything that comes from a sandbox: it reads bounded JSON
frames. No driver is ever forked, so it may have threads, accelerators and secrets.

This is not a container runtime: it confines Python code that an agent wrote, in the way that notes in `confine.py`
tell, and it refuses to start where seccomp is not available.

Example::

    with Sandbox(tool_names=["web_search"]) as sandbox, sandbox.start(seed=0) as session:
        session.run("x = 6", call_tool)
        a, b = session.preview(["x + 1", "x += 1"], call_tool)   # neither sees the other
        session.commit(1)                                        # x is 7 now
"""

from __future__ import annotations

import contextlib
import math
import os
import select
import socket
import subprocess
import sys
import sysconfig
import threading
import time
import weakref
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

from envs.sandbox import drive, wire
from envs.sandbox.execution import DEFAULT_MODULES, CallTool, Execution, SandboxError, SandboxLimits

MAX_CANDIDATES = wire.MAX_FDS
_ZYGOTE_START_S = 60.0  # importing numpy and sympy from a cold disk
_HELLO_S = 20.0
_FORK_S, _FORK_EACH_S = 3.0, 0.2  # how long forking may take a process that may be broken, on a busy machine
_CLOSE_S = 5.0
_NOT_RUN, _BROKEN = -1, -2  # in place of a fork: the code was refused; the state could not be forked for it
# The parts of this package that the zygote needs, without the rest: importing `envs` there would load the driver's
# side.
_BOOT = """
import sys, types
for name, path in (("envs", []), ("envs.sandbox", [sys.argv[2]])):
    module = types.ModuleType(name)
    module.__path__ = path
    sys.modules[name] = module
from envs.sandbox.zygote import main
main()
"""
_ENVIRONMENT = {
    "PYTHONHASHSEED": "0",
    "PYTHONUTF8": "1",
    "PYTHONDONTWRITEBYTECODE": "1",
    "LANG": "C.UTF-8",
    "TZ": "UTC",
    "HOME": "/tmp",
    "OMP_NUM_THREADS": "1",
    "OPENBLAS_NUM_THREADS": "1",
    "MKL_NUM_THREADS": "1",
    "NUMEXPR_NUM_THREADS": "1",
}


MUST_FAIL = ("no_network", "no_host_files", "no_writing", "no_exec", "no_signals", "no_fork")
"""What is tried from inside before a sandbox is used; see `confine.verify`."""


class _Refused(SandboxError):
    """An episode that says why it cannot be; trying again would not help."""


class Sandbox:
    """Owns one zygote; starts sessions, from any thread. A zygote that died is started again; its sessions live on.

    Raises `SandboxError` when the zygote cannot start or the minimum of confinement (no_new_privs, seccomp) is not
    available. `unsafe=True` goes on with what is available. `without` names layers of `report()` to leave out, to
    test the others. `sources`, module name -> program text, are our own modules: they are loaded once, in order and
    before anything is confined, and episodes may import them.
    """

    def __init__(
        self,
        *,
        tool_names: Sequence[str] = (),
        limits: SandboxLimits = SandboxLimits(),  # noqa: B008  (frozen)
        modules: Sequence[str] = DEFAULT_MODULES,
        sources: Mapping[str, str] | None = None,
        unsafe: bool = False,
        without: Sequence[str] = (),
    ) -> None:
        for name in tool_names:
            if not name.isidentifier() or name == "final_answer":
                raise ValueError(
                    f"tool name {name!r}: must be a Python identifier other than final_answer, which is built in"
                )
        if not sys.platform.startswith("linux"):
            raise SandboxError(f"the sandbox needs Linux, this is {sys.platform}")
        self.tool_names, self.limits = tuple(tool_names), limits
        self._config = {
            "tool_names": list(tool_names),
            "limits": asdict(limits),
            "modules": [*modules, *(sources or ())],
            "sources": dict(sources or {}),
            "unsafe": unsafe,
            "without": list(without),
            "paths": _library_paths(),
        }
        self._lock = threading.Lock()
        self._closed = False
        self._sessions: weakref.WeakSet[Session] = weakref.WeakSet()
        self._zygote: subprocess.Popen | None = None
        self._control: socket.socket | None = None
        try:
            with self._lock:
                self._start_zygote()
            session, self._layers = self._start(0, probe=True)
            session.close()
            if not unsafe and (held := [name for name in MUST_FAIL if self._layers.get(name) is not True]):
                raise SandboxError(
                    f"the confinement does not hold here: {', '.join(held)} (see report); unsafe=True would go on"
                )
        except BaseException:
            self.close()
            raise

    def start(self, seed: int) -> Session:
        """Start an episode. `random` and `numpy.random` start from `seed`. Raises `SandboxError`."""
        return self._start(seed, probe=False)[0]

    def report(self) -> dict[str, str | bool]:
        """Which layers are in force, as found by entering them and by trying, from inside, what must not work."""
        return dict(self._layers)

    def close(self) -> None:
        """End every session and the zygote; may be called twice. The same happens when this process dies."""
        with self._lock:
            self._closed = True
            sessions = list(self._sessions)
            zygote, control = self._zygote, self._control
            self._zygote = self._control = None
        for session in sessions:
            session.close()
        if control is not None:
            control.close()  # the zygote ends when it reads the end of this
        if zygote is not None:
            _end(zygote)

    def __enter__(self) -> Sandbox:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    @property
    def zygote_pid(self) -> int | None:
        """Process id of the zygote, None once closed."""
        return self._zygote.pid if self._zygote else None

    def _start(self, seed: int, *, probe: bool) -> tuple[Session, dict[str, str | bool]]:
        holder, hello, control = self._begin_episode(seed, probe)
        session = Session(self, seed, holder, control)
        with self._lock:
            if not self._closed:
                self._sessions.add(session)
                return session, hello.get("layers", {})
        session.close()
        raise SandboxError("the sandbox is closed")

    def _begin_episode(self, seed: int, probe: bool = False) -> tuple[drive.Process, dict[str, Any], socket.socket]:
        """A fresh state holder, its first frame, and the socket that its keeper lives by. Raises `SandboxError`."""
        problem: Exception | None = None
        for _ in range(3):  # again when the zygote turns out to be dead
            try:
                holder, hello, control = self._request_episode(seed, probe)
            except _Refused:
                raise
            except (OSError, SandboxError) as error:
                if self._closed:
                    raise SandboxError("the sandbox is closed") from error
                problem = error
                zygote = self._zygote
                if zygote is not None:  # one that is being killed is not seen as dead at once
                    with contextlib.suppress(subprocess.TimeoutExpired):
                        zygote.wait(0.3)
                continue
            return holder, hello, control
        raise SandboxError(f"an episode could not be started: {problem}") from problem

    def _request_episode(self, seed: int, probe: bool) -> tuple[drive.Process, dict[str, Any], socket.socket]:
        control, control_theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        frames, frames_theirs = socket.socketpair()
        try:
            try:
                frames.setsockopt(socket.SOL_SOCKET, socket.SO_PASSCRED, 1)
                with self._lock:
                    if self._zygote is None or self._control is None or self._zygote.poll() is not None:
                        self._start_zygote()
                    assert self._control is not None
                    self._control.settimeout(_HELLO_S)
                    wire.send(
                        self._control, {"seed": seed, "probe": probe}, [control_theirs.fileno(), frames_theirs.fileno()]
                    )
            finally:
                control_theirs.close()
                frames_theirs.close()
            pid, hello = drive.greet(frames, time.monotonic() + _HELLO_S)
            if "failed" in hello:  # its last words: it may have ended by now
                raise _Refused(str(hello["failed"]))
            return self._process(frames, pid), hello, control
        except BaseException:
            control.close()
            frames.close()
            raise

    def _process(self, frames: socket.socket, pid: int) -> drive.Process:
        return drive.Process(frames, pid, frame_bytes=wire.confined_frame_bytes(self.limits.output_chars))

    def _start_zygote(self) -> None:
        """Call with the lock held."""
        if self._closed:
            raise SandboxError("the sandbox is closed")
        if self._control is not None:
            self._control.close()
        if self._zygote is not None:
            _end(self._zygote)
        ours, theirs = socket.socketpair()
        command = [
            sys.executable,
            "-s",
            "-P",
            "-S",
            "-B",
            "-c",
            _BOOT,
            str(theirs.fileno()),
            os.path.dirname(os.path.abspath(__file__)),
        ]
        try:
            self._zygote = subprocess.Popen(
                command,
                env=_ENVIRONMENT,
                cwd="/",
                close_fds=True,
                pass_fds=[theirs.fileno()],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
                start_new_session=True,
            )
        except OSError as error:
            ours.close()
            raise SandboxError(f"the zygote did not start: {error}") from error
        finally:
            theirs.close()
        self._control = ours
        ours.settimeout(_ZYGOTE_START_S)
        try:
            wire.send(ours, self._config)
            received = wire.receive(ours)
        except (OSError, wire.WireError) as error:
            raise SandboxError(f"the zygote did not start: {error}") from error
        if received is None:
            raise SandboxError(f"the zygote ended with code {self._zygote.wait(_CLOSE_S)} before it was ready")
        if "failed" in received[0]:
            raise SandboxError(f"the zygote did not start: {received[0]['failed']}")


class Session:
    """One episode: a persistent interpreter. For one thread at a time. Close it, or close its sandbox."""

    def __init__(self, sandbox: Sandbox, seed: int, holder: drive.Process, control: socket.socket) -> None:
        self._sandbox, self._seed = sandbox, seed
        self._limits = sandbox.limits
        self._holder: drive.Process | None = holder
        self._control = control
        self._candidates: list[drive.Process] = []
        self._executions: list[Execution] = []
        self._codes: list[str] = []  # those that the forks ran
        self._fork_of: list[int] = []  # index of a previewed code -> index of its fork, _NOT_RUN or _BROKEN
        self._shared_calls: dict[drive.CallKey, drive.SharedCall] = {}  # of the preview and of what was added to it
        self._lost: str | None = None
        self._closed = False
        self._touched = False  # whether code has run in the holder: it is then not to be believed

    def run(self, code: str, call_tool: CallTool) -> Execution:
        """Run one step in place. A step that had to be killed loses the state, and says so in its `error`.

        Raises what `call_tool` raises beyond `ToolError`; the state is then lost and the session of no more use.
        """
        self._drop_candidates()
        if (refused := self._refuse(code)) is not None:
            return refused
        holder = self._living_holder()
        self._touched = True
        try:
            (execution,) = self._run_steps([holder], [code], call_tool, {})
        except BaseException:
            self._lost = "a tool failed in the middle of a step"
            self._shut()
            raise
        if holder.ended:
            self._shut()
        return execution

    def preview(self, codes: Sequence[str], call_tool: CallTool) -> list[Execution]:
        """Run each code in a fork of the present state, at the same moment; the state stays as it was.

        `call_tool` is called from several threads. Equal codes run once; equal tool calls of different codes are made
        once.
        Raises what `call_tool` raises beyond `ToolError`; the state stays as it was then, too.
        """
        self._drop_candidates()
        return self.preview_more(codes, call_tool)

    def preview_more(self, codes: Sequence[str], call_tool: CallTool) -> list[Execution]:
        """Add to the last preview: as if its codes and these had been given at once, but that those have run already.

        Indices of `commit` go on behind the earlier ones. Returns the executions of `codes` alone. Raises as `preview`
        does; what was previewed before can then still be kept.
        """
        runnable: list[str] = []
        fork_of: list[int] = []
        refusals: dict[int, Execution] = {}
        known = len(self._codes)
        for index, code in enumerate(codes):
            if (refused := self._refuse(code)) is not None:
                refusals[index] = refused
                fork_of.append(_NOT_RUN)
            elif code in self._codes:
                fork_of.append(self._codes.index(code))
            else:
                if code not in runnable:
                    runnable.append(code)
                fork_of.append(known + runnable.index(code))
        if known + len(runnable) > MAX_CANDIDATES:
            raise ValueError(f"{known + len(runnable)} different candidates at once; at most {MAX_CANDIDATES}")
        holder = self._living_holder()
        results = {fork: execution for fork, execution in zip(self._fork_of, self._executions, strict=True)}
        try:
            forks = self._fork(holder, len(runnable)) if runnable else []
        except SandboxError:
            if not self._candidates:  # else those that ran can still be kept
                before = self._executions, self._fork_of
                self._shut()
                self._executions, self._fork_of = before
            if not self._touched:
                raise
            # Code of an earlier step has broken the interpreter, or ended it: the agent is told, as after a step.
            broken = Execution(error=f"Killed: the interpreter does not answer. {drive.RESTARTED}", limit="died")
            fork_of = [_BROKEN if fork >= known else fork for fork in fork_of]
            results[_BROKEN] = broken
        else:
            try:
                done = self._run_steps(forks, runnable, call_tool, self._shared_calls)
            except BaseException:
                for fork in forks:
                    fork.kill()
                raise
            results |= dict(enumerate(done, start=known))
            self._candidates += forks
            self._codes += runnable
        executions = [refusals[index] if fork == _NOT_RUN else results[fork] for index, fork in enumerate(fork_of)]
        self._executions += executions
        self._fork_of += fork_of
        return executions

    def commit(self, index: int) -> Execution:
        """Make the fork of previewed code `index` the state; the code is not run again. Returns its `Execution`.

        Raises `RuntimeError` when there is no preview to choose from, `IndexError` for a wrong index.
        """
        self._check_open()
        if not self._executions:
            raise RuntimeError("commit() without a preview of the present state")
        if not 0 <= index < len(self._executions):
            raise IndexError(f"candidate {index} of {len(self._executions)}")
        execution, fork = self._executions[index], self._fork_of[index]
        if fork >= 0:
            chosen = self._candidates.pop(fork)
            if self._holder is not None:
                self._holder.kill()
            self._holder = chosen
            self._touched = True
            if chosen.ended:
                self._shut()
        elif fork == _BROKEN:
            self._shut()
        self._drop_candidates()
        return execution

    def cpu_s(self) -> float:
        """Processor time of the interpreter so far; infinite when there is none any more."""
        return self._holder.cpu_s() if self._holder is not None else math.inf

    def close(self) -> None:
        """End the episode and everything it started; may be called twice."""
        if not self._closed:
            self._closed = True
            self._shut()

    def __enter__(self) -> Session:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def _run_steps(
        self,
        processes: list[drive.Process],
        codes: list[str],
        call_tool: CallTool,
        shared: dict[drive.CallKey, drive.SharedCall],
    ) -> list[Execution]:
        tool_names = self._sandbox.tool_names
        return drive.run_steps(processes, codes, call_tool, limits=self._limits, tool_names=tool_names, shared=shared)

    def _refuse(self, code: str) -> Execution | None:
        if len(code) <= self._limits.code_chars:
            return None
        return Execution(
            error=f"the code has {len(code)} characters; at most {self._limits.code_chars} are run", limit="code size"
        )

    def _check_open(self) -> None:
        if self._closed:
            raise RuntimeError("the session is closed")
        if self._lost is not None:
            raise SandboxError(f"the session's state is lost: {self._lost}")

    def _living_holder(self) -> drive.Process:
        """The process that holds the state; a fresh one after a step that had to be killed."""
        self._check_open()
        if self._holder is None:
            self._holder, _, self._control = self._sandbox._begin_episode(self._seed)
            self._touched = False
        return self._holder

    def _fork(self, holder: drive.Process, count: int) -> list[drive.Process]:
        """Fork the state. The keeper lets exactly `count` forks through, before any candidate's code runs.

        Raises `SandboxError` when the holder does not do it; the state is then of no more use.
        """
        ours: list[socket.socket] = []
        theirs: list[socket.socket] = []
        forks: list[drive.Process] = []
        try:
            for _ in range(count):
                near, far = socket.socketpair()
                near.setsockopt(socket.SOL_SOCKET, socket.SO_PASSCRED, 1)
                ours.append(near)
                theirs.append(far)
            self._control.send(bytes([count]))
            holder.resume()
            wire.send(holder.socket, {"fork": count}, [sock.fileno() for sock in theirs])
            for far in theirs:
                far.close()
            deadline = time.monotonic() + _FORK_S + _FORK_EACH_S * count
            for sock in ours:
                pid, _ = drive.greet(sock, deadline)
                if pid == holder.pid or any(pid == fork.pid for fork in forks):
                    raise SandboxError("the state holder answered for its own forks")
                forks.append(self._sandbox._process(sock, pid))
            self._control.send(bytes([0]))
            holder.pause()
        except (OSError, SandboxError) as error:
            for process in (*forks, *ours, *theirs):
                process.kill() if isinstance(process, drive.Process) else process.close()
            raise SandboxError(f"the session's state could not be forked: {error}") from error
        return forks

    def _drop_candidates(self) -> None:
        for process in self._candidates:
            process.kill()
        self._candidates, self._codes, self._executions, self._fork_of, self._shared_calls = [], [], [], [], {}

    def _shut(self) -> None:
        """End all of the episode's processes; the keeper, which takes the others down, has ended when this returns."""
        self._drop_candidates()
        holder, self._holder = self._holder, None
        try:
            self._control.shutdown(socket.SHUT_WR)  # the keeper takes everything down
            poller = select.poll()
            poller.register(self._control, select.POLLIN)
            deadline = time.monotonic() + _CLOSE_S
            while (left_s := deadline - time.monotonic()) > 0:
                poller.poll(left_s * 1000)
                if not self._control.recv(1, socket.MSG_DONTWAIT):
                    break
        except OSError:  # the keeper has ended already
            pass
        finally:
            self._control.close()
        if holder is not None:
            holder.kill()


def _library_paths() -> list[str]:
    """The standard library and the installed packages; neither the working directory nor what else is on our path."""
    paths = sysconfig.get_paths()
    own = [paths["stdlib"], os.path.join(paths["stdlib"], "lib-dynload"), paths["purelib"], paths["platlib"]]
    installed = [path for path in sys.path if os.path.basename(path) in ("site-packages", "dist-packages")]
    return [path for path in dict.fromkeys([*own, *installed]) if os.path.isdir(path)]


def _end(zygote: subprocess.Popen) -> None:
    try:
        zygote.wait(_CLOSE_S)
    except subprocess.TimeoutExpired:
        zygote.kill()
        zygote.wait()
