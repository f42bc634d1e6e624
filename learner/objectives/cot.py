"""Chain-of-thought distillation, the baseline beside agents: a rationale in words and its answer, no code, no tools.

The loss is that of `sft`: cross entropy on every token of the turn (thought, answer, and the stop token, which is
format), each by its weight. What differs is what it trains on: one turn without observations, as the "cot" dialect
makes it. A row with code in it is an agent's, and is refused rather than trained on under the wrong name. To weigh
rationale and answer differently (arXiv 2305.02301 does, by two losses), set `span_weights` of "thought" and "answer".
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from learner.objectives.sft import SftObjective

if TYPE_CHECKING:
    from learner.examples import Example, RefusedRow


class CotObjective(SftObjective):
    """`sft` on rows of one turn without code."""

    name = "cot"

    def fit(self, example: Example) -> Example | RefusedRow:
        from learner.examples import Refusal, RefusedRow
        from rollout.trajectory import SpanType

        turns = max(example.turns) + 1
        code = example.span_types.count(SpanType.CODE)
        if code or turns > 1:
            return RefusedRow(
                example.key, Refusal.OBJECTIVE, f"{turns} turns with {code} tokens of code are no chain of thought"
            )
        return example
