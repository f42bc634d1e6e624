"""The long system prompts of teachers: what a general instruction-tuned model must be told to act in our formats.

A student is trained and run with its dialect's one line (`Dialect.system_prompt`): it learns the format from examples.
A teacher was never trained on them, so it is shown the rules, the tools that the env has, and worked examples. Only
the policy sees these prompts (`Trajectory.shown_system_prompt`); no training row holds them.

Example::

    _, info = env.reset(task, seed=0)
    teacher_prompt("code", info.get("tools", ()), max_steps=5)

The examples are ours. They use `web_search` where the env has it, and Python alone where it has not.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from rollout.dialects import SEARCH, TOOL, tools_preamble

ToolSchema = Mapping[str, Any]
"""`{"type": "function", "function": {"name", "description", "parameters"}}`, as `envs.tools.tool_schemas` makes it."""


def teacher_prompt(dialect: str, tools: Sequence[ToolSchema] = (), *, max_steps: int) -> str:
    """The system prompt of a teacher of that dialect. Raises `ValueError` when there is none for it."""
    match dialect:
        case "code":
            return _code(tools, max_steps)
        case "cot":
            return COT_TEACHER
        case "direct":
            return DIRECT_TEACHER
        case "tool":
            return _tool(tools, max_steps)
        case "search":
            return f"{SEARCH.system_prompt}\n\n{_SEARCH_MORE.format(max_steps=max_steps)}"
    raise ValueError(f"there is no teacher's prompt for dialect {dialect!r}; there are code, cot, direct, tool, search")


COT_TEACHER = """\
Answer the user's question. Think it through step by step: say what is asked, take one small step a paragraph, and \
check the result before you give it. If passages stand in front of the question, use what they say where it helps, and \
your own knowledge where they do not.

End with one line that begins with "Answer:" and holds the final answer alone: a number, a name, a date, yes or no, or \
a mathematical expression, without explanation and without units that were not asked for.

Example

Question: A crate holds 18 jars. How many jars are in 4 crates after 7 of them broke?

4 crates hold 4 * 18 = 72 jars.

7 of them broke, so 72 - 7 = 65 are left.

Answer: 65"""

DIRECT_TEACHER = """\
Answer the user's question at once, without reasoning in words. If passages stand in front of the question, use what \
they say where it helps.

Reply with one line that holds the final answer alone: a number, a name, a date, yes or no, or a mathematical \
expression, without explanation and without units that were not asked for.

Example

Question: A crate holds 18 jars. How many jars are in 4 crates after 7 of them broke?

65"""


# -- code

_CODE_RULES = """\
You solve tasks by writing Python. You work in turns, at most {max_steps} of them. Each turn has exactly this form:

Thought: what you know, what is missing, and what you do now
Code:
```py
# your code
```<end_code>

The code is run, and its printed output and last value come back as an "Observation:". You then take the next turn. \
Variables, functions and imports stay from turn to turn. Print whatever you need to see.

To end, call `final_answer(...)` with the answer itself: a number, a name, a date, yes or no, or an expression; no \
sentence, no explanation.

Rules
1. One code block a turn, and nothing behind <end_code>. Never write an observation yourself.
2. Compute in code, not in your head. Look facts up with the tools, and do not rely on memory for them.
3. When code fails, read the error and write the next turn so that it cannot happen again.
4. Do not repeat an action whose result you have seen: change the query or the approach.
5. Be sure to call final_answer by turn {max_steps}, with your best answer if need be."""

_CODE_SEARCH_EXAMPLES = """\
Examples

Task: In which country was the architect of the Sydney Opera House born?

Thought: I need the architect first, so I search for the building.
Code:
```py
print(web_search("Sydney Opera House architect"))
```<end_code>
Observation:
Execution logs:
[1] Sydney Opera House: The Sydney Opera House is a performing arts centre designed by Jørn Utzon.
Last output from code snippet:
None

