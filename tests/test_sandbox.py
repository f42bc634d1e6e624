"""The sandbox: what a step means, its limits, previews, what the code cannot reach, and that nothing is left behind.

Programs that attack run in every tier that this machine can offer: with all layers, without namespaces (as in most
containers), and without Landlock as well.
"""

from __future__ import annotations

import json
import os
import signal
import struct
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from envs.sandbox import Execution, Sandbox, SandboxError, SandboxLimits, Session, ToolError, seccomp

ROOT = Path(__file__).parents[1]
HOSTILE_MODULES = (
    "array", "asyncio", "collections", "ctypes", "dataclasses", "fcntl", "functools", "gc", "math", "mmap", "os",
    "random", "resource", "signal", "socket", "statistics", "struct", "subprocess", "sys", "threading", "time",
    "typing",
)  # fmt: skip
NAMESPACES = tuple(f"{kind}_namespace" for kind in ("user", "mount", "network", "ipc", "uts", "cgroup", "pid"))
TIERS = {"all": (), "no_namespaces": NAMESPACES, "no_landlock": (*NAMESPACES, "landlock")}
SECRET = "sk-a-secret-of-the-driver"


def no_tools(name: str, args: list, kwargs: dict) -> Any:
    raise AssertionError(f"{name} was called")


def echo(name: str, args: list, kwargs: dict) -> Any:
    return {"name": name, "args": args, "kwargs": kwargs}


@pytest.fixture(scope="module")
def sandbox() -> Iterator[Sandbox]:
    limits = SandboxLimits(wall_s=0.5, memory_mb=256, tool_calls=4, output_chars=2000, code_chars=5000)
    with Sandbox(tool_names=["search", "fetch"], modules=HOSTILE_MODULES, limits=limits) as sandbox:
        yield sandbox


@pytest.fixture
def session(sandbox: Sandbox) -> Iterator[Session]:
    with sandbox.start(seed=1) as session:
        yield session


@pytest.fixture
def patient() -> Iterator[Session]:
    """For what is not about time, on a machine that may be busy."""
    limits = SandboxLimits(wall_s=4.0, memory_mb=256, output_chars=2000)
    with Sandbox(modules=HOSTILE_MODULES, limits=limits) as sandbox, sandbox.start(seed=1) as session:
        yield session


@pytest.fixture(scope="module", params=TIERS)
def tier(request: pytest.FixtureRequest) -> Iterator[Sandbox]:
    os.environ["A_TOKEN"] = SECRET
    try:
        limits = SandboxLimits(wall_s=1.0, memory_mb=256)
        with Sandbox(modules=HOSTILE_MODULES, limits=limits, without=TIERS[request.param]) as sandbox:
            yield sandbox
    finally:
        del os.environ["A_TOKEN"]


@pytest.fixture(scope="module")
def attacked(tier: Sandbox) -> Iterator[Session]:
    """One session for all attacks of a tier: none of them may break it for the next."""
    with tier.start(seed=0) as session:
        yield session


def run(session: Session, code: str, call_tool: Callable = no_tools) -> Execution:
    return session.run(code, call_tool)


def descendants(pid: int) -> set[int]:
    """All living processes below `pid`; zombies do not count."""
    parents: dict[int, int] = {}
    for entry in os.listdir("/proc"):
        if entry.isdigit():
            try:
                state, parent = Path(f"/proc/{entry}/stat").read_text().rpartition(")")[2].split()[:2]
            except OSError:  # ended meanwhile
                continue
            if state != "Z":
                parents[int(entry)] = int(parent)
    found: set[int] = set()
    while new := {child for child, parent in parents.items() if parent in found | {pid}} - found:
        found |= new
    return found


def alive(pids: set[int]) -> set[int]:
    def living(pid: int) -> bool:
        try:
            return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
        except OSError:
            return False

    return {pid for pid in pids if living(pid)}


def wait_until(condition: Callable[[], bool], timeout_s: float = 5.0) -> bool:
    deadline = time.monotonic() + timeout_s
    while not condition():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.02)
    return True


# what a step means


@pytest.mark.parametrize(
    ("code", "value"),
    [
        ("1 + 1", "2"),
        ("x = 3\nx * 2", "6"),
        ("None", None),
        ("x = 1", None),
        ("", None),
        ("# only a comment", None),
        ("[i * i for i in range(3)]", "[0, 1, 4]"),
        ("'text'", "text"),
        ("def f():\n    return lambda y: y + 1\nf()(1)", "2"),
        ("import statistics\nstatistics.mean([1, 3])", "2"),
        ("len(str(2 ** 20000))", "6021"),
    ],
)
def test_value_is_that_of_the_last_expression(session: Session, code: str, value: str | None):
    execution = run(session, code)
    assert (execution.value, execution.error, execution.limit) == (value, None, None)


def test_state_persists_from_step_to_step(session: Session):
    run(session, "import math\nfrom dataclasses import dataclass\nn = 2\ndef f(x): return math.sqrt(x) + n")
    run(session, "@dataclass\nclass P:\n    x: int\nn = 3")
    assert run(session, "f(4), P(1)").value == "(5.0, P(x=1))"


