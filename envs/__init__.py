"""What an agent acts on: tasks, tools, sandbox, retrieval, grading, and the env contract (`envs.base`).

Example::

    from envs import Task, Tool, make_env

    env = make_env("code", tools=[Tool.from_function(web_search)])
    observation, info = env.reset(Task(id="1", question="6 * 7?", answer="42", kind="math"), seed=0)
    result = env.step("final_answer(6 * 7)")        # result.reward == 1.0
"""

from envs.base import Env, EnvError, Observation, ObservationKind, StepResult, Task
from envs.check import check_env
from envs.registry import env_factory, make_env, register_env
from envs.tools import Tool, ToolError

__all__ = [
    "Env",
    "EnvError",
    "Observation",
    "ObservationKind",
    "StepResult",
    "Task",
    "Tool",
    "ToolError",
    "check_env",
    "env_factory",
    "make_env",
    "register_env",
]
