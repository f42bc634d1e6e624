"""Two teachers' trajectories on one task become one: the first's attempt, a transition in words, the second's solution.

After DualDistill (arXiv 2507.05707), which teaches a student to change its way of working where the first one does not
do: a teacher that reasons in words ("cot") and one that acts in code ("code"), in either order, or two of the same
kind. What is made depends on who was right:

| first | second | result |
|---|---|---|
| wrong | right | the attempt, doubt, the solution: a correction |
| right | right | the solution, a check in the other way: a verification |
| right | wrong | nothing: the first alone is the better row |
| wrong | wrong | nothing |

The result is a trajectory like any other: in dialect "code" when one of the two was, its turns parse again, nothing
comes after a final answer, it is graded as the second was. It was never sampled as a whole, so it has no token ids, no
candidates and no guide. The second's code ran in a fresh interpreter, not in the one the first left behind.

Example::

    composed = compose(reasoned, coded)            # Trajectory | Refused
    composed.policy                                # "qwen-cot+qwen-agent"
"""

from __future__ import annotations

import hashlib
import json
from collections import defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from enum import StrEnum

from envs.base import ObservationKind
from rollout.dialects import DIALECTS
from rollout.trajectory import Completion, SpanType, Step, StopReason, Trajectory, trajectory_key

_LONGEST_ANSWER_CHARS = 80
"""A longer answer is not repeated in the transition."""

_DOUBT = (
    "Wait, {it} may be wrong. {change}",
    "I do not trust {it} yet. {change}",
    "Something about {it} does not add up. {change}",
)
_NO_ANSWER = (
    "This does not lead to an answer. {change}",
    "I am not getting anywhere like this. {change}",
)
_CHECK = (
    "So I come to {it}. {change}",
    "This gives {it}. Before I say so, I make sure. {change}",
    "I get {it}. That should be verified. {change}",
)
_CHANGE = {
    ("cot", "code"): "Let me work it out with code.",
    ("code", "cot"): "Let me think it through step by step in words.",
    ("cot", "cot"): "Let me go through it in another way.",
    ("code", "code"): "Let me try another way with code.",
}


class RefusalReason(StrEnum):
    """Why two trajectories are not composed."""

    OTHER_TASK = "other_task"
    OTHER_PROMPT = "other_prompt"
    DIALECT = "dialect"
    FAILED = "failed"
    LEAK = "leak"
    PARSE_ERROR = "parse_error"
    CUT_OFF = "cut_off"
    NO_ANSWER = "no_answer"
    BOTH_WRONG = "both_wrong"
    SECOND_WRONG = "second_wrong"
    PARSES_OTHERWISE = "parses_otherwise"


@dataclass(frozen=True, slots=True, kw_only=True)
class Refused:
    """Two trajectories that were not composed."""

    keys: tuple[str, str]
    reason: RefusalReason
    detail: str


class _Refusal(Exception):
    def __init__(self, reason: RefusalReason, detail: str) -> None:
        super().__init__(detail)
        self.reason = reason


def compose(first: Trajectory, second: Trajectory) -> Trajectory | Refused:
    """One trajectory out of two on the same task, or why there is none. The same two always give the same."""
    try:
        _check(first, second)
        steps = _steps(first, second)
    except _Refusal as refusal:
        return Refused(keys=(first.key, second.key), reason=refusal.reason, detail=str(refusal))
    acted = first if first.dialect == "code" and second.dialect != "code" else second
    policy = f"{first.policy}+{second.policy}"
    versions = (first.weights_version, second.weights_version)
    return replace(
        second,
        key=_key(first, second),
        dialect=acted.dialect,
        system_prompt=acted.system_prompt,
        steps=steps,
        policy=policy,
        weights_version="+".join(versions) if any(versions) else "",
        first_thought=None,
        shown_system_prompt=None,
        guide=None,
        usage=first.usage + second.usage,
        started_at_s=min(first.started_at_s, second.started_at_s),
        duration_s=first.duration_s + second.duration_s,
    )


