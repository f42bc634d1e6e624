"""Tools: the functions that an agent may call from its code, each with a name, a description and a JSON schema.

A `Tool` is data plus one function. It does not know how it is called (from sandboxed Python, from a JSON tool call)
and it does not run anything by itself. A model's mistake (a wrong argument, a page that does not exist) is a
`ToolError`, which the caller shows to the model; any other exception is our own failure and is never shown.

Example::

    def web_search(query: str, top_k: int = 3) -> str:
        '''Search the encyclopedia.

        Args:
            query: what to look for.
        '''

    tool = Tool.from_function(web_search)
    tool.call(["Ada Lovelace"], {})     # arguments are checked against the schema first

The schema is a JSON Schema object (https://json-schema.org), as OpenAI-compatible APIs and MCP use it; `envs.mcp_tools`
makes tools of an MCP server's.
"""

from __future__ import annotations

import inspect
import json
import re
import types
import typing
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

_JSON_TYPES: dict[str, tuple[type, ...]] = {
    "string": (str,),
    "integer": (int,),
    "number": (int, float),
    "boolean": (bool,),
    "array": (list, tuple),
    "object": (dict,),
    "null": (type(None),),
}
_NAMED = {
    str: "string",
    int: "integer",
    float: "number",
    bool: "boolean",
    list: "array",
    dict: "object",
    type(None): "null",
}


