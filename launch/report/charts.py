"""Line charts and bars as inline SVG in HTML: crisp at every width, in the colours of the page, without a script.

A chart is as wide as its place. Labels are set in the page's own size and never stretched: they are SVG text placed by
percentages, and only the curves lie in a stretched view box, with strokes that do not scale
(https://www.w3.org/TR/SVG2/coords.html#VectorEffects). Colours are classes `s0` ... `s7`, which the page's style
defines for light and dark. Pointing at a line chart shows the values there, by plain `<title>` elements.

Example::

    line_chart([Line("loss", [(0.0, 3.2), (1.0, 0.4)])], title="Loss", x="million tokens", y="nats a token", log=True)
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from launch.report.markup import Markup, tag, void
from launch.report.wording import duration, number

COLOURS = 8
_BOX = 1000
"""Units of the stretched view box, each way."""
_HOVERED = 60
"""Places of a line chart that tell their values, at most."""


@dataclass(frozen=True, slots=True)
class Line:
    """One curve."""

    name: str
    points: Sequence[tuple[float, float]]
    colour: int | str = 0
    """Of the palette by number, or a class of the page's style."""
    strong: bool = False
    dots: bool = False
    """Points are marked: for few of them."""


@dataclass(frozen=True, slots=True)
class Part:
    """A piece of a stacked bar."""

    name: str
    value: float
    colour: int | str
    note: str = ""


def line_chart(
    lines: Sequence[Line], *, title: str, x: str, y: str, log: bool = False, top: float | None = None,
    bottom: float | None = None, show: Callable[[float], str] | None = None, note: str = "",
) -> Markup:  # fmt: skip
    """`x`, `y`: what the axes show, with units; `top`, `bottom`: ends of the y axis where they are fixed. "" when no
    line has two points."""
    show = show or number
    lines = [line for line in lines if len(line.points) > 1 or (line.dots and line.points)]
    if log:
        lines = [Line(one.name, [p for p in one.points if p[1] > 0], one.colour, one.strong, one.dots) for one in lines]
        lines = [line for line in lines if len(line.points) > 1]
    if not lines:
        return Markup("")
    xs = [px for line in lines for px, _ in line.points]
    ys = [py for line in lines for _, py in line.points]
    left, right = min(xs), max(xs)
    right = right if right > left else left + 1
    x_ticks = [tick for tick in nice_ticks(left, right, 6) if left <= tick <= right]
    if log:
        low, high, y_ticks = _log_axis(min(ys), max(ys))
        scale: Callable[[float], float] = lambda v: (math.log10(v) - low) / (high - low)  # noqa: E731
    else:
        y_ticks = nice_ticks(min(ys) if bottom is None else bottom, max(ys) if top is None else top, 5)
        low = y_ticks[0] if bottom is None else bottom
        high = y_ticks[-1] if top is None else top
        high = high if high > low else low + 1
        scale = lambda v: (v - low) / (high - low)  # noqa: E731
    at_x: Callable[[float], float] = lambda v: (v - left) / (right - left)  # noqa: E731
    at_y: Callable[[float], float] = lambda v: 1 - min(1.0, max(0.0, scale(v)))  # noqa: E731

    grid = [
        void("line", class_="grid", x1="0", x2="100%", y1=percent_of(at_y(tick)), y2=percent_of(at_y(tick)))
        for tick in y_ticks
    ]
    curves = [
        void(
            "polyline",
            class_=f"line {colour_class(line.colour)}{' strong' if line.strong else ''}",
            points=_points(line, at_x, at_y),
        )
        for line in lines
    ]
    dots = [
        void(
            "circle", class_=f"dot {colour_class(line.colour)}", cx=percent_of(at_x(px)), cy=percent_of(at_y(py)), r="3"
        )
        for line in lines
        if line.dots
        for px, py in line.points
    ]
    stretched = tag(
        "svg", *curves, viewBox=f"0 0 {_BOX} {_BOX}", preserveAspectRatio="none", width="100%", height="100%",
        class_="data",
    )  # fmt: skip
    plot = tag(
        "svg", *grid, stretched, *dots, *_hovers(lines, at_x, x, show), class_="plot", role="img",
        aria_label=_in_words(lines, title, x, y, show),
    )  # fmt: skip
    marked = [(number(tick) if log else show(tick), percent_of(at_y(tick))) for tick in y_ticks]
    y_axis = tag(
        "svg",
        *(tag("text", text, x="100%", y=at, dy=".32em") for text, at in marked),
        class_="yaxis",
        aria_hidden="true",
    )
    x_axis = tag(
        "svg",
        *(tag("text", number(tick), x=percent_of(at_x(tick)), y="1em", class_=anchor(at_x(tick))) for tick in x_ticks),
        class_="xaxis",
        aria_hidden="true",
    )
    named = legend([(line.name, line.colour) for line in lines]) if len(lines) > 1 else ""
    return tag(
        "figure",
        tag("figcaption", tag("b", title), tag("span", y, class_="unit")),
        named,
        tag("div", y_axis, plot, x_axis, tag("div", x, class_="xlabel"), class_="frame"),
        tag("p", note, class_="note") if note else "",
        class_="chart",
    )