def test_both_outputs_are_collected(session: Session):
    execution = run(session, "import sys\nprint('a', 1)\nprint('b', file=sys.stderr)\n7")
    assert (execution.stdout, execution.value) == ("a 1\nb\n", "7")


def test_error_says_what_and_where(session: Session):
    execution = run(session, "print('so far')\nx = 1\ny = x / 0")
    assert execution.stdout == "so far\n"
    assert execution.error == "ZeroDivisionError: division by zero\n  line 3: y = x / 0"


def test_error_inside_an_earlier_steps_function_names_that_step(session: Session):
    run(session, "\ndef f():\n    raise KeyError('k')")
    assert run(session, "f()").error == "KeyError: 'k'\n  line 3 of step 1: raise KeyError('k')"


def test_syntax_error_names_the_line(session: Session):
    error = run(session, "x = 1\ny = = 2").error
    assert error is not None and error.startswith("SyntaxError: invalid syntax") and "line 2: y = = 2" in error


def test_import_outside_the_list_names_the_list(session: Session):
    error = run(session, "import pickle").error
    assert error is not None and error.startswith("ImportError: import of pickle is not allowed") and "math" in error


def test_exit_is_an_error_and_not_an_end(session: Session):
    run(session, "x = 1")
    assert "SystemExit" in str(run(session, "import sys\nsys.exit(3)").error)
    assert run(session, "x").value == "1"


def test_default_modules_are_there():
    with Sandbox() as sandbox, sandbox.start(seed=0) as session:
        run(session, "import numpy as np, sympy\nx = sympy.symbols('x')")
        assert run(session, "sympy.integrate(x**2, (x, 0, 3)), int(np.arange(4).sum())").value == "(9, 6)"
        solved = run(session, "sympy.solve(x**2 - 4), round(float(np.linalg.norm([3, 4])), 3)")
        assert solved.value == "([-2, 2], 5.0)"
        assert "OSError: [Errno 30]" in str(run(session, "np.arange(3).tofile('here')").error)  # read-only


@pytest.mark.parametrize(
    "code",
    [
        "final_answer(41 + 1)",
        "try:\n    final_answer(42)\nexcept Exception:\n    final_answer(0)",
        "try:\n    final_answer(42)\nexcept:\n    pass\nfinal_answer(0)",
        "def f():\n    return [final_answer(42) for _ in range(3)]\nf()",
    ],
)
def test_first_final_answer_ends_the_step(session: Session, code: str):
    execution = run(session, code)
    assert (execution.is_final, execution.final, execution.error) == (True, "42", None)


def test_final_answer_is_turned_into_text_inside(session: Session):
    code = "class A:\n    def __str__(self):\n        print('inside')\n        return 'an A'\nfinal_answer(A())"
    execution = run(session, code)
    assert (execution.final, execution.stdout) == ("an A", "inside\n")


def test_text_is_clean_for_tokenizers_and_files(session: Session):
    execution = run(session, "print('a\\0b\\ud800c')")
    assert execution.stdout.encode("utf-8") and "\0" not in execution.stdout
    terminal = run(session, "print('\\x1b[2Ja\\tb\\x9b1m\\b')")
    assert terminal.stdout == "\ufffd[2Ja\tb\ufffd1m\ufffd\n"


def test_same_seed_gives_the_same_random_numbers(sandbox: Sandbox):
    def draw(seed: int) -> str | None:
        with sandbox.start(seed) as session:
            return run(session, "import random\n[random.random(), {'a', 'b', 'c'}]").value

    assert draw(5) == draw(5) != draw(6)


def test_generator_without_a_seed_follows_the_episodes():
    with Sandbox(modules=["numpy"]) as sandbox:

        def draw(seed: int) -> str | None:
            with sandbox.start(seed) as session:
                return run(session, "import numpy as np\n[float(np.random.default_rng().random()) for _ in '12']").value

        assert draw(5) == draw(5) != draw(6)
        first, second = str(draw(5)).strip("[]").split(", ")
        assert first != second


# tools


def test_tool_call_crosses_and_comes_back(session: Session):
    execution = run(session, "search('a', top_k=(1, 2))['kwargs']", echo)
    assert execution.value == "{'top_k': [1, 2]}"
    (call,) = execution.tool_calls
    assert (call.name, call.ok, json.loads(call.args)) == ("search", True, {"args": ["a"], "kwargs": {"top_k": [1, 2]}})


def test_tool_error_is_raised_in_the_code(session: Session):
    def fail(name: str, args: list, kwargs: dict) -> Any:
        raise ToolError("no such page")

    execution = run(session, "try:\n    search('a')\nexcept Exception as e:\n    print('caught', e)\nfetch('b')", fail)
    assert execution.stdout == "caught no such page\n"
    assert execution.error == "ToolError: no such page\n  line 5: fetch('b')"
    assert [call.ok for call in execution.tool_calls] == [False, False]


