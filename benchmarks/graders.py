"""Do the graders agree with labelled cases, and how long do they take?

python benchmarks/graders.py --data tests/data/grader_cases
python benchmarks/graders.py --data FOLDER --part speed --check

`--data` is a file or a folder with `cases.jsonl` of mathematical answers (`gold`, `pred`, `expected`, `source`); below
or beside it, runs of FireAct (`fireact_hotpotqa_dev_*.json`, with the exact match and F1 of its authors) are used too.
The peer is math-verify as it comes, on the same cases. Part `speed` grades 10,000 answers of many kinds on two cores,
one in fifty of them made to hang or break a grader (`grader_answers.py`).
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import sys
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from statistics import quantiles
from typing import Any

if not __package__:  # run as a file: imports come from the repository's root
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

from benchmarks import scoreboard
from benchmarks.grader_answers import make_answers
from benchmarks.scoreboard import Row
from envs.base import Task
from envs.grading import exact, f1, grade_many
from envs.grading_math import MathGrader, MathSpec, configure_math

AGREEMENT = 0.97
BOMBS = ("9^{9^{9^9}}", "9**9**9**9", "$" + r"\frac{1}{" * 300 + "1" + "}" * 300 + "$", "(" * 50_000)
PARTS = ("agreement", "speed")
ANSWERS, CORES, SPEED_GOAL_S = 10_000, 2, 60.0
_SHOWN_CHARS = 100


def mathematical(path: Path) -> Iterator[Row]:
    """Agreement of `math` by category, its disagreements, and the time of a comparison."""
    cases = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
    by_category: dict[str, list[bool]] = defaultdict(list)
    wall_s: list[float] = []
    wrong: list[dict[str, Any]] = []
    with MathGrader() as grader:
        grader.equal("x", "x+0")  # starts the process
        for case in cases:
            started = time.perf_counter()
            agrees = grader.equal(case["gold"], case["pred"]) == case["expected"]
            wall_s.append(time.perf_counter() - started)
            by_category[case["source"]].append(agrees)
            if not agrees:
                wrong.append(case)
        stats = grader.stats()
    share = 1 - len(wrong) / len(cases)
    yield Row(
        what="math, all",
        measured=_share(share, len(cases)),
        goal=f">= {AGREEMENT}",
        kept=share >= AGREEMENT,
        beside=f"math-verify {_plain_agreement(cases):.4f}",
    )
    for category, agreements in sorted(by_category.items()):
        name = category.removeprefix("Math-Verify/tests/").replace("hendrycks/math/modeling/", "")
        yield Row(what=f"math, {name}", measured=_share(sum(agreements) / len(agreements), len(agreements)))
    yield from _times("comparison", wall_s)
    yield Row(what="comparisons stopped at a limit", measured=stats["stopped"])
    for case in wrong:
        label = "equal" if case["expected"] else "different"
        print(f"disagreement, labelled {label}: {_short(case['gold'])} | {_short(case['pred'])}  ({case['source']})")


def _plain_agreement(cases: list[dict[str, Any]]) -> float:
    """What math-verify says of the same texts, with its own defaults; in this process, since these texts are known."""
    logging.disable(logging.CRITICAL)
    from math_verify import parse, verify

    return sum(verify(parse(case["gold"]), parse(case["pred"])) == case["expected"] for case in cases) / len(cases)


def factual(path: Path) -> Iterator[Row]:
    """Agreement of `exact` and `f1` with the scores that FireAct's authors recorded."""
    runs = list(json.loads(path.read_text(encoding="utf-8")).values())
    runs = [run for run in runs if isinstance(run.get("pred"), str) and isinstance(run.get("gt"), str)]
    tasks = [Task(id="", question="", answer=run["gt"], kind="factual") for run in runs]
    recorded: dict[str, Callable[[int], bool]] = {
        "exact": lambda i: exact(tasks[i], runs[i]["pred"]) == float(runs[i]["em"]),
        "f1": lambda i: abs(f1(tasks[i], runs[i]["pred"]) - runs[i]["f1"]) < 1e-6,
    }
    for name, agrees in recorded.items():
        wrong = [i for i in range(len(runs)) if not agrees(i)]
        share = 1 - len(wrong) / len(runs)
        yield Row(
            what=f"{name}, FireAct's HotpotQA",
            measured=_share(share, len(runs)),
            goal=f">= {AGREEMENT}",
            kept=share >= AGREEMENT,
        )
        for i in wrong:
            print(
                f"disagreement, {name}: {_short(runs[i]['gt'])} | {_short(runs[i]['pred'])}  (f1 {runs[i]['f1']:.3f})"
            )