Thought: The architect is Jørn Utzon. Now I need where he was born.
Code:
```py
print(web_search("Jørn Utzon birthplace"))
```<end_code>
Observation:
Execution logs:
[1] Jørn Utzon: Jørn Oberg Utzon was an architect, born in Copenhagen, Denmark.
Last output from code snippet:
None

Thought: He was born in Copenhagen, which is in Denmark.
Code:
```py
final_answer("Denmark")
```<end_code>
"""

_CODE_MATH_EXAMPLES = """\
Task: How many integers from 1 to 500 are divisible by 6 but not by 9?

Thought: I can count them directly.
Code:
```py
count = sum(1 for n in range(1, 501) if n % 6 == 0 and n % 9 != 0)
print(count)
```<end_code>
Observation:
Execution logs:
56
Last output from code snippet:
None

Thought: There are 83 multiples of 6 and 27 of 18, and 83 - 27 = 56 agrees.
Code:
```py
final_answer(count)
```<end_code>

Task: What is the positive solution of x^2 - 3x - 40 = 0?

Thought: The equation has whole coefficients, so the formula gives it; I check the root before I answer.
Code:
```py
from math import sqrt
x = (3 + sqrt(9 + 160)) / 2
print(x, x**2 - 3 * x - 40)
```<end_code>
Observation:
Execution logs:
8.0 0.0
Last output from code snippet:
None

Thought: The root is 8, and it satisfies the equation.
Code:
```py
final_answer(8)
```<end_code>"""


def _code(tools: Sequence[ToolSchema], max_steps: int) -> str:
    names = {tool["function"]["name"] for tool in tools}
    parts = [_CODE_RULES.format(max_steps=max_steps), _code_tools(tools)]
    if "web_search" in names and max_steps >= 3:
        parts += [_CODE_SEARCH_EXAMPLES.rstrip(), _CODE_MATH_EXAMPLES]
    elif max_steps >= 2:
        parts += ["Examples", _CODE_MATH_EXAMPLES]
    return "\n\n".join(parts)


def _code_tools(tools: Sequence[ToolSchema]) -> str:
    lines = [
        "Your code can call these functions without importing them:" if tools else "Your code can call this function:"
    ]
    for tool in tools:
        lines.append(_signature(tool["function"]))
    lines.append("- final_answer(answer)\n    Ends the task with this answer.")
    return "\n".join(lines)


def _signature(function: Mapping[str, Any]) -> str:
    """A tool as Python has it, with what is told of it and of its arguments below."""
    schema = function.get("parameters") or {}
    required = set(schema.get("required") or ())
    shown, told = [], []
    for name, parameter in (schema.get("properties") or {}).items():
        kind = _python_type(parameter)
        default = "" if name in required else f" = {_default(parameter)!r}"
        shown.append(f"{name}: {kind}{default}")
        if isinstance(parameter, Mapping) and parameter.get("description"):
            told.append(f"    {name}: {' '.join(str(parameter['description']).split())}")
    description = " ".join(str(function.get("description") or "").split())
    return "\n".join(
        [f"- {function['name']}({', '.join(shown)})", *([f"    {description}"] if description else []), *told]
    )


def _default(parameter: Any) -> Any:
    return parameter.get("default") if isinstance(parameter, Mapping) else None


_PYTHON_TYPES = {
    "string": "str", "integer": "int", "number": "float", "boolean": "bool", "array": "list", "object": "dict",
    "null": "None",
}  # fmt: skip


def _python_type(parameter: Any) -> str:
    if not isinstance(parameter, Mapping):
        return "object"
    if "enum" in parameter:
        return " | ".join(repr(option) for option in parameter["enum"])
    options = parameter.get("anyOf") or parameter.get("oneOf")
    if options:
        return " | ".join(dict.fromkeys(_python_type(option) for option in options))
    kinds = parameter.get("type")
    if isinstance(kinds, str):
        kinds = [kinds]
    return " | ".join(_PYTHON_TYPES.get(kind, "object") for kind in kinds) if kinds else "object"


# -- tool calls

_TOOL_RULES = """\
You work in turns, at most {max_steps} of them. In a turn you either call functions or answer.

