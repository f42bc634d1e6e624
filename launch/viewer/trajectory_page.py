"""What the page of one trajectory shows, put together from the record: turns, code, observations, ballots, times.

Data for a template; nothing here knows of the web.

Example::

    turns = [turn(step, i, longest_s) for i, step in enumerate(trajectory.steps)]
    turns[0].ballots[0].votes
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

from launch.viewer import shown_text
from launch.viewer.shown_text import Shown
from rollout.trajectory import Candidate, Span, SpanType, Step, Trajectory

_FENCED = frozenset({SpanType.CODE, SpanType.ANSWER})
_LANGUAGES = {"tool": "json", "search": "text"}
"""Dialect -> of what its code is; Python where it is not named."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Piece:
    """A stretch of a turn of one type."""

    type: str
    shown: Shown


@dataclass(frozen=True, slots=True, kw_only=True)
class Ballot:
    """Candidates of one step that say and show the same."""

    numbers: tuple[int, ...]
    """Which of the k, from 1 on."""
    votes: int
    of: int
    won: bool
    """The chosen candidate is among them."""
    ran: bool
    kind: str
    text: Shown
    observation: Shown
    mean_logprob: float | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Turn:
    """One step."""

    number: int
    """From 1 on."""
    pieces: tuple[Piece, ...]
    observation: Shown
    kind: str
    ballots: tuple[Ballot, ...]
    candidates: int
    agreement: float
    tool_calls: int
    policy_s: float
    env_s: float
    policy_share: float
    """Of the longest step's time, in [0, 100]."""
    env_share: float
    prompt_tokens: int
    completion_tokens: int
    finish_reason: str
    cost_usd: float
    cached: bool
    prefix_by: str
    weights_version: str
    mean_logprob: float | None


def turns(trajectory: Trajectory, marked: re.Pattern[str] | None = None) -> list[Turn]:
    """All steps."""
    longest_s = max((step.policy_s + step.env_s for step in trajectory.steps), default=0.0) or 1.0
    language = _LANGUAGES.get(trajectory.dialect, "python")
    return [_turn(step, i + 1, longest_s, marked, language) for i, step in enumerate(trajectory.steps)]


def _turn(step: Step, number: int, longest_s: float, marked: re.Pattern[str] | None, language: str) -> Turn:
    completion = step.completion
    return Turn(
        number=number,
        pieces=tuple(_pieces(completion.text, step.spans, marked, language)),
        observation=shown_text.plain(step.observation, marked),
        kind=step.observation_kind.value,
        ballots=tuple(_ballots(step, marked)),
        candidates=len(step.candidates),
        agreement=step.agreement,
        tool_calls=step.tool_calls,
        policy_s=step.policy_s,
        env_s=step.env_s,
        policy_share=100 * step.policy_s / longest_s,
        env_share=100 * step.env_s / longest_s,
        prompt_tokens=completion.prompt_tokens,
        completion_tokens=completion.completion_tokens,
        finish_reason=completion.finish_reason,
        cost_usd=completion.cost_usd,
        cached=completion.cached,
        prefix_by=completion.prefix_by,
        weights_version=completion.weights_version,
        mean_logprob=_mean(completion.logprobs),
    )


def _pieces(text: str, spans: Sequence[Span], marked: re.Pattern[str] | None, language: str) -> list[Piece]:
    """What was said, without the format's own signs around it: those are in the token view and in the record."""
    if not spans:
        return [Piece(type="text", shown=shown_text.plain(text, marked))] if text else []
    found: list[Piece] = []
    for span in spans:
        part = text[span.start : span.end]
        if span.type in _FENCED:
            found.append(Piece(type=span.type.value, shown=shown_text.code(part.strip("\n"), language=language)))
        elif span.type is SpanType.FORMAT:
            if not any(each.isalnum() for each in _FORMAT.sub("", part)):
                continue
            found.append(Piece(type="format", shown=shown_text.plain(part.strip(), marked)))
        elif part.strip():
            found.append(Piece(type=span.type.value, shown=shown_text.plain(part.strip(), marked)))
    return found


_FORMAT = re.compile(r"Thought:|Code:|```(?:py|python)?|<end_code>|</?\w+>")


def _ballots(step: Step, marked: re.Pattern[str] | None) -> list[Ballot]:
    """Most votes first; those that are alike as one."""
    groups: dict[tuple[str, str, bool], list[int]] = {}
    for i, each in enumerate(step.candidates):
        groups.setdefault((each.text, each.observation, each.ran), []).append(i)
    made = [_ballot(step, members, marked) for members in groups.values()]
    return sorted(made, key=lambda ballot: (not ballot.won, -ballot.votes, ballot.numbers))


def _ballot(step: Step, members: Sequence[int], marked: re.Pattern[str] | None) -> Ballot:
    first: Candidate = step.candidates[members[0]]
    return Ballot(
        numbers=tuple(i + 1 for i in members),
        votes=first.votes,
        of=len(step.candidates),
        won=step.chosen in members,
        ran=first.ran,
        kind=first.kind.value,
        text=shown_text.plain(first.text, marked),
        observation=shown_text.plain(first.observation, marked),
        mean_logprob=_mean(first.logprobs),
    )


def _mean(values: Sequence[float] | None) -> float | None:
    return sum(values) / len(values) if values else None
