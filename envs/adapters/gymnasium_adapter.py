"""Gymnasium: envs as `gymnasium.Env` with text as action and observation.

Importing this module registers `apprentice/Answer-v0`, `apprentice/Code-v0`, `apprentice/Search-v0` and
`apprentice/Tool-v0`; `gymnasium.make` imports it itself when the id is given with the module's name, as below. Every
`reset` draws a task by Gymnasium's own random numbers, or takes `options={"task": task}`. Previews are not part of
Gymnasium's contract; `env.unwrapped.env` has them.

Example::

    env = gymnasium.make("envs.adapters.gymnasium_adapter:apprentice/Code-v0", tasks=tasks, tools=[search_tool])
    question, info = env.reset(seed=0)
    observation, reward, terminated, truncated, info = env.step("final_answer(42)")

Contract: https://gymnasium.farama.org/api/env/
"""

from __future__ import annotations

import string
from collections.abc import Callable, Sequence
from typing import Any

import gymnasium
from gymnasium.spaces import Text

from envs.base import Env, Task
from envs.registry import make_env

MAX_ACTION_CHARS = 65536
MAX_OBSERVATION_CHARS = 1 << 20


class UnicodeText(Text):
    """Any text of at most `max_length` characters; samples are short and of ASCII.

    `Text` alone knows a fixed alphabet, and Unicode has a million characters.
    """

    def __init__(self, max_length: int, seed: int | None = None) -> None:
        super().__init__(max_length, min_length=0, charset=string.printable, seed=seed)

    def contains(self, x: Any) -> bool:
        return isinstance(x, str) and len(x) <= self.max_length

    def sample(self, mask: Any = None, probability: Any = None) -> str:
        length = int(self.np_random.integers(0, min(self.max_length, 64) + 1))
        return "".join(self.np_random.choice(list(string.printable), size=length))


class GymnasiumEnv(gymnasium.Env[str, str]):
    """`env` as Gymnasium has it; `info` has the task's id, and at steps what the env says.

    Raises `ValueError` without tasks, and `EnvError` from `reset` and `step` when the env itself fails.
    """

    metadata = {"render_modes": ["ansi"], "render_fps": 1}

    def __init__(self, env: Env, tasks: Sequence[Task], *, render_mode: str | None = None) -> None:
        if not tasks:
            raise ValueError("a Gymnasium env needs at least one task to reset to: give tasks=[...]")
        if render_mode not in (None, "ansi"):
            raise ValueError(f"render_mode={render_mode!r} is unknown; there are None and 'ansi'")
        self.env, self.tasks, self.render_mode = env, tuple(tasks), render_mode
        self.action_space = UnicodeText(MAX_ACTION_CHARS)
        self.observation_space = UnicodeText(MAX_OBSERVATION_CHARS)
        self._transcript: list[str] = []

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[str, dict[str, Any]]:
        super().reset(seed=seed)
        drawn = self.tasks[int(self.np_random.integers(len(self.tasks)))]
        task = (options or {}).get("task", drawn)
        if not isinstance(task, Task):
            raise ValueError(f"options['task'] must be a Task, got {task!r:.80}")
        observation, info = self.env.reset(task, int(self.np_random.integers(2**31)))
        self._transcript = [observation.text]
        return observation.text[:MAX_OBSERVATION_CHARS], {"task_id": task.id, **info}

    def step(self, action: str) -> tuple[str, float, bool, bool, dict[str, Any]]:
        observation, reward, terminated, truncated, info = self.env.step(str(action))
        self._transcript += [str(action), observation.text]
        # A time is never the same twice, and Gymnasium's checker wants episodes that can be repeated.
        told = {key: value for key, value in info.items() if key != "wall_s"}
        text = observation.text[:MAX_OBSERVATION_CHARS]
        return text, reward, terminated, truncated, {"kind": observation.kind.value, **told}

    def render(self) -> str | None:  # type: ignore[override]
        """The episode so far, in mode "ansi"."""
        return "\n\n".join(self._transcript) if self.render_mode == "ansi" else None

    def close(self) -> None:
        self.env.close()


def _creator(name: str) -> Callable[..., GymnasiumEnv]:
    def create(*, tasks: Sequence[Task] = (), render_mode: str | None = None, **settings: Any) -> GymnasiumEnv:
        return GymnasiumEnv(make_env(name, **settings), tasks, render_mode=render_mode)

    return create


for _name in ("answer", "code", "search", "tool"):
    gymnasium.register(id=f"apprentice/{_name.capitalize()}-v0", entry_point=_creator(_name))
