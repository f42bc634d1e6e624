"""Marks and words that pictures of a job in a terminal are made of: bars, sparklines, durations, counts.

Everything is one line of text of a known width; `ascii_only` is for terminals that show nothing else.

Example::

    bar(0.4, 20); sparkline([3.2, 0.5, 0.1], 20); duration(4000)      # ..., ..., "67 min"
"""

from __future__ import annotations

import math
from collections.abc import Sequence

BLOCKS = "▁▂▃▄▅▆▇█"
ASCII_BLOCKS = "_.-=+*#@"
DECADES = 10.0
"""Curves that span more than this ratio are drawn by their logarithm: a loss falls by orders of magnitude."""


def bar(share: float, width: int, *, ascii_only: bool = False) -> tuple[str, str]:
    """The full and the empty part of a bar; together `width` columns."""
    share = min(1.0, max(0.0, share)) if math.isfinite(share) else 0.0
    full = int(share * width) if share < 1 else width
    on, off = ("#", "-") if ascii_only else ("━", "─")
    return on * full, off * (width - full)


def sparkline(points: Sequence[float], width: int, *, ascii_only: bool = False) -> str:
    """`points` as columns of growing height, at most `width` of them: where there are more, each is a mean of some."""
    blocks = ASCII_BLOCKS if ascii_only else BLOCKS
    points = [point for point in points if math.isfinite(point)]
    if not points or width < 1:
        return ""
    count = min(width, len(points))
    edges = [round(i * len(points) / count) for i in range(count + 1)]
    columns = [sum(points[a:b]) / (b - a) for a, b in zip(edges[:-1], edges[1:], strict=True)]
    low, high = min(columns), max(columns)
    if low > 0 and high / low > DECADES:
        columns = [math.log(column) for column in columns]
        low, high = math.log(low), math.log(high)
    span = high - low
    return "".join(blocks[int((column - low) / span * (len(blocks) - 1) + 0.5) if span else 0] for column in columns)


def duration(seconds: float) -> str:
    """About: 45 s, 12 min, 3.4 h, 2.1 days."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    if seconds < 5400:
        return f"{seconds / 60:.0f} min"
    return f"{seconds / 3600:.1f} h" if seconds < 48 * 3600 else f"{seconds / 86400:.1f} days"


def clock(seconds: float) -> str:
    """A stopwatch: 04:32, 1:04:32, 2d 01:04:32."""
    minutes, second = divmod(max(0, int(seconds)), 60)
    hours, minute = divmod(minutes, 60)
    if not hours:
        return f"{minute:02d}:{second:02d}"
    days, hour = divmod(hours, 24)
    return f"{days}d {hour:02d}:{minute:02d}:{second:02d}" if days else f"{hour}:{minute:02d}:{second:02d}"


def count(number: float) -> str:
    """Thousands are set apart from 10,000 on."""
    return f"{number:.0f}" if abs(number) < 10_000 else f"{number:,.0f}"


def per_cent(share: float) -> str:
    """Whole where it is exact enough: 93%, 97.6%, 100%."""
    if not math.isfinite(share):
        return "?"
    return f"{100 * share:.0f}%" if share in (0.0, 1.0) else f"{100 * share:.1f}%"


def loss_of(value: float) -> str:
    if not math.isfinite(value):
        return "not finite"
    return f"{value:.3f}" if abs(value) >= 0.001 or value == 0 else f"{value:.1e}"
