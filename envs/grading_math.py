"""`MathGrader`: symbolic equality of mathematical answers by math-verify, in sandboxed processes with a deadline.

math-verify and sympy can hang, grow without bound and (in sympy's parser) evaluate text, and their own timeout works in
a main thread only, while graders are called from many. So `grading_equality.py` runs inside `envs.sandbox`: model text
reaches a process without network, files or privileges, which is killed at its limits and replaced. What a model wrote
can make an answer wrong, never an error; only a sandbox that does not start is one (`EnvError`).

It grades any text against a reference answer; choosing a grader for a task is `grading.py`'s part.

Example::

    with MathGrader() as grader:
        grader.equal(r"\\frac{1}{2}", "0.5")      # True
        grader.equal("3", "9^{9^{9^9}}")         # False, within the limit
"""

from __future__ import annotations

import atexit
import hashlib
import math
import os
import threading
from collections import Counter, OrderedDict
from concurrent.futures import Future
from concurrent.futures import TimeoutError as FutureTimeoutError
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

from envs.base import EnvError
from envs.grading_plain import plain_verdict
from envs.sandbox import Sandbox, SandboxError, SandboxLimits, Session

_PROGRAMS = ("grading_plain", "grading_size", "grading_equality")
"""Files beside this one that run inside, in the order in which they import one another."""
_LOAD = "from envs.grading_equality import verdict"
_WARM_UP = r"""
from envs.grading_equality import verdict  # the parser builds its tables as it goes: once, for all processes
for gold, prediction in (("1", "2 + x"), (r"\frac{1}{2}", "x^2 + 1"), ("x = 2", "[1, 2)"), ("2", r"$\sqrt{3}$, so 4.")):
    verdict(gold, prediction)
"""
_RENEW_AFTER_RUNS = 1000
_RENEW_AFTER_S = 60.0
"""Of work: far below the processor time that the sandbox lets one process have in its life."""
_REMEMBERED = 16_384
_REMEMBERED_CHARS = 400
"""Of a longer pair a digest is kept."""


@dataclass(frozen=True, slots=True, kw_only=True)
class MathSpec:
    """Limits of a `MathGrader`; picklable."""

    cpu_s: int = 2
    """Processor time of one comparison; a comparison that needs more is a wrong answer. MATH's need 0.2 s at most."""
    wall_s: float = 20.0
    """The same on the clock, longer, so that a busy machine does not change verdicts."""
    memory_mb: int = 512
    processes: int = 2
    """Comparisons at the same moment; further callers wait."""
    wait_s: float = 300.0
    """Longest wait for a free process."""
    prediction_chars: int = 16_000
    """Of a longer prediction the end is read: a solution, whose answer comes last."""
    unsafe: bool = False
    """Grade without kernel confinement where there is none; refused otherwise."""

    def __post_init__(self) -> None:
        for name in ("cpu_s", "wall_s", "memory_mb", "processes", "wait_s", "prediction_chars"):
            if getattr(self, name) <= 0:
                raise ValueError(f"{name}={getattr(self, name)!r} must be positive")


