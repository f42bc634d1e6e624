r"""What is certain of two mathematical answers without symbolic algebra: the same text, or two plain numbers.

It decides most pairs in microseconds, in the process that asks, and says None for all else, which `grading_math.py`
then hands to math-verify in the sandbox. Nothing is evaluated, and every regular expression here is linear in its text.

Example::

    plain_verdict("1,234", "$1234.0$")          # True: both are numbers
    plain_verdict("12", r"\boxed{13}")          # False: likewise
    plain_verdict(r"\frac{1}{2}", "0.5")        # None: for the algebra to say
"""

import re
from fractions import Fraction

_RELATIVE_TOLERANCE = Fraction(1, 10**6)
_LONGEST_NUMBER_CHARS = 400

_TEXT = re.compile(r"\\(?:text|textbf|textit|textrm|mathrm|mathbf|mbox|operatorname) ?\{([^{}]*)\}")
_SPACING = re.compile(r"\\[!,;: ]|\\q?quad\b|~|\s+")
_SPACES = re.compile(r"\s+")
_DROPPED = re.compile(r"\\left\b|\\right\b|\\displaystyle\b|\^ ?\{? ?\\circ ?\}?|\\\$|\\(?=[%{}])")
_NUMBER = re.compile(r"[-+]?(?:\d{1,3}(?:,\d{3})+|\d+)?(?:\.\d*)?(?:[eE][-+]?\d{1,3})?")
_FRACTION = re.compile(r"([-+]?)(?:(\d{1,40})(?:/(\d{1,40}))?|\\frac\{(\d{1,40})\}\{(\d{1,40})\})")
_THOUSANDS = re.compile(r"(?<=\d)(?:\\[!,;: ]|~|\s)+(?=\d{3}(?!\d))")
_DIGITS_APART = re.compile(r"(?<=\d)(?:\\[!,;: ]|~|\s)+(?=\d)")
_APART = "\N{OPEN BOX}"
"""Stands for the space of `1 1/2`, which is not 11/2."""
_DECIMAL_COMMA = re.compile(r"-?\d+,\d+")


def plain_verdict(gold: str, prediction: str) -> bool | None:
    """Whether `prediction` equals `gold`; None where that takes algebra to say."""
    wanted, got = boxed_or_whole(gold), boxed_or_whole(prediction)
    if not got or not wanted:
        return False
    if _same_text(wanted, got):
        return True
    equal = _same_value(wanted, got)
    if equal is not False or _DECIMAL_COMMA.fullmatch(wanted) or _DECIMAL_COMMA.fullmatch(got):
        return equal or None
    if got in prediction[:-1].strip(" $") and len(got) < len(prediction.strip(" $.")):
        return None  # the last box of a longer text: what the text calls its final answer may be another
    return False


def number(text: str) -> Fraction | None:
    """The value of a plain number such as `-1,234.5`, `6.72e-05` or `\\$3`, exactly; None for all else."""
    if len(text) > 2 * _LONGEST_NUMBER_CHARS:
        return None
    cleaned = text.strip().removeprefix("\\$").removeprefix("$").removesuffix("%").removesuffix("\\").strip()
    cleaned = cleaned.replace("\\!", "").replace("{,}", ",").replace("\N{MINUS SIGN}", "-")
    if not cleaned.isascii() or not any(map(str.isdigit, cleaned)) or len(cleaned) > _LONGEST_NUMBER_CHARS:
        return None
    return Fraction(cleaned.replace(",", "")) if _NUMBER.fullmatch(cleaned) else None


def boxed_or_whole(text: str) -> str:
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


def without_text_commands(text: str, instead: str = r"\1") -> str:
    r"""`\text{cm}` and its like as their content, or as what is given `instead`."""
    return _TEXT.sub(instead, _SPACES.sub(" ", text))


def bare(text: str) -> str:
    """The text without what does not change its meaning: spacing, bracket sizes, degrees, dollars, text commands."""
    text = _DIGITS_APART.sub(_APART, _THOUSANDS.sub("", without_text_commands(text)))
    text = _SPACING.sub("", _DROPPED.sub("", text))
    return text.replace("dfrac", "frac").replace("tfrac", "frac")


def _same_text(wanted: str, got: str) -> bool:
    bare_wanted, bare_got = bare(wanted), bare(got)
    is_words = _TEXT.search(_SPACES.sub(" ", wanted)) or not re.search(r"[\d\\=+*/^(]", bare_wanted)
    if is_words:  # capitals do not count, nor brackets around a choice
        bare_wanted, bare_got = (re.sub(r"^\((\w)\)$", r"\1", text.casefold()) for text in (bare_wanted, bare_got))
    return bare_wanted == bare_got != ""


def _same_value(wanted: str, got: str) -> bool | None:
    """Of two plain numbers, or of two that are integers or fractions of integers; None for all else."""
    left, right = number(wanted), number(got)
    if left is None or right is None:  # a decimal may be a rounded fraction, which takes rules: not here
        left, right = _fraction(wanted), _fraction(got)
        return None if left is None or right is None else left == right
    is_share = "%" in wanted and "%" not in got  # 73% is 0.73 as well
    return _numbers_equal(left, right) or (is_share and _numbers_equal(left, 100 * right))


def _numbers_equal(left: Fraction, right: Fraction) -> bool:
    if left.denominator == right.denominator == 1:
        return left == right
    return abs(left - right) <= _RELATIVE_TOLERANCE * max(abs(left), abs(right))


def _fraction(text: str) -> Fraction | None:
    if len(text) > _LONGEST_NUMBER_CHARS or not text.isascii():
        return None
    match = _FRACTION.fullmatch(bare(text))
    if match is None:
        return None
    sign, *parts = match.groups()
    top, bottom = [*(int(part) for part in parts if part is not None), 1][:2]
    return Fraction(-top if sign == "-" else top, bottom) if bottom else None
