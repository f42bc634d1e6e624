"""Programs that attack the sandbox: none reaches the host, none hangs, none leaves a process, and the next one works.

Every program runs with all layers, without namespaces (as in most containers), and, marked slow, without Landlock too
(as on old kernels); those that hang are slow without namespaces too, but for some. It runs beside two harmless siblings
that must not notice it; one of them is then committed.
Controls run some of the same programs in plain Python: there they reach what they are after, so the checks can fail.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
from hostile import Program, all_programs
from hostile.world import EFFECTS, SECRET, World, may_trace

from envs.sandbox import Execution, Sandbox, SandboxLimits

MODULES = (
    "ast", "asyncio", "atexit", "collections", "concurrent", "ctypes", "faulthandler", "fcntl", "gc", "glob",
    "http", "importlib", "inspect", "io", "itertools", "json", "linecache", "logging", "math", "mmap",
    "multiprocessing", "numpy", "os", "pathlib", "pickle", "pty", "py_compile", "random", "re", "resource",
    "runpy", "select", "shutil", "signal", "socket", "struct", "subprocess", "sympy", "sys", "sysconfig",
    "tempfile", "threading", "time", "urllib", "webbrowser", "_ctypes", "_thread",
)  # fmt: skip
NAMESPACES = tuple(f"{kind}_namespace" for kind in ("user", "mount", "network", "ipc", "uts", "cgroup", "pid"))
TIERS = {"all_layers": (), "no_namespaces": NAMESPACES, "no_landlock": (*NAMESPACES, "landlock")}
LIMITS = SandboxLimits(wall_s=1.0, cpu_s=4, memory_mb=96, output_chars=2000, tool_calls=4, code_chars=20000)
TOO_LATE_S = LIMITS.wall_s + 0.5 + 3.0  # killed half a second after its time, on a machine that may be busy
SIBLINGS = ["L.append(4); len(L)", "len(L)"]
TOGETHER = 8
"""So many programs run at once, each in a candidate of its own."""

PROGRAMS = all_programs()
HANGING = [program for program in PROGRAMS if program.must_not == "hang"]
BESIDE = [program for program in PROGRAMS if program.must_not != "hang" and not program.in_place]
IN_PLACE = [program for program in PROGRAMS if program.in_place]
CONTROLS = [
    "network-tcp", "network-udp", "network-abstract_unix", "files-open", "files-link", "files-environment",
    "files-list_a_folder", "files-hard_link", "start-subprocess", "start-pickle", "start-fork",
    "threads-thread", "threads-pthread", "signals-terminate", "signals-by_pidfd", "signals-kill",
    "tracing-process_vm_readv", "tracing-process_vm_writev", "tracing-list_processes", "native-code_in_fresh_memory",
    "memory-shared,_made_writable_later", "memory-pipes", "output-real_outputs", "privilege-limits",
    "tracing-clock_of_another",
]  # fmt: skip


def in_groups(programs: list[Program]) -> list[list[Program]]:
    """Programs of one category in groups of `TOGETHER`."""
    by_category: dict[str, list[Program]] = {}
    for program in programs:
        by_category.setdefault(program.category, []).append(program)
    return [
        group[first : first + TOGETHER] for group in by_category.values() for first in range(0, len(group), TOGETHER)
    ]


def name(programs: list[Program]) -> str:
    return f"{programs[0].id}..{programs[-1].title}".replace(" ", "_")


def search(name: str, args: list, kwargs: dict) -> Any:
    assert name == "search", f"{name} was called"
    return "found"


@pytest.fixture(scope="module")
def world() -> Iterator[World]:
    os.environ["A_TOKEN"] = SECRET
    world = World()
    yield world
    world.close()
    del os.environ["A_TOKEN"]


TWO_TIERS_FAST = ["all_layers", "no_namespaces", pytest.param("no_landlock", marks=pytest.mark.slow)]
ONE_TIER_FAST = [tier if tier == "all_layers" else pytest.param(tier, marks=pytest.mark.slow) for tier in TIERS]


@pytest.fixture(scope="module", params=TWO_TIERS_FAST)
def sandbox(request: pytest.FixtureRequest, world: World) -> Iterator[Sandbox]:
    with Sandbox(tool_names=["search"], modules=MODULES, limits=LIMITS, without=TIERS[request.param]) as sandbox:
        yield sandbox
        assert wait_until(lambda: processes_below(sandbox.zygote_pid) == {})


def processes_below(pid: int | None) -> dict[int, str]:
    """Descendants of a process and the state of each, zombies too."""
    parents: dict[int, tuple[int, str]] = {}
    for entry in os.listdir("/proc"):
        if entry.isdigit():
            try:
                state, parent = Path(f"/proc/{entry}/stat").read_text().rpartition(")")[2].split()[:2]
            except OSError:  # ended meanwhile
                continue
            parents[int(entry)] = int(parent), state
    found: dict[int, str] = {}
    while new := {p: state for p, (parent, state) in parents.items() if parent in (pid, *found) and p not in found}:
        found |= new
    return found


def wait_until(condition: Any, timeout_s: float = 5.0) -> bool:
    deadline = time.monotonic() + timeout_s
    while not condition():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.01)
    return True


def said(execution: Execution) -> str:
    """All that a program could say, in the form in which it is kept."""
    return json.dumps(asdict(execution), allow_nan=False, ensure_ascii=False).encode("utf-8").decode("utf-8")


def check(world: World, executions: list[Execution], programs: list[Program]) -> None:
    for execution, program in zip(executions, programs, strict=True):
        reached = world.reached(said(execution))
        assert not reached, (program.id, reached, execution)
        length = max(len(text or "") for text in (execution.stdout, execution.value, execution.error, execution.final))
        assert length < 3 * LIMITS.output_chars, (program.id, length)
        assert not set(map(chr, range(32))) - set("\t\n\r") & set(execution.stdout + str(execution.value)), program.id


def attack(sandbox: Sandbox, world: World, programs: list[Program]) -> list[Execution]:
    """Run programs beside harmless siblings, commit one of these, and see that it and a next episode are well."""
    with sandbox.start(seed=0) as session:
        session.run("L = [1, 2, 3]", search)
        started = time.monotonic()
        codes = [world.prelude() + program.code for program in programs]
        executions = session.preview([*codes, *SIBLINGS], search)
        assert time.monotonic() - started < TOO_LATE_S + 0.1 * len(programs)
        assert [execution.value for execution in executions[-2:]] == ["4", "3"], executions[-2:]
        assert session.commit(len(programs)).value == "4"
        assert session.run("L", search).value == "[1, 2, 3, 4]"
    check(world, executions[:-2], programs)
    return executions[:-2]


@pytest.mark.parametrize("programs", in_groups(BESIDE), ids=name)
def test_programs_reach_nothing(sandbox: Sandbox, world: World, programs: list[Program]):
    attack(sandbox, world, programs)


@pytest.mark.parametrize("programs", in_groups(HANGING)[:1], ids=name)
def test_programs_that_hang_are_ended(sandbox: Sandbox, world: World, programs: list[Program]):
    attack_by_hanging(sandbox, world, programs)


@pytest.mark.parametrize("sandbox", ONE_TIER_FAST, indirect=True, scope="module")
@pytest.mark.parametrize("programs", in_groups(HANGING)[1:], ids=name)
def test_more_programs_that_hang_are_ended(sandbox: Sandbox, world: World, programs: list[Program]):
    """What ends them is the same in every tier, and a second is waited for each group."""
    attack_by_hanging(sandbox, world, programs)


def attack_by_hanging(sandbox: Sandbox, world: World, programs: list[Program]) -> None:
    executions = attack(sandbox, world, programs)
    for execution, program in zip(executions, programs, strict=True):
        assert execution.limit is not None or execution.error is not None or execution.is_final, (program.id, execution)


@pytest.mark.parametrize("program", IN_PLACE, ids=lambda program: program.id)
def test_program_leaves_nothing_behind(sandbox: Sandbox, world: World, program: Program):
    with sandbox.start(seed=0) as session:
        execution = session.run(world.prelude() + program.code, search)
        started = time.monotonic()
        forked = session.preview(["2 + 2", "3 + 3"], search)
        assert time.monotonic() - started < TOO_LATE_S
        # Either it is well, or the agent is told that it was restarted; it is well then.
        assert all(done.value in ("4", "6") or done.limit in ("died", "wall time") or done.error for done in forked)
        again = [session.run("1 + 1", search) for _ in range(2)]
        assert again[1].value == "2", (program.id, again)
    check(world, [execution, *forked, *again], [program] * 5)
    with sandbox.start(seed=0) as session:
        assert session.run("search(1)", search).value == "found"


@pytest.mark.parametrize("title", CONTROLS)
def test_control_reaches_what_it_is_after(world: World, title: str):
    (program,) = [program for program in PROGRAMS if program.id == title]
    if program.category == "tracing" and not may_trace():
        pytest.skip("processes may not be traced here at all")
    world.reached("")
    assert program.must_not in EFFECTS
    code = world.prelude() + "def final_answer(x): print(x)\n" + program.code
    shown = f"import ast\ntree = ast.parse({code!r})\nlast = tree.body[-1]\n" + (
        "if isinstance(last, ast.Expr): tree.body[-1] = ast.parse('print()').body[0]; "
        "tree.body[-1].value.args = [last.value]\n"
        "exec(compile(ast.fix_missing_locations(tree), 'x', 'exec'), {'__name__': '__main__'})"
    )
    ran = subprocess.run(
        [sys.executable, "-c", shown], capture_output=True, text=True, timeout=60, cwd=world.folder, check=False
    )
    assert program.must_not in world.reached(ran.stdout), (ran.stdout[-500:], ran.stderr[-500:])
    for left in world.folder.iterdir():  # what it left there
        if left.name == "mark":
            left.unlink()
    world.reached("")
