"""An engine in a process of its own: it answers as any, ends with its owner even when that is killed, and its own death
is told from a failed request."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("vllm")

from learner.base_student import BASE_STUDENT_FOLDER  # noqa: E402

pytestmark = pytest.mark.timeout(240)
ROOT = Path(__file__).parents[1]

OWNER = """
import asyncio, json, os, signal, sys, psutil
from rollout.policy import Sampling
from rollout.trajectory import Message
from rollout.vllm_policy import VllmPolicy

async def main():
    policy = VllmPolicy(sys.argv[1], max_model_len=512, max_num_seqs=8, kv_cache_bytes=16 << 20, engine="own_process")
    ask = lambda: policy.complete([Message(role="user", content="Copy: a b c")], Sampling(max_tokens=8, logprobs=True))
    [completion] = await ask()
    children = [child.pid for child in psutil.Process().children(recursive=True)]
    told = {"tokens": len(completion.sampled_ids), "logprobs": len(completion.logprobs), "children": children}
    told["prompt"], told["waiting"] = len(completion.prompt_ids), policy.pressure().waiting
    print(json.dumps(told), flush=True)
    for line in sys.stdin:
        for pid in children:
            os.kill(pid, signal.SIGKILL)
        try:
            await ask()
        except Exception as error:
            print(json.dumps({"error": type(error).__name__, "ends": error.ends_collection}), flush=True)

asyncio.run(main())
"""


class Owner:
    """The process that has the engine."""

    def __init__(self) -> None:
        environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
        self.process = subprocess.Popen(
            [sys.executable, "-c", OWNER, str(BASE_STUDENT_FOLDER)], stdin=subprocess.PIPE, stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL, text=True, env=environment,
        )  # fmt: skip

    def told(self) -> dict[str, Any]:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            if line.startswith("{"):
                return json.loads(line)
        raise AssertionError(f"the owner ended with {self.process.wait(10)}")


@pytest.fixture
def owner() -> Iterator[Owner]:
    owner = Owner()
    yield owner
    owner.process.kill()
    owner.process.wait(30)
    for pipe in (owner.process.stdin, owner.process.stdout):
        assert pipe is not None
        pipe.close()


def ended(pids: list[int]) -> bool:
    return not any(Path(f"/proc/{pid}").exists() for pid in pids)


def test_the_engine_answers_and_ends_when_its_owner_is_killed(owner):
    told = owner.told()
    assert told["tokens"] == told["logprobs"] > 0 and told["prompt"] > 0 and told["waiting"] == 0
    assert told["children"]
    owner.process.send_signal(signal.SIGKILL)
    owner.process.wait(30)
    deadline = time.monotonic() + 30
    while not ended(told["children"]) and time.monotonic() < deadline:
        time.sleep(0.2)
    assert ended(told["children"])


@pytest.mark.slow
def test_a_killed_engine_is_told_from_a_failed_request(owner):
    owner.told()
    assert owner.process.stdin is not None
    owner.process.stdin.write("kill\n")
    owner.process.stdin.flush()
    assert owner.told() == {"error": "EngineDiedError", "ends": True}
