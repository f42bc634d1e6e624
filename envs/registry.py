"""Envs by name: `make_env` for a bare script, `env_factory` for many of a kind, `register_env` for one of your own.

Example::

    from envs import make_env

    env = make_env("code", tools=[Tool.from_function(web_search)])
    observation, info = env.reset(task, seed=0)
"""

from __future__ import annotations

import functools
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


def env_factory(name: str, **settings: Any) -> Callable[[], Env]:
    """Makes envs of one kind that share what they can: "code" envs share a sandbox, which ends with the last of them
    and the factory. Raises `ValueError` for an unknown name."""
    if name == "code":
        return _CodeEnvs(**settings)
    if name not in _FACTORIES:
        raise ValueError(f"env {name!r} is unknown; there are {', '.join(sorted(_FACTORIES))}")
    return functools.partial(make_env, name, **settings)


class _CodeEnvs:
    """Python with `tools`, in one sandbox; `modules` are what code may import."""

    def __init__(
        self,
        *,
        tools: Sequence[Tool] = (),
        max_steps: int = 5,
        limits: SandboxLimits | None = None,
        modules: Sequence[str] | None = None,
        unsafe: bool = False,
    ) -> None:
        from envs.sandbox import DEFAULT_MODULES, Sandbox, SandboxLimits

        self._tools, self._max_steps = tools, max_steps
        self._sandbox = Sandbox(
            tool_names=[tool.name for tool in tools],
            limits=limits or SandboxLimits(),
            modules=DEFAULT_MODULES if modules is None else modules,
            unsafe=unsafe,
        )
        weakref.finalize(self, self._sandbox.close)

    def __call__(self) -> Env:
        from envs.code_env import CodeEnv
        from envs.grading import grade

        env = CodeEnv(sandbox=self._sandbox, tools=self._tools, grade=grade, max_steps=self._max_steps)
        weakref.finalize(env, _let_go, self)  # holds on to the sandbox as long as the env lives
        return env


def _let_go(kept: object) -> None:
    """`kept` was an argument until now, and so alive."""


def _code(**settings: Any) -> Env:
    return _CodeEnvs(**settings)()


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
