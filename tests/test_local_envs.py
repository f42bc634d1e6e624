"""Envs in the worker's own process: the same contract, time limits, and an env that is given up harms nobody."""

import asyncio
import pickle
import threading

import pytest

from envs.base import EnvError, ObservationKind, Task
from envs.grading_math import MathSpec
from envs.local_envs import LocalEnvs
from envs.pool import EnvSpec

TASK = Task(id="1", question="What is 6 times 7?", answer="42", kind="math", grader="numeric")


def run(coroutine):
    return asyncio.run(asyncio.wait_for(coroutine, 60))


def test_an_episode_with_candidates_and_the_next_one_on_the_same_env():
    async def scenario():
        envs = pickle.loads(pickle.dumps(LocalEnvs(EnvSpec(), None, count=2, timeout_s=30)))
        env, other = await envs.connect()
        try:
            observation, _ = await env.reset(TASK, 0)
            assert observation.text == TASK.question
            await other.reset(TASK, 0)
            previews = await env.preview(["x = 42\nprint(x)", "1 / 0"])
            kinds = [preview.observation.kind for preview in previews]
            assert kinds == [ObservationKind.OK, ObservationKind.CODE_ERROR]
            await env.commit(0)
            result = await env.step("final_answer(x)")
            assert result.terminated and result.reward == 1.0
            await env.close()
            await env.reset(TASK, 1)
            again = await env.step("print(x)")
            assert again.observation.kind is ObservationKind.CODE_ERROR  # nothing of the last episode is left
            assert (await other.step("final_answer(41)")).reward == 0.0
        finally:
            await envs.close()
            await envs.close()
        with pytest.raises(EnvError, match="closed before step"):
            await other.step("1")

    run(scenario())


def test_a_call_that_hangs_is_given_up_and_the_slot_goes_on():
    hangs = threading.Event()

    def search(query, k):
        hangs.wait(30)
        return []

    async def scenario():
        spec = EnvSpec(name="answer", context_passages=2)
        envs = LocalEnvs(spec, search, count=1, timeout_s=0.3)
        [env] = await envs.connect()
        try:
            with pytest.raises(EnvError, match=r"did not finish reset within 0.3 s"):
                await env.reset(TASK, 0)
            hangs.set()
            observation, _ = await env.reset(TASK, 0)
            assert TASK.question in observation.text
            assert (await env.step("42")).reward == 1.0
        finally:
            hangs.set()
            await envs.close()

    run(scenario())


def test_what_cannot_start_says_why():
    with pytest.raises(ValueError, match="needs something to search"):
        run(LocalEnvs(EnvSpec(name="search"), None, count=1, timeout_s=5).connect())


def test_an_answer_that_is_slow_to_grade_holds_up_no_other_episode():
    """The episodes of a worker are coroutines of one event loop; one of them answers what takes its whole limit."""
    slow = r"\int_0^{10^{10}} \sin(x^{x^x}) dx"
    answers = [slow, *(f"{i} + x" for i in range(1, 7))]
    tasks = [Task(id=str(i), question="q", answer=f"x + {i}", kind="math", grader="math") for i in range(len(answers))]
    ended: list[str] = []

    async def episode(env, task, answer):
        await env.reset(task, 0)
        result = await env.step(answer)
        ended.append(answer)
        return result.reward

    async def scenario():
        spec = EnvSpec(name="answer", math=MathSpec(cpu_s=3, processes=2))
        envs = LocalEnvs(spec, None, count=len(answers), timeout_s=60)
        try:
            connected = await envs.connect()
            await episode(connected[0], tasks[0], "y")  # the grader's processes are started
            ended.clear()
            episodes = zip(connected, tasks, answers, strict=True)
            return await asyncio.gather(*(episode(*each) for each in episodes))
        finally:
            await envs.close()

    rewards = run(scenario())
    assert rewards == [0.0] + [1.0] * 6
    assert ended[-1] == slow
