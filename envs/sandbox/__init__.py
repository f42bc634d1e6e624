"""Runs an agent's Python in real CPython, confined by the kernel; `session.py` tells how."""

from envs.sandbox.execution import DEFAULT_MODULES, Execution, SandboxError, SandboxLimits, ToolCall
from envs.sandbox.session import Sandbox, Session
from envs.tools import ToolError

__all__ = [
    "DEFAULT_MODULES",
    "Execution",
    "Sandbox",
    "SandboxError",
    "SandboxLimits",
    "Session",
    "ToolCall",
    "ToolError",
]
