"""learner.audit: right rows are proven and counted, every claim can fail, and the report is shown three ways."""

from __future__ import annotations

import dataclasses
import html.parser
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from learner_samples import TOKENIZER, example_of, trajectory, turn
from tokenizer_samples import NAMES
from tokenizer_samples import tokenizer as small_tokenizer

from learner.audit import Claim, audit, check_row
from learner.audit.__main__ import main
from learner.audit.page import html_page
from learner.audit.proofs import check_batches
from learner.config import ConfigError, LearnerConfig
from learner.examples import Example, ExampleMaker
from learner.packing import StepPlan, plan_step
from rollout.ledger import LedgerWriter
from rollout.trajectory import SpanType


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(TOKENIZER)


@pytest.fixture(scope="module")
def maker(tokenizer: Any) -> ExampleMaker:
    return ExampleMaker(tokenizer, max_row_tokens=1024)


def test_audit_proves_good_rows_and_counts_them(tokenizer: Any) -> None:
    rows = [trajectory(i, system_prompt="Be brief." if i % 2 else "") for i in range(8)]
    report = audit([*rows, trajectory(9, success=False)], tokenizer, max_row_tokens=1024)
    assert report.ok, report.failures
    assert (report.rows, report.turns, report.stop_tokens) == (8, 16, 16)
    assert report.refused == {"not_trainable": 1}
    assert report.trained["observation"] == report.trained["user"] == report.trained["system"] == 0


def test_audit_of_nothing_is_not_ok(tokenizer: Any) -> None:
    assert not audit([trajectory(1, success=False)], tokenizer, max_row_tokens=1024).ok


def shifted(made: Example, by: int) -> Example:
    weights = made.loss_weights
    return dataclasses.replace(made, loss_weights=(*weights[-by:], *weights[:-by]) if by else weights)


def weighing(made: Example, *weights: float) -> Example:
    return dataclasses.replace(made, loss_weights=weights)


@pytest.mark.parametrize(
    ("break_it", "claim", "said"),
    [
        (lambda made: shifted(made, 1), Claim.WEIGHTS, "is not trained"),
        (lambda made: weighing(made, *(2 * weight for weight in made.loss_weights)), Claim.WEIGHTS, "weighs 2.0, a"),
        (lambda made: weighing(made, *(1.0,) * len(made)), Claim.READ, "outside the assistant's turns"),
        (lambda made: weighing(made, *made.loss_weights[:-1], 0.0), Claim.STOPS, "its stop token is not trained"),
        (lambda made: dataclasses.replace(made, token_ids=(*made.token_ids[:-1], 17)), Claim.COVERED, "no stop token"),
        (lambda made: dataclasses.replace(made, turns=(0,) * len(made)), Claim.COVERED, "token 0 is counted to turn 0"),
        (lambda made: dataclasses.replace(made, token_ids=(17, *made.token_ids[1:])), Claim.PREFIXES, "no prefix"),
        (lambda made: dataclasses.replace(made, token_ids=(17, *made.token_ids[1:])), Claim.TEXT, "does not decode"),
        (lambda made: dataclasses.replace(made, span_types=made.span_types[:-1]), Claim.COVERED, "same length"),
        (
            lambda made: dataclasses.replace(
                made, span_types=tuple(SpanType.CODE if s is SpanType.THOUGHT else s for s in made.span_types)
            ),
            Claim.TYPES,
            "is counted as code",
        ),
    ],
)
def test_audit_finds_a_wrong_mask(maker: ExampleMaker, break_it: Any, claim: Claim, said: str) -> None:
    one = trajectory(4)
    made = example_of(maker, one)
    assert not list(check_row(made, maker.messages(one), maker))
    failures = list(check_row(break_it(made), maker.messages(one), maker))
    assert any(failure.claim is claim and said in failure.problem for failure in failures), failures


def moved_targets(*given: Any, **settings: Any) -> StepPlan:
    """A planner that is off by one."""
    return planned(lambda batch: {"selected": np.maximum(0, batch.selected - 1)}, *given, **settings)


def heavier(*given: Any, **settings: Any) -> StepPlan:
    """A planner that doubles the weights."""
    return planned(lambda batch: {"weights": 2 * batch.weights}, *given, **settings)


def planned(change: Any, *given: Any, **settings: Any) -> StepPlan:
    plan = plan_step(*given, **settings)
    ranks = tuple(tuple(dataclasses.replace(batch, **change(batch)) for batch in rank) for rank in plan.ranks)
    return dataclasses.replace(plan, ranks=ranks)


@pytest.mark.parametrize(
    ("planner", "claim", "said"),
    [
        (moved_targets, Claim.BATCHES, "are missing or behind another prefix"),
        (heavier, Claim.WEIGHTS, "targets weigh"),
    ],
)
def test_audit_finds_wrong_batches(maker: ExampleMaker, planner: Any, claim: Claim, said: str) -> None:
    rows = [example_of(maker, trajectory(i)) for i in range(5)]
    assert not list(check_batches(rows, 1024))
    failures = list(check_batches(rows, 1024, planner))
    assert {failure.claim for failure in failures} == {claim} and said in failures[0].problem
    assert len(failures) == 2  # bucketed and packed


