"""Trajectories/s beside smolagents: the same tasks, solved by its `CodeAgent` in threads over vLLM's OpenAI server.

That is how the paper's code collects (arXiv 2505.17612): smolagents' own agent, its own Python interpreter in this
process, HTTP to a server of the same student with the same engine arguments. It is given the student's short system
prompt, code fences and wording of observations, so that the student really solves the tasks, and our `web_search` on
the same retriever. Greedy on both sides, the same limits of steps and tokens, no log-probabilities; prefixes are
forgotten before each run.

Unlike ours, the peer confines nothing, records no token ids, and writes no ledger. Both rates are of whole runs, ramps
included.
"""

from __future__ import annotations

import os
import socket
import statistics
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

from benchmarks.rollout_world import Stage
from benchmarks.scoreboard import Row
from envs.base import Task
from envs.grading import grade
from envs.local_envs import LocalEnvs
from envs.retrieval.search_tool import web_search_tool
from envs.tools import Tool
from launch.evaluation.scoring import student_spec
from rollout.collector import Collection, missing_requests, start_rollout_actors, stop_rollout_actors
from rollout.dialects import CODE
from rollout.ledger import Ledger
from rollout.vllm_policy import vllm_environment

THREADS = (4, 16)
ENGINES = 2
"""Of ours, one a core; the peer's server and its clients have both cores too."""
GOAL = 5.0
_START_S = 300.0
_CALL_S = 120.0
_FENCES = ("```py", "```<end_code>")
_NAME = "student"


@contextmanager
def server(student: Path, stage: Stage) -> Iterator[str]:
    """vLLM's OpenAI server on a free loopback port; yields its URL. Raises `RuntimeError` when it does not start."""
    evaluate = stage.config.evaluate
    port = _free_port()
    command = [
        sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", str(student),
        "--served-model-name", _NAME, "--host", "127.0.0.1", "--port", str(port), "--dtype", evaluate.dtype,
        "--max-model-len", str(evaluate.max_model_len), "--max-num-seqs", "256", "--enforce-eager",
        "--kv-cache-memory-bytes", str((evaluate.kv_cache_mb or 512) << 20), "--enable-prefix-caching",
        "--no-enable-chunked-prefill", "--max-num-batched-tokens", str(max(evaluate.max_model_len, 4096)),
        "--block-size", "64", "--disable-uvicorn-access-log", "--disable-log-stats",
    ]  # fmt: skip
    environment = {
        **os.environ, **vllm_environment(), "OMP_NUM_THREADS": "1", "TORCHDYNAMO_DISABLE": "1", "HF_HUB_OFFLINE": "1",
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_SERVER_DEV_MODE": "1",
    }  # fmt: skip
    with tempfile.TemporaryFile("w+") as log:
        process = subprocess.Popen(command, env=environment, stdout=log, stderr=subprocess.STDOUT)
        try:
            url = f"http://127.0.0.1:{port}"
            if not _answers(f"{url}/health", process):
                log.seek(0)
                raise RuntimeError(f"vLLM's server did not start; it said:\n{log.read()[-3000:]}")
            yield url
        finally:
            process.terminate()
            try:
                process.wait(60)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait(60)


def _free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


def _answers(url: str, process: subprocess.Popen[Any]) -> bool:
    until = time.monotonic() + _START_S
    while time.monotonic() < until and process.poll() is None:
        try:
            with urllib.request.urlopen(url, timeout=5):
                return True
        except (urllib.error.URLError, OSError):
            time.sleep(0.5)
    return False


def _agent_class() -> type:
    """smolagents is imported late: it takes seconds."""
    from smolagents import ActionStep, ChatMessage, CodeAgent, MessageRole, TaskStep, TokenUsage
    from smolagents.utils import AgentParsingError

    from envs.adapters.smolagents_adapter import NO_CODE

    def message(role: MessageRole, text: str) -> ChatMessage:
        return ChatMessage(role=role, content=[{"type": "text", "text": text}])

    class PlainAgent(CodeAgent):
        """A CodeAgent that only words its memory as the student was trained."""

        def initialize_system_prompt(self) -> str:
            return CODE.system_prompt

        def write_memory_to_messages(self, summary_mode: bool = False) -> list[ChatMessage]:
            messages = [message(MessageRole.SYSTEM, CODE.system_prompt)]
            for step in self.memory.steps:
                if isinstance(step, TaskStep):
                    messages.append(message(MessageRole.USER, step.task))
                elif isinstance(step, ActionStep) and step.model_output is not None:
                    seen = (step.observations or "").replace("Execution logs:\nLast output", "Last output", 1)
                    if isinstance(step.error, AgentParsingError):
                        seen = NO_CODE
                    elif step.error is not None:
                        seen = f"{seen}Error: {step.error}"
                    messages.append(message(MessageRole.ASSISTANT, str(step.model_output)))
                    messages.append(message(MessageRole.USER, f"Observation:\n{seen}"))
            return messages

        def provide_final_answer(self, task: str) -> ChatMessage:
            """None: our episodes ask for none when they are out of steps."""
            return ChatMessage(role=MessageRole.ASSISTANT, content=None, token_usage=TokenUsage(0, 0))

    return PlainAgent