Rules
1. Before a call, say in a sentence what you know and what you are looking for.
2. Several independent calls may stand in one turn. What they return comes back in the next message, between \
<tool_response> and </tool_response>; never write that yourself.
3. Look facts up, and do not rely on memory for them. Do not repeat a call whose result you have seen.
4. When you know the answer, reply with the answer alone, without a call and without explanation: a number, a name, a \
date, yes or no. Do so by turn {max_steps}, with your best answer if need be."""

_TOOL_EXAMPLES = """\
Examples

User: In which country was the architect of the Sydney Opera House born?

I need the architect first.
<tool_call>
{"name": "web_search", "arguments": {"query": "Sydney Opera House architect"}}
</tool_call>

<tool_response>
[1] Sydney Opera House: The Sydney Opera House is a performing arts centre designed by Jørn Utzon.
</tool_response>

The architect is Jørn Utzon; now I need his birthplace.
<tool_call>
{"name": "web_search", "arguments": {"query": "Jørn Utzon birthplace"}}
</tool_call>

<tool_response>
[1] Jørn Utzon: Jørn Oberg Utzon was an architect, born in Copenhagen, Denmark.
</tool_response>

Denmark

User: Which of the two rivers is longer, the Loire or the Rhône?

I need the length of both, and can ask for them together.
<tool_call>
{"name": "web_search", "arguments": {"query": "Loire river length"}}
</tool_call>
<tool_call>
{"name": "web_search", "arguments": {"query": "Rhône river length"}}
</tool_call>

<tool_response>
[1] Loire: The Loire is the longest river in France, with a length of 1,006 kilometres.
</tool_response>
<tool_response>
[1] Rhône: The Rhône is a river in Switzerland and France, 813 kilometres long.
</tool_response>

Loire"""


def _tool(tools: Sequence[ToolSchema], max_steps: int) -> str:
    parts = [TOOL.system_prompt, _TOOL_RULES.format(max_steps=max_steps)]
    if max_steps >= 3 and any(tool["function"]["name"] == "web_search" for tool in tools):
        parts.append(_TOOL_EXAMPLES)
    return "\n\n".join(parts) + tools_preamble(json.dumps(tool, ensure_ascii=False) for tool in tools)


# -- Search-R1

_SEARCH_MORE = """\
You have at most {max_steps} turns. A turn ends with one <search> or with the <answer>; never write <information> \
yourself. Search with a few words, names above all, and not twice for the same. The answer is the name, number, date, \
or yes or no that was asked for, alone.

Examples

Question: In which country was the architect of the Sydney Opera House born?

<think>I need the architect first.</think>
<search>Sydney Opera House architect</search>

<information>Doc 1(Title: Sydney Opera House) The Sydney Opera House is a performing arts centre designed by Jørn \
Utzon.</information>

<think>The architect is Jørn Utzon. Now I need his birthplace.</think>
<search>Jørn Utzon birthplace</search>

<information>Doc 1(Title: Jørn Utzon) Jørn Oberg Utzon was an architect, born in Copenhagen, Denmark.</information>

<think>Copenhagen is in Denmark.</think>
<answer>Denmark</answer>

Question: What is the capital of the country whose currency is the forint?

<think>I look up the currency.</think>
<search>forint currency country</search>

<information>Doc 1(Title: Hungarian forint) The forint is the currency of Hungary.</information>

<think>The forint is Hungary's. I make sure of its capital.</think>
<search>capital of Hungary</search>

<information>Doc 1(Title: Budapest) Budapest is the capital and most populous city of Hungary.</information>

<think>The capital of Hungary is Budapest.</think>
<answer>Budapest</answer>"""
