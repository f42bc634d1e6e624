"""Guided episodes: the policy is shown a reference solution or a tutorial that its student will not see.

A teacher that fails a task alone often solves it with help, and then demonstrates what it could not have demonstrated.
The guide stands behind the question in the policy's own view and is no part of `Trajectory.messages`. `guide_leaks`
finds the turns that only make sense to a reader of the guide, so that no student learns to speak of what it cannot
see, or to answer out of nothing.

Example::

    text = guide_text(task, "solution")        # TaskError when the task holds none
    guide_leaks(trajectory)                    # ('step 1 speaks of the guide: "the reference solution"',)

After AgentTrek (arXiv 2412.09605), which replays tutorials, and the guided variant of arXiv 2505.17612's code.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal, get_args

from envs.base import Task, TaskError

GuideKind = Literal["none", "solution", "tutorial"]
GUIDES: tuple[str, ...] = get_args(GuideKind)

_SHOWN_AS = {
    "solution": "Reference solution",
    "tutorial": "Tutorial",
}
_INSTRUCTIONS = (
    "The text between the marks is for your eyes alone. Whoever reads your work has the question and what you write, "
    "nothing else. Let the text steer you, and act as if it were not there: never mention or quote it, reason from the "
    "question, find every fact with the tools and compute every number in code, also where you know it by now."
)


def guide_text(task: Task, kind: GuideKind) -> str | None:
    """What is shown behind the question of `task`; None for "none". Raises `TaskError` when the task has no such guide.

    A solution is `metadata["solution"]` (as MATH has it), or the sentences that HotpotQA's `supporting_facts` name in
    its `context`; a tutorial is `metadata["tutorial"]`. A list of texts is shown as numbered lines.
    """
    if kind == "none":
        return None
    body = _body(task.metadata.get(kind))
    if not body and kind == "solution":
        body = _supporting_sentences(task.metadata)
    if not body:
        found = ", ".join(map(str, task.metadata)) or "nothing"
        raise TaskError(
            f"task {task.id!r} has no {kind} to guide with: metadata[{kind!r}] must be a text or a list of texts; "
            f"its metadata holds {found}"
        )
    name = _SHOWN_AS[kind]
    return f"{_INSTRUCTIONS}\n\n--- {name} ---\n{body}\n--- End of {name.lower()} ---"


def _body(value: Any) -> str:
    if isinstance(value, str):
        return value.strip()
    if isinstance(value, Sequence) and value and all(isinstance(each, str) for each in value):
        return "\n".join(f"{number}. {each.strip()}" for number, each in enumerate(value, start=1))
    return ""


def _supporting_sentences(metadata: Mapping[str, Any]) -> str:
    """HotpotQA's: `supporting_facts` {title, sent_id} point into `context` {title, sentences}; "" for other shapes."""
    facts, context = metadata.get("supporting_facts"), metadata.get("context")
    try:
        pages = dict(zip(context["title"], context["sentences"], strict=True))  # type: ignore[index]
        named = list(zip(facts["title"], facts["sent_id"], strict=True))  # type: ignore[index]
        return "\n".join(f"{title}: {pages[title][sentence].strip()}" for title, sentence in named)
    except (TypeError, KeyError, IndexError, ValueError, AttributeError):
        return ""