class Peer:
    """smolagents over the server at `url`."""

    def __init__(self, url: str, stage: Stage) -> None:
        from smolagents import OpenAIModel

        self._url, self._config, self._class = url, stage.config, _agent_class()
        env = stage.config.env
        self._tool: Tool = web_search_tool(stage.search, k=env.search_results, formatter=env.search_format)
        self._model = OpenAIModel(
            model_id=_NAME, api_base=f"{url}/v1", api_key="none", flatten_messages_as_text=True, temperature=0.0,
            max_tokens=stage.config.evaluate.max_tokens, client_kwargs={"timeout": _CALL_S},
        )  # fmt: skip

    def solve(self, tasks: Sequence[Task], threads: int) -> tuple[float, float, int]:
        """Trajectories/s, share solved, and how many runs ended in an exception."""
        request = urllib.request.Request(f"{self._url}/reset_prefix_cache", method="POST")
        with urllib.request.urlopen(request, timeout=60):
            pass
        started = time.monotonic()
        with ThreadPoolExecutor(threads) as pool:
            rewards = list(pool.map(self._reward, tasks))
        wall_s = time.monotonic() - started
        solved = sum(reward is not None and reward >= 1.0 for reward in rewards)
        return len(tasks) / wall_s, solved / len(tasks), sum(reward is None for reward in rewards)

    def _reward(self, task: Task) -> float | None:
        from smolagents import LogLevel
        from smolagents.utils import AgentError

        from envs.adapters.smolagents_adapter import as_smolagents_tool

        agent = self._class(
            tools=[as_smolagents_tool(self._tool)], model=self._model, code_block_tags=_FENCES,
            additional_authorized_imports=list(self._config.env.modules), max_steps=self._config.env.max_steps,
            verbosity_level=LogLevel.OFF,
        )  # fmt: skip
        try:
            answer = agent.run(task.question)
        except AgentError:
            return None
        return grade(task, str(answer)) if answer is not None else 0.0


class Ours:
    """As a user collects: Ray workers, each with an engine and envs in its own process, one ledger."""

    def __init__(self, stage: Stage, student: Path, *, slots: int) -> None:
        evaluate = replace(stage.config.evaluate, concurrency=slots // ENGINES)
        spec = student_spec(replace(stage.config, evaluate=evaluate), str(student))
        self._spec = replace(spec, engine="in_process", data_parallel_size=ENGINES)
        self._slots = slots // ENGINES
        self._envs = LocalEnvs(stage.config.env, stage.search, count=self._slots, timeout_s=_CALL_S)
        self._settings = replace(stage.settings(temperature=0.0), logprobs=False)  # the peer asks for none either
        self._actors = start_rollout_actors(self._spec, count=1)

    def solve(self, tasks: Sequence[Task]) -> tuple[float, float]:
        """Trajectories/s between the first episode's start and the last one's end, and the share solved."""
        import ray

        ray.get([actor.forget_prefixes.remote() for actor in self._actors], timeout=_START_S)
        with tempfile.TemporaryDirectory(prefix="rollout-benchmark-") as folder:
            ledger = Ledger(Path(folder) / "ledger")
            requests, _ = missing_requests(
                tasks, policy=self._spec.policy_name, settings=self._settings, ledger=ledger
            )
            collection = Collection(
                self._actors, self._envs, requests, settings=self._settings, ledger=Path(folder) / "ledger",
                concurrency=self._slots, adaptive=False,
            )  # fmt: skip
            try:
                while not collection.poll(timeout_s=1.0):
                    pass
            finally:
                collection.close()
            done = list(ledger.trajectories())
        if len(done) != len(tasks):
            raise RuntimeError(f"{len(tasks)} tasks left {len(done)} trajectories")
        wall_s = max(t.started_at_s + t.duration_s for t in done) - min(t.started_at_s for t in done)
        return len(tasks) / wall_s, sum(t.success for t in done) / len(tasks)

    def close(self) -> None:
        stop_rollout_actors(self._actors)


def rows(stage: Stage, student: Path, *, tasks: int, slots: int, repeats: int) -> Iterator[Row]:
    """Ours, the peer with few threads, the peer with many, in turn, `repeats` times; medians."""
    chosen = stage.tasks[:tasks]
    group = "trajectories/s, greedy"
    runs: list[tuple[float, float, list[tuple[float, float, int]]]] = []
    mine = Ours(stage, student, slots=slots)
    try:
        with server(student, stage) as url:
            peer = Peer(url, stage)
            mine.solve(chosen[:slots])  # both sides warm up
            peer.solve(chosen[: THREADS[-1]], THREADS[-1])
            for repeat in range(repeats):
                ours = mine.solve(chosen)
                theirs = [peer.solve(chosen, threads) for threads in THREADS]
                runs.append((*ours, theirs))
                shown = ", ".join(f"{rate:.2f}" for rate, _, _ in theirs)
                print(f"{group} {repeat + 1}/{repeats}: {ours[0]:.2f}; smolagents {shown}", flush=True)
    finally:
        mine.close()
    rate = statistics.median(run[0] for run in runs)
    success = 100 * statistics.median(run[1] for run in runs)
    what = f"ours, {ENGINES} engines, {slots} at a time"
    yield Row(what=what, measured=rate, unit="/s", beside=f"success {success:.1f} %", group=group)
    for i, threads in enumerate(THREADS):
        peer_rate, peer_success, errors = (statistics.median(run[2][i][j] for run in runs) for j in range(3))
        ratio = statistics.median(run[0] / run[2][i][0] for run in runs)
        beside = f"{peer_rate:.2f}/s, success {100 * peer_success:.1f} %"
        yield Row(
            what=f"times smolagents with {threads} threads", measured=ratio, goal=f">= {GOAL:g}", kept=ratio >= GOAL,
            beside=beside + (f", {errors:.0f} runs failed" if errors else ""), group=group,
        )  # fmt: skip
