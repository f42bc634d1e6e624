r"""Ten thousand answers to grade, as models write them: right, wrong, differently written, and made to break a grader.

Reference answers are MATH's, GSM8K's and the labelled cases' where their files are found; GSM-Hard's floats, AIME's
integers, OlymMATH's LaTeX and factual answers are made here in their form. Each reference answer gets one right answer
(often written in another way) or a wrong one; one in fifty answers is pathological. `expected` is what is certain by
construction; None where two readings are possible. Nothing is graded here.

Example::

    answers = make_answers(Path("../shared/data"), count=10_000, seed=0)
    answers[0].task.answer, answers[0].prediction, answers[0].expected
"""

from __future__ import annotations

import json
import random
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from envs.base import Task
from envs.grading import number

PATHOLOGICAL_SHARE = 0.02
_MB = 1_000_000
_SHARES = {
    "math": 0.42,
    "gsm8k": 0.22,
    "gsm_hard": 0.14,
    "aime": 0.04,
    "olymmath": 0.06,
    "cases": 0.03,
    "factual": 0.07,
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Answer:
    """One answer to grade."""

    task: Task
    prediction: str
    expected: bool | None
    """Whether it is right; None where that is not certain."""
    source: str
    """Where the reference answer is from, or `pathological`."""


def make_answers(data: Path | None, *, count: int = 10_000, seed: int = 0) -> list[Answer]:
    """`count` answers in random order; the same for the same files and seed. `data`: a folder with data sets below."""
    rng = random.Random(seed)
    answers: list[Answer] = []
    odd = round(count * PATHOLOGICAL_SHARE)
    bombs = list(pathological().values())
    for i in range(odd):
        gold = rng.choice(("10", r"\frac{1}{2}", "x^2+1", "42", r"[1, 2)"))
        answers.append(_answer(gold, bombs[i % len(bombs)](rng), False, "pathological", "math"))
    golds = {source: _GOLDS[source](data, rng) for source in _SHARES}
    total = sum(_SHARES.values())
    for source, share in _SHARES.items():
        for _ in range(round((count - odd) * share / total)):
            answers.append(_written(source, golds[source], rng))
    while len(answers) < count:
        answers.append(_written("math", golds["math"], rng))
    del answers[count:]
    rng.shuffle(answers)
    return answers


def pathological() -> dict[str, Callable[[random.Random], str]]:
    """Makers of answers that hang, grow, break or misuse a careless grader; none equals any reference answer above."""
    return {
        "power tower": lambda rng: f"{rng.randint(6, 99)}**9**9**9",
        "power tower, LaTeX": lambda rng: f"{rng.randint(6, 99)}^{{9^{{9^{{9}}}}}}",
        "power tower, boxed": lambda rng: rf"The answer is $\boxed{{10^{{10^{{{rng.randint(10, 99)}}}}}}}$.",
        "factorial": lambda rng: f"factorial({rng.randint(10**6, 10**9)})",
        "factorial, LaTeX": lambda rng: f"${rng.randint(10**6, 10**7)}!$",
        "binomial": lambda rng: rf"\binom{{{rng.randint(10**8, 10**9)}}}{{{rng.randint(10**6, 10**7)}}}",
        "fractions 10,000 deep": lambda rng: r"\frac{1}{" * 10_000 + str(rng.randint(2, 99)) + "}" * 10_000,
        "fractions 40 deep": lambda rng: r"$\frac{1}{1+" * 1 + r"\frac{1}{1+" * 39 + str(rng.random()) + "}" * 40 + "$",
        "roots": lambda rng: r"\sqrt{" * 2000 + str(rng.randint(2, 99)),
        "unbalanced": lambda rng: r"\frac{" * rng.randint(1, 300) + "{" * rng.randint(1, 300) + r"1}}\right)",
        "unbalanced, short": lambda rng: rf"$\left( \frac{{{rng.randint(1, 99)}}}{{ 2 \right]$",
        "boxes": lambda rng: r"\boxed{" * rng.randint(1000, 9000),
        "1 MB of digits": lambda rng: str(rng.randint(1, 9)) * _MB,
        "1 MB of decimals": lambda rng: "0." + str(rng.randint(1, 9)) * _MB,
        "1 MB of brackets": lambda rng: rng.choice("([{") * _MB,
        "1 MB of text": lambda rng: "the answer is hard to say and so on " * (_MB // 36),
        "1 MB of LaTeX": lambda rng: r"$\frac{x_1}{y^2} + \sqrt{2}$ and " * (_MB // 32),
        "1 MB of dollars": lambda rng: "$" * _MB + str(rng.randint(11, 99)),
        "1 MB of spaces": lambda rng: "1" + " " * _MB + str(rng.randint(1, 9)),
        "1 MB of commas": lambda rng: "1," * (_MB // 2),
        "matrix": lambda rng: (
            r"\begin{pmatrix}"
            + r"\\".join("&".join(str(rng.randint(0, 9)) for _ in range(40)) for _ in range(40))
            + r"\end{pmatrix}"
        ),
        "matrix, Python": lambda rng: f"Matrix({[[rng.randint(0, 9)] * 30 for _ in range(30)]})",
        "matrix power": lambda rng: rf"\begin{{pmatrix}} 1 & {rng.randint(2, 9)} \\ 3 & x \end{{pmatrix}}^{{9999999}}",
        "intervals": lambda rng: r" \cup ".join(f"({i}, {i}.{rng.randint(1, 9)})" for i in range(200)),
        "intervals, Python": lambda rng: f"Union({', '.join(f'Interval({i}, {i + rng.random()})' for i in range(40))})",
        "set": lambda rng: r"\{" + ", ".join(str(rng.random()) for _ in range(400)) + r"\}",
        "polynomial": lambda rng: "(" + "+".join(f"x_{{{i}}}" for i in range(60)) + f")^{{{rng.randint(60, 90)}}}",
        "polynomial, expanded by nobody": lambda rng: f"(x+1)^{{{rng.randint(10**4, 10**6)}}} - (x-1)^{{{10**5}}}",
        "sum": lambda rng: "1+" * rng.randint(3000, 7000) + "1",
        "sum without end": lambda rng: rf"\sum_{{n=1}}^{{\infty}} \frac{{\sin(n^{{{rng.randint(3, 99)}}})}}{{n!^n}}",
        "sum, long": lambda rng: rf"$\sum_{{k=1}}^{{{10 ** rng.randint(8, 12)}}} k^{{k}}$",
        "product": lambda rng: rf"\prod_{{k=1}}^{{{10 ** rng.randint(8, 12)}}} (1 + \frac{{1}}{{k^k}})",
        "integral": lambda rng: rf"\int_0^{{10^{{{rng.randint(9, 20)}}}}} \sin(x^{{x^x}}) dx",
        "integral, nested": lambda rng: r"\int_0^1 " * rng.randint(4, 9) + r"e^{-x^2 y^z} dx dy dz dx",
        "limit": lambda rng: rf"\lim_{{x \to 0}} \frac{{\sin^{{{rng.randint(20, 99)}}} x - x^{{\tan x}}}}{{x^{{x^x}}}}",
        "equation": lambda rng: rf"x^{{{rng.randint(50, 99)}}} - 7x^{{31}} + \sin x = e^{{x^x}}",
        "x to the x": lambda rng: "**".join(["x"] * rng.randint(30, 60)),
        "roots of sums": lambda rng: "+".join(rf"\sqrt{{{rng.randint(2, 999)} + \sqrt{{{i}}}}}" for i in range(1, 25)),
        "trigonometry": lambda rng: "*".join(f"sin({rng.randint(2, 99)}*x)**{i}" for i in range(2, 30)),
        "logarithms": lambda rng: "log(" * 45 + str(rng.randint(2, 9)) + ")" * 45,
        "modulus": lambda rng: rf"7^{{{10 ** rng.randint(8, 12)}}} \mod 10^{{9}}",
        "exponent of a float": lambda rng: f"1e{rng.randint(10**6, 10**9)}",
        "exponents in a row": lambda rng: "2^" * rng.randint(100, 4000) + "2",
        "backtracking, quantity": lambda rng: "$" + " " * 8000 + "1" + " ," * 3000 + "!",
        "backtracking, numbers": lambda rng: "1,111," * rng.randint(500, 2500) + "x",
        "backtracking, answer is": lambda rng: "final answer is " * rng.randint(100, 900) + "?",
        "backtracking, circle": lambda rng: "^" + " " * 15_000 + "!",
        "backtracking, text": lambda rng: r"\text{" * 2500 + " " * 900,
        "unicode digits": lambda rng: rng.choice(
            ("\u0661\u0663", "\uff11\uff10\uff12", "\u2469", "\U0001d7cf\U0001d7ce9")
        ),
        "NULs": lambda rng: "\x00" * rng.randint(1, 999) + "7",
        "lone surrogates": lambda rng: "\ud83d" * rng.randint(1, 999) + "7\udc00",
        "right to left": lambda rng: "\u202e" * 99 + "01" + "\u200f",
        "combining marks": lambda rng: "x" + "\u0301" * rng.randint(1000, 20_000),
        "control characters": lambda rng: "".join(chr(rng.randint(1, 31)) for _ in range(2000)),
        "code that opens a file": lambda rng: "__import__('os').system('touch owned')",
        "code, subclasses": lambda rng: "().__class__.__base__.__subclasses__()[0]",
        "code in LaTeX": lambda rng: r"\operatorname{exec}(open('/etc/passwd').read())",
        "code that evaluates": lambda rng: f"eval('10*{rng.randint(2, 9)}')",
        "sympify": lambda rng: "sympify('open(chr(47))')",
        "quotes": lambda rng: "1') or open('owned', 'w') or ('" * rng.randint(1, 50),
        "format strings": lambda rng: "{0.__class__}" * rng.randint(1, 500) + "%s%n" * 99,
        "not a number": lambda rng: rng.choice(
            ("nan", "inf", "-oo", "zoo", "None", "True", "1/0", r"\frac{1}{0}", "0^0")
        ),
    }


def _answer(gold: str, prediction: str, expected: bool | None, source: str, grader: str) -> Answer:
    task = Task(id=f"{source}", question="q", answer=gold, kind=source, grader=grader)
    return Answer(task=task, prediction=prediction, expected=expected, source=source)


def _written(source: str, golds: Sequence[str], rng: random.Random) -> Answer:
    gold = rng.choice(golds)
    grader = "math" if source != "factual" else rng.choice(("exact", "f1"))
    draw = rng.random()
    if source == "factual":
        text = gold if draw < 0.5 else rng.choice(golds)
        prediction = text if rng.random() < 0.5 else f"The {text.lower()}."
        expected = None if grader == "f1" else text == gold
        return _answer(gold, prediction, expected, source, grader)
    if draw < 0.45:
        return _answer(gold, _rewritten(gold, rng), True, source, grader)
    if draw < 0.75:
        other = rng.choice(golds)
        bare_gold, bare_other = (re.sub(r"\\text\{.*?\}|[^\w.]", "", text) for text in (gold, other))
        same = bare_gold == bare_other or (number(other) is not None and number(other) == number(gold))
        return _answer(gold, _rewritten(other, rng), None if other == gold or same else False, source, grader)
    if draw < 0.93:
        near = _near_miss(gold, rng)
        return _answer(gold, _rewritten(near, rng), None, source, grader)
    return _answer(gold, rng.choice(_NOTHING), False, source, grader)


_NOTHING = (
    "I could not find the answer",
    "unknown",
    "There is no solution to this problem.",
    "None",
    "[]",
    "The code failed",
)


def _near_miss(gold: str, rng: random.Random) -> str:
    """One digit changed, or a sign, or a term more."""
    places = [match.start() for match in re.finditer(r"\d", gold)]
    if places and rng.random() < 0.7:
        place = rng.choice(places)
        return gold[:place] + str((int(gold[place]) + rng.randint(1, 8)) % 10) + gold[place + 1 :]
    return gold[1:] if gold.startswith("-") and len(gold) > 1 else rng.choice((f"-{gold}", f"{gold} + 1"))


def _rewritten(text: str, rng: random.Random) -> str:
    """The same value in one of the ways that models write it."""
    if (value := number(text)) is not None and value.denominator == 1 and re.fullmatch(r"-?[\d.]+", text):
        n = int(value)
        ways = [text, str(n), f"{n}.0", f"{n:,}", rf"\boxed{{{n}}}", f"${n}$", f"The answer is ${n}$.", f"**{n}**"]
        return rng.choice(ways)
    if re.fullmatch(r"-?\d+\.\d+(e[-+]?\d+)?", text):
        ways = [text, repr(float(text)), f"{float(text):.10e}", f"${text}$", rf"\boxed{{{text}}}"]
        return rng.choice(ways)
    ways = [
        text, text, text, rf"\boxed{{{text}}}", f"${text}$", f"The answer is ${text}$.", text.replace(" ", ""),
        text.replace(r"\frac", r"\dfrac"), text.replace(r"\left", "").replace(r"\right", ""), f"  {text} ",
        _as_python(text), rf"We get $x$ first, so the result is \[\boxed{{{text}}}\]",
    ]  # fmt: skip
    return rng.choice(ways)


def _as_python(text: str) -> str:
    """What a code agent prints for simple LaTeX; the text itself where that is not simple."""
    plain = re.sub(r"\\frac\{([\w+-]+)\}\{(\w+)\}", r"(\1)/(\2)", text)
    plain = re.sub(r"(?<![\\\w])(\d+)\s*\\sqrt\{(\w+)\}", r"\1*sqrt(\2)", plain)
    plain = re.sub(r"\\sqrt\{(\w+)\}", r"sqrt(\1)", plain).replace(r"\pi", "pi")
    return text if "\\" in plain or "{" in plain else plain.replace("^", "**")


def _math(data: Path | None, rng: random.Random) -> list[str]:
    found: list[str] = []
    for path in sorted(data.glob("*/math_*.json")) if data is not None else ():
        found += [str(row["answer"]) for row in json.loads(path.read_text(encoding="utf-8"))["examples"]]
    return [gold for gold in found if gold.strip()] or _MATH


def _gsm8k(data: Path | None, rng: random.Random) -> list[str]:
    path = data / "gsm8k" / "train.jsonl" if data is not None else None
    if path is None or not path.is_file():
        return [str(rng.choice((rng.randint(1, 99), rng.randint(100, 99_999)))) for _ in range(2000)]
    rows = (json.loads(line) for line in path.read_text(encoding="utf-8").splitlines())
    return [row["answer"].rpartition("####")[2].strip().replace(",", "") for row in rows]


def _gsm_hard(data: Path | None, rng: random.Random) -> list[str]:
    def one() -> str:
        value = rng.choice(
            (rng.randint(-(10**6), 10**10), rng.uniform(-10, 10**7), rng.uniform(0, 1), 1 / rng.randint(2, 99))
        )
        return repr(float(value))

    return [one() for _ in range(2000)]


def _aime(data: Path | None, rng: random.Random) -> list[str]:
    return [rng.choice((str(i), f"{i:03d}")) for i in range(1000)]


def _olymmath(data: Path | None, rng: random.Random) -> list[str]:
    def n(top: int = 40) -> int:
        return rng.randint(2, top)

    makers = (
        lambda: rf"\frac{{{n()}+{n()}\sqrt{{{n()}}}}}{{{n()}}}",
        lambda: rf"\sqrt[3]{{{n()}}}-\sqrt{{{n(999)}}}",
        lambda: rf"\left(\frac{{{n()}}}{{{n(99)}}},\frac{{\sqrt{{{n()}}}}}{{{n()}}}\right)",
        lambda: rf"[{n()},{n() + 40})\cup({n() + 90},+\infty)",
        lambda: rf"\frac{{{n()}\pi}}{{{n()}}}+\arctan\frac{{{n()}}}{{{n()}}}",
        lambda: rf"{n()}^{{{n(2030)}}}-{n()}",
        lambda: rf"\binom{{{n(2030)}}}{{{n()}}}",
        lambda: rf"\{{{n()}, {n() + 40}, {n() + 90}\}}",
        lambda: f"{n(10**6)}",
    )
    return [rng.choice(makers)() for _ in range(400)]


def _cases(data: Path | None, rng: random.Random) -> list[str]:
    path = data / "grader_cases" / "cases.jsonl" if data is not None else None
    if path is None or not path.is_file():
        return _MATH
    return [json.loads(line)["gold"] for line in path.read_text(encoding="utf-8").splitlines()]


def _factual(data: Path | None, rng: random.Random) -> list[str]:
    first = ("Silver", "North", "Old", "Saint", "Little", "Great")
    second = ("Harbor", "Carolina", "Bridge", "Petersburg", "Rock", "Lakes Institute of Technology")
    return [f"{a} {b}{c}" for a in first for b in second for c in ("", " (1987)", " II", ", Ohio")]


_GOLDS: dict[str, Callable[[Path | None, random.Random], list[str]]] = {
    "math": _math, "gsm8k": _gsm8k, "gsm_hard": _gsm_hard, "aime": _aime, "olymmath": _olymmath, "cases": _cases,
    "factual": _factual,
}  # fmt: skip
_MATH = [
    r"\frac{1}{2}", r"3\sqrt{2}", r"(-\infty,-8]\cup [8,\infty)", "x^2-x-1", "1,3", r"\text{(C)}", r"\frac{3\pi}{4}",
    r"\begin{pmatrix} 0 \\ -5 \end{pmatrix}", r"\left( \frac{25}{13}, 10 \right)", "-8+2i", r"73\%", "y=-2x+1", "216",
    r"\frac{\sqrt{3}}{3}", r"2^{10}-1", r"11\frac{1}{2}", r"\sqrt[3]{4}", r"x \in [-2,7]", r"\$1.65", r"8\text{ cm}",
]  # fmt: skip