def compose_policies(
    trajectories: Iterable[Trajectory], first: str, second: str, *, either_order: bool = False
) -> Iterator[Trajectory | Refused]:
    """Every task's samples of policy `first`, each with the sample of policy `second` of the same rank; by task id.

    `either_order`: where only the first was right, the second's attempt comes first. Holds the trajectories of both
    policies in memory. Raises `ValueError` when a policy has none, or both are one.
    """
    if first == second:
        raise ValueError(f"two policies are composed, and both are {first!r}")
    by_task: dict[str, tuple[list[Trajectory], list[Trajectory]]] = defaultdict(lambda: ([], []))
    policies: set[str] = set()
    for trajectory in trajectories:
        policies.add(trajectory.policy)
        if trajectory.policy in (first, second):
            by_task[trajectory.task.id][trajectory.policy == second].append(trajectory)
    for policy in (first, second):
        if policy not in policies:
            raise ValueError(
                f"no trajectory is of policy {policy!r}; there are {', '.join(sorted(policies)) or 'none'}"
            )
    for task_id in sorted(by_task):
        firsts, seconds = (sorted(each, key=lambda t: (t.sample_index, t.key)) for each in by_task[task_id])
        for one, other in zip(firsts, seconds, strict=False):
            swap = either_order and one.success and not other.success
            yield compose(other, one) if swap else compose(one, other)


def _check(first: Trajectory, second: Trajectory) -> None:
    if (first.task.id, first.task.question) != (second.task.id, second.task.question):
        raise _Refusal(RefusalReason.OTHER_TASK, f"tasks {first.task.id!r} and {second.task.id!r} are not the same")
    if first.user_prompt != second.user_prompt:
        raise _Refusal(RefusalReason.OTHER_PROMPT, "the two were asked in different words (retrieved passages?)")
    for name, each in (("first", first), ("second", second)):
        if each.dialect not in ("cot", "code"):
            raise _Refusal(RefusalReason.DIALECT, f"the {name} is in dialect {each.dialect!r}; use 'cot' or 'code'")
        if each.failure is not None:
            raise _Refusal(RefusalReason.FAILED, f"the {name} failed: {each.failure.message}")
        if each.leaks:
            raise _Refusal(RefusalReason.LEAK, f"the {name} leaks its guide: {each.leaks[0]}")
        if any(step.observation_kind is ObservationKind.PARSE_ERROR for step in each.steps):
            raise _Refusal(RefusalReason.PARSE_ERROR, f"a turn of the {name} could not be parsed")
        if any(step.completion.finish_reason != "stop" for step in each.steps):
            raise _Refusal(RefusalReason.CUT_OFF, f"a turn of the {name} was cut off")
        if any(step.observation_kind is ObservationKind.FINAL for step in each.steps[:-1]):
            raise _Refusal(RefusalReason.PARSES_OTHERWISE, f"the {name} goes on after its final answer")
        if each.dialect == "cot" and len(each.steps) != 1:
            raise _Refusal(RefusalReason.NO_ANSWER, f"the {name} has {len(each.steps)} turns of reasoning, not one")
    if not second.success:
        both = not first.success
        reason = RefusalReason.BOTH_WRONG if both else RefusalReason.SECOND_WRONG
        raise _Refusal(reason, "both are wrong" if both else "the first alone is right: it needs no second")
    if not first.steps or not _answered(second) or second.prediction is None:
        raise _Refusal(
            RefusalReason.NO_ANSWER, "the first did nothing" if not first.steps else "the second has no answer"
        )


def _steps(first: Trajectory, second: Trajectory) -> tuple[Step, ...]:
    """The first's steps without its answer, then the second's, the transition in the second's first turn."""
    attempt = first.steps[:-1] if _answered(first) else first.steps
    thought = _reasoning(first.steps[-1]) if _answered(first) else ""
    lead = f"{thought}\n\n{_transition(first, second)}".lstrip()
    if first.dialect == "code" and second.dialect == "cot":
        opening = _answer_in_code(first.steps[-1], lead, second)
    elif second.dialect == "code":
        text = _without_label(second.steps[0].completion.text)
        opening = _reparsed(second.steps[0], "code", f"Thought: {lead}\n\n{text}", second.steps[0].action)
    else:
        opening = _reparsed(
            second.steps[0], "cot", f"{lead}\n\n{second.steps[0].completion.text}", second.steps[0].action
        )
    merged = first.steps[-1].completion.completion_tokens if _answered(first) else 0
    completion = replace(opening.completion, completion_tokens=opening.completion.completion_tokens + merged)
    steps = (*attempt, replace(opening, completion=completion), *second.steps[1:])
    return tuple(_unsampled(step) for step in steps)