def test_other_failure_of_a_tool_reaches_the_caller(session: Session):
    def fail(name: str, args: list, kwargs: dict) -> Any:
        raise ConnectionError("the index is down")

    run(session, "x = 1")
    with pytest.raises(ConnectionError, match="index is down"):
        session.preview(["x = 2\nsearch('a')", "x"], fail)
    assert run(session, "x").value == "1"
    with pytest.raises(ConnectionError, match="index is down"):
        run(session, "search('a')", fail)
    with pytest.raises(SandboxError, match="state is lost"):
        run(session, "x")


def test_arguments_that_are_not_json_are_the_codes_error(session: Session):
    assert str(run(session, "search(object())").error).startswith("TypeError: search() takes JSON values")
    assert str(run(session, "search(float('nan'))").error).startswith("TypeError: search() takes JSON values")


def test_code_cannot_lose_a_tool(session: Session):
    run(session, "search = 1; final_answer = 2")
    assert run(session, "search('a')['name']", echo).value == "search"
    assert run(session, "final_answer(3)").final == "3"


def test_waiting_for_a_tool_is_not_the_steps_time(session: Session):
    def slow(name: str, args: list, kwargs: dict) -> str:
        time.sleep(0.8)
        return "done"

    execution = run(session, "search('a')", slow)
    assert execution.value == "done" and execution.wall_s < 0.4 and execution.tool_calls[0].wall_s > 0.7


def test_tool_that_never_answers_is_our_failure():
    release = threading.Event()
    with Sandbox(tool_names=["search"], modules=["math"], limits=SandboxLimits(tool_s=0.3)) as sandbox:
        with sandbox.start(seed=0) as session, pytest.raises(SandboxError, match="search did not answer in 0.3 s"):
            run(session, "search()", lambda *call: release.wait(10))
    release.set()


# limits


def test_wall_time_stops_the_step_and_keeps_the_state(session: Session):
    run(session, "x = 1")
    execution = run(session, "x = 2\nprint('on')\nwhile True: pass")
    assert (execution.limit, execution.stdout) == ("wall time", "on\n")
    assert execution.error == "Stopped: the step was stopped after 0.5 s\n  line 3: while True: pass"
    assert run(session, "x").value == "2"


@pytest.mark.parametrize(
    "code",
    [
        "sum(range(10 ** 12))",
        "import signal\nsignal.pthread_sigmask(signal.SIG_BLOCK, range(1, 65))\nwhile True: pass",
        "class E(Exception):\n    def __str__(self):\n        while True: pass\nraise E",
    ],
)
def test_code_that_resists_is_killed_and_told_that_the_state_is_gone(session: Session, code: str):
    run(session, "x = 1")
    started = time.monotonic()
    execution = run(session, code)
    assert time.monotonic() - started < 2.5
    assert execution.limit == "wall time" and "The interpreter was restarted" in str(execution.error)
    assert str(run(session, "x").error).startswith("NameError")
    assert run(session, "1 + 1").value == "2"


def test_output_of_a_killed_step_is_kept(session: Session):
    execution = run(session, "print('one')\nprint('two', end='\\n')\nsum(range(10 ** 12))")
    assert (execution.limit, execution.stdout) == ("wall time", "one\ntwo\n")


@pytest.mark.parametrize(
    "code",
    [
        "class A:\n    def __del__(self):\n        while True: pass\na = A()\ndel a",
        "try:\n    while True: pass\nexcept BaseException: pass",
        "try:\n    while True: pass\nexcept BaseException: final_answer('late')",
        "try:\n    while True: pass\nexcept BaseException: raise ValueError",
    ],
)
def test_limit_that_the_code_caught_is_told_all_the_same(session: Session, code: str):
    execution = run(session, code)
    assert (execution.limit, execution.is_final) == ("wall time", False)
    assert "stopped after 0.5 s" in str(execution.error)


def test_cpu_time():
    with (
        Sandbox(modules=["math"], limits=SandboxLimits(wall_s=20, cpu_s=1)) as sandbox,
        sandbox.start(seed=0) as session,
    ):
        execution = run(session, "x = 1\nwhile True: pass")
        assert execution.limit == "cpu time"
        assert run(session, "x").value == "1"


def test_memory(session: Session):
    run(session, "x = 1")
    execution = run(session, "y = 'a' * 10 ** 9")
    assert execution.limit == "memory"
    assert str(execution.error).startswith("MemoryError: the step needs more than 256 MB\n  line 1")
    assert run(session, "x").value == "1"


def test_number_of_tool_calls(session: Session):
    execution = run(session, "for i in range(9):\n    n = i\n    search(i)", echo)
    assert execution.limit == "tool calls" and len(execution.tool_calls) == 4
    assert run(session, "n").value == "4"


def test_number_of_tool_calls_when_the_code_catches_it(session: Session):
    execution = run(session, "for i in range(9):\n    try: search(i)\n    except: pass\nfinal_answer(1)", echo)
    assert (execution.limit, execution.is_final, len(execution.tool_calls)) == ("tool calls", False, 4)
    execution = run(session, "while True:\n    try: search(1)\n    except: pass", echo)
    assert execution.limit == "tool calls"  # by its own timer, or killed


def test_length_of_the_code(session: Session):
    execution = run(session, "1\n" * 5000)
    assert execution.limit == "code size" and "at most 5000" in str(execution.error)


