"""`Tool`: what a schema lets through, and what a wrong argument is told. More of it in test_code_env.py."""

from __future__ import annotations

from typing import Any, Literal

import pytest

from envs.tools import Tool, ToolError


def tool(**properties: Any) -> Tool:
    parameters = {"type": "object", "properties": properties, "required": list(properties)}
    return Tool(name="look", description="Look.", parameters=parameters, function=lambda **arguments: arguments)


@pytest.mark.parametrize(
    ("schema", "good", "bad", "says"),
    [
        ({"type": "array", "items": {"type": "string"}}, ["a"], ["a", 1], "must be array of string, got list"),
        ({"anyOf": [{"type": "string"}, {"type": "null"}]}, None, 1, "must be string or null, got int 1"),
        ({"oneOf": [{"type": "string"}, {"enum": [1, 2]}]}, 2, 3, "must be string or one of 1, 2, got int 3"),
        ({"type": ["integer", "null"]}, None, "1", "must be integer or null, got str '1'"),
        ({"enum": ["fast", "slow"]}, "fast", "quick", "must be one of 'fast', 'slow', got str 'quick'"),
        (False, None, 1, "must be left out"),
    ],
)
def test_wrong_argument_is_told_what_is_wanted(schema: Any, good: Any, bad: Any, says: str):
    if schema is not False:
        assert tool(x=schema).call([good], {}) == {"x": good}
    with pytest.raises(ToolError, match=says):
        tool(x=schema).call([bad], {})


@pytest.mark.parametrize("schema", [True, {}, {"$ref": "#/$defs/Thing"}])
def test_what_the_schema_does_not_say_is_left_to_the_tool(schema: Any):
    assert tool(x=schema).call([], {"x": [object]}) == {"x": [object]}


def test_more_arguments_pass_where_the_schema_says_so():
    open_ended = Tool(
        name="any",
        description="",
        parameters={"type": "object", "properties": {}, "additionalProperties": True},
        function=lambda **arguments: arguments,
    )
    assert open_ended.call([], {"a": 1}) == {"a": 1}
    with pytest.raises(ToolError, match="takes at most 0 arguments"):
        open_ended.call([1], {})


def test_literal_annotations_are_enums():
    def go(how: Literal["fast", "slow"] = "fast") -> str:
        """Go."""
        return how

    assert Tool.from_function(go).parameters["properties"]["how"]["enum"] == ["fast", "slow"]


def test_schema_for_chat_templates():
    assert tool(x={"type": "string"}).as_json_schema() == {
        "type": "function",
        "function": {
            "name": "look",
            "description": "Look.",
            "parameters": {"type": "object", "properties": {"x": {"type": "string"}}, "required": ["x"]},
        },
    }


def test_name_must_be_callable_from_code():
    with pytest.raises(ValueError, match="'read-file' is not a Python identifier"):
        Tool(name="read-file", description="", parameters={}, function=print)