class ToolError(Exception):
    """The model's mistake in a tool call; the message says what is wrong and is shown to the model."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Tool:
    """One callable tool."""

    name: str
    description: str
    parameters: Mapping[str, Any]
    """JSON schema, `{"type": "object", "properties": {...}, "required": [...]}`, in positional order."""
    function: Callable[..., Any]
    """Called with checked arguments; returns a JSON value. Called from several threads at the same moment."""

    def __post_init__(self) -> None:
        if not self.name.isidentifier():
            raise ValueError(f"tool name {self.name!r} is not a Python identifier, so code could not call it")

    @classmethod
    def from_function(cls, function: Callable[..., Any], *, name: str | None = None) -> Tool:
        """Make a tool from a typed function: its signature gives the schema, its docstring the description.

        Raises `TypeError` for a parameter without annotation, for `*args`/`**kwargs`, and for positional-only
        parameters.
        """
        tool_name = name or function.__name__
        summary, docs = _read_docstring(inspect.getdoc(function) or "")
        hints = typing.get_type_hints(function)
        properties: dict[str, Any] = {}
        required: list[str] = []
        for parameter in inspect.signature(function).parameters.values():
            if parameter.kind not in (parameter.POSITIONAL_OR_KEYWORD, parameter.KEYWORD_ONLY):
                raise TypeError(f"tool {tool_name}: parameter {parameter.name!r} must be a plain named parameter")
            if parameter.name not in hints:
                raise TypeError(f"tool {tool_name}: parameter {parameter.name!r} needs a type annotation")
            schema = _schema(hints[parameter.name])
            if parameter.name in docs:
                schema["description"] = docs[parameter.name]
            if parameter.default is parameter.empty:
                required.append(parameter.name)
            else:
                schema["default"] = parameter.default
            properties[parameter.name] = schema
        parameters = {"type": "object", "properties": properties, "required": required}
        return cls(name=tool_name, description=summary, parameters=parameters, function=function)

    def call(self, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
        """Check the arguments against the schema and call the function.

        Raises `ToolError` naming the argument that is wrong; what the function raises goes through.
        """
        properties: Mapping[str, Any] = self.parameters.get("properties", {})
        open_ended = self.parameters.get("additionalProperties", False) is not False
        names = list(properties)
        if len(args) > len(names):
            raise ToolError(f"{self.name}() takes at most {len(names)} arguments ({', '.join(names)}), got {len(args)}")
        bound = dict(zip(names, args, strict=False))
        for key, value in kwargs.items():
            if key not in properties and not open_ended:
                raise ToolError(f"{self.name}() has no argument {key!r}; it has {', '.join(names) or 'none'}")
            if key in bound:
                raise ToolError(f"{self.name}() got two values for argument {key!r}")
            bound[key] = value
        missing = [name for name in self.parameters.get("required", ()) if name not in bound]
        if missing:
            raise ToolError(f"{self.name}() needs argument {missing[0]!r}; its arguments are {', '.join(names)}")
        for key, value in bound.items():
            schema = properties.get(key, {})
            if not _matches(value, schema):
                got = f"{type(value).__name__} {value!r:.80}"
                raise ToolError(f"{self.name}() argument {key!r} must be {_wanted(schema)}, got {got}")
        return self.function(**bound)

    def as_json_schema(self) -> dict[str, Any]:
        """The tool as OpenAI-compatible APIs and chat templates take it: `{"type": "function", "function": ...}`."""
        function = {"name": self.name, "description": self.description, "parameters": dict(self.parameters)}
        return {"type": "function", "function": function}


def tool_schemas(tools: Sequence[Tool]) -> list[dict[str, Any]]:
    """`Tool.as_json_schema` of each, as plain JSON whatever their defaults are: what `Env.reset` tells in
    `info["tools"]`."""
    return json.loads(json.dumps([tool.as_json_schema() for tool in tools], default=str))


def _matches(value: Any, schema: Any) -> bool:
    """Types, enums and the items of arrays; other keywords of JSON Schema are left to the tool itself."""
    if not isinstance(schema, Mapping):  # `true` and `false` are schemas, too
        return schema is not False
    for keyword in ("anyOf", "oneOf"):
        if keyword in schema:
            return any(_matches(value, option) for option in schema[keyword])
    if "enum" in schema:
        return value in schema["enum"]
    wanted = schema.get("type")
    if wanted is None:
        return True
    kinds = [wanted] if isinstance(wanted, str) else list(wanted)
    if isinstance(value, bool):  # a bool is an int in Python, but not in JSON
        return "boolean" in kinds
    if not any(isinstance(value, _JSON_TYPES.get(kind, (object,))) for kind in kinds):
        return False
    return not isinstance(value, list) or all(_matches(item, schema.get("items", True)) for item in value)


def _wanted(schema: Any) -> str:
    """A schema in words, for an error message."""
    if not isinstance(schema, Mapping):
        return "left out"
    for keyword in ("anyOf", "oneOf"):
        if keyword in schema:
            return " or ".join(_wanted(option) for option in schema[keyword])
    if "enum" in schema:
        return "one of " + ", ".join(repr(option) for option in schema["enum"])
    kinds = schema.get("type", "another value")
    words = kinds if isinstance(kinds, str) else " or ".join(kinds)
    items = schema.get("items")
    return f"{words} of {_wanted(items)}" if words == "array" and isinstance(items, Mapping) and items else words


def _schema(hint: Any) -> dict[str, Any]:
    """JSON schema of one annotation; what cannot be said in it (a class of the caller's) is left open: `{}`."""
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):
        options = [_schema(argument) for argument in arguments]
        if all(set(option) == {"type"} for option in options):
            return {"type": [option["type"] for option in options]}
        return {"anyOf": options}
    if origin is typing.Literal:
        return {"enum": list(arguments)}
    if origin in (list, Sequence) and arguments:
        return {"type": "array", "items": _schema(arguments[0])}
    named = _NAMED.get(origin or hint)
    return {"type": named} if named else {}


def _read_docstring(text: str) -> tuple[str, dict[str, str]]:
    """Split a docstring into its text before `Args:` and the Google-style entries of that section."""
    head, _, tail = text.partition("Args:")
    docs: dict[str, str] = {}
    current = None
    for line in tail.splitlines()[1:]:
        entry = re.match(r"\s+(\w+)(?:\s*\([^)]*\))?:\s*(.*)", line)
        if entry:
            current = entry[1]
            docs[current] = entry[2].strip()
        elif current and line.startswith("    ") and line.strip():
            docs[current] += " " + line.strip()
        else:
            current = None
    return head.strip(), docs