def _answer_in_code(last: Step, lead: str, reasoned: Trajectory) -> Step:
    """The turn of reasoning as a turn of code that only answers, laid out as the first's turns are."""
    prediction = reasoned.prediction or ""
    code = f"final_answer({json.dumps(prediction, ensure_ascii=False)})"
    before, after = _fence(last)
    thought = f"{lead}\n\n{_reasoning(reasoned.steps[-1])}".rstrip()
    step = reasoned.steps[-1]
    return _reparsed(step, "code", f"Thought: {thought}{before}{code}{after}", code)


def _fence(step: Step) -> tuple[str, str]:
    """What stands before and behind the code of a turn: `\\nCode:\\n```py\\n` and `\\n```<end_code>`."""
    text = step.completion.text
    code = [span for span in step.spans if span.type in (SpanType.CODE, SpanType.ANSWER)]
    thoughts = [span.end for span in step.spans if span.type is SpanType.THOUGHT]
    if not code or (thoughts and thoughts[-1] > code[0].start):
        raise _Refusal(RefusalReason.PARSES_OTHERWISE, "the first's last turn has no code where it should be")
    before = text[thoughts[-1] if thoughts else 0 : code[0].start]
    return f"\n{_without_label(before)}", text[code[-1].end :]


def _reparsed(step: Step, dialect: str, text: str, action: str | None) -> Step:
    """`step` with another text, proven to be the same action and to end where it ends."""
    language = DIALECTS[dialect]
    turn = language.parse(text)
    if turn.action is None or turn.action != action:
        raise _Refusal(RefusalReason.PARSES_OTHERWISE, "the composed turn does not parse to the second's action")
    words = text[: text.rfind(turn.action)]
    if any(stop in words for stop in language.stop):
        raise _Refusal(RefusalReason.PARSES_OTHERWISE, f"its words hold one of {', '.join(language.stop)}")
    completion = replace(step.completion, text=text)
    return replace(step, completion=completion, spans=turn.spans, action=turn.action)


def _unsampled(step: Step) -> Step:
    """Nobody sampled this turn behind this prompt: no ids, no candidates."""
    completion = step.completion
    bare = Completion(
        text=completion.text,
        finish_reason=completion.finish_reason,
        weights_version=completion.weights_version,
        completion_tokens=completion.completion_tokens,
        cost_usd=completion.cost_usd,
    )
    return replace(step, completion=bare, candidates=(), chosen=0)


def _reasoning(step: Step) -> str:
    """The words of a turn, without its answer, its code and its label."""
    text = step.completion.text
    words = " ".join(text[span.start : span.end].strip() for span in step.spans if span.type is SpanType.THOUGHT)
    return _without_label(words).strip()


def _without_label(text: str) -> str:
    return text.lstrip().removeprefix("Thought:").lstrip()


def _transition(first: Trajectory, second: Trajectory) -> str:
    """In words; which of the wordings, the keys decide."""
    change = _CHANGE[first.dialect, second.dialect]
    wordings = _CHECK if first.success else _DOUBT if _answered(first) else _NO_ANSWER
    digest = hashlib.sha256(_key(first, second).encode("utf-8", "replace")).digest()
    answer = " ".join((first.prediction or "").split())
    it = f"the answer {answer}" if 0 < len(answer) <= _LONGEST_ANSWER_CHARS else "this answer"
    return wordings[digest[0] % len(wordings)].format(it=it, change=change)


def _key(first: Trajectory, second: Trajectory) -> str:
    return trajectory_key(
        task_id=second.task.id,
        policy=f"{first.policy}+{second.policy}",
        sample_index=second.sample_index,
        settings={"composed": [first.key, second.key]},
    )


def _answered(trajectory: Trajectory) -> bool:
    return (
        trajectory.stop_reason is StopReason.FINAL
        and bool(trajectory.steps)
        and trajectory.steps[-1].observation_kind is ObservationKind.FINAL
    )
