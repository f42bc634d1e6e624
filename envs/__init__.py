"""What an agent acts on: tasks, tools, sandbox, retrieval, grading, and the env contract (`envs.base`)."""

from envs.registry import make_env, register_env

__all__ = ["make_env", "register_env"]
