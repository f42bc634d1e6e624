r"""Are two mathematical answers equal? The program that `grading_math.py` runs inside the sandbox, and nowhere else.

It is asked where `grading_plain.py` is not certain. An answer comes as LaTeX, as a whole solution with a box, as a
Python value (`3*sqrt(2)`, `[1, -1]`, which is what agents that write code give), or in prose. Each reading that a text
allows is compared with each of the other's by math-verify (https://github.com/huggingface/Math-Verify).
Python syntax is read by `ast` and built from a short list of functions: nothing a model wrote is evaluated.
Readings whose value nobody could write out (`grading_size.py`) are equal only when they are built alike.

Example::

    verdict(r"\frac{1}{2}", "0.5")                    # True
    verdict(r"3 \sqrt{2}", "The area is 3*sqrt(2).")  # False: prose is searched for LaTeX and numbers only
    verdict("1,-1", "[-1, 1]")                        # True: the gold answer is a list without an order
"""

import ast
import functools
import logging
import re
from typing import Any

import sympy
from math_verify import ExprExtractionConfig, LatexExtractionConfig, parse, verify

from envs.grading_plain import bare, boxed_or_whole, number, without_text_commands
from envs.grading_size import is_too_large, settled

logging.disable(logging.CRITICAL)  # math-verify tells of each text that it cannot parse
sympy.binomial = functools.partial(sympy.binomial, evaluate=False)  # like all else that math-verify parses

_DEEPEST_NESTING = 10
"""Of brackets of any kind on one line; the parser's time doubles with each."""
_LONGEST_EXPRESSION_CHARS = 2000
_LARGEST_ARGUMENT = 4000
_MOST_ARGUMENTS = 16

_MARKUP = re.compile(r"\$|\\boxed|\\fbox|\\\(|\\\[")
_CALL = re.compile(r"[A-Za-z_]\w*\(")
_WORD = re.compile(r"(?<![\\A-Za-z])[A-Za-z]{2,}")
_CURRENCIES = "$\u20ac\u00a3\u00a5\u20b9"
_QUANTITY = re.compile(  # 1,000.99m², 1 000, 3.5 kg, 1,22
    rf"[{_CURRENCIES}]? ?-?\d*(?:[ ,]\d+)*(?:\.\d+)?\s*[A-Za-z%/\u00b0\u00b2\u00b3\u00b5{_CURRENCIES}]{{0,12}}"
)
_LATEX_ONLY = (LatexExtractionConfig(),)
_ANY = (*_LATEX_ONLY, ExprExtractionConfig())
_FRAC_WITHOUT_BRACES = re.compile(r"\\([dt]?frac)\s*(\d|\\[a-z]+)\s*(\d|\\pi\b)")
_BRACKETS = {"(": ")", "[": "]", "{": "}"}
_ROOT_SIGN = re.compile("\N{SQUARE ROOT} ?([0-9.]+|[A-Za-z]|\\\\([^()]*\\\\))")
_SUPERSCRIPTS = re.compile("[\u207b\u2070\u00b9\u00b2\u00b3\u2074-\u2079]+")
_LOWERED = str.maketrans("\u207b\u2070\u00b9\u00b2\u00b3\u2074\u2075\u2076\u2077\u2078\u2079", "-0123456789")
_SIGNS = str.maketrans(
    {
        "\N{MULTIPLICATION SIGN}": r" \cdot ", "\N{MIDDLE DOT}": r" \cdot ", "\N{DOT OPERATOR}": r" \cdot ",
        "\N{DIVISION SIGN}": "/", "\N{MINUS SIGN}": "-", "\N{INFINITY}": r" \infty ", "\N{UNION}": r" \cup ",
        "\N{LESS-THAN OR EQUAL TO}": r" \le ", "\N{GREATER-THAN OR EQUAL TO}": r" \ge ",
        "\N{NOT EQUAL TO}": r" \ne ", "\N{ELEMENT OF}": r" \in ", "\N{DEGREE SIGN}": "",
    }
)  # fmt: skip
_MIXED_NUMBER = re.compile(r"(?<![\d./^])(\d{1,9}) (\d{1,9})/(\d{1,9})(?![\d.])")
_ENVIRONMENT = re.compile(r"\\(?:begin|end)\{\w*\}")
_NAME_OR_FACTOR = re.compile(r"([A-Za-z_]\w*)|(\d++(?:\.\d*+)?+(?:[eE][-+]?\d++)?+j?+|\)) ?(?=[A-Za-z(])")

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
    wanted, got = boxed_or_whole(gold), boxed_or_whole(prediction)
    if max(_nesting(gold), _nesting(prediction)) > _DEEPEST_NESTING:
        return False
    golds, predictions = _readings(gold, wanted, wanted), _readings(prediction, got, wanted)
    large_golds, large_predictions = ([one for one in each if is_too_large(one)] for each in (golds, predictions))
    if any(settled(one) == settled(other) for one in large_golds for other in large_predictions):
        return True
    golds = [one for one in golds if one not in large_golds]
    predictions = [one for one in predictions if one not in large_predictions]
    return verify(golds, predictions, timeout_seconds=0, allow_set_relation_comp=True)


def _nesting(text: str) -> int:
    depth = deepest = 0
    for character in text:
        if character == "\n":
            depth = 0
        depth += (character in "({[") - (character in ")}]")
        deepest = max(deepest, depth)
    return deepest


