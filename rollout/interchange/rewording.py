"""Foreign turns in our dialects' words, only where that is exact: thought and action stay letter by letter, the format
around them becomes ours. Where it would not be, None comes back and the turn stays as it is.

Example::

    code_turn("Thought: add.\\n<code>\\nprint(1 + 1)\\n</code>")
    # 'Thought: add.\\nCode:\\n```py\\nprint(1 + 1)\\n```<end_code>'
    react_turn("Thought: look.\\nAction: search[Paris]", {"search": "web_search"}).text
    # 'Thought: look.\\nCode:\\n```py\\nprint(web_search("Paris"))\\n```<end_code>'
"""

from __future__ import annotations

import ast
import json
import re
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from rollout.dialects import CODE, SEARCH
from rollout.trajectory import SpanType

FINAL = "final_answer"
_TAGGED = re.compile(r"<code>(.*?)</code>", re.DOTALL)
_FENCED = re.compile(r"```(?:py|python)?[ \t]*\n(.*?)\n?```", re.DOTALL)
_ACTION = re.compile(r"^[ \t]*Action(?: \d+)?:[ \t]*(\w+)\[([^\n]*)\][ \t]*$", re.MULTILINE)
_ACTION_LABEL = re.compile(r"^[ \t]*Action(?: \d+)?:", re.MULTILINE)
_THOUGHT_LABEL = re.compile(r"\s*Thoughts?(?: \d+)?:\s*")


def write_code_turn(thought: str, code: str) -> str | None:
    """A turn of the code dialect; None when its parser would not read exactly this thought and this code out of it."""
    thought, code = thought.strip(), code.strip("\n")
    turn = f"Thought: {thought}\n" if thought else ""
    turn += f"Code:\n```py\n{code}\n```<end_code>"
    parsed = CODE.parse(turn)
    read = "".join(turn[span.start : span.end] for span in parsed.spans if span.type is SpanType.THOUGHT)
    return turn if parsed.action == code and read == thought else None


def code_turn(text: str) -> str:
    """A turn with one `<code>` block, or one fence, at its end, as the code dialect writes it; else the text as it is.

    A `</code>` without a beginning is taken off in any case: smolagents puts it behind what was sampled.
    """
    blocks = list(_TAGGED.finditer(text))
    if len(blocks) == 1 and not text[blocks[0].end() :].strip():
        return write_code_turn(_thought(text[: blocks[0].start()]), blocks[0].group(1).strip()) or text
    if blocks:
        return text
    text = text.rstrip().removesuffix("</code>").rstrip() if text.rstrip().endswith("</code>") else text
    fences = list(_FENCED.finditer(text))
    if len(fences) != 1 or text[fences[0].end() :].strip():
        return text
    thought = text[: fences[0].start()].rstrip()
    if thought.endswith("Code:"):
        return text  # it is this dialect already, but for the mark of its end
    return write_code_turn(_thought(thought), fences[0].group(1)) or text


def _thought(text: str) -> str:
    label = _THOUGHT_LABEL.match(text)
    text = (text[label.end() :] if label else text).strip()
    return text.removesuffix("Code:").rstrip()


@dataclass(frozen=True, slots=True, kw_only=True)
class ReactTurn:
    """`Thought: ...` and `Action: name[argument]`, understood."""

    thought: str
    name: str
    """In lower case."""
    argument: str
    text: str | None
    """The turn as code; None when its action has no function, or it cannot be written exactly."""
    searched: str | None
    """The turn with Search-R1's tags; None when it has no such action."""


def react_turn(text: str, functions: Mapping[str, str]) -> ReactTurn | None:
    """A ReAct turn that ends in its only action; None for anything else. `functions`: action -> function to call."""
    found = _ACTION.search(text)
    if found is None or text[found.end() :].strip() or len(_ACTION_LABEL.findall(text)) > 1:
        return None
    label = _THOUGHT_LABEL.match(text)
    thought = text[label.end() if label and label.end() <= found.start() else 0 : found.start()].strip()
    name, argument = found[1].lower(), found[2]
    function = functions.get(name)
    code = None
    if function is not None:
        call = f"{function}({json.dumps(argument, ensure_ascii=False)})"
        code = call if function == FINAL else f"print({call})"
    tag = {"search": "search", "finish": "answer"}.get(name)
    searched = f"<think>{thought}</think>\n<{tag}>{argument.strip()}</{tag}>" if tag else None
    if searched and SEARCH.parse(searched).action != f"<{tag}>{argument.strip()}</{tag}>":
        searched = None
    return ReactTurn(
        thought=thought,
        name=name,
        argument=argument,
        text=write_code_turn(thought, code) if code else None,
        searched=searched,
    )


def tool_turn(content: str, calls: Sequence[tuple[str, Any]]) -> str:
    """(name, arguments) calls behind what was said, as Qwen's chat template writes them."""
    written = [
        "<tool_call>\n" + json.dumps({"name": name, "arguments": arguments}, ensure_ascii=False) + "\n</tool_call>"
        for name, arguments in calls
    ]
    return "\n".join([*([content.strip()] if content.strip() else []), *written])


def tool_response(text: str) -> str:
    """As `envs.tool_env` words a result."""
    return f"<tool_response>\n{text}\n</tool_response>"


def syntax_nodes(code: str) -> Iterator[ast.AST]:
    """Every node of a program's syntax tree; none when it is no program."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # such as of "\\(" in a string: the author's, not ours
            tree = ast.parse(code)
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return iter(())
    return ast.walk(tree)


def final_answer_of(action: str | None) -> str | None:
    """The text that code hands to `final_answer` as a literal, the last such call; None when there is none."""
    found = None
    for node in syntax_nodes(action or ""):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == FINAL:
            given = [*node.args, *(keyword.value for keyword in node.keywords)]
            if len(given) == 1:
                try:
                    found = str(ast.literal_eval(given[0]))
                except (ValueError, RecursionError, MemoryError, SyntaxError, TypeError):
                    continue
    return found
