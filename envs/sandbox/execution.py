"""What goes into a sandbox and what comes out: `SandboxLimits`, `Execution`, `ToolCall`, `SandboxError`. Data only."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

DEFAULT_MODULES: tuple[str, ...] = (
    "math", "cmath", "statistics", "fractions", "decimal", "numbers", "random", "itertools", "functools", "operator",
    "collections", "heapq", "bisect", "array", "copy", "string", "re", "textwrap", "unicodedata", "json", "pprint",
    "datetime", "calendar", "time", "typing", "dataclasses", "enum", "abc", "contextlib", "queue", "numpy", "sympy",
)  # fmt: skip
"""Modules that code may import by default; those that are installed are loaded once, before the first episode."""

CallTool = Callable[[str, list, dict], Any]
"""`call_tool(name, args, kwargs)` returns a JSON value; raises `envs.tools.ToolError` for the model's mistake."""


class SandboxError(RuntimeError):
    """Our own failure: the zygote does not start, the confinement is not available, an episode's process is lost."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SandboxLimits:
    """Limits of one step; every limit but `output_chars` ends the step and is named in `Execution.limit`."""

    wall_s: float = 10.0
    """Time that the code may take; waiting for tools is not counted. Code that resists is killed 0.5 s later."""
    cpu_s: int = 10
    memory_mb: int = 1024
    """Address space on top of what the interpreter with its loaded modules takes, for each process."""
    output_chars: int = 8000
    """Length of `stdout`, of `value` and of `final`, each: longer text keeps its head and its tail."""
    tool_calls: int = 32
    code_chars: int = 65536
    tool_s: float = 120.0
    """Longest wait for one tool call. A tool that is slower is our own failure: `SandboxError`."""

    def __post_init__(self) -> None:
        for name in ("wall_s", "cpu_s", "memory_mb", "output_chars", "code_chars", "tool_s"):
            if getattr(self, name) <= 0:
                raise ValueError(f"{name}={getattr(self, name)!r} must be positive")
        if self.tool_calls < 0:
            raise ValueError(f"tool_calls={self.tool_calls} must not be negative")


@dataclass(frozen=True, slots=True, kw_only=True)
class ToolCall:
    """One tool call that the code made."""

    name: str
    args: str
    """JSON text: `{"args": [...], "kwargs": {...}}`."""
    ok: bool
    """False: the tool answered with a `ToolError`."""
    wall_s: float
    """How long the code waited for the answer."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Execution:
    """What one step did. All text is clipped to `SandboxLimits.output_chars`, without control characters and lone
    surrogates."""

    stdout: str = ""
    """What was printed, to standard error as well; when the process had to be killed, the last of it may be lost."""
    value: str | None = None
    """`str()` of the last expression's value; None if there was none or if it was None."""
    error: str | None = None
    """`"ValueError: ..."` and the line it came from; what an agent would want to read."""
    limit: str | None = None
    """Name of the limit that ended the step: one of `LIMITS`."""
    final: str | None = None
    """`str()` of what was given to `final_answer`, made inside the sandbox."""
    is_final: bool = False
    tool_calls: tuple[ToolCall, ...] = ()
    wall_s: float = 0.0
    """Time the step took, without waiting for tools."""


LIMITS: tuple[str, ...] = ("wall time", "cpu time", "memory", "tool calls", "code size", "died")
"""Values of `Execution.limit`. "died": the process ended by itself, by a crash for instance."""
