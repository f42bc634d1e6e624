"""The sandbox's numbers, beside a fresh interpreter per step and smolagents' local interpreter, in one run.

python benchmarks/sandbox.py            # some three minutes; needs `ray` and `smolagents`
python benchmarks/sandbox.py --quick    # fewer repetitions, 40 episodes at once

All layers of the sandbox that this machine grants are on, and numpy and sympy are loaded. Processor time is that of
all processes (driver, zygote, keeper, state holder, candidates), as a control group counts it; where no control group
can be made that row is left unmeasured. "Bare forks" are calls of `os.fork()` whose children only exit, in a process
that has loaded the same modules; candidates are forked without Python's hooks, from huge pages, so they start cheaper.
"""

from __future__ import annotations

import asyncio
import gc
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

if not __package__:  # run as a file: imports come from the repository's root
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

from benchmarks import scoreboard
from benchmarks.rollout_processes import children_of_all
from benchmarks.scoreboard import Row
from envs.base import Task
from envs.code_env import CodeEnv
from envs.sandbox import Sandbox, SandboxLimits, Session

TASK = Task(id="benchmark", question="What is 1 + 1?", answer="2", kind="math")
STEP = "x = 1 + 1"
CANDIDATES = 8
LOOP = "s = 0\nfor i in range(10**6):\n    s += i * i"
MODULES = "import numpy, sympy"
ENOUGH_STEPS = 10**9
_ONE_THREAD = {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}

# Loads what the zygote loads, and forks as often as it is told; each line of input is a number, each of output "done".
_BARE = f"""
import gc, os, sys
{MODULES}
import numpy.random, numpy.linalg, numpy.fft
gc.collect(); gc.disable(); gc.freeze()
print("ready", flush=True)
for line in sys.stdin:
    pids = []
    for _ in range(int(line)):
        pid = os.fork()
        if pid == 0:
            os._exit(0)
        pids.append(pid)
    for pid in pids:
        os.waitpid(pid, 0)
    print("done", flush=True)
"""
_TIMED_LOOP = f"""
import time
code = compile({LOOP!r}, "<loop>", "exec")
for _ in range(3):
    started = time.perf_counter()
    exec(code, {{}})
    print(time.perf_counter() - started)
"""


def milliseconds(action: Callable[[], Any], times: int) -> list[float]:
    """How long each of `times` calls takes, in ms."""
    taken = []
    for _ in range(times):
        started = time.perf_counter()
        action()
        taken.append((time.perf_counter() - started) * 1000)
    return taken


def p99(values: Sequence[float]) -> float:
    return sorted(values)[min(len(values) - 1, int(0.99 * len(values)))]


def no_tools(name: str, args: list, kwargs: dict) -> Any:
    raise LookupError(f"no tool {name!r}")


def zero(task: Task, answer: str) -> float:
    return 0.0


def code_env(sandbox: Sandbox) -> CodeEnv:
    env = CodeEnv(sandbox=sandbox, tools=[], grade=zero, max_steps=ENOUGH_STEPS)
    env.reset(TASK, seed=0)
    return env


class ProcessorTime:
    """Processor seconds of this process and all it has started since, by a control group; raises `OSError` without."""

    def __init__(self) -> None:
        self._folder, self._name, self._seconds = self._make()

    @staticmethod
    def _make() -> tuple[Path, str, Callable[[str], float]]:
        own = {line.split(":")[1]: line.strip().split(":")[2] for line in Path("/proc/self/cgroup").open()}
        options: list[tuple[Path, str, Callable[[str], float]]] = [
            (Path("/sys/fs/cgroup/cpuacct" + own.get("cpuacct", "/")), "cpuacct.usage", lambda text: int(text) / 1e9),
            (Path("/sys/fs/cgroup" + own.get("", "/")), "cpu.stat", lambda text: int(text.split()[1]) / 1e6),
        ]
        for parent, name, seconds in options:
            folder = parent / f"sandbox-benchmark-{os.getpid()}"
            try:
                folder.mkdir()
                (folder / "cgroup.procs").write_text(str(os.getpid()))
            except OSError:
                if folder.is_dir():
                    folder.rmdir()
                continue
            return folder, name, seconds
        raise OSError("no control group can be made here")

    def __call__(self) -> float:
        return self._seconds((self._folder / self._name).read_text())

    def close(self) -> None:
        (self._folder.parent / "cgroup.procs").write_text(str(os.getpid()))
        try:
            self._folder.rmdir()
        except OSError:  # something that was started is still ending
            pass


