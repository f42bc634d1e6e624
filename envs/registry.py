"""Envs by name: `make_env` for a bare script, `register_env` for an env of your own.

Example::

    from envs import make_env

    env = make_env("code", tools=[Tool.from_function(web_search)])
    observation, info = env.reset(task, seed=0)
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from envs.base import Env

if TYPE_CHECKING:
    from envs.sandbox import SandboxLimits
    from envs.tools import Tool

_FACTORIES: dict[str, Callable[..., Env]] = {}


def register_env(name: str, factory: Callable[..., Env]) -> None:
    """Makes `make_env(name, **settings)` call `factory(**settings)`. Raises `ValueError` for a name that is taken."""
    if name in _FACTORIES:
        raise ValueError(f"an env named {name!r} is registered already")
    _FACTORIES[name] = factory


def make_env(name: str, **settings: Any) -> Env:
    """A new env with everything that it needs. Raises `ValueError` for an unknown name."""
    if name not in _FACTORIES:
        raise ValueError(f"env {name!r} is unknown; there are {', '.join(sorted(_FACTORIES))}")
    return _FACTORIES[name](**settings)


def _code(
    *, tools: Sequence[Tool] = (), max_steps: int = 5, limits: SandboxLimits | None = None, unsafe: bool = False
) -> Env:
    """Python with `tools`, in a sandbox of its own that ends with the env."""
    from envs.code_env import CodeEnv
    from envs.grading import grade
    from envs.sandbox import Sandbox, SandboxLimits

    names = [tool.name for tool in tools]
    sandbox = Sandbox(tool_names=names, limits=limits or SandboxLimits(), unsafe=unsafe)
    env = CodeEnv(sandbox=sandbox, tools=tools, grade=grade, max_steps=max_steps)
    weakref.finalize(env, sandbox.close)
    return env


def _tool(
    *,
    tools: Sequence[Tool],
    max_steps: int = 5,
    max_calls: int = 8,
    tool_s: float = 120.0,
    output_chars: int = 8000,
    stateless: bool = True,
) -> Env:
    """JSON function calls of `tools`; see `envs.tool_env.ToolEnv`."""
    from envs.grading import grade
    from envs.tool_env import ToolEnv

    return ToolEnv(
        tools=tools,
        grade=grade,
        max_steps=max_steps,
        max_calls=max_calls,
        tool_s=tool_s,
        output_chars=output_chars,
        stateless=stateless,
    )


def _search(
    *, search: Callable[[str], str], max_steps: int = 5, search_s: float = 120.0, output_chars: int = 8000
) -> Env:
    """Search-R1's tags over `search`; see `envs.search_env.SearchEnv`."""
    from envs.grading import grade
    from envs.search_env import SearchEnv

    return SearchEnv(search=search, grade=grade, max_steps=max_steps, search_s=search_s, output_chars=output_chars)


def _answer() -> Env:
    """No tools: the action is the answer."""
    from envs.answer_env import AnswerEnv
    from envs.grading import grade

    return AnswerEnv(grade=grade)


register_env("code", _code)
register_env("tool", _tool)
register_env("search", _search)
register_env("answer", _answer)
