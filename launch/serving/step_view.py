"""Steps and trajectories as clients see them: as JSON, and as Markdown for chat windows.

The Markdown is for people: model text stands in fences that it cannot close, and where HTML would count it is escaped.

Example::

    step_json(1, step)         # {"number": 1, "thought": ..., "action": ..., "observation": ..., "candidates": [...]}
    step_markdown(1, step, "code")
"""

from __future__ import annotations

import html
import re
from collections.abc import Mapping, Sequence
from typing import Any

from envs.base import ObservationKind
from rollout.trajectory import SpanType, Step, Trajectory

_LANGUAGES = {"code": "python", "tool": "json"}
"""Of actions, by dialect."""


def thought(step: Step) -> str:
    """What the policy thought, in its words."""
    text = step.completion.text
    return "".join(text[span.start : span.end] for span in step.spans if span.type is SpanType.THOUGHT).strip()


def step_json(number: int, step: Step, searches: Sequence[Mapping[str, Any]] = ()) -> dict[str, Any]:
    """`number` counts from 1; `searches` are those of `SearchLog.shown`. Of a step with several candidates all are
    there."""
    shown: dict[str, Any] = {
        "number": number,
        "thought": thought(step),
        "action": step.action,
        "observation": step.observation,
        "observation_kind": step.observation_kind.value,
        "tool_calls": step.tool_calls,
        "completion_tokens": step.completion.completion_tokens,
        "policy_s": round(step.policy_s, 4),
        "env_s": round(step.env_s, 4),
    }
    if searches:
        shown["searches"] = list(searches)
    if step.candidates:
        shown["chosen"] = step.chosen
        shown["candidates"] = [
            {
                "text": candidate.text,
                "observation": candidate.observation,
                "observation_kind": candidate.kind.value,
                "votes": candidate.votes,
                "ran": candidate.ran,
            }
            for candidate in step.candidates
        ]
    return shown


def trajectory_json(
    trajectory: Trajectory, *, steps: bool = True, searches: Sequence[Sequence[Mapping[str, Any]]] = ()
) -> dict[str, Any]:
    """What an episode was, without what its question was. `success` is null where nobody knows the right answer;
    `searches` are those of each step."""
    usage, task = trajectory.usage, trajectory.task
    graded = bool(task.answer or task.aliases) and trajectory.failure is None
    failure = trajectory.failure
    shown: dict[str, Any] = {
        "key": trajectory.key,
        "policy": trajectory.policy,
        "weights_version": trajectory.weights_version,
        "answer": trajectory.prediction,
        "success": trajectory.success if graded else None,
        "stop_reason": trajectory.stop_reason.value,
        "stop_detail": trajectory.stop_detail,
        "failure": {"class": failure.failure_class.value, "message": failure.message} if failure is not None else None,
        "tool_calls": trajectory.tool_calls,
        "duration_s": round(trajectory.duration_s, 4),
        "usage": {
            "requests": usage.requests,
            "prompt_tokens": usage.prompt_tokens,
            "completion_tokens": usage.completion_tokens,
            "cost_usd": usage.cost_usd,
        },
    }
    if steps:
        found = [*searches, *([()] * (len(trajectory.steps) - len(searches)))]
        pairs = zip(trajectory.steps, found, strict=True)
        shown["steps"] = [step_json(number, step, hits) for number, (step, hits) in enumerate(pairs, start=1)]
    return shown


def agreement(step: Step) -> str:
    """Of a step with candidates, how the vote went."""
    return f"{step.candidates[step.chosen].votes} of {len(step.candidates)} candidates agree"


def observation(step: Step) -> str:
    """What came back, without the word that some dialects put in front of it."""
    return step.observation.removeprefix("Observation:\n")


def step_markdown(number: int, step: Step, dialect: str, *, escape: bool = False) -> str:
    """A step for a chat window. The answer itself is left out: it is the message. `escape`: the text stands where HTML
    is understood."""
    words = thought(step)
    votes = f" ({agreement(step)})" if step.candidates else ""
    parts = [f"**Step {number}**{votes}"]
    if words:
        parts.append(html.escape(words, quote=False) if escape else words)
    if step.action is not None and dialect != "cot":
        parts.append(fenced(step.action, _LANGUAGES.get(dialect, "")))
    if step.observation_kind is not ObservationKind.FINAL:
        parts.append(fenced(observation(step), "text"))
    return "\n\n".join(parts) + "\n\n"


def folded(markdown: str, title: str) -> str:
    """`markdown` that a reader may open."""
    return f"<details>\n<summary>{html.escape(title)}</summary>\n\n{markdown}</details>\n\n"


def stopped(trajectory: Trajectory) -> str:
    """Why there is no answer, in words; "" where there is one."""
    if trajectory.prediction is not None:
        return ""
    return f"No answer: {trajectory.stop_detail or trajectory.stop_reason.value}."


def fenced(text: str, language: str = "") -> str:
    """`text` in a fence that is longer than any in it."""
    longest = max((len(run) for run in re.findall(r"`+", text)), default=0)
    fence = "`" * max(3, longest + 1)
    return f"{fence}{language}\n{text.rstrip()}\n{fence}"