@pytest.mark.parametrize(
    "code", ["for i in range(20000): print('line', i)", "print('line 0' + 'x' * 10 ** 7 + '19999')"]
)
def test_flood_of_output_keeps_its_head_and_tail(patient: Session, code: str):
    execution = run(patient, code)
    assert execution.error is None
    assert len(execution.stdout) < 2100
    assert execution.stdout.startswith("line 0") and execution.stdout.rstrip().endswith("19999")
    assert "characters left out" in execution.stdout


@pytest.mark.parametrize(
    "code", ["import os\nos._exit(0)", "import os\nos.abort()", "import ctypes\nctypes.string_at(0)"]
)
def test_process_that_dies_is_told_and_replaced(session: Session, code: str):
    execution = run(session, code)
    assert execution.limit == "died" and "The interpreter was restarted" in str(execution.error)
    assert run(session, "1 + 1").value == "2"


def test_recursion_is_an_error(session: Session):
    assert str(run(session, "def f(): return f()\nf()").error).startswith("RecursionError")


# previews


def test_candidates_see_neither_each_other_nor_change_the_state(session: Session):
    run(session, "items = [1, 2, 3]")
    seen = session.preview(["items.append(4); len(items)", "len(items)", "items.clear(); len(items)"], no_tools)
    assert [execution.value for execution in seen] == ["4", "3", "0"]
    assert run(session, "items").value == "[1, 2, 3]"


def test_commit_keeps_the_candidates_state_and_runs_nothing(session: Session):
    calls = []

    def count(name: str, args: list, kwargs: dict) -> Any:
        calls.append(args)
        return len(calls)

    seen = session.preview(["x = 1", "x = search('b'); x"], count)
    assert session.commit(1) == seen[1]
    assert len(calls) == 1
    assert run(session, "x").value == "1"
    with pytest.raises(RuntimeError, match="without a preview"):
        session.commit(0)


def test_equal_codes_run_once_and_equal_calls_are_made_once(session: Session):
    calls = []

    def count(name: str, args: list, kwargs: dict) -> Any:
        calls.append((name, args[0]))
        time.sleep(0.05)
        return len(calls)

    codes = ["search('a')", "search('a') + 0", "search('a')", "search('a'); search('a')", "fetch('a')"]
    seen = session.preview(codes, count)
    assert sorted(calls) == [("fetch", "a"), ("search", "a"), ("search", "a")]
    assert seen[0] is seen[2] and seen[0].value == seen[1].value
    assert [len(execution.tool_calls) for execution in seen] == [1, 1, 1, 2, 1]
    session.commit(2)
    assert run(session, "1").value == "1"


def test_candidates_and_their_tools_run_at_the_same_moment(session: Session):
    def slow(name: str, args: list, kwargs: dict) -> Any:
        time.sleep(0.3)
        return args

    started = time.monotonic()
    session.preview([f"import time\ntime.sleep(0.3)\nsearch({i})" for i in range(6)], slow)
    assert time.monotonic() - started < 1.8


def test_candidate_that_is_killed_harms_no_other(patient: Session):
    session = patient
    run(session, "x = 1")
    codes = ["x = 2; x", "sum(range(10 ** 12))", "import os\nos._exit(1)", "x = 3; x"]
    seen = session.preview(codes, no_tools)
    assert [execution.limit for execution in seen] == [None, "wall time", "died", None]
    session.commit(3)
    assert run(session, "x").value == "3"


def test_commit_of_a_killed_candidate_starts_afresh_as_a_step_would(session: Session):
    run(session, "x = 1")
    (seen,) = session.preview(["sum(range(10 ** 12))"], no_tools)
    assert session.commit(0) == seen and "The interpreter was restarted" in str(seen.error)
    assert str(run(session, "x").error).startswith("NameError")


@pytest.mark.parametrize(
    "breakage", ["._fork = lambda: os._exit(0)", "._receive = lambda *_: None", ".Interpreter.move_to = None"]
)
def test_state_that_cannot_be_forked_is_an_observation(session: Session, breakage: str):
    run(session, f"import os, sys\nx = 1\nsys.modules['envs.sandbox.child']{breakage}")
    seen = session.preview(["x", "x + 1"], no_tools)
    assert [execution.limit for execution in seen] == ["died", "died"]
    assert "The interpreter was restarted" in str(seen[0].error)
    assert session.commit(0) == seen[0]
    assert [execution.value for execution in session.preview(["1", "2"], no_tools)] == ["1", "2"]


def test_candidates_share_no_memory(session: Session):
    """Shared memory that was made before the fork would join them."""
    run(session, "import ctypes, mmap, time\nlibc = ctypes.CDLL(None)\nlibc.mmap.restype = ctypes.c_void_p")
    run(session, "page = libc.mmap(None, 4096, 1, 0x21, -1, 0)\npage = -1 if page == 2 ** 64 - 1 else page")
    assert run(session, "page").value == "-1"
    assert "PermissionError" in str(run(session, "mmap.mmap(-1, 4096)").error)


