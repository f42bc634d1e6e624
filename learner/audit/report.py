"""`audit`: makes every row that the learner would make, checks it, and counts: `AuditReport`.

Example::

    report = audit(trajectories, tokenizer, max_row_tokens=1024, samples=3)
    report.trained["code"], report.weight["code"]      # trained code tokens, and what they weigh together
    report.wrong[Claim.STOPS]                          # 0
"""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from learner.audit.proofs import AuditFailure, Claim, check_batches, check_row
from learner.examples import TRAINED_SPANS, Example, ExampleMaker, RefusedRow
from rollout.trajectory import Trajectory

PLANNED_ROWS = 64
"""Rows that are planned together; masks do not depend on it."""
KEPT = 2000
"""Rows, refused rows and failures that are listed one by one; all are counted."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RowCounts:
    """One row in numbers; tokens unless said otherwise."""

    key: str
    tokens: int
    turns: int
    by_span: Mapping[str, int]
    """Span type -> its tokens, trained or not."""
    trained: int
    weight: float
    """Sum of the loss weights."""
    wrong: int
    """Claims that do not hold of it."""


@dataclass(slots=True)
class AuditReport:
    """What `audit` found; counts are tokens unless said otherwise."""

    trajectories: int = 0
    rows: int = 0
    """Trajectories that are trained on."""
    refused: Counter[str] = field(default_factory=Counter)
    """Reason -> trajectories."""
    refused_rows: list[RefusedRow] = field(default_factory=list)
    """The first of them, with details."""
    trained: Counter[str] = field(default_factory=Counter)
    """Span type -> trained tokens."""
    read: Counter[str] = field(default_factory=Counter)
    """Span type -> tokens that are only read."""
    weight: dict[str, float] = field(default_factory=dict)
    """Span type -> sum of its loss weights."""
    said: int = 0
    """Tokens of assistant turns, their stop tokens included."""
    stop_tokens: int = 0
    """Trained stop tokens: one per turn."""
    turns: int = 0
    wrong: Counter[Claim] = field(default_factory=Counter)
    """Claim -> failures."""
    failures: list[AuditFailure] = field(default_factory=list)
    """The first of them."""
    row_counts: list[RowCounts] = field(default_factory=list)
    """The first rows."""
    samples: list[Example] = field(default_factory=list)
    """The first rows, to be looked at."""

    @property
    def ok(self) -> bool:
        """Nothing is wrong, and something was looked at."""
        return not self.wrong and self.rows > 0

    def checked(self, claim: Claim) -> str:
        """How much a claim was checked on, in words."""
        trained = self.trained.total()
        return {
            Claim.TEXT: f"{self.rows:,} rows",
            Claim.PREFIXES: f"{self.turns:,} turns",
            Claim.STOPS: f"{self.stop_tokens:,} stop tokens of {self.turns:,} turns",
            Claim.READ: f"{self.read.total():,} tokens that are only read",
            Claim.COVERED: f"{self.said:,} tokens of {self.turns:,} turns",
            Claim.TYPES: f"{self.said:,} tokens",
            Claim.WEIGHTS: f"{trained:,} trained tokens, {math.fsum(self.weight.values()):,.6g} in all",
            Claim.BATCHES: f"{trained:,} trained tokens, bucketed and packed",
        }[claim]

    def to_json(self) -> str:
        return json.dumps(
            {
                "ok": self.ok,
                "trajectories": self.trajectories,
                "rows": self.rows,
                "refused": dict(self.refused),
                "refused_rows": [
                    {"key": row.key, "reason": row.reason, "detail": row.detail} for row in self.refused_rows
                ],
                "trained_tokens": dict(self.trained),
                "read_tokens": dict(self.read),
                "weight": self.weight,
                "turns": self.turns,
                "stop_tokens": self.stop_tokens,
                "proofs": {
                    claim.value: {"checked": self.checked(claim), "wrong": self.wrong[claim]} for claim in Claim
                },
                "failures": [
                    {"key": failure.key, "claim": failure.claim, "problem": failure.problem}
                    for failure in self.failures
                ],
            }
        )

    def _add_failure(self, failure: AuditFailure) -> None:
        self.wrong[failure.claim] += 1
        if len(self.failures) < KEPT:
            self.failures.append(failure)

    def _add_row(self, example: Example, wrong: int, stop_id: int) -> None:
        self.rows += 1
        by_span: Counter[str] = Counter(span.value for span in example.span_types)
        trained = 0
        for token, span, weight in zip(example.token_ids, example.span_types, example.loss_weights, strict=True):
            if weight > 0:
                trained += 1
                self.trained[span.value] += 1
                self.weight[span.value] = self.weight.get(span.value, 0.0) + weight
                self.stop_tokens += token == stop_id
            else:
                self.read[span.value] += 1
        turns = max(example.turns) + 1
        self.turns += turns
        self.said += sum(turn >= 0 for turn in example.turns)
        if len(self.row_counts) < KEPT:
            self.row_counts.append(
                RowCounts(
                    key=example.key,
                    tokens=len(example),
                    turns=turns,
                    by_span=dict(by_span),
                    trained=trained,
                    weight=math.fsum(example.loss_weights),
                    wrong=wrong,
                )
            )


def audit(
    trajectories: Iterable[Trajectory],
    tokenizer: Any,
    *,
    max_row_tokens: int,
    system_prompt: str | None = None,
    span_weights: Mapping[str, float] | None = None,
    samples: int = 2,
) -> AuditReport:
    """Check every row that the learner would make of `trajectories`. Raises `RenderingError`."""
    maker = ExampleMaker(
        tokenizer, max_row_tokens=max_row_tokens, system_prompt=system_prompt, span_weights=span_weights
    )
    stop_id = maker.renderer.stop_token_id
    report = AuditReport()
    planned: list[Example] = []

    def check_planned() -> None:
        for failure in check_batches(planned, max_row_tokens):
            report._add_failure(failure)
        planned.clear()

    for trajectory in trajectories:
        report.trajectories += 1
        made = maker.make(trajectory)
        if isinstance(made, RefusedRow):
            report.refused[made.reason.value] += 1
            if len(report.refused_rows) < KEPT:
                report.refused_rows.append(made)
            continue
        failures = list(check_row(made, maker.messages(trajectory), maker))
        for failure in failures:
            report._add_failure(failure)
        report._add_row(made, len(failures), stop_id)
        if len(report.samples) < samples:
            report.samples.append(made)
        planned.append(made)
        if len(planned) == PLANNED_ROWS:
            check_planned()
    check_planned()
    unknown = set(report.trained) - {span.value for span in TRAINED_SPANS}
    if unknown:
        report._add_failure(AuditFailure(key="", claim=Claim.READ, problem=f"tokens of {sorted(unknown)} are trained"))
    return report
