"""The texts of a trajectory, each by a name that stands in its address.

Example::

    text_of(trajectory, "observation-2")                        # what the second step was shown
    [title for title, _, _ in prompts(trajectory)]              # what stood before the first turn
"""

from __future__ import annotations

from typing import Any

from launch.viewer import shown_text
from rollout.trajectory import Trajectory


def text_of(trajectory: Trajectory, part: str) -> str | None:
    """One text by its name, None where there is none: `question`, `system`, `guide`, `turn-1`, `observation-2`,
    `candidate-1-3`, `candidate-observation-1-3`."""
    whole = {
        "question": trajectory.task.question,
        "answer": trajectory.task.answer,
        "prediction": trajectory.prediction,
        "failure": trajectory.failure.message if trajectory.failure else None,
        **{name: text for _, name, text in prompts(trajectory)},
    }
    if part in whole:
        return whole[part]
    name, _, numbers = part.partition("-")
    name, numbers = (name, numbers) if not numbers.startswith("observation-") else ("shown", numbers[12:])
    try:
        at = [int(each) - 1 for each in numbers.split("-")]
        if min(at) < 0:
            return None
        step = trajectory.steps[at[0]]
        match name, len(at):
            case "turn", 1:
                return step.completion.text
            case "observation", 1:
                return step.observation
            case "candidate", 2:
                return step.candidates[at[1]].text
            case "shown", 2:
                return step.candidates[at[1]].observation
    except (ValueError, IndexError):
        return None
    return None


def prompts(trajectory: Trajectory) -> list[tuple[str, str, str]]:
    """(title, name of its text, text) of what stood before the first turn."""
    found = [
        ("system prompt of the student", "system", trajectory.system_prompt),
        ("system prompt that the policy was shown", "shown-system", trajectory.shown_system_prompt),
        ("first message, where it is more than the question", "user", trajectory.user_prompt),
        ("guide that the policy alone was shown", "guide", trajectory.guide),
        ("first thought that began its first turn", "first-thought", trajectory.first_thought),
    ]
    return [(title, name, text) for title, name, text in found if text]


def shown_prompts(trajectory: Trajectory) -> list[dict[str, Any]]:
    """The same, to be shown."""
    return [{"title": t, "name": n, "shown": shown_text.plain(text)} for t, n, text in prompts(trajectory)]
