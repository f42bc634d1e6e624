"""How a policy and an env talk: system prompt, parsing of a turn, wording of what comes back, stop strings.

`CodeDialect` is the Thought / Code / Observation format of arXiv 2505.17612 (smolagents' CodeAgent): every turn is
`Thought: ...`, `Code:`, a fenced Python block and `<end_code>`. `ToolDialect` is Qwen's and Hermes' function calling:
`<tool_call>` blocks of JSON, or an answer in plain words. `SearchDialect` is Search-R1's `<think>`, `<search>`,
`<information>` and `<answer>` (arXiv 2503.09516). `AnswerDialect` is plain chain of thought ending in `Answer: ...`:
the paper's baseline without tools. `DirectDialect` is the answer at once, without reasoning: what a model knows by
heart.

Example::

    turn = CODE.parse("Thought: add.\\nCode:\\n```py\\nprint(1 + 1)\\n```<end_code>")
    turn.action        # 'print(1 + 1)'
    turn.spans         # thought, format and code, covering the text without gap
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from envs.search_env import INVALID
from envs.tools import Tool
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
_LABEL = re.compile(r"\s*Thought:[ \t]*")
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


class DirectDialect:
    """The answer at once: the first line that says something is the answer, `Answer:` in front of it aside. Lines
    behind it, where a model goes on to reason, do not count."""

    name = "direct"
    stop: tuple[str, ...] = ()

    def __init__(self, system_prompt: str) -> None:
        self.system_prompt = system_prompt

    def parse(self, text: str) -> ParsedTurn:
        found = _FIRST_LINE.match(text)
        if found is None:
            spans = _spans([(SpanType.FORMAT, 0, len(text))])
            return ParsedTurn(spans=spans, action=None, error="No answer was found.")
        start, end = found.span(1)
        pieces = [(SpanType.FORMAT, 0, start), (SpanType.ANSWER, start, end), (SpanType.THOUGHT, end, len(text))]
        return ParsedTurn(spans=_spans(pieces), action=found.group(1))

    def observation(self, text: str) -> str:
        return text

    def opening(self, first_thought: str) -> str:
        return ""


_FIRST_LINE = re.compile(r"\s*(?:Answer:\s*)?+(\S(?:[^\n]*\S)?)")
_CALL_START = re.compile(r"<tool_call>\s*")
_CALL_END = re.compile(r"\s*(?:</tool_call>|\Z)")
_TOOLS_PREAMBLE = """

# Tools

You may call one or more functions to assist with the user query.

You are provided with function signatures within <tools></tools> XML tags:
<tools>
{signatures}
</tools>

