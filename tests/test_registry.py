"""Envs by name, in a bare script: no Ray, nothing started that does not end with the env."""

import gc
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from envs import env_factory, make_env, register_env
from envs.answer_env import AnswerEnv
from envs.base import Task
from envs.tools import Tool

TASK = Task(id="t", question="What is 6 times 7?", answer="42", kind="sum")


def double(x: int) -> int:
    """Twice x."""
    return 2 * x


def test_a_code_env_with_a_tool_answers_and_ends():
    env: Any = make_env("code", tools=[Tool.from_function(double)])
    env.reset(TASK, seed=0)
    assert env.step("y = double(20)\ny + 2").observation.text.endswith("Last output from code snippet:\n42")
    result = env.step("final_answer(y + 2)")
    assert result.terminated and result.reward == 1.0
    env.close()
    zygote = env._sandbox.zygote_pid
    assert Path(f"/proc/{zygote}").exists()
    del env, result
    gc.collect()
    assert not Path(f"/proc/{zygote}").exists()


def test_unknown_and_taken_names_are_refused():
    with pytest.raises(ValueError, match="env 'cod' is unknown; there are answer, code, search, tool"):
        make_env("cod")
    with pytest.raises(ValueError, match="'code' is registered already"):
        register_env("code", lambda: AnswerEnv(grade=lambda task, answer: 0.0))


def test_importing_envs_is_light():
    code = "import sys, envs; print(sorted({'torch', 'ray', 'numpy', 'vllm', 'faiss'} & set(sys.modules)))"
    root = Path(__file__).resolve().parent.parent
    result = subprocess.run([sys.executable, "-c", code], cwd=root, capture_output=True, text=True, timeout=30)
    assert result.stdout.strip() == "[]", result.stderr


def test_envs_of_a_factory_share_a_sandbox_that_ends_with_the_last():
    factory = env_factory("code", modules=["math"])
    one: Any = factory()
    two: Any = factory()
    zygote = one._sandbox.zygote_pid
    assert two._sandbox.zygote_pid == zygote
    del factory, one
    gc.collect()
    two.reset(TASK, seed=0)
    assert two.step("import math\nmath.floor(42.5)").observation.text.endswith("42")
    two.close()
    del two
    gc.collect()
    assert not Path(f"/proc/{zygote}").exists()


def test_unknown_factory_is_refused():
    with pytest.raises(ValueError, match="env 'cod' is unknown"):
        env_factory("cod")
