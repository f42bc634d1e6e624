"""Our envs through the real Gymnasium: its `make`, its checker, its vector envs."""

from __future__ import annotations

import warnings
from typing import Any

import gymnasium
import pytest
from gymnasium.utils.env_checker import check_env

from envs.base import Task
from envs.tools import Tool

MODULE = "envs.adapters.gymnasium_adapter"
TASKS = [Task(id=str(n), question=f"What is {n} + 1?", answer=str(n + 1), kind="sum") for n in range(5)]


def increase(x: int) -> int:
    """One more."""
    return x + 1


SETTINGS: dict[str, dict[str, Any]] = {
    "Code": {"tools": [Tool.from_function(increase)], "modules": ["math"]},
    "Tool": {"tools": [Tool.from_function(increase)]},
    "Search": {"search": lambda query: f"Doc 1(Title: {query}) text"},
    "Answer": {},
}


@pytest.mark.parametrize("name", SETTINGS)
def test_passes_gymnasiums_checker(name: str):
    env = gymnasium.make(f"{MODULE}:apprentice/{name}-v0", tasks=TASKS, **SETTINGS[name])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        check_env(env.unwrapped)
    env.close()


def test_an_episode():
    env = gymnasium.make(f"{MODULE}:apprentice/Code-v0", tasks=TASKS, render_mode="ansi", **SETTINGS["Code"])
    question, info = env.reset(options={"task": TASKS[3]})
    assert (question, info["task_id"]) == ("What is 3 + 1?", "3")
    observation, reward, terminated, truncated, info = env.step("x = increase(3)\nprint('é', x)")
    assert (observation, reward, terminated, truncated, info["kind"]) == (
        "Execution logs:\né 4\nLast output from code snippet:\nNone", 0.0, False, False, "ok",
    )  # fmt: skip
    assert env.step("final_answer(x)")[:3] == ("4", 1.0, True)
    assert str(env.render()).startswith("What is 3 + 1?\n\nx = increase(3)")
    env.close()


def test_seeds_draw_tasks():
    env = gymnasium.make(f"{MODULE}:apprentice/Answer-v0", tasks=TASKS)
    drawn = [env.reset(seed=seed)[1]["task_id"] for seed in range(20)]
    assert drawn == [env.reset(seed=seed)[1]["task_id"] for seed in range(20)]
    assert len(set(drawn)) > 1


def test_vector_env_of_ours():
    envs = gymnasium.make_vec(f"{MODULE}:apprentice/Answer-v0", num_envs=2, vectorization_mode="sync", tasks=TASKS[:1])
    envs.reset(seed=0)
    _, rewards, terminated, _, _ = envs.step(("1", "2"))
    assert (list(rewards), list(terminated)) == ([1.0, 0.0], [True, True])
    envs.close()


def test_tasks_are_needed():
    with pytest.raises(ValueError, match="at least one task"):
        gymnasium.make(f"{MODULE}:apprentice/Answer-v0")
    env = gymnasium.make(f"{MODULE}:apprentice/Answer-v0", tasks=TASKS)
    with pytest.raises(ValueError, match="must be a Task, got '3'"):
        env.reset(options={"task": "3"})
