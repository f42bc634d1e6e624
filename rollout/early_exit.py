"""Early exit from fruitless runs: when the turns so far show that more of them would lead nowhere.

Pure, and free while no rule is set. It is no judge of answers.

Example::

    rule = EarlyExit(same_action=3)
    fruitless(steps, rule)         # "the same action 3 times", or "" while there is hope

After "Runaway is ashamed, but helpful" (arXiv 2505.17616), with rules in place of its prompts: they cost no tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields

from envs.base import ObservationKind
from rollout.trajectory import Step


@dataclass(frozen=True, slots=True, kw_only=True)
class EarlyExit:
    """When to give an episode up; 0 never does, in each of them."""

    unparsed_turns: int = 0
    """So many turns in a row from which no action could be read."""
    same_action: int = 0
    """The last action, white space aside, was taken so many times in this episode."""
    same_observation: int = 0
    """So many steps in a row were shown the same."""
    no_progress: int = 0
    """So many steps in a row whose observation is an error or repeats an earlier one of the episode."""

    def __post_init__(self) -> None:
        for knob in fields(self):
            value = getattr(self, knob.name)
            if value < 0 or (value == 1 and knob.name in ("same_action", "same_observation")):
                raise ValueError(
                    f"early_exit.{knob.name}={value} must be 0 (never) or at least "
                    f"{2 if knob.name.startswith('same') else 1}"
                )


def fruitless(steps: Sequence[Step], rule: EarlyExit) -> str:
    """Why an episode with these steps should end now, in words; "" when it should go on."""
    if (n := rule.unparsed_turns) and len(steps) >= n and all(step.action is None for step in steps[-n:]):
        return f"{n} turns in a row without an action"
    if (n := rule.same_action) and len(steps) >= n and steps[-1].action is not None:
        last = _plain(steps[-1].action)
        if sum(step.action is not None and _plain(step.action) == last for step in steps) >= n:
            return f"the same action {n} times"
    if (n := rule.same_observation) and len(steps) >= n and len({_plain(step.observation) for step in steps[-n:]}) == 1:
        return f"the same observation {n} times in a row"
    if (n := rule.no_progress) and len(steps) >= n and _without_progress(steps) >= n:
        return f"{n} steps in a row without progress"
    return ""


def _without_progress(steps: Sequence[Step]) -> int:
    """How many of the last steps in a row brought nothing: an error, or what had been shown before."""
    seen: set[str] = set()
    in_a_row = 0
    for step in steps:
        shown = _plain(step.observation)
        new = step.observation_kind in (ObservationKind.OK, ObservationKind.FINAL) and shown not in seen
        in_a_row = 0 if new else in_a_row + 1
        seen.add(shown)
    return in_a_row


def _plain(text: str) -> str:
    return " ".join(text.split())
