"""Early exit: what is fruitless, what is not, and that each rule names its reason."""

from __future__ import annotations

import pytest

from envs.base import ObservationKind
from rollout.early_exit import EarlyExit, fruitless
from rollout.trajectory import Completion, Step

OK, ERROR, PARSE = ObservationKind.OK, ObservationKind.CODE_ERROR, ObservationKind.PARSE_ERROR


def step(action: str | None, observation: str, kind: ObservationKind = OK) -> Step:
    return Step(
        completion=Completion(text=action or "?"),
        spans=(),
        action=action,
        observation=observation,
        observation_kind=kind,
    )


UNPARSED = step(None, "no code block was found", PARSE)


@pytest.mark.parametrize(
    ("rule", "steps", "reason"),
    [
        (
            EarlyExit(unparsed_turns=2),
            [UNPARSED, step("a", "1"), UNPARSED, UNPARSED],
            "2 turns in a row without an action",
        ),
        (EarlyExit(unparsed_turns=2), [UNPARSED, step("a", "1"), UNPARSED], ""),
        (
            EarlyExit(same_action=3),
            [step("a", "1"), step("b", "2"), step(" a\n", "3"), step("a", "4")],
            "the same action 3 times",
        ),
        (EarlyExit(same_action=3), [step("a", "1"), step("a", "2"), step("a", "3"), step("b", "4")], ""),
        (EarlyExit(same_action=2), [UNPARSED, UNPARSED], ""),
        (
            EarlyExit(same_observation=3),
            [step("a", "none found"), step("b", "none found"), step("c", "none  found\n")],
            "the same observation 3 times in a row",
        ),
        (EarlyExit(same_observation=2), [step("a", "x"), step("b", "y"), step("c", "x")], ""),
        (
            EarlyExit(no_progress=3),
            [step("a", "x"), step("b", "bad", ERROR), step("c", "x"), UNPARSED],
            "3 steps in a row without progress",
        ),
        (
            EarlyExit(no_progress=3),
            [step("b", "bad", ERROR), step("c", "worse", ERROR), step("a", "new"), UNPARSED],
            "",
        ),
        (EarlyExit(), [UNPARSED] * 9, ""),
    ],
)
def test_when_an_episode_is_fruitless(rule, steps, reason):
    assert fruitless(steps, rule) == reason


def test_the_first_reason_is_named_of_several():
    rule = EarlyExit(unparsed_turns=2, same_observation=2, no_progress=2)
    assert fruitless([UNPARSED, UNPARSED], rule) == "2 turns in a row without an action"


@pytest.mark.parametrize(
    ("knobs", "wrong"),
    [
        ({"unparsed_turns": -1}, "early_exit.unparsed_turns=-1 must be 0 .never. or at least 1"),
        ({"same_action": 1}, "early_exit.same_action=1 must be 0 .never. or at least 2"),
        ({"same_observation": 1}, "early_exit.same_observation=1 must be"),
    ],
)
def test_numbers_that_mean_nothing_are_refused(knobs, wrong):
    with pytest.raises(ValueError, match=wrong):
        EarlyExit(**knobs)