def bar(share: float, colour: int | str = 0, *, label: str = "") -> Markup:
    """A share in [0, 1] as a bar, for a cell of a table."""
    width = percent_of(min(1.0, max(0.0, share)))
    return tag(
        "svg",
        void("rect", class_="ground", width="100%", height="100%", rx="3"),
        void("rect", class_=f"fill {colour_class(colour)}", width=width, height="100%", rx="3"),
        class_="bar",
        role="img",
        aria_label=label or f"{100 * share:.0f}%",
    )


def stacked_bar(parts: Sequence[Part], *, title: str, unit: str) -> Markup:
    """Parts of a whole, in their order, with a legend that tells numbers and shares."""
    total = sum(part.value for part in parts)
    if total <= 0:
        return Markup("")
    pieces: list[Markup] = []
    start = 0.0
    for part in parts:
        share = part.value / total
        pieces.append(
            tag(
                "g",
                tag("title", f"{part.name}: {part.value:,.0f} {unit} ({100 * share:.1f}%)"),
                void(
                    "rect",
                    class_=f"fill {colour_class(part.colour)}",
                    x=percent_of(start),
                    width=percent_of(share),
                    height="100%",
                ),
            )
        )
        start += share
    legend = tag(
        "ul",
        *(
            tag(
                "li",
                _swatch(part.colour),
                tag("span", part.name),
                tag("b", f"{100 * part.value / total:.1f}%"),
                tag("i", f"{part.value:,.0f}{' ' + part.note if part.note else ''}"),
            )
            for part in parts
            if part.value
        ),
        class_="parts",
    )
    whole = tag("svg", *pieces, class_="stack", role="img", aria_label=f"{title}, {total:,.0f} {unit}")
    caption = tag("figcaption", tag("b", title), tag("span", f"{total:,.0f} {unit}", class_="unit"))
    return tag("figure", caption, whole, legend, class_="chart")


def span_chart(rows: Sequence[tuple[str, float, float, int | str]], *, title: str) -> Markup:
    """What lasted from when to when: (name, start in s, end in s, colour) on one axis that begins at 0."""
    last_s = max((end for _, _, end, _ in rows), default=0.0)
    each_s, x = (3600.0, "h") if last_s > 3 * 3600 else (60.0, "min") if last_s > 90 else (1.0, "s")
    rows = [(name, start / each_s, end / each_s, colour) for name, start, end, colour in rows]
    whole = max((end for _, _, end, _ in rows), default=0.0)
    if whole <= 0:
        return Markup("")
    lines = [
        tag(
            "div",
            tag("span", name, class_="who"),
            tag(
                "svg",
                tag(
                    "g",
                    tag("title", f"{name}: {number(start)} to {number(end)} {x}"),
                    void("rect", class_="ground", width="100%", height="100%", rx="3"),
                    void(
                        "rect", class_=f"fill {colour_class(colour)}", x=percent_of(start / whole),
                        width=percent_of(max(end - start, whole / 400) / whole), height="100%", rx="3",
                    ),
                ),
                class_="bar",
                role="img",
                aria_label=f"from {number(start)} to {number(end)} {x}",
            ),
            tag("span", duration((end - start) * each_s), class_="value"),
            class_="rate",
        )
        for name, start, end, colour in rows
    ]  # fmt: skip
    ticks = [tick for tick in nice_ticks(0.0, whole, 6) if tick <= whole]
    scale = tag(
        "svg",
        *(
            tag("text", number(tick), x=percent_of(tick / whole), y="1em", class_=anchor(tick / whole))
            for tick in ticks
        ),
        class_="scale",
        aria_hidden="true",
    )
    axis = tag("div", tag("span", class_="who"), scale, tag("span", x, class_="value"), class_="rate axis")
    return tag(
        "figure", tag("figcaption", tag("b", title)), tag("div", *lines, axis, class_="spans"), class_="chart",
    )  # fmt: skip