@contextmanager
def bare_zygote() -> Iterator[Callable[[int], None]]:
    """A function that makes a process with the same modules fork so many children, which exit at once."""
    process = subprocess.Popen(
        [sys.executable, "-c", _BARE],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, **_ONE_THREAD},
    )
    assert process.stdin is not None and process.stdout is not None
    stdin, stdout = process.stdin, process.stdout
    try:
        if stdout.readline() != "ready\n":
            raise RuntimeError("the process to fork barely did not start")

        def fork(count: int) -> None:
            stdin.write(f"{count}\n")
            stdin.flush()
            stdout.readline()

        yield fork
    finally:
        stdin.close()
        process.wait(30)


def proportional_mb(pids: Sequence[int]) -> float:
    """Memory of processes, shared pages divided among their sharers, in MB. Raises `OSError` without the right."""
    total_kb = 0
    for pid in pids:
        for line in Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines():
            if line.startswith("Pss:"):
                total_kb += int(line.split()[1])
    return total_kb / 1024


def below(pid: int) -> list[int]:
    """A process and all its descendants."""
    parents = children_of_all()
    found = [pid]
    for process in found:
        found += parents.get(process, [])
    return found


def fresh_interpreter(times: int) -> float:
    """Median of `python -c "import numpy, sympy"`, in ms."""
    run = lambda: subprocess.run([sys.executable, "-c", MODULES], check=True, env={**os.environ, **_ONE_THREAD})  # noqa: E731
    return statistics.median(milliseconds(run, times))


def steps_in_place(sandbox: Sandbox, fresh_ms: float, quick: bool) -> Iterator[Row]:
    env = code_env(sandbox)
    gc.collect()
    env.step(STEP)
    taken = milliseconds(lambda: env.step(STEP), 200 if quick else 2000)
    env.close()
    middle, late = statistics.median(taken), p99(taken)
    yield Row(what="step in place, p50", measured=middle, unit="ms", goal="<= 1", kept=middle <= 1)
    yield Row(what="step in place, p99", measured=late, unit="ms", goal="<= 25", kept=late <= 25)
    ratio = fresh_ms / middle
    beside = f"fresh interpreter {fresh_ms:.0f} ms"
    yield Row(what="times faster than fresh", measured=ratio, goal=">= 100", kept=ratio >= 100, beside=beside)


def steps_of_smolagents(quick: bool) -> Iterator[Row]:
    from smolagents.local_python_executor import LocalPythonExecutor

    executor = LocalPythonExecutor(["numpy", "sympy"])
    executor.send_tools({})
    executor(STEP)
    taken = milliseconds(lambda: executor(STEP), 50 if quick else 500)
    yield Row(what="smolagents: step, p50", measured=statistics.median(taken), unit="ms", beside="confines nothing")
    (imports,) = milliseconds(lambda: executor(MODULES), 1)
    yield Row(what="smolagents: step of `import numpy, sympy`", measured=imports, unit="ms")
    (loop,) = milliseconds(lambda: executor(LOOP.replace("10**6", "10**5")), 1)
    yield Row(what="smolagents: loop of 10^6 (10 times one of 10^5)", measured=10 * loop, unit="ms")


def previews(sandbox: Sandbox, fresh_ms: float, quick: bool) -> Iterator[Row]:
    env = code_env(sandbox)
    codes = [f"{STEP} + {number}" for number in range(CANDIDATES)]
    env.preview(codes)
    taken = statistics.median(milliseconds(lambda: env.preview(codes), 20 if quick else 100))
    env.close()
    share = taken / fresh_ms
    yield Row(
        what=f"k={CANDIDATES} previews, p50, of one fresh interpreter",
        measured=share,
        goal="<= 0.25",
        kept=share <= 0.25,
        beside=f"{taken:.1f} ms of {fresh_ms:.0f} ms",
    )


def processor_time(quick: bool) -> Iterator[Row]:
    """Previews and bare forks in turn, so that a neighbour's load falls on both."""
    what = f"k={CANDIDATES} previews, processor time of {CANDIDATES} bare forks"
    try:
        used_s = ProcessorTime()
    except OSError as error:
        yield Row(what=what, measured="not measured", goal="<= 1.3", beside=str(error))
        return
    ours: list[float] = []
    bare: list[float] = []
    codes = [f"{STEP} + {number}" for number in range(CANDIDATES)]
    try:
        with bare_zygote() as fork, Sandbox() as sandbox, sandbox.start(seed=0) as session:
            session.preview(codes, no_tools)
            fork(CANDIDATES)
            for _ in range(10 if quick else 40):
                for spent, action in (
                    (ours, lambda: preview_and_drop(session, codes)),
                    (bare, lambda: fork(CANDIDATES)),
                ):
                    before = used_s()
                    for _ in range(2):
                        action()
                    time.sleep(0.01)  # the killed candidates are torn down
                    spent.append((used_s() - before) * 500)
    finally:
        used_s.close()
    ratio = statistics.median(ours) / statistics.median(bare)
    beside = f"{statistics.median(ours):.1f} ms of {statistics.median(bare):.1f} ms"
    yield Row(what=what, measured=ratio, goal="<= 1.3", kept=ratio <= 1.3, beside=beside)