def test_previews_leave_no_zombies(sandbox: Sandbox, session: Session):
    def zombies() -> int:
        found = 0
        for path in Path("/proc").glob("[0-9]*/stat"):
            try:
                state, parent = path.read_text().rpartition(")")[2].split()[:2]
            except OSError:  # ended meanwhile
                continue
            found += state == "Z" and int(parent) in below
        return found

    assert sandbox.zygote_pid is not None
    for _ in range(3):
        session.preview(["1", "2", "import os; os._exit(1)"], no_tools)
    below = descendants(sandbox.zygote_pid) | {sandbox.zygote_pid}
    session._drop_candidates()
    assert wait_until(lambda: zombies() == 0)


def test_long_chain_of_commits(session: Session):
    run(session, "n = 0")
    for _ in range(40):
        session.preview(["n += 1", "n += 2", "n"], no_tools)
        session.commit(1)
    assert run(session, "n").value == "80"
    lowest_free = run(session, "import os\nos.open(os.__file__, os.O_RDONLY)").value
    assert int(str(lowest_free)) < 20  # no commit leaves a descriptor open


def test_candidates_draw_the_numbers_that_the_state_would(session: Session):
    run(session, "import random")
    seen = session.preview(["random.random()", "random.random() + 0"], no_tools)
    assert seen[0].value == seen[1].value == run(session, "random.random()").value


def test_preview_more_adds_to_a_preview_as_if_all_had_been_given_at_once(session: Session):
    calls = []

    def count(name: str, args: list, kwargs: dict) -> Any:
        calls.append(args[0])
        return len(calls)

    run(session, "x = 1\nimport random")
    first = session.preview(["x += 1; search('a')", "x = 10; random.random()"], count)
    more = session.preview_more(["x = 20; random.random()", "x + search('a')", "x += 1; search('a')"], count)
    assert calls == ["a"]  # the call of the first wave is shared with the second
    assert more[0].value == first[1].value and more[1].value == "2"  # the state is as it was
    assert more[2] is first[0]  # equal code is not run again
    assert session.commit(2) == more[0]
    assert run(session, "x").value == "20"


def test_what_was_previewed_first_can_be_kept_after_more(session: Session):
    session.preview(["x = 1", "x = 2"], no_tools)
    session.preview_more(["x = 3"], no_tools)
    session.commit(1)
    assert run(session, "x").value == "2"
    session.preview(["x = 4"], no_tools)
    session.commit(0)
    assert run(session, "x").value == "4"


def test_addition_that_fails_on_our_side_leaves_the_preview(session: Session):
    def fail(name: str, args: list, kwargs: dict) -> Any:
        raise OSError("the tool is down")

    session.preview(["x = 1"], no_tools)
    with pytest.raises(OSError, match="the tool is down"):
        session.preview_more(["search('a')"], fail)
    session.commit(0)
    assert run(session, "x").value == "1"


@pytest.mark.parametrize(("index", "value"), [(0, "5"), (2, "gone")])
def test_state_that_cannot_be_forked_a_second_time_is_an_observation(session: Session, index: int, value: str):
    # The first two forks go well; from the third on the interpreter ends.
    breakage = (
        "import sys, os\nx = 1\nmodule = sys.modules['envs.sandbox.child']\nold, left = module._fork, [2]\n"
        "def fork():\n    left[0] -= 1\n    return old() if left[0] >= 0 else os._exit(0)\nmodule._fork = fork"
    )
    run(session, breakage)
    session.preview(["x = 5; x", "x = 6; x"], no_tools)
    (broken,) = session.preview_more(["x"], no_tools)
    assert broken.limit == "died" and "The interpreter was restarted" in str(broken.error)
    session.commit(index)
    assert run(session, "globals().get('x', 'gone')").value == value


def test_preview_more_leaves_nothing_behind(sandbox: Sandbox, session: Session):
    assert sandbox.zygote_pid is not None
    zygote = sandbox.zygote_pid
    before = descendants(zygote)
    for _ in range(3):
        session.preview(["x = 1", "x = 2"], no_tools)
        session.preview_more(["x = 3", "x = 4"], no_tools)
        session.commit(3)
    assert wait_until(lambda: len(descendants(zygote)) <= len(before))  # an earlier test's may be ending


def test_candidates_share_no_file_offset(session: Session):
    run(session, "import os\nf = open(os.__file__)")
    first, second = session.preview(["f.read(10)", "f.read(10) + ''"], no_tools)
    assert first.value == second.value


# what code cannot reach, in every tier


