"""Success rates as dots with 95% whiskers on one scale, drawn as `launch.report.charts` draws.

Example::

    rate_chart([("arithmetic", [Rate("student", Score(0.9, 0.85, 0.94, 200), 0)])])
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from launch.evaluation.intervals import Score
from launch.report.charts import anchor, colour_class, percent_of
from launch.report.markup import Markup, tag, void
from launch.report.wording import percent


@dataclass(frozen=True, slots=True)
class Rate:
    """A success rate with its interval."""

    name: str
    score: Score
    colour: int = 0


def rate_chart(groups: Sequence[tuple[str, Sequence[Rate]]], *, unit: str = "tasks") -> Markup:
    """Success rates as dots with 95% whiskers on one scale from 0 to 100%, in named groups."""
    names = list(dict.fromkeys((rate.name, rate.colour) for _, rates in groups for rate in rates))
    rows: list[Markup] = []
    for label, rates in groups:
        lines = [
            tag(
                "div",
                tag("span", rate.name if len(names) > 1 else "", class_="who") if len(names) > 1 else "",
                _whisker(rate, label),
                tag("span", percent(rate.score), " ", tag("i", f"n={rate.score.n:,}"), class_="value"),
                class_="rate" if len(names) > 1 else "rate alone",
            )
            for rate in rates
        ]
        rows.append(tag("div", tag("div", label, class_="label"), tag("div", *lines, class_="lines"), class_="group"))
    ends = tag(
        "svg",
        *(
            tag("text", f"{tick}", x=f"{tick}%", y="1em", class_=anchor(tick / 100))
            for tick in (0, 25, 50, 75, 100)
        ),
        class_="scale",
        aria_hidden="true",
    )  # fmt: skip
    axis_line = tag(
        "div",
        tag("span", class_="who") if len(names) > 1 else "",
        ends,
        tag("span", f"% of {unit}", class_="value"),
        class_="rate axis" if len(names) > 1 else "rate alone axis",
    )
    rows.append(tag("div", tag("div", class_="label"), tag("div", axis_line, class_="lines"), class_="group"))
    return tag("div", *rows, class_="rates")


def interval(score: Score, colour: int = 0) -> Markup:
    """A score's interval alone, small, for a cell of a table."""
    return tag(
        "svg",
        void("line", class_="grid", x1="0", x2="100%", y1="50%", y2="50%"),
        *_marks(score, colour, radius="3"),
        class_="spark",
        aria_hidden="true",
    )


def _whisker(rate: Rate, label: str) -> Markup:
    ticks = [
        void("line", class_="grid", x1=f"{tick}%", x2=f"{tick}%", y1="0", y2="100%") for tick in (0, 25, 50, 75, 100)
    ]
    told = f"{rate.name}, {label}: {percent(rate.score)}, n={rate.score.n:,}"
    return tag(
        "svg",
        *ticks,
        tag("g", tag("title", told), *_marks(rate.score, rate.colour, radius="4.5")),
        class_="track",
        role="img",
        aria_label=told,
    )


def _marks(score: Score, colour: int, *, radius: str) -> list[Markup]:
    return [
        void(
            "line",
            class_=f"whisker {colour_class(colour)}",
            x1=percent_of(score.low),
            x2=percent_of(score.high),
            y1="50%",
            y2="50%",
        ),
        void("circle", class_=f"dot {colour_class(colour)}", cx=percent_of(score.mean), cy="50%", r=radius),
    ]  # fmt: skip
