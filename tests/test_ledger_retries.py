"""What a resumed run leaves alone: results, and keys that a retry rule has given up."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from rollout.ledger import Ledger, LedgerWriter
from rollout.retries import RetryRule
from rollout.trajectory import Failure, FailureClass
from tests.test_ledger import trajectory

ENVIRONMENT, ENGINE, LIMIT, MODEL, INPUT = (
    FailureClass.ENVIRONMENT, FailureClass.ENGINE, FailureClass.LIMIT, FailureClass.MODEL, FailureClass.INPUT,
)  # fmt: skip


def ledger(folder: Path, *failed: tuple[str, FailureClass], done: tuple[str, ...] = ()) -> Ledger:
    """A ledger in which every attempt was recorded by a run of its own."""
    for key, failure in failed:
        LedgerWriter(folder, writer="w").append([trajectory(key, failure=failure)])
    LedgerWriter(folder, writer="w").append([trajectory(key) for key in done])
    return Ledger(folder)


def test_attempts_are_counted_per_key_and_class_over_runs(tmp_path: Path) -> None:
    found = ledger(tmp_path, ("a", ENGINE), ("b", MODEL), ("a", ENGINE), ("a", ENVIRONMENT)).attempts()
    assert {key: dict(each.by_class) for key, each in found.items()} == {
        "a": {ENGINE: 2, ENVIRONMENT: 1},
        "b": {MODEL: 1},
    }
    assert found["a"].total == 3


def test_the_last_attempt_is_the_one_that_ended_last_whichever_shard_it_is_in(tmp_path: Path) -> None:
    def failed(at_s: float, message: str, failure_class: FailureClass):
        failure = Failure(failure_class=failure_class, message=message)
        return replace(trajectory("a", failure=ENGINE), failure=failure, started_at_s=at_s, duration_s=5.0)

    LedgerWriter(tmp_path, writer="z").append([failed(100.0, "early", ENGINE)])
    LedgerWriter(tmp_path, writer="y").append([failed(300.0, "late", INPUT)])
    LedgerWriter(tmp_path, writer="z").append([failed(200.0, "between", ENGINE)])
    last = Ledger(tmp_path).attempts()["a"]
    assert (last.last_message, last.last_class, last.last_at_s) == ("late", INPUT, 305.0)


@pytest.mark.parametrize(("failure", "tries"), [(ENVIRONMENT, 3), (ENGINE, 3), (MODEL, 1), (INPUT, 1)])
def test_a_class_is_tried_as_often_as_the_rule_says_then_quarantined(
    tmp_path: Path, failure: FailureClass, tries: int
) -> None:
    rule = RetryRule()
    for attempt in range(1, tries + 1):
        settled = ledger(tmp_path, ("a", failure)).settled(rule)
        assert ("a" in settled) == (attempt == tries)
    assert settled.quarantined == {"a": failure}
    assert "a" not in settled.done


def test_a_budget_that_was_used_up_never_counts(tmp_path: Path) -> None:
    assert "a" not in ledger(tmp_path, *[("a", LIMIT)] * 9).settled(RetryRule())


def test_classes_are_counted_apart(tmp_path: Path) -> None:
    assert "a" not in ledger(tmp_path, ("a", ENGINE), ("a", ENVIRONMENT), ("a", ENGINE), ("a", LIMIT)).settled()


def test_a_key_with_a_result_is_done_whatever_failed_before(tmp_path: Path) -> None:
    settled = ledger(tmp_path, ("a", INPUT), ("b", INPUT), done=("a", "c")).settled()
    assert settled.done == {"a", "c"}
    assert settled.quarantined == {"b": INPUT}
    assert len(settled) == 3


def test_quarantined_keys_are_tried_again_when_that_is_asked_for(tmp_path: Path) -> None:
    settled = ledger(tmp_path, ("a", INPUT), ("b", MODEL), done=("c",)).settled(retry_quarantined=True)
    assert [key for key in "abc" if key not in settled] == ["a", "b"]


def test_a_rule_of_its_own_holds_for_what_is_recorded_already(tmp_path: Path) -> None:
    found = ledger(tmp_path, ("a", ENGINE), ("b", MODEL))
    assert found.settled(RetryRule(engine=1, model=2)).quarantined == {"a": ENGINE}
    assert found.settled(RetryRule(engine=None, model=None)).quarantined == {}


def test_a_rule_that_tries_nothing_at_all_is_refused() -> None:
    with pytest.raises(ValueError, match="engine: 0 attempts; the first one counts too"):
        RetryRule(engine=0)
