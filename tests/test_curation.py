"""`rollout.curation`: each filter keeps what it promises, sets do not depend on order, errors name what there is."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from envs.base import ObservationKind, Task
from rollout.curation import Curation, CurationError
from rollout.curation_filters import computes
from rollout.trajectory import Candidate, Completion, Failure, FailureClass, Step, StopReason, Trajectory

OK, CODE_ERROR, PARSE_ERROR = ObservationKind.OK, ObservationKind.CODE_ERROR, ObservationKind.PARSE_ERROR
FINAL = ObservationKind.FINAL
CONFIGS = Path(__file__).parents[1] / "configs" / "curation"


def step(
    action: str | None = "print(1)", kind: ObservationKind = OK, *, calls: int = 0, votes: int = 0, k: int = 0
) -> Step:
    """`votes` of `k` candidates agree."""
    losers = [Candidate(text="y", observation="2", kind=OK, votes=1)] * (k - votes)
    winners = [Candidate(text="x", observation="1", kind=OK, votes=votes)] * votes
    return Step(
        completion=Completion(text=action or "?", completion_tokens=10),
        spans=(),
        action=action,
        observation="seen",
        observation_kind=kind,
        candidates=tuple(winners + losers),
        tool_calls=calls,
    )


ANSWER = step("final_answer(1)", FINAL)


def made(
    *steps: Step, i: int = 0, kind: str = "fact", answer: str = "Paris", sample: int = 0, **changes: Any
) -> Trajectory:
    task = Task(id=f"t{i:03d}", question=f"question {i}?", answer=answer, kind=kind)
    base = Trajectory(
        key=f"t{i:03d}|policy|{sample}|d", task=task, dialect="code", system_prompt="s", policy="policy",
        steps=steps or (step(), ANSWER), sample_index=sample, success=True, reward=1.0,
    )  # fmt: skip
    return replace(base, **changes)


def keeps(trajectory: Trajectory, *filters: Any) -> bool:
    return Curation.from_config(filters).keeps(trajectory)


def kept(filters: list[Any], trajectories: list[Trajectory]) -> list[str]:
    return [trajectory.key for trajectory in Curation.from_config(filters).apply(trajectories).kept]


@pytest.mark.parametrize(
    ("filter_", "good", "bad"),
    [
        ("correct", made(), made(success=False, reward=0.5)),
        ({"name": "correct", "at_least": 0.5}, made(success=False, reward=0.5), made(success=False, reward=0.4)),
        ("no_failure", made(), made(failure=Failure(failure_class=FailureClass.ENGINE, message="gone"))),
        ("finished", made(), made(stop_reason=StopReason.MAX_STEPS)),
        ("no_parse_error", made(step(kind=CODE_ERROR), step(), ANSWER), made(step(None, PARSE_ERROR), step(), ANSWER)),
        ("no_leak", made(guide="the solution"), made(guide="the solution", leaks=("turn 0: the solution",))),
        ("repaired", made(step(kind=CODE_ERROR), step(), ANSWER), made(step(), step(kind=CODE_ERROR), ANSWER)),
        ("repaired", made(ANSWER), made(step(), step(kind=CODE_ERROR), stop_reason=StopReason.MAX_STEPS)),
        (
            {"name": "repaired", "max_errors": 1},
            made(step(kind=CODE_ERROR), step(), ANSWER),
            made(step(kind=CODE_ERROR), step(kind=CODE_ERROR), step(), ANSWER),
        ),
        (
            {"name": "repaired", "errors": ["code_error"]},
            made(step(), step(None, PARSE_ERROR), ANSWER),
            made(step(), step(kind=CODE_ERROR), ANSWER),
        ),
        ({"name": "length", "max_steps": 2}, made(), made(step(), step(), ANSWER)),
        ({"name": "length", "min_steps": 2}, made(), made(ANSWER)),
        ({"name": "length", "max_chars": 60}, made(), made(step("x" * 60), ANSWER)),
        ({"name": "agreement", "at_least": 0.5}, made(step(votes=2, k=4), ANSWER), made(step(votes=1, k=4), ANSWER)),
        (
            {"name": "agreement", "at_least": 0.5, "of": "min"},
            made(step(votes=2, k=4), ANSWER),
            made(step(votes=4, k=4), step(votes=1, k=4), ANSWER),
        ),
    ],
)  # fmt: skip
def test_a_filter_keeps_the_good_one_alone(filter_, good, bad):
    assert keeps(good, filter_) and not keeps(bad, filter_)


def test_agreement_counts_only_the_steps_that_were_voted_on():
    assert keeps(made(step(votes=1, k=4), ANSWER, ANSWER), {"name": "agreement", "at_least": 0.3}) is False
    assert keeps(made(), {"name": "agreement", "at_least": 1.0})


def test_length_takes_the_policys_count_and_else_estimates():
    counted = replace(ANSWER, completion=Completion(text="a", prompt_tokens=900, completion_tokens=100))
    assert keeps(made(counted), {"name": "length", "max_tokens": 1000})
    assert not keeps(made(counted), {"name": "length", "max_tokens": 999})
    assert not keeps(made(step("x" * 4000), ANSWER), {"name": "length", "max_tokens": 1000})


LOOKED_UP = made(step("print(web_search('x'))", calls=1), ANSWER)
AT_ONCE = made(step("r = web_search('x')\nfinal_answer('Paris')", FINAL, calls=1))
BY_HEART = made(step("final_answer('Paris')", FINAL))


def test_a_fact_must_have_been_read_before_the_answer():
    assert keeps(LOOKED_UP, "used_tools")
    assert not keeps(AT_ONCE, "used_tools"), "its answer was written before the search came back"
    assert not keeps(BY_HEART, "used_tools")
    assert not keeps(made(step(kind=CODE_ERROR, calls=1), ANSWER), "used_tools"), "the search failed"


def test_what_can_be_computed_may_be():
    computed = made(step("x = 17 * 3\nprint(x)"), ANSWER, answer="51")
    told = made(step("print(51)"), ANSWER, answer="51")
    assert keeps(computed, "used_tools") and not keeps(told, "used_tools")
    assert keeps(made(step("final_answer(17 * 3)", FINAL), answer="51"), "used_tools")
    assert not keeps(replace(computed, dialect="cot"), "used_tools"), "words were never run"
    assert not keeps(computed, {"name": "used_tools", "look_up": ["fa*"]})
    assert keeps(computed, {"name": "used_tools", "look_up": ["two_hop*"]})


def test_how_many_calls_are_asked_goes_by_kind():
    twice = {"name": "used_tools", "by_kind": {"two_hop*": 2, "closed": 0}}
    hop, closed = replace(LOOKED_UP.task, kind="two_hop_unseen"), replace(BY_HEART.task, kind="closed")
    assert not keeps(replace(LOOKED_UP, task=hop), twice) and keeps(LOOKED_UP, twice)
    assert keeps(replace(BY_HEART, task=closed), twice)


@pytest.mark.parametrize(
    ("code", "works"),
    [
        ("x = 1\nx += 2", True),
        ("for i in a:\n    print(i)", True),
        ("print(sum(numbers))", True),
        ("final_answer(str(42))", False),
        ("final_answer(-42)", False),
        ("import math", False),
        ("not python at all", False),
        ("x = '\0'", False),
        ("(" * 500 + ")" * 500, False),
    ],
)
def test_code_that_computes_is_told_from_code_that_shows(code, works):
    assert computes(code) is works


def test_of_the_same_question_the_best_is_kept():
    short = made(ANSWER, sample=1)
    long = made(step(), step(), ANSWER, sample=0)
    agreed = made(step(votes=4, k=4), step("other()"), ANSWER, sample=2)
    doubted = replace(long, key="t000|policy|3|d", steps=(step(votes=1, k=4), step(), ANSWER), sample_index=3)
    rows = [long, short, agreed, doubted]
    assert kept([{"name": "deduplicate", "by": "question"}], rows) == [short.key]
    assert kept([{"name": "deduplicate", "by": "question", "keep": "first"}], rows) == [long.key]
    voted = [{"name": "deduplicate", "by": "question", "keep": "highest_agreement"}]
    assert kept(voted, [doubted, agreed]) == [agreed.key]


def test_actions_are_the_same_whatever_their_comments_and_spacing():
    plain, commented = made(step("x = 1\nprint( x )"), sample=0), made(step("x=1  # one\nprint(x)"), sample=1)
    other, elsewhere = made(step("x = 2\nprint(x)"), sample=2), made(step("x = 1\nprint(x)"), i=1)
    rows = [plain, commented, other, elsewhere]
    assert kept(["deduplicate"], rows) == [plain.key, other.key, elsewhere.key]
    assert kept([{"name": "deduplicate", "by": "actions"}], rows) == [plain.key, other.key]


def test_questions_are_the_same_whatever_their_case_but_not_their_signs():
    def ask(i: int, question: str) -> Trajectory:
        row = made(i=i)
        return replace(row, task=replace(row.task, question=question))

    rows = [ask(0, "What is 3 + 4?"), ask(1, "what is  3 + 4?"), ask(2, "What is 3 - 4?"), ask(3, "What is 34?")]
    assert kept([{"name": "deduplicate", "by": "question"}], rows) == [rows[i].key for i in (0, 2, 3)]


def test_no_task_has_more_than_its_share():
    rows = [made(*[step()] * n, ANSWER, i=i, sample=n) for i in range(3) for n in range(4)]
    assert kept([{"name": "per_task", "at_most": 2, "keep": "fewest_steps"}], rows) == [
        row.key for row in rows if row.sample_index < 2
    ]


def test_kinds_are_balanced_by_chance_that_a_seed_decides():
    rows = [made(i=i, kind="rare" if i % 10 == 0 else "common") for i in range(100)]
    chosen = {seed: kept([{"name": "balance", "ratio": 2.0, "seed": seed}], rows) for seed in (0, 1)}
    sizes = Counter("rare" if int(key[1:4]) % 10 == 0 else "common" for key in chosen[0])
    assert sizes == {"rare": 10, "common": 20} and chosen[0] != chosen[1]
    assert chosen[0] == kept([{"name": "balance", "ratio": 2.0, "seed": 0}], rows)


def test_difficulty_is_the_level_the_steps_or_how_often_the_task_was_solved():
    levels = [replace(row, task=replace(row.task, metadata={"level": 1 + row.task.id.count("0")})) for row in
              (made(i=i) for i in (11, 12, 13, 1))]  # fmt: skip
    assert len(kept([{"name": "balance", "by": "level"}], levels)) == 2
    assert len(kept([{"name": "balance", "by": "steps"}], [made(ANSWER), made(ANSWER, i=1), made(i=2)])) == 2
    # Task 0 is solved once in four, tasks 1 to 3 always: what other filters remove counts, too.
    hard = [made(sample=n, success=n == 0) for n in range(4)]
    easy = [made(i=i) for i in (1, 2, 3)]
    assert len(kept(["correct", {"name": "balance", "by": "success_rate"}], hard + easy)) == 2


STRICT = yaml.safe_load((CONFIGS / "strict.yaml").read_text())["filters"]


@given(st.randoms(use_true_random=False))
def test_what_is_kept_does_not_depend_on_the_order_of_rows(rng: random.Random):
    rows = [
        made(
            *[step("x = 1 + 1", calls=1)] * (1 + n % 3),
            ANSWER,
            i=i,
            sample=n,
            kind="ab"[i % 2],
            success=(i + n) % 4 > 0,
        )
        for i in range(6)
        for n in range(4)
    ]
    filters = [*STRICT, {"name": "balance", "by": "success_rate", "seed": 3}]
    wanted = sorted(kept(filters, rows))
    rng.shuffle(rows)
    curated = Curation.from_config(filters).apply(rows)
    assert [row.key for row in curated.kept] == [row.key for row in rows if row.key in wanted]
    assert 0 < len(wanted) < len(rows)


def test_the_report_says_what_each_removed_in_their_order():
    rows = [made(i=i, kind="ab"[i > 3], success=i != 3) for i in range(10)] + [
        made(step(None, PARSE_ERROR), i=10, kind="b")
    ]
    curated = Curation.from_config(["correct", "balance", "no_parse_error"]).apply(rows)
    first, second, third = curated.report.removals
    assert (curated.report.seen, first.removed, first.left, first.examples) == (11, 1, 10, ("t003|policy|0|d",))
    assert (second.filter, second.removed, second.left) == ("balance", 4, 6)
    assert third.left == curated.report.kept == len(list(curated.kept))
    data = curated.report.to_json()
    assert data["seen"] == 11 and data["filters"][0] == {
        "filter": "correct", "removed": 1, "left": 10, "examples": ["t003|policy|0|d"],
    }  # fmt: skip
    from rich.console import Console

    console = Console(width=100)
    with console.capture() as captured:
        console.print(curated.report.table())
    assert "balance" in captured.get() and "t003|policy|0|d" in captured.get()


def test_per_trajectory_filters_stream():
    taken: list[int] = []

    def endless() -> Iterator[Trajectory]:
        i = 0
        while True:
            taken.append(i)
            yield made(i=i, success=i % 2 == 0)
            i += 1

    curated = Curation.from_config(["correct", "no_parse_error"]).apply(endless())
    assert [next(curated.kept).task.id for _ in range(3)] == ["t000", "t002", "t004"]
    assert len(taken) == 5 and curated.report.removals[0].removed == 2


def test_a_set_filter_reads_what_can_be_read_twice():
    curation = Curation.from_config(["correct", "per_task"])
    assert curation.needs_all and not curation.stream.needs_all and curation.stream.removed_by(made(success=False))
    starts: list[int] = []

    def source() -> Iterator[Trajectory]:
        starts.append(1)
        yield from [made(), made(sample=1), made(i=1)]

    assert [t.key for t in curation.apply(source).kept] == ["t000|policy|0|d", "t001|policy|0|d"] and len(starts) == 2
    with pytest.raises(CurationError, match="per_task must see all trajectories first"):
        curation.apply(iter([made()]))


@pytest.mark.parametrize(
    ("filters", "says"),
    [
        (["corect"], "filter 'corect' is unknown, did you mean 'correct'?; there are no_failure, correct"),
        (
            [{"name": "length", "max_step": 3}],
            "no parameter 'max_step', did you mean 'max_steps'?; there are max_tokens",
        ),
        ([{"name": "correct", "at_least": 1, "x": 2}], "filter 'correct' has no parameter 'x'; there are at_least"),
        ([{"name": "no_leak", "x": 2}], "filter 'no_leak' has no parameter 'x'; it has none"),
        ([{"name": "length", "max_steps": "3"}], "filter 'length': max_steps is '3': input should be a valid integer"),
        (["length"], "filter 'length': give at least one of max_tokens, max_steps"),
        ([{"name": "agreement", "at_least": 2}], "at_least must be in [0, 1], not 2"),
        ([{"name": "balance", "ratio": 0.5}], "ratio must be at least 1, not 0.5"),
        ([{"name": "balance", "by": "size"}], "filter 'balance': by is 'size': input should be 'kind'"),
        ([{"name": "per_task", "at_most": 0}], "at_most must be at least 1, not 0"),
        ("correct", "filters must be a list"),
        ([{"max_steps": 3}], "write a name, or"),
    ],
)
def test_a_wrong_filter_is_named_with_what_there_is(filters, says):
    with pytest.raises(CurationError) as raised:
        Curation.from_config(filters)
    assert says in str(raised.value)


@pytest.mark.parametrize("path", sorted(CONFIGS.glob("*.yaml")), ids=lambda path: path.stem)
def test_every_packaged_curation_can_be_used(path):
    curation = Curation.from_config(yaml.safe_load(path.read_text())["filters"])
    assert list(curation.apply([made(step("x = 1 + 1", calls=1), ANSWER)]).kept)


def test_the_papers_curation_keeps_what_was_repaired():
    paper = Curation.from_config(yaml.safe_load((CONFIGS / "paper.yaml").read_text())["filters"])
    assert paper.keeps(made(step(kind=CODE_ERROR), step(), ANSWER))
    assert not paper.keeps(made(step(None, PARSE_ERROR), step(), ANSWER)) and not paper.keeps(made(success=False))
