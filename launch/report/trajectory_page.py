"""One sample trajectory as HTML: question, each step with thought, highlighted code, observation, candidates and votes,
and how it ended. Every text is a model's or a data set's: clipped, escaped, and never anything but shown.

Example::

    show_trajectory(trajectory, clip=2_000)           # a closed <details>
"""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence
from typing import Any

from envs.base import ObservationKind
from launch.report.markup import ELLIPSIS, Markup, clipped, details, html, joined, tag, visible
from rollout.trajectory import Span, SpanType, Step, Trajectory

_CANDIDATES = 16
_STEPS = 30
_KIND_WORDS = {
    ObservationKind.OK: "",
    ObservationKind.CODE_ERROR: "code error",
    ObservationKind.PARSE_ERROR: "not parsed",
    ObservationKind.LIMIT: "limit",
    ObservationKind.FINAL: "final answer",
}


def show_trajectory(trajectory: Trajectory, *, clip: int = 3_000, opened: bool = False) -> Markup:
    """`clip`: characters of each of its texts."""
    clip_prompt = min(clip, 1_500)
    parts: list[object] = [_text("question", trajectory.task.question, clip, class_="question")]
    if trajectory.user_prompt and trajectory.user_prompt != trajectory.task.question:
        parts.append(details("what stood around the question", _pre(trajectory.user_prompt, clip)))
    system = trajectory.shown_system_prompt or trajectory.system_prompt
    if system:
        parts.append(details("system prompt", _pre(system, clip_prompt)))
    if trajectory.guide:
        parts.append(details("guide that only the teacher saw", _pre(trajectory.guide, clip_prompt)))
    if trajectory.first_thought:
        parts.append(_text("first thought, given", trajectory.first_thought, clip_prompt, class_="thought"))
    parts += [_step(at, step, clip) for at, step in enumerate(trajectory.steps[:_STEPS], 1)]
    if len(trajectory.steps) > _STEPS:
        parts.append(tag("p", f"{len(trajectory.steps) - _STEPS} more steps", class_="note"))
    parts.append(_end(trajectory, clip_prompt))
    return details(_summary(trajectory), tag("div", *parts, class_="episode"), opened=opened, class_="sample")


def highlighted(code: str) -> Markup:
    """Python in colours, by classes of the page's style."""
    from pygments import highlight

    lexer, formatter = _highlighter()
    return Markup(highlight(visible(code), lexer, formatter))


def highlight_style(dark: bool) -> str:
    """CSS of the classes that `highlighted` uses."""
    from pygments.formatters import HtmlFormatter

    styles = HtmlFormatter(style="github-dark" if dark else "default").get_style_defs(".code").splitlines()
    # Only colours and weights of tokens: the ground is the page's own.
    return "\n".join(each for each in styles if each.startswith(".code .") and "linenos" not in each)


@functools.cache
def _highlighter() -> tuple[Any, Any]:
    from pygments.formatters import HtmlFormatter
    from pygments.lexers import PythonLexer

    return PythonLexer(stripnl=False, ensurenl=False), HtmlFormatter(nowrap=True)


def _summary(trajectory: Trajectory) -> Markup:
    failed = trajectory.failure is not None
    verdict = "failed" if failed else "right" if trajectory.success else "wrong"
    sign = "✓" if verdict == "right" else "✗" if verdict == "wrong" else "!"
    facts = [f"{len(trajectory.steps)} step{'s' if len(trajectory.steps) != 1 else ''}"]
    if trajectory.tool_calls:
        facts.append(f"{trajectory.tool_calls} tool call{'s' if trajectory.tool_calls != 1 else ''}")
    facts.append(f"{trajectory.completion_tokens:,} tokens")
    facts.append(f"{trajectory.duration_s:.1f} s")
    return joined(
        [
            tag("span", sign, class_=f"verdict {verdict}", title=verdict),
            tag("span", _shortened(trajectory.task.question, 160), class_="asked"),
            tag("span", ", ".join(facts), class_="facts"),
        ]
    )


def _shortened(text: str, limit: int) -> str:
    words = " ".join(text[: 4 * limit].split())
    return words if len(words) <= limit else words[:limit] + ELLIPSIS


def _step(at: int, step: Step, clip: int) -> Markup:
    facts = [f"{step.completion.completion_tokens:,} tokens"] if step.completion.completion_tokens else []
    facts += [f"model {step.policy_s:.2f} s", f"env {step.env_s:.2f} s"]
    if step.tool_calls:
        facts.append(f"{step.tool_calls} tool call{'s' if step.tool_calls != 1 else ''}")
    if step.completion.finish_reason != "stop":
        facts.append(f"ended by {step.completion.finish_reason}")
    kind = _KIND_WORDS[step.observation_kind]
    bad = step.observation_kind in (ObservationKind.CODE_ERROR, ObservationKind.PARSE_ERROR, ObservationKind.LIMIT)
    seen = "answer" if step.observation_kind is ObservationKind.FINAL else "observation"
    return tag(
        "section",
        tag(
            "header",
            tag("b", f"step {at}"),
            tag("span", kind, class_="kind bad" if bad else "kind") if kind and seen != "answer" else "",
            tag("span", ", ".join(facts), class_="facts"),
        ),
        *_turn(step.completion.text, step.spans, clip),
        _text(seen, step.observation, clip, class_=f"{seen}{' bad' if bad else ''}") if step.observation else "",
        _candidates(step, clip) if step.candidates else "",
        class_="step",
    )


