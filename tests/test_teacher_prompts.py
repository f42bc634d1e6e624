"""Teachers' prompts: they tell of the tools that are there, and their examples are what our dialects and envs take."""

from __future__ import annotations

import re
from collections.abc import Iterator

import pytest

from envs.base import ObservationKind, Task
from envs.code_env import CodeEnv
from envs.grading import grade
from envs.sandbox import Sandbox
from envs.tool_env import parse_calls
from envs.tools import Tool, tool_schemas
from rollout.dialects import CODE, COT, DIALECTS, SEARCH, TOOL
from rollout.first_thought import first_paragraph
from rollout.teacher_prompts import COT_TEACHER, teacher_prompt


def web_search(query: str) -> str:
    """Search an encyclopedia.

    Args:
        query: what to look for.
    """
    return f"[1] {query}: nothing else is known."


def convert(amount: float, unit: str = "km", *, digits: int | None = None) -> float:
    """Convert a length to metres.

    Args:
        amount: how much.
    """
    return amount * 1000


TOOLS = tool_schemas([Tool.from_function(web_search), Tool.from_function(convert)])


def prompt(dialect: str, tools=TOOLS, max_steps: int = 5) -> str:
    return teacher_prompt(dialect, tools, max_steps=max_steps)


@pytest.mark.parametrize("dialect", sorted(DIALECTS))
def test_every_dialect_has_a_prompt_longer_than_its_students(dialect):
    assert len(prompt(dialect)) > 3 * len(DIALECTS[dialect].system_prompt)


def test_an_unknown_dialect_is_refused():
    with pytest.raises(ValueError, match="dialect 'chess'; there are code, cot, direct, tool, search"):
        teacher_prompt("chess", max_steps=5)


def test_code_is_told_of_each_tool_as_python_has_it():
    text = prompt("code")
    assert "- web_search(query: str)\n    Search an encyclopedia.\n    query: what to look for." in text
    assert "- convert(amount: float, unit: str = 'km', digits: int | None = None)\n    Convert a length" in text
    assert "- final_answer(answer)" in text


@pytest.mark.parametrize(
    ("parameter", "shown"),
    [
        ({"enum": ["a", "b"]}, "x: 'a' | 'b'"),
        ({"anyOf": [{"type": "string"}, {"type": "null"}]}, "x: str | None"),
        ({"type": ["integer", "string"]}, "x: int | str"),
        ({"type": "array", "items": {"type": "string"}}, "x: list"),
        ({}, "x: object"),
        (True, "x: object"),
    ],
)
def test_schemas_of_any_server_can_be_told(parameter, shown):
    function = {"name": "f", "parameters": {"type": "object", "properties": {"x": parameter}, "required": ["x"]}}
    assert f"- f({shown})" in prompt("code", [{"type": "function", "function": function}])


@pytest.mark.parametrize("dialect", ["code", "tool"])
def test_no_search_is_told_of_where_there_is_none(dialect):
    assert "web_search" in prompt(dialect) and "web_search" not in prompt(dialect, [])


@pytest.mark.parametrize("dialect", ["code", "tool", "search"])
def test_the_limit_of_turns_is_told(dialect):
    assert re.search(r"\b7\b", prompt(dialect, max_steps=7))


def code_turns(text: str) -> list[str]:
    """The worked turns of a prompt (its form in the rules aside)."""
    return [turn for turn in re.findall(r"^Thought: .*?<end_code>", text, re.M | re.S) if "# your code" not in turn]


def test_worked_turns_are_parsed_by_the_dialect():
    turns = code_turns(prompt("code"))
    assert len(turns) == 7
    for turn in turns:
        parsed = CODE.parse(turn)
        assert parsed.action and parsed.error is None and len(parsed.spans) >= 4
    examples = prompt("code").split("\nTask: ")[1:]
    assert len(examples) == 3 and all(len(code_turns(example)) <= 5 for example in examples)
    assert all("final_answer(" in code_turns(example)[-1] for example in examples)


@pytest.fixture(scope="module")
def sandbox() -> Iterator[Sandbox]:
    with Sandbox(tool_names=[], modules=["math"]) as sandbox:
        yield sandbox


def test_the_observations_of_worked_sums_are_what_our_env_shows(sandbox: Sandbox):
    text = prompt("code", [])
    env = CodeEnv(sandbox=sandbox, tools=[], grade=grade, max_steps=5)
    shown = [found.strip() for found in re.findall(r"^Observation:\n(.*?)\n\nThought", text, re.M | re.S)]
    assert len(shown) == 2
    for example, observation in zip(text.split("\nTask: ")[1:], shown, strict=True):
        env.reset(Task(id="t", question="q", answer="", kind="k"), seed=0)
        first, last = (CODE.parse(turn).action or "" for turn in code_turns(example))
        assert env.step(first).observation.text == observation
        assert env.step(last).observation.kind is ObservationKind.FINAL


def test_worked_calls_are_what_the_tool_env_takes():
    told = prompt("tool").partition("# Tools")[0]
    turns = [part for part in re.split(r"\n\n", told) if "<tool_call>\n{" in part]
    assert len(turns) == 3
    for turn in turns:
        parsed = TOOL.parse(turn)
        assert parsed.action and all(call.name == "web_search" for call in parse_calls(parsed.action))
    assert '"name": "convert"' in prompt("tool")


def test_worked_searches_are_what_the_search_dialect_takes():
    turns = re.findall(r"^<think>.*?</(?:search|answer)>", prompt("search"), re.M | re.S)
    assert len(turns) == 6 and all(SEARCH.parse(turn).action for turn in turns)
    assert prompt("search").startswith(SEARCH.system_prompt)


def test_the_worked_answer_in_words_is_parsed_and_begins_with_a_thought():
    example = COT_TEACHER.partition("Question: ")[2].partition("\n\n")[2]
    assert COT.parse(example).action == "65"
    assert first_paragraph(example) == "4 crates hold 4 * 18 = 72 jars."


@pytest.mark.parametrize(
    ("text", "thought"),
    [
        ("\n\nFirst, add.\n\nThen more.", "First, add."),
        ("First, add.\nThen more.", "First, add."),
        ("First.\n \t\nThen.", "First."),
        ("Answer: 42", ""),
        ("", ""),
    ],
)
def test_the_first_thought_is_the_first_paragraph(text, thought):
    assert first_paragraph(text) == thought