@pytest.mark.parametrize(
    "attack",
    [
        "import socket; socket.socket(socket.AF_INET, socket.SOCK_STREAM)",
        "import socket; socket.socket(socket.AF_UNIX)",
        "import socket; socket.socketpair()",
        "open('/etc/passwd').read()",
        "open('/proc/self/environ').read()",
        f"open({str(Path(__file__))!r}).read()",
        "import os; os.listdir('/root')",
        "import os; os.listdir('/home')",
        "open('/tmp/mark', 'w')",
        "open('mark', 'w')",
        "import os; open(os.__file__, 'a')",
        "import os; os.mkdir('/tmp/mark')",
        "import os; os.unlink(os.__file__)",
        "import os; os.chmod(os.__file__, 0o777)",
        "import os; os.fork()",
        "import os; os.execv('/bin/true', ['true'])",
        "import subprocess; subprocess.run(['true'])",
        "import os; os.kill(1, 9)",
        "import os; os.kill(os.getppid(), 9)",
        "import os; os.kill(-1, 9)",
        "import os; os.setuid(0)",
        "import os; os.setsid()",
        "import os; os.pipe()",
        "import os; os.memfd_create('m')",
        "import resource; resource.setrlimit(resource.RLIMIT_CPU, (-1, -1))",
        "import mmap; mmap.mmap(-1, 4096)",
        "import fcntl; fcntl.flock(0, fcntl.LOCK_EX)",
        "import threading; threading.Thread(target=print).start()",
    ],
)
def test_attack_is_an_error_in_the_code(attacked: Session, attack: str):
    execution = run(attacked, f"done = False\n{attack}\ndone = True")
    names = ("PermissionError", "FileNotFoundError", "BlockingIOError", "OSError", "RuntimeError", "ValueError")
    assert execution.error is not None and execution.error.startswith(names), execution
    assert run(attacked, "done").value == "False"


@pytest.mark.parametrize(
    "call",
    [
        "101, 0, 0, 0, 0",  # ptrace
        "272, 0x10000000",  # unshare(CLONE_NEWUSER)
        "317, 1, 0, 0",  # seccomp
        "321, 0, 0, 0",  # bpf
        "425, 1, 0",  # io_uring_setup
        "310, 1, 0, 0, 0, 0, 0",  # process_vm_readv
        "157, 38, 1, 0, 0, 0",  # prctl
        "435, 0, 0",  # clone3
        "56, 0x10000011, 0, 0, 0, 0",  # clone(CLONE_NEWUSER)
        "2, b'/etc/passwd', 0",  # open
        "0x40000000 + 39",  # getpid of the x32 table
    ],
)
@pytest.mark.skipif(seccomp.machine() != "x86_64", reason="these are numbers of x86_64")
def test_raw_system_call_is_refused(attacked: Session, call: str):
    run(attacked, "import ctypes\nlibc = ctypes.CDLL(None, use_errno=True)")
    assert run(attacked, f"libc.syscall({call}), ctypes.get_errno() in (1, 11, 38)").value == "(-1, True)"


def test_environment_holds_no_secret(tier: Sandbox):
    with tier.start(seed=0) as session:
        execution = run(session, "import os, gc\nprint(dict(os.environ))\nrepr(gc.get_objects())")
        assert "PYTHONHASHSEED" in execution.stdout and SECRET not in execution.stdout
        found = run(session, f"import gc\nneedle = {SECRET[:9]!r} + {SECRET[9:]!r}\nneedle in str(os.environ)")
        assert found.value == "False"


def test_fork_bomb_makes_nothing(tier: Sandbox):
    with tier.start(seed=0) as session:
        before = len(descendants(os.getpid()))
        code = (
            "import os\nmade = 0\nfor _ in range(200):\n    try:\n        os.fork(); made += 1\n"
            "    except OSError: pass\nmade"
        )
        assert run(session, code).value == "0"
        assert len(descendants(os.getpid())) <= before
        # nor while its siblings are being made
        seen = session.preview([code, code + " + 0", "1"], no_tools)
        assert [execution.value for execution in seen] == ["0", "0", "1"]


def test_frames_of_the_codes_own_making_harm_only_itself(patient: Session):
    session = patient

    def forge(data: str) -> str:
        return (
            f"import os, struct\nbody = {data}\nframe = struct.pack('>I', len(body)) + body\n"
            "for fd in range(3, 128):\n    try: os.write(fd, frame)\n    except OSError: pass\n"
        )

    run(session, "x = 1")
    codes = [
        forge("b'not json'"),
        forge("b'[' * 100000"),
        forge("""b'{"call": 1, "name": "os.system", "args": ["id"], "kwargs": {}}'"""),
        forge("""b'{"stdout": 5}'"""),
        forge("b''") + "os.write(3, bytes([255] * 8))",
        "x + 1",
    ]
    seen = session.preview(codes, no_tools)
    assert [execution.limit for execution in seen] == ["died"] * 5 + [None]
    session.commit(5)
    assert run(session, "x").value == "1"


def test_half_a_frame_delays_nobody(session: Session):
    write = "for fd in range(3, 128):\n    try: os.write(fd, b'\\0\\0')\n    except OSError: pass\n"
    half = f"import os, time\n{write}time.sleep(60)"
    started = time.monotonic()
    seen = session.preview([half + "\n1", "2"], echo)
    assert time.monotonic() - started < 2.5
    assert seen[0].limit in ("wall time", "died") and seen[1].value == "2"


# what becomes of processes


def test_report_tells_of_every_layer(sandbox: Sandbox, tier: Sandbox):
    report = tier.report()
    assert all(report[name] for name in ("seccomp", "no_new_privs", "no_capabilities", "rlimits", "fork_metering"))
    assert all(report[name] is True for name in ("no_network", "no_host_files", "no_writing", "no_exec", "no_fork"))
    assert report["unprivileged_uid"] != "0"


