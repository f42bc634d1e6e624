r"""Are two mathematical answers equal? The program that `grading_math.py` runs inside the sandbox, and nowhere else.

An answer comes as LaTeX, as a whole solution with a box, as a Python value (`3*sqrt(2)`, `[1, -1]`, `6.72e-05`, which
is what agents that write code give), or in prose. Each reading that a text allows is compared with each of the other's
by math-verify (https://github.com/huggingface/Math-Verify), after plain text and plain numbers, which are decided here.
Python syntax is read by `ast` and built from a short list of functions: nothing a model wrote is evaluated.

Example::

    verdict(r"\frac{1}{2}", "0.5")                    # True
    verdict(r"3 \sqrt{2}", "The area is 3*sqrt(2).")  # False: prose is searched for LaTeX and numbers only
    verdict("1,-1", "[-1, 1]")                        # True: the gold answer is a list without an order
"""

import ast
import logging
import re
from fractions import Fraction
from typing import Any

import sympy
from math_verify import LatexExtractionConfig, parse, verify

logging.disable(logging.CRITICAL)  # math-verify tells of each text that it cannot parse

_DEEPEST_NESTING = 48
_LONGEST_EXPRESSION_CHARS = 2000
_RELATIVE_TOLERANCE = Fraction(1, 10**6)
_LARGEST_EXPONENT = 4000
_LONGEST_NUMBER_CHARS = 400

_MARKUP = re.compile(r"\$|\\boxed|\\fbox|\\\(|\\\[")
_TEXT = re.compile(r"\\(?:text|textbf|textit|textrm|mathrm|mathbf|mbox|operatorname)\s*\{([^{}]*)\}")
_SPACING = re.compile(r"\\[!,;: ]|\\q?quad\b|~|\s+")
_DROPPED = re.compile(r"\\left\b|\\right\b|\\displaystyle\b|\^\s*\{?\s*\\circ\s*\}?|\\\$|\\(?=[%{}])")
_CALL = re.compile(r"[A-Za-z_]\w*\(")
_WORD = re.compile(r"(?<![\\A-Za-z])[A-Za-z]{2,}")
_NUMBER = re.compile(r"[-+]?(?:\d{1,3}(?:,\d{3})+|\d+)?(?:\.\d*)?(?:[eE][-+]?\d{1,3})?")
_DECIMAL_COMMA = re.compile(r"-?\d+,\d+")
_CURRENCIES = "$\u20ac\u00a3\u00a5\u20b9"
_QUANTITY = re.compile(  # 1,000.99m², 1 000, 3.5 kg, 1,22
    rf"[{_CURRENCIES}]?\s*-?\d*(?:[ ,]\d+)*(?:\.\d+)?\s*[A-Za-z%/\u00b0\u00b2\u00b3\u00b5{_CURRENCIES}]{{0,12}}"
)
_LATEX_ONLY = (LatexExtractionConfig(),)
_BRACKETS = {"(": ")", "[": "]", "{": "}"}

_CONSTANTS: dict[str, Any] = {"pi": sympy.pi, "E": sympy.E, "e": sympy.E, "I": sympy.I, "oo": sympy.oo, "inf": sympy.oo}
_FUNCTIONS: dict[str, Any] = {
    name: getattr(sympy, name)
    for name in (
        "sqrt cbrt root Abs exp log sin cos tan cot sec csc asin acos atan sinh cosh tanh floor ceiling factorial "
        "binomial Rational Integer Float Interval Union FiniteSet Eq Matrix Tuple Min Max"
    ).split()
} | {"Lopen": sympy.Interval.Lopen, "Ropen": sympy.Interval.Ropen, "open": sympy.Interval.open}
_FUNCTIONS |= {"Fraction": sympy.Rational, "abs": sympy.Abs, "ln": sympy.log}
_FUNCTIONS |= {"Point": sympy.Tuple, "Point2D": sympy.Tuple}
_KNOWN_WORDS = {*_CONSTANTS, *_FUNCTIONS, "array", "np", "sp", "math", "sympy", "cup", "cap", "in", "or", "and"}


class _NotMathematicsError(Exception):
    """A Python text that is no mathematical value."""


