"""What a report says of faults that the job rode out: a table of its events (`launch.events`).

Example::

    event_section.went_wrong(figures)
"""

from __future__ import annotations

import time
from collections import Counter

from launch.events import NAME as EVENTS
from launch.events import Event, events_of
from launch.report.figures import Figures
from launch.report.markup import Markup, clipped, joined, table, tag
from launch.report.wording import number

TITLE = "What went wrong on the way"
_MOST = 100


def went_wrong(figures: Figures) -> Markup:
    """Empty where nothing did."""
    events = events_of(figures.files.lines(EVENTS))
    counts = Counter(event.what for event in events if not event.returned)
    if not counts:
        return Markup("")
    summary = ", ".join(f"{what} {number(count)}" for what, count in counts.most_common())
    parts: list[object] = [
        tag("h2", TITLE),
        tag("p", f"The job went on after each of these; nothing of the ledger was lost by them. By part: {summary}.",
            class_="intro"),
        table(["when (UTC)", "part", "what happened", "away"], [_row(event) for event in events[:_MOST]]),
    ]  # fmt: skip
    if len(events) > _MOST:
        parts.append(tag("p", f"{number(len(events) - _MOST)} more are in {EVENTS}.", class_="note"))
    return joined(parts)


def _row(event: Event) -> list[object]:
    when = time.strftime("%m-%d %H:%M:%S", time.gmtime(event.unix_s))
    away = "" if event.away_s is None else f"{event.away_s:.1f} s"
    return [when, event.what, clipped(event.words, 300), away]
