r"""Would working on a sympy expression take for ever? Known from its shape, before anything is evaluated.

math-verify parses without evaluating; comparing then multiplies out. `10^{10^{10}}`, `(10^6)!` or the 60th power of a
long sum are short to write and too large to work on. The measure is an upper bound, in bits, of the numbers that
evaluation would make; what it does not know (integrals, simplification) is left to the sandbox's limits.

Example::

    is_too_large(sympy.Pow(9, sympy.Pow(9, 9, evaluate=False), evaluate=False))     # True: 1.2 billion bits
    is_too_large(sympy.Pow(2, 2024, evaluate=False))                                # False
"""

import math
from typing import Any

import sympy
from sympy import binomial, factorial

_MOST_BITS = 200_000.0
_MOST_NODES = 600
_MOST_TERMS = 1000
_DEEPEST_POWERS = 6


def is_too_large(expression: Any) -> bool:
    """Whether its value could have more than 60,000 digits, or it has more parts or terms than an answer has."""
    if isinstance(expression, sympy.MatrixBase):
        return expression.rows * expression.cols > _MOST_NODES or any(map(is_too_large, expression.flat()))
    if isinstance(expression, (list, tuple, set)):
        return len(expression) > _MOST_NODES or any(map(is_too_large, expression))
    if not isinstance(expression, sympy.Basic):
        return False
    if sum(1 for _, _ in zip(range(_MOST_NODES + 1), sympy.preorder_traversal(expression), strict=False)) > _MOST_NODES:
        return True
    return _bits(expression, 0) > _MOST_BITS


def settled(expression: Any) -> Any:
    """A sum, product or power that is too large to work on, with those of its parts evaluated that are not."""
    if not is_too_large(expression):
        return expression.doit()
    if isinstance(expression, (sympy.Add, sympy.Mul, sympy.Pow)):
        return expression.func(*map(settled, expression.args), evaluate=False)
    return expression


def _bits(node: Any, powers: int) -> float:
    """An upper bound of log2 of the absolute value; of a fraction, of the larger part. Unknowns count as small."""
    match node:
        case sympy.Rational():
            return max(1, node.p.bit_length(), node.q.bit_length())
        case sympy.Float():
            return max(53.0, abs(node._mpf_[2] + node._mpf_[3]))
        case sympy.Pow(base=base, exp=exponent):
            return _power_bits(base, exponent, powers + 1)
        case factorial(args=(of,)):
            largest = _largest(of, powers)
            return largest * math.log2(largest + 2)
        case binomial(args=(of, chosen)):
            parts = [_largest(chosen, powers)]
            if isinstance(of, sympy.Integer) and isinstance(chosen, sympy.Integer):
                parts.append(abs(int(of) - int(chosen)) * 1.0)
            return min(parts) * _bits(of, powers)
        case sympy.Sum() | sympy.Product():
            terms = math.prod(_terms(limit) for limit in node.args[1:])
            return terms * _bits(node.args[0], powers) if terms <= _MOST_TERMS else math.inf
        case sympy.Integral():
            return math.inf if len(node.args) > 3 else max(_bits(each, powers) for each in node.args)
        case sympy.Mul():
            return sum(_bits(each, powers) for each in node.args)
    if not getattr(node, "args", ()):
        return 2.0
    return max(_bits(each, powers) for each in node.args) + math.log2(len(node.args))


def _power_bits(base: Any, exponent: Any, powers: int) -> float:
    if powers > _DEEPEST_POWERS:
        return math.inf
    if getattr(exponent, "free_symbols", None):
        return _bits(base, powers) + _bits(exponent, powers)
    times = _largest(exponent, powers)
    if isinstance(base, sympy.Add) and times > 1:
        terms = len(base.args)
        if times > _MOST_TERMS or math.comb(int(times) + terms - 1, terms - 1) > _MOST_TERMS:
            return math.inf
    return max(1.0, times) * _bits(base, powers)


def _largest(node: Any, powers: int) -> float:
    """An upper bound of the absolute value."""
    if isinstance(node, sympy.Integer):
        return float(min(abs(int(node)), 1 << 64))
    if isinstance(node, (sympy.Rational, sympy.Float)):
        bits = node.p.bit_length() - node.q.bit_length() + 1 if isinstance(node, sympy.Rational) else 0
        return 2.0 ** min(64, bits) if isinstance(node, sympy.Rational) else min(2.0**64, abs(float(node)))
    bits = _bits(node, powers)
    return 2.0**bits if bits <= 64 else math.inf


def _terms(limit: Any) -> float:
    """How many terms a limit of a sum has; one without end is summed as a whole, or not at all."""
    if len(limit) != 3 or any(bound.is_infinite for bound in limit[1:]):
        return 1.0
    span = limit[2] - limit[1]
    return abs(float(span)) + 1 if span.is_number and not span.free_symbols and span.is_Rational else 1.0