def test_a_run_that_does_not_train_its_stop_tokens_is_told(tokenizer: Any) -> None:
    report = audit([trajectory(1)], tokenizer, max_row_tokens=1024, span_weights={"format": 0.0})
    assert not report.ok and report.wrong == {Claim.STOPS: 2}


def test_a_run_that_would_not_train_its_stop_tokens_is_refused() -> None:
    with pytest.raises(ConfigError, match="never ends a turn; use a small weight"):
        LearnerConfig(model_path="m", output_dir="o", epochs=1, span_weights={"format": 0.0})


def test_weights_add_up_to_what_the_spans_weigh(tokenizer: Any) -> None:
    report = audit([trajectory(1)], tokenizer, max_row_tokens=1024, span_weights={"code": 0.5, "thought": 2.0})
    assert report.ok
    assert (
        report.weight["code"] == report.trained["code"] / 2
        and report.weight["thought"] == report.trained["thought"] * 2
    )


# -- how it is shown


ODD = turn(
    "Farmers \U0001f469\u200d\U0001f33e <b>bold</b> & <|im_end|>",
    "print('\u00e9')",
    "Observation:\n<script>alert(1)</script>",
)


class Page(html.parser.HTMLParser):
    """A page as a browser takes it in: its texts, its tags; fails on tags that are not closed in order."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[str] = []
        self.links: list[str] = []
        self.pre: list[str] = []
        self.text = ""
        self._hidden = 0
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.links += [value or "" for name, value in attrs if name in ("src", "href")]
        if tag != "meta":
            self.open.append(tag)
        if tag == "pre":
            self.pre.append("")

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data
        if "pre" in self.open and "u" not in self.open:
            self.pre[-1] += data


@pytest.mark.parametrize("name", NAMES)
def test_the_page_shows_rows_as_they_are_and_needs_nothing_else(name: str) -> None:
    of = small_tokenizer(name)
    odd = dataclasses.replace(trajectory(1), steps=(ODD, trajectory(1).steps[1]))
    report = audit([odd, trajectory(2), trajectory(3, success=False)], of, max_row_tokens=4096)
    text = html_page(report, of, title="a <ledger>")
    page = Page(text)
    assert [of.decode(example.token_ids) for example in report.samples] == page.pre
    assert "script" not in page.tags and page.links == [] and "http" not in text and "@import" not in text
    for shown in ("Every mask is proven.", "a <ledger>", "no success, stopped by final", *SpanType, *Claim):
        assert shown in page.text
    assert all(row.key in page.text for row in (*report.row_counts, *report.refused_rows))


def test_the_page_says_what_is_wrong(tokenizer: Any) -> None:
    report = audit([trajectory(1)], tokenizer, max_row_tokens=1024, span_weights={"format": 0.0})
    page = Page(html_page(report, tokenizer, title="x"))
    assert "2 proofs fail." in page.text and "its stop token is not trained" in page.text


@pytest.fixture(scope="module")
def ledgers(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("ledgers")
    odd = dataclasses.replace(trajectory(7), steps=(ODD, trajectory(7).steps[1]))
    LedgerWriter(folder / "good", writer="a").append([*(trajectory(i) for i in range(3)), odd])
    LedgerWriter(folder / "bad", writer="a").append([trajectory(1, success=False)])
    return folder


def test_the_command_shows_rows_and_proofs(ledgers: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([str(ledgers / "good"), "--tokenizer", str(TOKENIZER), "--rows", "4"]) == 0
    shown = capsys.readouterr().out
    for part in ("Every mask is proven", "stop tokens are trained", "weights add up", "final_answer", "\U0001f33e"):
        assert part in shown


def test_the_commands_exit_code_is_its_verdict(ledgers: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([str(ledgers / "bad")]) == 1
    assert "no success, stopped by final" in capsys.readouterr().out
    assert main([str(ledgers / "none")]) == 1
    assert main([str(ledgers / "good"), "--span-weight", "format=0"]) == 1


def test_the_command_writes_json_and_a_page(ledgers: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = [str(ledgers / "good"), "--json", "--html", str(tmp_path / "page.html"), "--span-weight", "code=0.5"]
    assert main(arguments) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["ok"] and report["rows"] == 4 and report["stop_tokens"] == report["turns"] == 8
    assert report["weight"]["code"] == report["trained_tokens"]["code"] / 2
    assert set(report["proofs"]) == set(Claim)
    assert Page((tmp_path / "page.html").read_text(encoding="utf-8")).pre


@pytest.mark.parametrize("weight", ["observation=1", "code", "code=x", "code=-1"])
def test_the_command_refuses_weights_that_cannot_be(
    ledgers: Path, weight: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([str(ledgers / "good"), "--span-weight", weight]) == 1
    assert f"--span-weight '{weight}'" in capsys.readouterr().err