def bombs() -> Iterator[Row]:
    """The longest that an answer made to hang takes."""
    with MathGrader(MathSpec(cpu_s=2)) as grader:
        grader.equal("x", "x+0")
        wall_s = []
        for bomb in BOMBS:
            started = time.perf_counter()
            grader.equal("10", bomb)
            wall_s.append(time.perf_counter() - started)
        limit_s = grader.spec.wall_s
    yield Row(
        what="longest of answers made to hang, cpu limit 2 s",
        measured=max(wall_s),
        unit="s",
        goal=f"<= {limit_s + 1:g}",
        kept=max(wall_s) <= limit_s + 1,
    )


def speed(data: Path | None) -> Iterator[Row]:
    """The time of grading many answers, and whether the odd ones among them fool the grader."""
    answers = make_answers(data, count=ANSWERS)
    spec = MathSpec(processes=CORES)
    with _on_cores(CORES):
        grader = configure_math(spec)
        started, own_s = time.perf_counter(), time.process_time()
        pairs = ((answer.task, answer.prediction) for answer in answers)
        scores = list(grade_many(pairs, at_once=CORES))
        wall_s, own_s = time.perf_counter() - started, time.process_time() - own_s
        stats = grader.stats()
        grader.close()
    odd = [i for i, answer in enumerate(answers) if answer.source == "pathological"]
    fooled = [i for i in odd if scores[i]]
    wrong = [i for i, answer in enumerate(answers) if answer.expected is not None and scores[i] != answer.expected]
    for i in wrong:
        print(f"unexpected {scores[i]:g}: {_short(answers[i].task.answer)} | {_short(answers[i].prediction)}")
    yield Row(
        what=f"{ANSWERS:,} answers, {len(odd)} of them pathological, {CORES} cores",
        measured=wall_s,
        unit="s",
        goal=f"< {SPEED_GOAL_S:g}",
        kept=wall_s < SPEED_GOAL_S,
    )
    yield Row(what="processor time of that, of both cores", measured=own_s + stats.pop("cpu_ms") / 1000, unit="s")
    yield Row(what="pathological ones taken for right", measured=len(fooled), goal="0", kept=not fooled)
    certain = sum(answer.expected is not None for answer in answers)
    yield Row(what="graded as their making says", measured=_share(1 - len(wrong) / certain, certain))
    for name, value in stats.items():
        yield Row(what=f"math grader, {name}", measured=value)


@contextlib.contextmanager
def _on_cores(count: int) -> Iterator[None]:
    """At most so many of the machine's cores, for this process and those that it starts."""
    before = os.sched_getaffinity(0)
    os.sched_setaffinity(0, sorted(before)[:count])
    try:
        yield
    finally:
        os.sched_setaffinity(0, before)


def _times(what: str, wall_s: list[float]) -> Iterator[Row]:
    cuts = quantiles(wall_s, n=100)
    for name, value in (("p50", cuts[49]), ("p99", cuts[98])):
        yield Row(what=f"{what}, {name}", measured=1000 * value, unit="ms")


def _share(share: float, n: int) -> str:
    return f"{share:.4f} n={n}"


def _short(text: str) -> str:
    text = " ".join(text.split())
    return text if len(text) <= _SHOWN_CHARS else f"...{text[-_SHOWN_CHARS:]}"


def _find(data: Path, pattern: str) -> Path | None:
    """In the folder, below it, or in a folder beside it."""
    if data.is_file():
        return data if data.match(pattern) else None
    places = (data.glob(pattern), data.glob(f"*/{pattern}"), data.resolve().parent.glob(f"*/{pattern}"))
    return next((path for place in places for path in sorted(place)), None)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = scoreboard.arguments(__doc__)
    parser.add_argument("--data", type=Path, default=Path("tests/data/grader_cases"), help="labelled cases")
    parser.add_argument("--part", choices=PARTS, help="only this one of them (default: all)")
    options = parser.parse_args(arguments)
    cases = _find(options.data, "cases.jsonl")
    if cases is None:
        print(f"error: {options.data} holds no cases.jsonl", file=sys.stderr)
        return 2
    rows: list[Row] = []
    if options.part in (None, "agreement"):
        rows += mathematical(cases)
        runs = _find(options.data, "fireact_hotpotqa_dev_*.json")
        if runs is not None:
            rows += factual(runs)
        rows += bombs()
    if options.part in (None, "speed"):
        rows += speed(cases.resolve().parent.parent)
    return scoreboard.publish(rows, options, title="graders against labelled cases")


if __name__ == "__main__":
    sys.exit(main())