For each function call, return a json object with function name and arguments within <tool_call></tool_call> XML tags:
<tool_call>
{{"name": <function-name>, "arguments": <args-json-object>}}
</tool_call>"""  # word for word Qwen2.5's chat template, which these models were trained with


def tools_preamble(signatures: Iterable[str]) -> str:
    """What Qwen's chat template puts behind the system prompt to tell of functions; each signature is a line of
    JSON."""
    return _TOOLS_PREAMBLE.format(signatures="\n".join(signatures))


class ToolDialect:
    """JSON function calls in `<tool_call>` tags, several a turn if need be; a turn without one is the final answer.

    `<think>...</think>` and what stands before the first call is thought. The action is the JSON list of the turn's
    calls, as `envs.tool_env` takes it; an answer in words becomes the call of `final_answer`.
    """

    name = "tool"
    stop: tuple[str, ...] = ()
    """A turn ends by itself: behind one call there may be another."""

    def __init__(self, system_prompt: str) -> None:
        self.system_prompt = system_prompt

    @classmethod
    def for_tools(cls, system_prompt: str, tools: Sequence[Tool]) -> ToolDialect:
        """With the signatures of `tools` in the system prompt, as a model needs it that was not trained on them."""
        signatures = (json.dumps(tool.as_json_schema(), ensure_ascii=False) for tool in tools)
        return cls(system_prompt + tools_preamble(signatures))

    def parse(self, text: str) -> ParsedTurn:
        pieces = _Pieces(text)
        pieces.think("<tool_call>")
        if "<tool_response>" in text[pieces.at :]:
            return pieces.failed("Error in tool call parsing: <tool_response> is written by the tools, never by you.")
        calls: list[Any] = []
        action = ""
        while start := _CALL_START.search(text, pieces.at):
            pieces.thought(start.start())
            pieces.to(SpanType.FORMAT, start.end())
            try:
                call, end = _JSON.raw_decode(text, pieces.at)
                calls.append(call)
                action = json.dumps(calls)  # what can be read may be nested too deeply to be written
            except (ValueError, RecursionError) as error:
                fault = _fault(error, pieces.at)
                return _Pieces(text).failed(f"Error in tool call parsing: call {len(calls) + 1} is {fault}.")
            final = isinstance(call, dict) and call.get("name") == "final_answer"
            pieces.to(SpanType.ANSWER if final else SpanType.CODE, end)
            closed = _CALL_END.match(text, end)
            if closed is None:
                return _Pieces(text).failed(
                    f"Error in tool call parsing: after its JSON, call {len(calls)} must end with </tool_call>."
                )
            pieces.to(SpanType.FORMAT, closed.end())
        if calls:
            pieces.thought(len(text))
            return pieces.turn(action)
        answer = text[pieces.at :].strip()
        if not answer:
            return pieces.failed("Error in tool call parsing: neither a <tool_call> nor an answer was found.")
        pieces.blank()
        pieces.to(SpanType.ANSWER, pieces.at + len(answer))
        return pieces.turn(json.dumps([{"name": "final_answer", "arguments": {"answer": answer}}]))

    def observation(self, text: str) -> str:
        return text

    def opening(self, first_thought: str) -> str:
        return f"<think>\n{first_thought.strip()}"


_SEARCH_TAG = re.compile(r"<(search|answer)>(.*?)(</search>|</answer>|\Z)", re.DOTALL)


class SearchDialect:
    """Search-R1's tags. The action is the turn's first `<search>` or `<answer>`, as `envs.search_env` takes it.

    An endpoint may leave out the tag that it stopped at, or put back the wrong one of the two: both are read.
    """

    name = "search"
    stop: tuple[str, ...] = ("</search>", "</answer>")

    def __init__(self, system_prompt: str) -> None:
        self.system_prompt = system_prompt

    def parse(self, text: str) -> ParsedTurn:
        pieces = _Pieces(text)
        pieces.think("<search>|<answer>")
        tag = _SEARCH_TAG.search(text, pieces.at)
        if tag is None or not tag[2].strip():
            return pieces.failed(INVALID)
        pieces.thought(tag.start())
        pieces.to(SpanType.FORMAT, tag.start(2))
        pieces.blank()
        content = tag[2].strip()
        pieces.to(SpanType.CODE if tag[1] == "search" else SpanType.ANSWER, pieces.at + len(content))
        return pieces.turn(f"<{tag[1]}>{content}</{tag[1]}>")

    def observation(self, text: str) -> str:
        return text

    def opening(self, first_thought: str) -> str:
        return f"<think>{first_thought.strip()}"


_THINK = re.compile(r"\s*<think>(.*?)</think>", re.DOTALL)
_JSON = json.JSONDecoder()


class _Pieces:
    """Spans of a turn, put down from left to right without gap."""

    def __init__(self, text: str) -> None:
        self.text, self.at = text, 0
        self._spans: list[tuple[SpanType, int, int]] = []

    def to(self, kind: SpanType, end: int) -> None:
        if end > self.at:
            self._spans.append((kind, self.at, end))
            self.at = end

    def blank(self) -> None:
        """White space that follows is format."""
        self.blank_to(len(self.text))

    def think(self, action: str) -> None:
        """A `<think>` at the beginning: its inside is thought, its tags are format. One that is not closed ends where
        `action` begins, a pattern."""
        closed = _THINK.match(self.text)
        found = closed or re.compile(rf"\s*<think>(.*?)(?={action}|\Z)", re.DOTALL).match(self.text)
        if found:
            self.to(SpanType.FORMAT, found.start(1))
            self.thought(found.end(1))
            self.to(SpanType.FORMAT, found.end())

    def thought(self, end: int) -> None:
        """Thought up to `end`, the white space around it aside."""
        self.blank_to(end)
        self.to(SpanType.THOUGHT, self.at + len(self.text[self.at : end].rstrip()))
        self.to(SpanType.FORMAT, end)

    def blank_to(self, end: int) -> None:
        inside = self.text[self.at : end]
        self.to(SpanType.FORMAT, self.at + len(inside) - len(inside.lstrip()))

    def turn(self, action: str) -> ParsedTurn:
        self.to(SpanType.FORMAT, len(self.text))
        return ParsedTurn(spans=_spans(self._spans), action=action)

    def failed(self, error: str) -> ParsedTurn:
        self.to(SpanType.THOUGHT, len(self.text))
        return ParsedTurn(spans=_spans(self._spans), action=None, error=error)


def _fault(error: Exception, start: int) -> str:
    """`start`: where in the text the JSON begins."""
    if isinstance(error, json.JSONDecodeError):
        return f"not JSON: {error.msg} at its character {error.pos - start}"
    return "no JSON that can be read"


def _thought(text: str, fence_start: int) -> tuple[int, int]:
    """Where the thought stands: behind `Thought:` (or at the start) up to the `Code:` line (or the fence)."""
    start = 0
    label = _LABEL.match(text)
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
TOOL = ToolDialect("Solve the task step by step with the tools. When you know the answer, reply with the answer alone.")
SEARCH = SearchDialect(  # Search-R1's own words
    "Answer the given question. You must conduct reasoning inside <think> and </think> first every time you get new "
    "information. After reasoning, if you find you lack some knowledge, you can call a search engine by <search> query "
    "</search> and it will return the top searched results between <information> and </information>. You can search as "
    "many times as your want. If you find no further external knowledge needed, you can directly provide the answer "
    "inside <answer> and </answer>, without detailed illustrations. For example, <answer> Beijing </answer>."
)
DIRECT = DirectDialect("Reply with the answer alone.")
DIALECTS: dict[str, Dialect] = {dialect.name: dialect for dialect in (CODE, COT, DIRECT, TOOL, SEARCH)}