def preview_and_drop(session: Session, codes: Sequence[str]) -> None:
    session.preview(codes, no_tools)
    session._drop_candidates()


def episodes(sandbox: Sandbox, quick: bool) -> Iterator[Row]:
    started: list[Session] = []
    count = 40 if quick else 200
    taken = milliseconds(lambda: started.append(sandbox.start(seed=0)), count)
    answers = [session.run(f"{number} + 1", no_tools).value for number, session in enumerate(started)]
    middle = statistics.median(taken)
    yield Row(what="start of an episode, p50", measured=middle, unit="ms", goal="<= 20", kept=middle <= 20)
    right = sum(value == str(number + 1) for number, value in enumerate(answers))
    kept = None if quick else right == count
    yield Row(what="live episodes that answer", measured=float(right), goal="" if quick else ">= 200", kept=kept)
    assert sandbox.zygote_pid is not None
    try:
        each = proportional_mb(below(sandbox.zygote_pid)) / count
        yield Row(what="memory of an idle episode (PSS)", measured=each, unit="MB", goal="<= 6", kept=each <= 6)
    except PermissionError as error:
        yield Row(what="memory of an idle episode (PSS)", measured="not measured", goal="<= 6", beside=str(error))
    for session in started:
        session.close()


def loops(sandbox: Sandbox) -> Iterator[Row]:
    """Sandbox and plain interpreter in turn; the best of several on each side."""
    ours: list[float] = []
    plain: list[float] = []
    with sandbox.start(seed=0) as session:
        for _ in range(4):
            for _ in range(3):
                ours.append(session.run(LOOP, no_tools).wall_s * 1000)
            ran = subprocess.run([sys.executable, "-c", _TIMED_LOOP], check=True, capture_output=True, text=True)
            plain += [float(line) * 1000 for line in ran.stdout.split()]
    ratio = min(ours) / min(plain)
    beside = f"{min(ours):.0f} ms of {min(plain):.0f} ms"
    what = "loop of 10^6, of plain CPython's time"
    yield Row(what=what, measured=ratio, goal="<= 1.2", kept=ratio <= 1.2, beside=beside)


def steps_through_ray(quick: bool) -> Iterator[Row]:
    # no report to a server outside, no token written into the home folder; Ray reads these when it is imported
    os.environ.update({"RAY_USAGE_STATS_ENABLED": "0", "RAY_AUTH_MODE": "disabled"})
    import ray

    from envs.pool import EnvSpec, RemoteEnv, start_env_hosts

    async def measure(host: Any) -> list[float]:
        env = RemoteEnv(host, slot=0, can_preview=True, timeout_s=60)
        await env.reset(TASK, seed=0)
        taken = []
        for _ in range(100 if quick else 500):
            started = time.perf_counter()
            await env.step(STEP)
            taken.append((time.perf_counter() - started) * 1000)
        await env.close()
        return taken

    ray.init(
        address="local",
        num_cpus=2,
        include_dashboard=False,
        log_to_driver=False,
        configure_logging=False,
        object_store_memory=100 << 20,
    )
    try:
        root = str(Path(__file__).resolve().parent.parent)
        os.environ["PYTHONPATH"] = root
        hosts = start_env_hosts(EnvSpec(name="code", max_steps=ENOUGH_STEPS), count=1, slots_per_host=2, search=None)
        middle = statistics.median(asyncio.run(measure(hosts[0])))
        ray.get(hosts[0].close.remote(), timeout=60)
    finally:
        ray.shutdown()
    yield Row(what="step in place through a Ray actor, p50", measured=middle, unit="ms", goal="<= 4", kept=middle <= 4)


def measure(quick: bool) -> Iterator[Row]:
    yield from processor_time(quick)
    with Sandbox(limits=SandboxLimits()) as sandbox:
        fresh_ms = fresh_interpreter(3 if quick else 9)
        yield Row(what="fresh `import numpy, sympy`, p50", measured=fresh_ms, unit="ms")
        yield from steps_in_place(sandbox, fresh_ms, quick)
        yield from previews(sandbox, fresh_ms, quick)
        yield from episodes(sandbox, quick)
        yield from loops(sandbox)
    yield from steps_of_smolagents(quick)
    yield from steps_through_ray(quick)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = scoreboard.arguments(__doc__)
    parser.add_argument("--quick", action="store_true", help="fewer repetitions, 40 episodes at once")
    options = parser.parse_args(arguments)
    return scoreboard.publish(list(measure(options.quick)), options, title="The sandbox, numpy and sympy loaded")


if __name__ == "__main__":
    sys.exit(main())