def verdict(gold: str, prediction: str) -> bool:
    """Whether `prediction` equals `gold`. May take long or much memory on odd texts: the caller sets the limits."""
    wanted, got = _boxed_or_whole(gold), _boxed_or_whole(prediction)
    if not got or not wanted:
        return False
    if _same_text(wanted, got):
        return True
    wanted_number, got_number = number(wanted), number(got)
    if wanted_number is not None and got_number is not None:
        is_share = "%" in wanted and "%" not in got  # 73% is 0.73 as well
        if _numbers_equal(wanted_number, got_number) or (is_share and _numbers_equal(wanted_number, 100 * got_number)):
            return True
        if got in prediction[:-1].strip(" $") and len(got) < len(prediction.strip(" $.")):
            pass  # the last box of a longer text: what the text calls its final answer may be another
        elif not _DECIMAL_COMMA.fullmatch(wanted) and not _DECIMAL_COMMA.fullmatch(got):
            return False
    if max(_nesting(gold), _nesting(prediction)) > _DEEPEST_NESTING:
        return False
    golds, predictions = _readings(gold, wanted, like=wanted), _readings(prediction, got, like=wanted)
    return verify(golds, predictions, timeout_seconds=0, allow_set_relation_comp=True)


def number(text: str) -> Fraction | None:
    """The value of a plain number such as `-1,234.5`, `6.72e-05` or `\\$3`, exactly; None for all else."""
    cleaned = text.strip().removeprefix("\\$").removeprefix("$").removesuffix("%").removesuffix("\\").strip()
    cleaned = cleaned.replace("\\!", "").replace("{,}", ",").replace("\N{MINUS SIGN}", "-")
    if not cleaned.isascii() or not any(map(str.isdigit, cleaned)) or len(cleaned) > _LONGEST_NUMBER_CHARS:
        return None
    return Fraction(cleaned.replace(",", "")) if _NUMBER.fullmatch(cleaned) else None


def _numbers_equal(wanted: Fraction, got: Fraction) -> bool:
    if wanted.denominator == 1 and got.denominator == 1:
        return wanted == got
    return abs(wanted - got) <= _RELATIVE_TOLERANCE * max(abs(wanted), abs(got))


def _boxed_or_whole(text: str) -> str:
    """What stands in the last box, or all of it without the dollars around it and a last full stop."""
    text = text.strip().strip("*").strip()
    start = max(text.rfind("\\boxed{"), text.rfind("\\fbox{"))
    if start >= 0:
        opened = text.index("{", start)
        depth = 0
        for place in range(opened, len(text)):
            depth += {"{": 1, "}": -1}.get(text[place], 0)
            if depth == 0:
                return text[opened + 1 : place].strip()
        return text[opened + 1 :].strip()
    if text.endswith(".") and not text.endswith(".."):
        text = text[:-1].rstrip()
    for left, right in (("$$", "$$"), ("$", "$"), ("\\(", "\\)"), ("\\[", "\\]")):
        inner = text[len(left) : -len(right)]
        if text.startswith(left) and text.endswith(right) and inner and left not in inner:
            return inner.strip()
    return text


def _same_text(wanted: str, got: str) -> bool:
    plain_wanted, plain_got = _plain(wanted), _plain(got)
    if _TEXT.search(wanted) or not re.search(r"[\d\\=+*/^(]", plain_wanted):  # words: capitals do not count
        plain_wanted, plain_got = (re.sub(r"^\((\w)\)$", r"\1", text.casefold()) for text in (plain_wanted, plain_got))
    return plain_wanted == plain_got != ""


def _plain(text: str) -> str:
    """The text without what does not change its meaning: spacing, bracket sizes, degrees, dollars, text commands."""
    bare = _SPACING.sub("", _DROPPED.sub("", _TEXT.sub(r"\1", text)))
    return bare.replace("dfrac", "frac").replace("tfrac", "frac")


def _nesting(text: str) -> int:
    depth = deepest = 0
    for character in text:
        depth += (character in "({[") - (character in ")}]")
        deepest = max(deepest, depth)
    return deepest


def _readings(text: str, core: str, *, like: str) -> list[Any]:
    """What `text` may mean. `core`: its boxed part; `like`: the gold answer, whose form a Python value is read in."""
    found: list[Any] = []
    bare = not _MARKUP.search(text.rstrip("$")) and len(core) <= _LONGEST_EXPRESSION_CHARS
    if not bare or _is_prose(core) or _has_words(core) or _reads_as_number(core):
        found += parse(_with_imaginary_unit(text), parsing_timeout=0)
    if (value := number(core)) is not None:
        found.append(sympy.Integer(int(value)) if value.denominator == 1 else sympy.Float(float(value)))
    elif len(core) <= _LONGEST_EXPRESSION_CHARS and not _is_prose(core):
        found += parse(f"${_cleaned(core)}$", _LATEX_ONLY, parsing_timeout=0)
        for form in _python_forms(core, like):
            found += parse(f"${form}$", _LATEX_ONLY, parsing_timeout=0)
    return [reading for place, reading in enumerate(found) if reading not in found[:place]]


def _cleaned(core: str) -> str:
    cleaned = core.replace("\\$", "").replace("$", "").strip()
    cleaned = _with_imaginary_unit(cleaned).rstrip(".")
    return re.sub(r"(?<=[\])])\s*U\s*(?=[\[(])", r" \\cup ", cleaned)