def test_minimum_is_refused_without_and_given_up_only_when_told():
    with pytest.raises(SandboxError, match="seccomp"):
        Sandbox(modules=["math"], without=["seccomp"])
    with Sandbox(modules=["math"], without=["seccomp"], unsafe=True) as sandbox, sandbox.start(seed=0) as session:
        assert sandbox.report()["seccomp"] is False
        assert [execution.value for execution in session.preview(["1", "2"], no_tools)] == ["1", "2"]


def test_zygote_that_dies_is_replaced_and_its_sessions_live_on(sandbox: Sandbox, session: Session):
    run(session, "x = 1")
    old = sandbox.zygote_pid
    assert old is not None
    os.kill(old, signal.SIGKILL)
    with sandbox.start(seed=0) as fresh:
        assert run(fresh, "1 + 1").value == "2"
    assert sandbox.zygote_pid != old
    assert run(session, "x").value == "1"


def test_close_leaves_no_process():
    before = descendants(os.getpid())
    sandbox = Sandbox(modules=["time"], tool_names=["search"])
    sessions = [sandbox.start(seed) for seed in range(3)]
    for session in sessions:
        session.preview(["1", "2", "3"], no_tools)
    assert len(descendants(os.getpid()) - before) == 1 + 3 * 5  # the zygote; keeper, state holder, three candidates
    sandbox.close()
    sandbox.close()
    assert wait_until(lambda: descendants(os.getpid()) <= before)
    with pytest.raises(SandboxError, match="closed"):
        sandbox.start(seed=0)


@pytest.mark.parametrize("tier_name", ["all", "no_namespaces"])
def test_nothing_survives_a_driver_that_is_killed(tier_name: str):
    program = f"""
import sys, threading, time
from envs.sandbox import Sandbox
sandbox = Sandbox(modules=["signal", "time"], without={TIERS[tier_name]!r})
session = sandbox.start(0)
code = "import signal, time\\nsignal.pthread_sigmask(signal.SIG_BLOCK, range(1, 65))\\nwhile True: time.sleep(1)"
threading.Timer(0.5, lambda: print("ready", flush=True)).start()
session.preview([code, code + " # 2", code + " # 3"], None)
"""
    driver = subprocess.Popen([sys.executable, "-c", program], cwd=ROOT, stdout=subprocess.PIPE, text=True)
    try:
        assert driver.stdout is not None and driver.stdout.readline() == "ready\n"
        started = descendants(driver.pid)
        assert len(started) == 6
    finally:
        driver.kill()
        driver.wait(10)
    assert wait_until(lambda: not alive(started))