def nice_ticks(low: float, high: float, count: int) -> list[float]:
    """Round values about `count` in number, whose first and last enclose [low, high]."""
    if not high > low:
        high = low + 1
    raw = (high - low) / max(count, 1)
    size = 10 ** math.floor(math.log10(raw))
    step = next(factor * size for factor in (1, 2, 2.5, 5, 10) if factor * size >= raw * 0.999)
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [round(i * step, 12) for i in range(first, last + 1)]


def _log_axis(low: float, high: float) -> tuple[float, float, list[float]]:
    """Exponents of both ends, and the powers of ten to be marked: eight at most."""
    first, last = math.floor(math.log10(low)), math.ceil(math.log10(high))
    last = last if last > first else first + 1
    step = max(1, math.ceil((last - first) / 7))
    return first, last, [10.0**power for power in range(first, last + 1, step)]


def _points(line: Line, at_x: Callable[[float], float], at_y: Callable[[float], float]) -> str:
    return " ".join(f"{_BOX * at_x(px):.4g},{_BOX * at_y(py):.4g}" for px, py in line.points)


def _hovers(
    lines: Sequence[Line], at_x: Callable[[float], float], x: str, show: Callable[[float], str]
) -> list[Markup]:
    """Invisible columns; each tells the values of all lines that have a point in it."""
    columns: dict[int, dict[str, tuple[float, float]]] = {}
    count = min(_HOVERED, max(len(line.points) for line in lines))
    for line in lines:
        for px, py in line.points:
            columns.setdefault(min(count - 1, int(at_x(px) * count)), {})[line.name] = (px, py)
    made = []
    for at, values in sorted(columns.items()):
        told = "\n".join(f"{name}: {show(py)}" for name, (_, py) in values.items())
        where = next(iter(values.values()))[0]
        middle = percent_of(at_x(where))
        made.append(
            tag(
                "g",
                tag("title", f"{number(where)} {x}\n{told}"),
                void("rect", x=percent_of(at / count), width=percent_of(1 / count), height="100%"),
                void("line", x1=middle, x2=middle, y1="0", y2="100%"),
                class_="hit",
            )
        )
    return made


def legend(names: Sequence[tuple[str, int | str]]) -> Markup:
    """Names with their colours."""
    return tag("ul", *(tag("li", _swatch(colour), name) for name, colour in names), class_="legend")


def _swatch(colour: int | str) -> Markup:
    return tag("i", class_=f"swatch {colour_class(colour)}", aria_hidden="true")


def _in_words(lines: Sequence[Line], title: str, x: str, y: str, show: Callable[[float], str]) -> str:
    told = ", ".join(f"{line.name} from {show(line.points[0][1])} to {show(line.points[-1][1])}" for line in lines)
    return f"{title}: {y} over {x}. {told}"


def colour_class(colour: int | str) -> str:
    """Of the page's style."""
    return f"s{colour % COLOURS}" if isinstance(colour, int) else colour


def percent_of(share: float) -> str:
    """Of a length, for SVG."""
    return f"{100 * share:.4g}%"


def anchor(share: float) -> str | None:
    """Class of a label at this place of an axis: those at the ends do not stand out."""
    return "first" if share < 0.03 else "last" if share > 0.97 else None