class MathGrader:
    """Compares answers; call it from any thread. Starts its sandbox at the first comparison that needs one."""

    def __init__(self, spec: MathSpec = MathSpec()) -> None:  # noqa: B008  (frozen)
        self.spec = spec
        self._lock = threading.Lock()
        self._slots = threading.BoundedSemaphore(spec.processes)
        self._sandbox: Sandbox | None = None
        self._idle: list[_Process] = []
        self._remembered: OrderedDict[_Pair, Future[bool]] = OrderedDict()
        self._counts: Counter[str] = Counter()
        self._pid = os.getpid()

    def equal(self, gold: str, prediction: str) -> bool:
        """Whether `prediction` equals `gold` (not symmetric: the reference says in which form answers are read).

        Raises `EnvError` when the sandbox cannot start or no process is free within `wait_s`.
        """
        prediction = prediction[-self.spec.prediction_chars :].strip()
        gold = gold.strip()
        if not prediction or not gold:
            return False
        if prediction == gold:
            return True
        certain = plain_verdict(gold, prediction)
        if certain is not None:
            self._count("plain")
            return certain
        pair = _pair(gold, prediction)
        with self._lock:
            known = self._remembered.get(pair)
            if known is None:
                ours: Future[bool] = Future()
                self._remembered[pair] = ours
                if len(self._remembered) > _REMEMBERED:
                    self._remembered.popitem(last=False)
            else:
                self._remembered.move_to_end(pair)
                self._counts["remembered"] += 1
        if known is not None:  # or being found out by another thread
            try:
                return known.result(self.spec.wait_s)
            except FutureTimeoutError:
                raise EnvError(self._no_process()) from None
        try:
            ours.set_result(self._compared(gold, prediction))
        except BaseException as error:
            with self._lock:
                if self._remembered.get(pair) is ours:
                    del self._remembered[pair]
            ours.set_exception(error)
            raise
        return ours.result()

    def stats(self) -> dict[str, int]:
        """Since the start: plain (pairs decided without algebra), comparisons, remembered, started (processes), stopped
        (comparisons that hit a limit), failed (comparisons that raised inside), cpu_ms (processor time of all)."""
        names = ("plain", "comparisons", "remembered", "started", "stopped", "failed", "cpu_ms")
        with self._lock:
            return {name: self._counts[name] for name in names}

    def close(self) -> None:
        """End all processes; may be called twice. A later comparison starts them again."""
        with self._lock:
            sandbox, self._sandbox = self._sandbox, None
            idle, self._idle = self._idle, []
        if os.getpid() != self._pid:
            return  # a fork: they belong to the parent
        for process in idle:
            process.session.close()
        if sandbox is not None:
            sandbox.close()

    def __enter__(self) -> MathGrader:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _compared(self, gold: str, prediction: str) -> bool:
        if not self._slots.acquire(timeout=self.spec.wait_s):
            raise EnvError(self._no_process())
        try:
            problem: SandboxError | None = None
            for _ in range(2):  # again when the process died of something else
                process = self._take()
                used_s = process.work_s
                try:
                    execution = process.run(f"verdict({gold!a}, {prediction!a})")
                except SandboxError as error:
                    process.session.close()
                    problem = error
                    continue
                except BaseException:
                    process.session.close()
                    raise
                self._count("comparisons")
                self._count("cpu_ms", round(1000 * (process.work_s - used_s)))
                if execution.limit is None:
                    self._give_back(process)
                    if execution.error is not None:
                        self._count("failed")
                    return execution.value == "True"
                process.session.close()
                problem = None
                if execution.limit != "died":
                    break
            if problem is not None:
                raise EnvError(f"the math grader's sandbox does not work: {problem}") from problem
            self._count("stopped")
            return False
        finally:
            self._slots.release()

    def _no_process(self) -> str:
        return f"no process of the math grader became free within {self.spec.wait_s:g} s"

    def _take(self) -> _Process:
        with self._lock:
            if self._idle:
                return self._idle.pop()
            if self._sandbox is None:
                self._sandbox = self._start_sandbox()
            sandbox = self._sandbox
        try:
            process = _Process(sandbox.start(seed=0), self.spec.cpu_s)
            loaded = process.run(_LOAD)
            if loaded.error is not None:
                process.session.close()
                raise SandboxError(f"its program does not load: {loaded.error}")
        except SandboxError as error:
            raise EnvError(f"the math grader's sandbox does not work: {error}") from error
        self._count("started")
        return process

    def _start_sandbox(self) -> Sandbox:
        """Call with the lock held."""
        spec = self.spec
        limits = SandboxLimits(
            wall_s=spec.wall_s,
            cpu_s=spec.cpu_s,
            memory_mb=spec.memory_mb,
            output_chars=2000,
            tool_calls=0,
            # As Python source one character may take ten; the reference answer is ours and rarely long.
            code_chars=10 * spec.prediction_chars + 1_000_000,
        )
        folder = Path(__file__).parent
        sources = {f"envs.{name}": (folder / f"{name}.py").read_text(encoding="utf-8") for name in _PROGRAMS}
        try:
            return Sandbox(modules=(), sources=sources | {"warm_up": _WARM_UP}, limits=limits, unsafe=spec.unsafe)
        except SandboxError as error:
            raise EnvError(f"the math grader's sandbox does not start: {error}") from error

    def _give_back(self, process: _Process) -> None:
        if process.is_worn():
            process.session.close()
            return
        with self._lock:
            if self._sandbox is not None:
                self._idle.append(process)
                return
        process.session.close()

    def _count(self, name: str, by: int = 1) -> None:
        with self._lock:
            self._counts[name] += by


_Pair = tuple[str, str] | bytes


def _pair(gold: str, prediction: str) -> _Pair:
    if len(gold) + len(prediction) <= _REMEMBERED_CHARS:
        return gold, prediction
    text = f"{len(gold)} {gold}{prediction}"
    return hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=20).digest()


class _Process:
    """A session that has the program loaded, and how much it has been used."""

    def __init__(self, session: Session, limit_s: float) -> None:
        self.session = session
        self._runs = 0
        self._limit_s = limit_s
        self.work_s = 0.0
        """Processor time; a run that had to be killed counts as `limit_s`."""

    def run(self, code: str) -> Any:
        before_s = self.session.cpu_s()
        try:
            return self.session.run(code, _no_tools)
        finally:
            self._runs += 1
            used_s = self.session.cpu_s() - before_s
            self.work_s += used_s if math.isfinite(used_s) else self._limit_s

    def is_worn(self) -> bool:
        return self._runs >= _RENEW_AFTER_RUNS or self.work_s >= _RENEW_AFTER_S


def _no_tools(name: str, args: list, kwargs: dict[str, Any]) -> None:
    raise AssertionError("the sandbox was made without tools")


_shared: MathGrader | None = None
_shared_lock = threading.Lock()


def configure_math(spec: MathSpec) -> MathGrader:
    """Set the grader of this process that `grading.grade` uses for the grader "math"; ends the one before."""
    global _shared
    with _shared_lock:
        if _shared is not None:
            _shared.close()
        _shared = MathGrader(spec)
        return _shared


def shared_math_grader() -> MathGrader:
    """The grader of this process, made with default limits if nobody configured one."""
    global _shared
    with _shared_lock:
        if _shared is None or _shared._pid != os.getpid():  # a fork has no use for its parent's processes
            _shared = MathGrader(_shared.spec if _shared is not None else MathSpec())
        return _shared


def _close_shared() -> None:
    if _shared is not None:
        _shared.close()


atexit.register(_close_shared)