def _turn(text: str, spans: Sequence[Span], clip: int) -> Iterator[Markup]:
    """The assistant's text by its spans: thought as prose, code in colours, format faint."""
    left = clip
    for kind, piece in _pieces(text, spans):
        if left <= 0:
            yield tag("p", f"… ({len(text) - clip:,} more characters)", class_="note")
            return
        shown = clipped(piece, left)
        left -= len(piece)
        if kind in (SpanType.CODE, SpanType.ANSWER):
            yield tag("pre", tag("code", highlighted(shown)), class_="code")
        elif kind is SpanType.FORMAT:
            if words := " ".join(shown.split()):
                yield tag("div", words, class_="format")
        else:
            yield tag("div", shown.strip("\n"), class_="thought")


def _pieces(text: str, spans: Sequence[Span]) -> Iterator[tuple[SpanType, str]]:
    """All of the text, also where the spans do not cover it."""
    at = 0
    for span in spans:
        start, end = max(at, span.start), min(len(text), span.end)
        if start > at:
            yield SpanType.THOUGHT, text[at:start]
        if end > start:
            yield span.type, text[start:end]
        at = max(at, end)
    if at < len(text):
        yield SpanType.THOUGHT, text[at:]


def _candidates(step: Step, clip: int) -> Markup:
    """Those that are alike as one line, the chosen one first, then by votes."""
    groups: dict[tuple[str, str], list[int]] = {}
    for at, each in enumerate(step.candidates):
        groups.setdefault((each.text, each.observation), []).append(at)
    order = sorted(groups.values(), key=lambda group: (step.chosen not in group, -step.candidates[group[0]].votes))
    rows = []
    limit = min(clip, 700)
    for group in order[:_CANDIDATES]:
        each = step.candidates[group[0]]
        chosen = step.chosen in group
        words = "not run" if not each.ran else _KIND_WORDS[each.kind]
        rows.append(
            tag(
                "li",
                tag(
                    "header",
                    tag("b", f"{each.votes} vote{'s' if each.votes != 1 else ''}"),
                    tag("span", f"said {len(group)} times" if len(group) > 1 else "said once"),
                    tag("span", "chosen", class_="kind chosen") if chosen else "",
                    tag("span", words, class_="kind") if words else "",
                ),
                tag("p", "as above", class_="note") if chosen else _pre(each.text, limit),
                _pre(each.observation, limit, class_="observation") if each.observation and not chosen else "",
            )
        )
    if len(order) > _CANDIDATES:
        rows.append(tag("li", f"{len(order) - _CANDIDATES} more", class_="note"))
    agreed = f"{round(step.agreement * len(step.candidates))} of {len(step.candidates)} candidates agree"
    told = agreed if len(order) > 1 else f"all {len(step.candidates)} candidates say the same"
    if len(order) == 1 and step.chosen in order[0]:
        return tag("p", told, class_="note")
    return details(told, tag("ol", *rows, class_="candidates"))


def _end(trajectory: Trajectory, clip: int) -> Markup:
    rows: list[tuple[str, object]] = [("ended by", trajectory.stop_reason.value)]
    if trajectory.stop_detail:
        rows[0] = ("ended by", f"{trajectory.stop_reason.value}: {clipped(trajectory.stop_detail, 300)}")
    if trajectory.prediction is not None:
        rows.append(("answer given", clipped(trajectory.prediction, clip)))
    rows.append(("right answer", clipped(trajectory.task.answer, clip)))
    if trajectory.failure is not None:
        failure = trajectory.failure
        rows.append(("failure", f"{failure.failure_class.value}: {clipped(failure.message, clip)}"))
    if trajectory.leaks:
        rows.append(("speaks of its guide", clipped("; ".join(trajectory.leaks), 400)))
    if trajectory.usage.cost_usd:
        rows.append(("cost", f"${trajectory.usage.cost_usd:.5f}"))
    rows.append(("key", tag("code", clipped(trajectory.key, 300))))
    return tag("dl", *(part for name, value in rows for part in (tag("dt", name), tag("dd", value))), class_="end")


def _text(name: str, text: str, clip: int, *, class_: str) -> Markup:
    return tag("div", tag("span", name, class_="tag"), _pre(text, clip), class_=f"said {class_}")


def _pre(text: str, clip: int, *, class_: str | None = None) -> Markup:
    return tag("pre", html(clipped(text, clip)), class_=class_)