@functools.lru_cache(maxsize=256)
def _readings(text: str, core: str, like: str) -> list[Any]:
    """What `text` may mean. `core`: its boxed part; `like`: the gold answer, whose form a Python value is read in."""
    found: list[Any] = []
    unmarked = not _MARKUP.search(text.rstrip("$")) and len(core) <= _LONGEST_EXPRESSION_CHARS
    if not unmarked or _is_prose(core) or _has_words(core) or _reads_as_number(core):
        # LaTeX in a box that cannot be read is not searched for numbers: it would be equal to its last one.
        boxed_latex = core != text and "\\" in core and "boxed" in text
        found += parse(_with_imaginary_unit(text), _LATEX_ONLY if boxed_latex else _ANY, parsing_timeout=0)
    if (value := number(core)) is not None:
        found.append(sympy.Integer(int(value)) if value.denominator == 1 else sympy.Float(float(value)))
    elif len(core) <= _LONGEST_EXPRESSION_CHARS and not _is_prose(core):
        found += parse(f"${_cleaned(core)}$", _LATEX_ONLY, parsing_timeout=0)
        for form in _python_forms(core, like):
            if _nesting(form) <= _DEEPEST_NESTING:
                found += parse(f"${form}$", _LATEX_ONLY, parsing_timeout=0)
    return [reading for place, reading in enumerate(found) if reading not in found[:place]]


def _cleaned(core: str) -> str:
    core = _FRAC_WITHOUT_BRACES.sub(r"\\\1{\2}{\3}", core)
    cleaned = _with_latex_signs(core.replace("\\$", "").replace("$", "").strip())
    cleaned = _MIXED_NUMBER.sub(r"\1\\frac{\2}{\3}", _with_imaginary_unit(cleaned).rstrip("."))
    return re.sub(r"(?<=[\])])\s*U\s*(?=[\[(])", r" \\cup ", cleaned)


def _with_latex_signs(text: str) -> str:
    """Signs that are characters of their own, as LaTeX: 2√3, x², 5·10³, (-∞, 2] ∪ {3}."""
    if text.isascii():
        return text
    text = _ROOT_SIGN.sub(lambda match: f"\\sqrt{{{match[1].strip('()')}}}", text)
    text = _SUPERSCRIPTS.sub(lambda match: f"^{{{match[0].translate(_LOWERED)}}}", text)
    return text.translate(_SIGNS)


def _with_imaginary_unit(text: str) -> str:
    """math-verify takes the i of `2i` for a real unknown, that of `2 i` not."""
    return re.sub(r"(?<=\d)i(?![A-Za-z])", " i", text)


def _is_prose(text: str) -> bool:
    words = [word for word in _WORD.findall(without_text_commands(text, " ")) if word not in _KNOWN_WORDS]
    return len(words) >= 2 and "\\" not in text


def _has_words(text: str) -> bool:
    """`Answer: 10` as well, which is too short for prose; not a function's name."""
    text = _ENVIRONMENT.sub(" ", text)
    return not _CALL.search(text) and any(len(word) > 3 and word not in _KNOWN_WORDS for word in _WORD.findall(text))


def _reads_as_number(text: str) -> bool:
    return bool(_QUANTITY.fullmatch(text)) and any(map(str.isdigit, text))


def _python_forms(text: str, like: str) -> list[str]:
    """LaTeX of a Python value: a list is a matrix where the gold answer is one, a set where it is a bare list."""
    if "\\" in text or "#" in text or len(text) > _LONGEST_EXPRESSION_CHARS:
        return []
    text = text.replace("^", "**").replace("\N{MINUS SIGN}", "-")
    text = _NAME_OR_FACTOR.sub(lambda match: match[1] or f"{match[2]}*", text)  # 3p**2, 12pi
    try:
        node = ast.parse(text, mode="eval").body
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return []
    try:
        if isinstance(node, ast.Compare):
            return []  # LaTeX reads these as well
        value = _value(node)
    except (_NotMathematicsError, TypeError, ValueError, ArithmeticError, AttributeError, RecursionError):
        return []
    if not isinstance(value, (list, tuple, set)):
        return [_latex(value)]
    forms = []
    if "matrix" in like:
        try:
            forms.append(_latex(sympy.Matrix(list(value))))
        except (TypeError, ValueError):
            pass
    elif isinstance(value, set) or not _is_bracketed(like):
        forms.append(", ".join(_latex(item) for item in value))
    elif isinstance(value, tuple):
        forms.append(f"({', '.join(_latex(item) for item in value)})")
    return forms


_latex = functools.partial(sympy.latex, inv_trig_style="full")  # the parser knows \\arctan, not atan


def _is_bracketed(text: str) -> bool:
    text = bare(text)
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
    if is_too_large(left) or is_too_large(right):
        raise _NotMathematicsError
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
            if not isinstance(left, sympy.Expr) or not isinstance(right, sympy.Expr):
                raise _NotMathematicsError
            power = sympy.Pow(left, right, evaluate=False)
            return power if is_too_large(power) else left**right
    raise _NotMathematicsError


def _called(function: ast.expr, arguments: list[Any]) -> Any:
    name = (
        function.id if isinstance(function, ast.Name) else function.attr if isinstance(function, ast.Attribute) else ""
    )
    if isinstance(function, ast.Attribute) and not isinstance(function.value, ast.Name):
        raise _NotMathematicsError
    if name == "array" and len(arguments) == 1:
        return arguments[0]
    if name in ("factorial", "binomial") and any(abs(argument) > _LARGEST_ARGUMENT for argument in arguments):
        raise _NotMathematicsError
    if name not in _FUNCTIONS or len(arguments) > _MOST_ARGUMENTS or any(map(is_too_large, arguments)):
        raise _NotMathematicsError
    return _FUNCTIONS[name](*arguments)