def _with_imaginary_unit(text: str) -> str:
    """math-verify takes the i of `2i` for a real unknown, that of `2 i` not."""
    return re.sub(r"(?<=\d)i(?![A-Za-z])", " i", text)


def _is_prose(text: str) -> bool:
    words = [word for word in _WORD.findall(_TEXT.sub(" ", text)) if word not in _KNOWN_WORDS]
    return len(words) >= 2 and "\\" not in text


def _has_words(text: str) -> bool:
    """`Answer: 10` as well, which is too short for prose; not a function's name."""
    return not _CALL.search(text) and any(len(word) > 3 and word not in _KNOWN_WORDS for word in _WORD.findall(text))


def _reads_as_number(text: str) -> bool:
    return bool(_QUANTITY.fullmatch(text)) and any(map(str.isdigit, text))


def _python_forms(text: str, like: str) -> list[str]:
    """LaTeX of a Python value: a list is a matrix where the gold answer is one, a set where it is a bare list."""
    if "\\" in text or "#" in text or len(text) > _LONGEST_EXPRESSION_CHARS:
        return []
    try:
        node = ast.parse(text.replace("^", "**").replace("\N{MINUS SIGN}", "-"), mode="eval").body
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return []
    try:
        if isinstance(node, ast.Compare):
            return []  # LaTeX reads these as well
        value = _value(node)
    except (_NotMathematicsError, TypeError, ValueError, ArithmeticError, AttributeError, RecursionError):
        return []
    if not isinstance(value, (list, tuple, set)):
        return [sympy.latex(value)]
    forms = []
    if "matrix" in like:
        try:
            forms.append(sympy.latex(sympy.Matrix(list(value))))
        except (TypeError, ValueError):
            pass
    elif isinstance(value, set) or not _is_bracketed(like):
        forms.append(", ".join(sympy.latex(item) for item in value))
    elif isinstance(value, tuple):
        forms.append(f"({', '.join(sympy.latex(item) for item in value)})")
    return forms


def _is_bracketed(text: str) -> bool:
    text = _plain(text)
    return text[:1] in _BRACKETS and text[-1:] in ")]}"


def _value(node: ast.expr) -> Any:
    """The sympy value of a Python expression made of numbers, names, operators and the functions listed above."""
    match node:
        case ast.Constant(value=bool() | str() | bytes() | None):
            raise _NotMathematicsError
        case ast.Constant(value=complex() as value):
            return sympy.sympify(value)
        case ast.Constant(value=int() | float() as value):
            return sympy.Integer(value) if isinstance(value, int) else sympy.Float(repr(value))
        case ast.Name(id=name):
            return _CONSTANTS[name] if name in _CONSTANTS else sympy.Symbol(name)
        case ast.Attribute(value=ast.Name(id="math" | "np" | "numpy" | "sympy" | "sp"), attr=name) if (
            name in _CONSTANTS
        ):
            return _CONSTANTS[name]
        case ast.UnaryOp(op=ast.USub(), operand=operand):
            return -_value(operand)
        case ast.UnaryOp(op=ast.UAdd(), operand=operand):
            return _value(operand)
        case ast.BinOp(left=left, op=operator, right=right):
            return _combined(_value(left), operator, _value(right))
        case ast.List(elts=items):
            return [_value(item) for item in items]
        case ast.Tuple(elts=items):
            return tuple(_value(item) for item in items)
        case ast.Set(elts=items):
            return {_value(item) for item in items}
        case ast.Call(func=function, args=arguments, keywords=[]):
            return _called(function, [_value(argument) for argument in arguments])
    raise _NotMathematicsError


def _combined(left: Any, operator: ast.operator, right: Any) -> Any:
    match operator:
        case ast.Add():
            return left + right
        case ast.Sub():
            return left - right
        case ast.Mult():
            return left * right
        case ast.Div():
            return left / right
        case ast.Pow():
            if isinstance(right, sympy.Number) and abs(right) > _LARGEST_EXPONENT:
                return sympy.Pow(left, right, evaluate=False)
            return left**right
    raise _NotMathematicsError


def _called(function: ast.expr, arguments: list[Any]) -> Any:
    name = (
        function.id if isinstance(function, ast.Name) else function.attr if isinstance(function, ast.Attribute) else ""
    )
    if isinstance(function, ast.Attribute) and not isinstance(function.value, ast.Name):
        raise _NotMathematicsError
    if name == "array" and len(arguments) == 1:
        return arguments[0]
    if name in ("factorial", "binomial") and any(abs(argument) > _LARGEST_EXPONENT for argument in arguments):
        raise _NotMathematicsError
    if name not in _FUNCTIONS:
        raise _NotMathematicsError
    return _FUNCTIONS[name](*arguments)
