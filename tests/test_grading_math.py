"""The math grader agrees with labelled cases, reads what agents answer, and no answer can hang, break or misuse it."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from benchmarks.grader_answers import pathological
from envs import grading_math
from envs.base import EnvError, Task
from envs.grading import grade, grade_many
from envs.grading_math import MathGrader, MathSpec, configure_math, shared_math_grader
from envs.sandbox import SandboxError

ROOT = Path(__file__).parents[1]
CASES = [json.loads(line) for line in (ROOT / "tests/data/grader_cases/cases.jsonl").read_text().splitlines()]
FLOOR = 0.97
STRICT = MathSpec(cpu_s=1, processes=2)


@pytest.fixture(scope="module")
def grader() -> Iterator[MathGrader]:
    with MathGrader() as shared:
        yield shared


BOMBS = [
    "9^{9^{9^9}}",
    "9**9**9**9",
    "$" + r"\frac{1}{" * 300 + "1" + "}" * 300 + "$",
    r"\sqrt{" * 2000 + "2",
    "(" * 50_000,
    "factorial(10**9)",
    "binomial(10**9, 10**8)",
    "x" * 2_000_000,
    "\\boxed{" * 5000,
    "1+" * 7000 + "1",
    r"\int_0^{10^{10}} \sin(x^{x^x}) dx",
    "(" + "+".join(f"x_{{{i}}}" for i in range(60)) + ")^{60}",
]
HANGS = BOMBS[10]


@dataclass(frozen=True, slots=True, kw_only=True)
class Bombed:
    """What became of one bomb, and of a right answer that followed it."""

    equal: bool
    took_s: float
    next_equal: bool


@pytest.fixture(scope="module")
def bombed() -> dict[str, Bombed]:
    """All bombs, two at a time: most take a second. What follows each is an answer that was not seen before."""

    def drop(i: int) -> Bombed:
        started = time.monotonic()
        equal = strict.equal("10", BOMBS[i])
        took_s = time.monotonic() - started
        return Bombed(equal=equal, took_s=took_s, next_equal=strict.equal("10", f"{20 + 10 * i}/{2 + i}"))

    with MathGrader(STRICT) as strict, ThreadPoolExecutor(2) as threads:
        return dict(zip(BOMBS, threads.map(drop, range(len(BOMBS))), strict=True))


def test_labelled_cases_agree(grader):
    wrong = [case for case in CASES if grader.equal(case["gold"], case["pred"]) != case["expected"]]
    assert len(CASES) >= 100 and 1 - len(wrong) / len(CASES) >= FLOOR, wrong


@pytest.mark.parametrize(
    ("gold", "prediction"),
    [
        (r"3 \sqrt{2}", "3*sqrt(2)"),
        (r"x^2 - x - 1", "x**2 - x - 1"),
        (r"\left( \frac{25}{13}, 10 \right)", "(25/13, 10)"),
        (r"(-\infty,-8]\cup [8,\infty)", "Union(Interval(-oo, -8), Interval(8, oo))"),
        (r"[3, 4) \cup \left(4, \frac{64}{11}\right]", "[3,4) U (4,64/11]"),
        (r"\begin{pmatrix} 0 \\ -5 \end{pmatrix}", "Matrix([[0], [-5]])"),
        (r"\begin{pmatrix} 0 \\ -5 \end{pmatrix}", "[0, -5]"),
        ("1,3", "[3, 1]"),
        ("1,i,-i", "[1, I, -I]"),
        ("-8 + 2i", "(-8+2j)"),
        ("-3 + 8i", "The answer is $-3 + 8i$."),
        (r"\frac{1}{2}", "Fraction(1, 2)"),
        (r"\sqrt{59}", "7.681145747868608"),
        (r"20,\!000,\!000", "20000000.0"),
        (r"73\%", "0.73"),
        (r"\$1.65", "$1.65"),
        (r"8\text{ cm}", "8"),
        (r"\text{Evelyn}", "evelyn"),
        (r"\text{(C)}", "C"),
        (r"\text{6:30 PM}", "6:30 PM"),
        (".0000672", "6.72e-05"),
        ("y=-2x+1", "-2*x + 1"),
        ("216", "The volume of the cube is 216 cubic inches."),
        ("6", "**6**"),
        ("1e3", "1000"),
        ("10", "Answer: 10"),
        ("1/3", "0.333333"),
        (r"\frac{3}{56}", "3/56"),
    ],
)
def test_what_agents_answer_is_read(grader, gold, prediction):
    assert grader.equal(gold, prediction)


@pytest.mark.parametrize(
    ("gold", "prediction"),
    [
        ("(2,4)", "[2, 4]"),
        ("[2,4]", "(2, 4)"),
        ("(1,2)", "(2, 1)"),
        ("1,3", "[1, 4]"),
        ("x+1", "x-1"),
        ("12345678901234567890", "12345678901234567891"),
        ("10", "10**9"),
        ("10", "10*x"),
        ("10", "10!"),
        ("10", "round(3.5, 10)"),
        ("10", "10 @ 3"),
        ("10", "10 # 3"),
        ("10", "10, 11"),
        ("2", r"2 \text{ or } 3"),
        ("0.0000001", "0.0000002"),
        ("1/3", "0.33"),
        ("f(x)", "f(y)"),
        ("10", "-10"),
        ("5", "[5, 6]"),
        ("5", ""),
        ("0", "None"),
        ("64", "64.05128205128204"),
        (r"\text{even}", "odd"),
    ],
)
def test_other_answers_are_wrong(grader, gold, prediction):
    assert not grader.equal(gold, prediction)


@pytest.mark.parametrize("bomb", BOMBS, ids=lambda bomb: bomb[:24])
def test_no_answer_can_hang_the_grader(bombed, bomb):
    assert not bombed[bomb].equal
    assert bombed[bomb].took_s < 2 * STRICT.wall_s + 10
    assert bombed[bomb].next_equal


@pytest.mark.slow
@pytest.mark.parametrize("name", sorted(pathological()))
def test_no_pathological_answer_is_taken_for_right(grader, name):
    make, rng = pathological()[name], random.Random(0)
    for gold in ("10", "x^2+1", r"\frac{1}{2}", "[1, 2)"):
        assert not grader.equal(gold, make(rng))
    assert grader.stats()["failed"] == 0


@pytest.mark.parametrize(
    "template",
    [
        "__import__('pathlib').Path('{path}').touch()",
        "().__class__.__base__.__subclasses__()",
        "\\text{{__import__('os').system('touch {path}')}}",
        "$__import__('os').system('touch {path}')$",
        "\\operatorname{{exec}}(open('{path}','w'))",
        "sympify('open(chr(47))')",
        "1\") or open('{path}', 'w') or (\"",
        "1' + str(open('{path}', 'w')) + '",
        "\n\nimport os; os.system('touch {path}')\n",
        "sqrt.__globals__['__builtins__']['open']('{path}', 'w')",
        "10 if open('{path}', 'w') else 10",
        "[10 for x in [open('{path}', 'w')]][0]",
        "(lambda: 10)()",
    ],
)
def test_no_answer_is_run_as_code(grader, tmp_path, template):
    path = tmp_path / "written"
    assert not grader.equal("7919", template.format(path=path))
    assert not path.exists()
    before = grader.stats()["failed"]
    grader.equal("7919", "7919 ")
    assert grader.stats()["failed"] == before


def test_the_grading_process_can_reach_nothing():
    """Should a parser ever run what it reads: there is nothing to run it on."""
    with MathGrader() as grader:
        assert grader.equal("x + 2", "2 + x")
        assert grader._sandbox is not None
        report = grader._sandbox.report()
    names = ("no_new_privs", "seccomp", "no_network", "no_host_files", "no_writing", "no_exec", "no_fork")
    assert all(report[name] for name in names), report


@settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck))
@given(
    st.one_of(
        st.text(max_size=200),
        st.text(alphabet="\\{}()[]$^_&%0123456789+-*/=<>,.xyzi frac sqrt", max_size=60),
        st.lists(st.sampled_from([r"\frac", "{", "}", r"\sqrt", "^", "_", "2", "x", "$", "(", ")", r"\boxed"])).map(
            "".join
        ),
    )
)
def test_no_answer_raises(grader, prediction):
    assert grade_with(grader, prediction) in (True, False)


def grade_with(grader: MathGrader, prediction: str) -> bool:
    return grader.equal("17", prediction)


def test_a_killed_process_is_replaced(grader):
    grader.equal("x + 3", "3 + x")
    [process] = grader._idle[-1:]
    holder = process.session._holder
    assert holder is not None
    os.kill(holder.pid, signal.SIGKILL)
    assert grader.equal("x + 5", "5 + x")


def test_threads_share_a_few_processes():
    with MathGrader(MathSpec(processes=2)) as grader, ThreadPoolExecutor(6) as threads:
        results = list(threads.map(lambda i: grader.equal(f"x + {i}", f"{i} + x"), range(1, 19)))
        assert all(results) and grader.stats()["started"] <= 2


def test_equal_questions_are_compared_once(grader):
    before = grader.stats()
    for _ in range(3):
        assert grader.equal("x + 31", "31 + x")
    after = grader.stats()
    assert after["comparisons"] == before["comparisons"] + 1 and after["remembered"] == before["remembered"] + 2


def test_a_question_that_is_being_answered_is_not_asked_again():
    with MathGrader(MathSpec(processes=2, cpu_s=1)) as grader, ThreadPoolExecutor(4) as threads:
        assert not any(threads.map(lambda _: grader.equal("10", HANGS), range(4)))
        stats = grader.stats()
    assert (stats["comparisons"], stats["remembered"]) == (1, 3)


def test_an_answer_that_hangs_holds_up_no_other():
    """The others, behind it in the queue, are all done when it meets its limit."""
    pairs = [("10", HANGS), *((f"x + {i}", f"{i} + x") for i in range(20))]
    tasks = [(Task(id="t", question="q", answer=gold, kind="k", grader="math"), text) for gold, text in pairs]
    grader = configure_math(MathSpec(processes=2, cpu_s=6))  # long enough for the others, also on a busy machine
    assert not grader.equal("x", "y")
    scores = grade_many(tasks, at_once=2)
    assert next(scores) == 0.0  # comes first, being asked first; the process that is not held has gone on
    assert grader.stats()["comparisons"] == 2 + 20 and grader.stats()["stopped"] == 1
    assert list(scores) == [1.0] * 20


def test_a_wait_for_a_process_has_a_limit():
    with MathGrader(MathSpec(processes=1, cpu_s=1, wait_s=0.2)) as grader:
        grader.equal("x + 3", "3 + x")
        busy = threading.Thread(target=grader.equal, args=("10", HANGS))
        busy.start()
        time.sleep(0.3)
        with pytest.raises(EnvError, match="no process of the math grader became free within 0.2 s"):
            grader.equal("x + 3", "4 + x")
        busy.join(30)


def test_a_sandbox_that_does_not_start_is_our_failure(monkeypatch):
    def refuse(**options: object) -> None:
        raise SandboxError("layer seccomp is not available here")

    monkeypatch.setattr(grading_math, "Sandbox", refuse)
    with pytest.raises(EnvError, match="math grader's sandbox does not start: layer seccomp"):
        MathGrader().equal("x + 1", "1 + x")


def test_the_grader_takes_tasks_and_aliases(monkeypatch, grader):
    monkeypatch.setattr(grading_math, "_shared", grader)
    task = Task(id="t", question="q", answer=r"\frac{1}{2}", aliases=("x = 7",), kind="math", grader="math")
    assert [grade(task, text) for text in ("0.5", "7", "8")] == [1.0, 1.0, 0.0]


def test_a_process_has_one_configured_grader(monkeypatch):
    monkeypatch.setattr(grading_math, "_shared", None)
    assert configure_math(MathSpec(cpu_s=3)) is shared_math_grader()
    assert shared_math_grader().spec.cpu_s == 3


def test_a_wrong_limit_is_named():
    with pytest.raises(ValueError, match="cpu_s=0 must be positive"):
        MathSpec(cpu_s=0)


SCRIPT = """
from envs.base import Task
from envs.grading import grade, grade_many
from envs.grading_math import shared_math_grader
task = Task(id="t", question="q", answer="1/2", kind="k", grader="math")
print(grade(task, "0.5"), shared_math_grader()._sandbox.zygote_pid)
"""


def test_nothing_is_left_when_the_interpreter_ends():
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", SCRIPT], capture_output=True, text=True, env=environment, timeout=60)
    score, pid = done.stdout.split()
    assert score == "1.0" and done.stderr == ""
    deadline = time.monotonic() + 10
    while Path(f"/proc/{pid}").exists() and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not Path(f"/proc/{pid}").exists()
