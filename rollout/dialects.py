"""How a policy and an env talk: system prompt, parsing of a turn, wording of what comes back, stop strings.

`CodeDialect` is the Thought / Code / Observation format of arXiv 2505.17612 (smolagents' CodeAgent): every turn is
`Thought: ...`, `Code:`, a fenced Python block and `<end_code>`. `AnswerDialect` is plain chain of thought ending in
`Answer: ...`: the paper's baseline without tools.

Example::

    turn = CODE.parse("Thought: add.\\nCode:\\n```py\\nprint(1 + 1)\\n```<end_code>")
    turn.action        # 'print(1 + 1)'
    turn.spans         # thought, format and code, covering the text without gap
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Protocol

from rollout.trajectory import Span, SpanType


@dataclass(frozen=True, slots=True, kw_only=True)
class ParsedTurn:
    """An assistant turn, understood."""

    spans: tuple[Span, ...]
    """Cover the text without gap or overlap."""
    action: str | None
    """What to give to the env; None when the turn could not be parsed."""
    error: str | None = None
    """What to tell the model when it could not."""


class Dialect(Protocol):
    """Stateless; one instance serves every episode."""

    name: str
    system_prompt: str
    """The short prompt that students are trained and run with."""
    stop: tuple[str, ...]

    def parse(self, text: str) -> ParsedTurn: ...

    def observation(self, text: str) -> str:
        """How the env's observation is worded as the next message."""
        ...

    def opening(self, first_thought: str) -> str:
        """The beginning of a turn that continues `first_thought`: the first-thought prefix."""
        ...


_FENCE = re.compile(r"```(?:py|python)?[ \t]*\n(.*?)\n?```", re.DOTALL)
_FINAL = re.compile(r"^[ \t]*final_answer\(", re.MULTILINE)


class CodeDialect:
    """Thought / Code / Observation, as the paper's agents write it."""

    name = "code"
    stop: tuple[str, ...] = ("<end_code>",)

    def __init__(self, system_prompt: str) -> None:
        self.system_prompt = system_prompt

    def parse(self, text: str) -> ParsedTurn:
        fence = _FENCE.search(text)
        if fence is None or not fence.group(1).strip():
            end = len(text)
            return ParsedTurn(
                spans=(Span(type=SpanType.THOUGHT, start=0, end=end),) if end else (),
                action=None,
                error=(
                    "Error in code parsing: no code block was found in your answer. "
                    "Write it as:\nThought: your thoughts\nCode:\n```py\n# your code\n```<end_code>"
                ),
            )
        code_start, code_end = fence.span(1)
        thought_start, thought_end = _thought(text, fence.start())
        final = _FINAL.search(text, code_start, code_end)
        answer_start = final.start() if final else code_end
        pieces = [
            (SpanType.FORMAT, 0, thought_start),
            (SpanType.THOUGHT, thought_start, thought_end),
            (SpanType.FORMAT, thought_end, code_start),
            (SpanType.CODE, code_start, answer_start),
            (SpanType.ANSWER, answer_start, code_end),
            (SpanType.FORMAT, code_end, len(text)),
        ]
        return ParsedTurn(spans=_spans(pieces), action=fence.group(1))

    def observation(self, text: str) -> str:
        return f"Observation:\n{text}"

    def opening(self, first_thought: str) -> str:
        return f"Thought: {first_thought.removeprefix('Thought:').strip()}"


class AnswerDialect:
    """Reasoning in words, then `Answer: ...` on a line of its own."""

    name = "cot"
    stop: tuple[str, ...] = ()

    def __init__(self, system_prompt: str) -> None:
        self.system_prompt = system_prompt

    def parse(self, text: str) -> ParsedTurn:
        found = text.rfind("Answer:")
        answer = text[found + len("Answer:") :].strip() if found >= 0 else ""
        if not answer:
            spans = _spans([(SpanType.THOUGHT, 0, len(text))])
            return ParsedTurn(spans=spans, action=None, error="No line that begins with 'Answer:' was found.")
        return ParsedTurn(
            spans=_spans([(SpanType.THOUGHT, 0, found), (SpanType.ANSWER, found, len(text))]), action=answer
        )

    def observation(self, text: str) -> str:
        return text

    def opening(self, first_thought: str) -> str:
        return first_thought


def _thought(text: str, fence_start: int) -> tuple[int, int]:
    """Where the thought stands: behind `Thought:` (or at the start) up to the `Code:` line (or the fence)."""
    start = 0
    label = re.match(r"\s*Thought:[ \t]*", text)
    if label:
        start = label.end()
    code_label = text.rfind("Code:", start, fence_start)
    end = code_label if code_label >= 0 else fence_start
    while end > start and text[end - 1].isspace():
        end -= 1
    return start, end


def _spans(pieces: list[tuple[SpanType, int, int]]) -> tuple[Span, ...]:
    return tuple(Span(type=kind, start=start, end=end) for kind, start, end in pieces if end > start)


CODE = CodeDialect("Solve the task step by step with Python code.")
COT = AnswerDialect("Solve the task step by step.")
DIALECTS: dict[str, Dialect] = {dialect.name: dialect for dialect in (CODE, COT)}