def test_many_threads_have_sessions_of_their_own(sandbox: Sandbox):
    wrong: list[Any] = []

    def episode(number: int) -> None:
        try:
            with sandbox.start(seed=number) as session:
                for step in range(3):
                    seen = session.preview([f"x = {number} + {step}; x", "search(1)"], echo)
                    if seen[0].value != str(number + step) or session.commit(0).value != str(number + step):
                        wrong.append(seen)
                if run(session, "x").value != str(number + 2):
                    wrong.append(number)
        except Exception as error:
            wrong.append(error)

    threads = [threading.Thread(target=episode, args=(number,)) for number in range(12)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    assert not wrong


@pytest.mark.parametrize(
    ("arguments", "code", "status", "shown"),
    [
        (["run"], "print(1)\n6 * 7", 0, {"value": "42", "kind": "ok", "limit": None}),
        (["run", "--modules", "math"], "import numpy", 1, {"kind": "code_error", "stdout": ""}),
        (["run", "--modules", "math", "--wall-s", "0.5"], "while True: pass", 1, {"limit": "wall time"}),
        (["run", "--modules", "math", "--output-chars", "10"], "'x' * 99", 0, {"kind": "ok"}),
        (["doctor", "--json"], "", 0, {"no_network": True, "no_new_privs": True}),
    ],
)
def test_command_line(arguments: list[str], code: str, status: int, shown: dict):
    command = [sys.executable, "-m", "envs.sandbox", *arguments]
    ran = subprocess.run(command, cwd=ROOT, input=code, capture_output=True, text=True, timeout=60)
    assert ran.returncode == status, ran
    said = json.loads(ran.stdout)
    assert {key: said[key] for key in shown} == shown
    assert "observation" in said or arguments[0] == "doctor"


def test_command_line_names_what_is_wrong():
    def fails(arguments: list[str], data: bytes) -> str:
        command = [sys.executable, "-m", "envs.sandbox", *arguments]
        ran = subprocess.run(command, cwd=ROOT, input=data, capture_output=True, timeout=60)
        assert (ran.returncode, ran.stdout) == (2, b"")
        return ran.stderr.decode()

    assert "wall_s=-1.0 must be positive" in fails(["run", "--wall-s", "-1"], b"1")
    assert "not UTF-8" in fails(["run"], b"\xff\xfe")


# the filter, for the architecture of this machine and for the other


def decide(program: bytes, arch: int, number: int, *arguments: int) -> str:
    """Run a filter, as the kernel would."""
    data = struct.pack("<iIQ6Q", number, arch, 0, *arguments, *[0] * (6 - len(arguments)))
    instructions = list(struct.iter_unpack("HBBI", program))
    accumulator = at = 0
    while True:
        code, yes, no, constant = instructions[at]
        at += 1
        if code == 0x20:
            (accumulator,) = struct.unpack_from("<I", data, constant)
        elif code == 0x54:
            accumulator &= constant
        elif code == 0x06:
            action = {0x7FFF0000: "allow", 0x80000000: "kill", 0x7FC00000: "notify"}.get(constant)
            return action or os.strerror(constant & 0xFFFF)
        else:
            taken = {0x15: accumulator == constant, 0x35: accumulator >= constant, 0x45: bool(accumulator & constant)}
            at += yes if taken[code] else no


CALLS = [  # (x86_64, aarch64), arguments, decision
    ((0, 63), (), "allow"),  # read
    ((47, 212), (), "allow"),  # recvmsg
    ((46, 211), (), "Operation not permitted"),  # sendmsg
    ((41, 198), (2, 1, 0), "Operation not permitted"),  # socket
    ((59, 221), (), "Operation not permitted"),  # execve
    ((62, 129), (1, 9), "Operation not permitted"),  # kill
    ((257, 56), (0, 0, os.O_RDONLY), "allow"),  # openat
    ((257, 56), (0, 0, os.O_RDWR), "Read-only file system"),
    ((257, 56), (0, 0, os.O_CREAT), "Read-only file system"),
    ((257, 56), (0, 0, 0o20000000), "Read-only file system"),  # O_TMPFILE
    ((9, 222), (0, 4096, 3, 0x22), "allow"),  # mmap: anonymous memory
    ((9, 222), (0, 4096, 5, 0x02), "allow"),  # code of a library
    ((9, 222), (0, 4096, 7, 0x02), "Operation not permitted"),
    ((9, 222), (0, 4096, 5, 0x22), "Operation not permitted"),
    ((9, 222), (0, 4096, 3, 0x21), "Operation not permitted"),  # shared and writable
    ((9, 222), (0, 4096, 1, 0x01), "allow"),  # shared, only to read
    ((9, 222), (0, 4096, 1, 0x21), "Operation not permitted"),  # shared and anonymous: could be made writable later
    ((9, 222), (0, 4096, 3, 0x40022), "Operation not permitted"),  # the machine's huge pages
    ((228, 113), (1,), "allow"),  # clock_gettime
    ((228, 113), (0xFFFFFFC6,), "Operation not permitted"),  # of another process
    ((124, 156), (0,), "allow"),  # getsid
    ((124, 156), (7,), "Operation not permitted"),
    ((267, 78), (), "allow"),  # readlinkat
    ((10, 226), (0, 4096, 3), "allow"),  # mprotect
    ((10, 226), (0, 4096, 5), "Operation not permitted"),
    ((72, 25), (3, 1), "allow"),  # fcntl(F_GETFD)
    ((72, 25), (3, 6), "Operation not permitted"),  # F_SETLK
    ((16, 29), (1, 0x5401), "Inappropriate ioctl for device"),
    ((16, 29), (1, 0x5412), "Operation not permitted"),  # TIOCSTI
    ((302, 261), (0, 7, 0, 1), "allow"),  # prlimit64: read
    ((302, 261), (0, 7, 1 << 32, 1), "Operation not permitted"),
    ((302, 261), (5, 7, 0, 1), "Operation not permitted"),
    ((44, 206), (3, 1, 1, 0, 0, 0), "allow"),  # sendto the connected peer
    ((44, 206), (3, 1, 1, 0, 1 << 40, 16), "Operation not permitted"),
    ((56, 220), (0x01200011,), "allow"),  # clone: a fork, which the other filter asks about
    ((56, 220), (0x003D0F00,), "Resource temporarily unavailable"),  # a thread
    ((435, 435), (), "Function not implemented"),  # clone3
]


@pytest.mark.parametrize(("arch", "audit"), [("x86_64", 0xC000003E), ("aarch64", 0xC00000B7)])
def test_filter_decides_as_it_should(arch: str, audit: int):
    program = seccomp.allow_list_filter(arch, may_open=True)
    for numbers, arguments, decision in CALLS:
        number = numbers[arch == "aarch64"]
        assert decide(program, audit, number, *arguments) == decision, (number, arguments)
    assert decide(program, 0x40000003, 0) == "kill"  # another architecture's call
    closed = seccomp.allow_list_filter(arch, may_open=False)
    assert decide(closed, audit, CALLS[6][0][arch == "aarch64"], 0, 0, 0) == "Permission denied"
    hosts_root = seccomp.allow_list_filter(arch, may_open=True, may_read_links=False)
    assert decide(hosts_root, audit, (267, 78)[arch == "aarch64"]) == "Permission denied"
    metering = seccomp.metering_filter(arch)
    assert decide(metering, audit, CALLS[-3][0][arch == "aarch64"], 0x11) == "notify"
    assert decide(metering, audit, 0) == "allow"
