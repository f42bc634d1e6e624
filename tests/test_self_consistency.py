"""Early stop of the vote: the same majority with fewer actions run, each at most once, and the winner kept."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from envs.base import EnvError, Observation, ObservationKind, StepResult, Task
from envs.code_env import CodeEnv
from envs.grading import grade
from envs.sandbox import Sandbox
from envs.tools import Tool
from rollout.async_env import ThreadedEnv
from rollout.episode import EpisodeSettings, run_episode
from rollout.policy import Policy, Sampling, ScriptedPolicy
from rollout.self_consistency import is_decided, vote, waves
from rollout.trajectory import Completion, FailureClass, Message, StopReason, Trajectory

TASK = Task(id="t", question="What is 6 times 7?", answer="42", kind="arithmetic")


class TableEnv:
    """What each action shows is looked up; None is an action that fails. Counts what runs."""

    can_preview = True

    def __init__(self, table: dict[str, str | None]) -> None:
        self._table = table
        self.waves: list[list[str]] = []
        self.committed: str | None = None

    def reset(self, task, seed):
        return Observation(text=task.question), {}

    def step(self, action):
        raise AssertionError("a previewed action is never run again")

    def _result(self, action: str) -> StepResult:
        if action == "boom":
            raise EnvError("the sandbox is gone")
        text = self._table[action]
        kind = ObservationKind.CODE_ERROR if text is None else ObservationKind.OK
        return StepResult(Observation(text=text or "failed", kind=kind), 0.0, False, False, {"final_answer": None})

    def preview(self, actions):
        self.waves = []
        return self.preview_more(actions)

    def preview_more(self, actions):
        results = [self._result(action) for action in actions]
        self.waves.append(list(actions))
        return results

    def commit(self, index):
        self.committed = [action for wave in self.waves for action in wave][index]
        return self._result(self.committed)

    def close(self):
        pass


class LikelyPolicy:
    """Candidates with log-probabilities of their own."""

    name, weights_version = "likely", "v1"

    def __init__(self, bodies: list[str | None], likelihoods: list[float]) -> None:
        self._turns = list(zip(bodies, likelihoods, strict=True))

    async def complete(self, messages: list[Message], sampling: Sampling, *, prefix: str = "") -> list[Completion]:
        return [
            Completion(text="no code" if body is None else code(body), logprobs=(likelihood,))
            for body, likelihood in self._turns
        ]

    async def close(self) -> None:
        pass


def code(body: str) -> str:
    return f"Thought: go\nCode:\n```py\n{body}\n```<end_code>"


def one_step(policy: Policy, env, k: int):
    settings_ = EpisodeSettings(max_steps=1, candidates=k, temperature=0.7)
    return asyncio.run(run_episode(TASK, policy=policy, env=ThreadedEnv(env), settings=settings_))


ACTIONS = list("abcdef")
candidate_lists = st.lists(st.sampled_from([*ACTIONS, None]), min_size=2, max_size=10)
tables = st.fixed_dictionaries({action: st.sampled_from(["one", "two", None]) for action in ACTIONS})


@settings(max_examples=150, deadline=None)
@given(bodies=candidate_lists, table=tables, data=st.data())
def test_the_majority_is_what_it_is_without_early_stop(bodies, table, data):
    likely = data.draw(st.lists(st.floats(-9, 0), min_size=len(bodies), max_size=len(bodies)))
    everything = [None if body is None else table[body] for body in bodies]
    full = vote(everything, likely)
    env = TableEnv(table)
    [step] = one_step(LikelyPolicy(bodies, likely), env, len(bodies)).steps
    assert everything[step.chosen] == everything[full.winner]
    ran = [action for wave in env.waves for action in wave]
    assert len(set(ran)) == len(ran)
    assert env.committed == step.action
    for body, candidate in zip(bodies, step.candidates, strict=True):
        assert candidate.ran == (body is None or body in ran)
        assert candidate.ran or (candidate.votes, candidate.observation) == (0, "")
        assert candidate.votes <= full.counts[full.winner]
    assert step.agreement <= full.agreement


@settings(max_examples=100, deadline=None)
@given(bodies=candidate_lists)
def test_the_first_wave_is_the_smallest_that_could_decide(bodies):
    first, rest = waves(bodies, None)
    assert sorted([*first, *rest]) == sorted({body for body in bodies if body is not None})

    def decides(run: list[str]) -> bool:
        agreed = ["same" for body in bodies if body in run]
        return is_decided(agreed, waiting=sum(body is not None and body not in run for body in bodies))

    assert decides(first) or not first
    assert not first or not decides(first[:-1])


def test_equal_candidates_run_once_and_spare_the_rest():
    env = TableEnv({"a": "one", "b": "two", "c": "two"})
    [step] = one_step(LikelyPolicy(["b", "a", "a", "c", "a"], [-1.0] * 5), env, 5).steps
    assert env.waves == [["a"]] and env.committed == "a"
    assert [(c.votes, c.ran) for c in step.candidates] == [(0, False), (3, True), (3, True), (0, False), (3, True)]
    assert step.agreement == pytest.approx(0.6)


def test_different_actions_go_in_two_waves_when_they_disagree():
    env = TableEnv({"a": "one", "b": "two", "c": "two", "d": "two"})
    [step] = one_step(LikelyPolicy(["a", "b", "c", "d"], [-4.0, -3.0, -2.0, -1.0]), env, 4).steps
    assert env.waves == [["d", "c", "b"]]  # the likeliest three agree, and the fourth cannot change that
    assert step.chosen == 3
    env = TableEnv({"a": "one", "b": "one", "c": "two", "d": "two"})
    [step] = one_step(LikelyPolicy(["a", "b", "c", "d"], [-4.0, -3.0, -2.0, -1.0]), env, 4).steps
    assert env.waves == [["d", "c", "b"], ["a"]] and step.chosen == 3
    assert all(candidate.ran for candidate in step.candidates)


def test_env_that_cannot_add_to_a_preview_runs_all_at_once():
    class OneWave(TableEnv):
        preview_more = None  # type: ignore[assignment]

        def preview(self, actions):
            self.waves = [list(actions)]
            return [self._result(action) for action in actions]

    env = OneWave({"a": "one", "b": "two"})
    [step] = one_step(LikelyPolicy(["b", "a", "a"], [-1.0] * 3), env, 3).steps
    assert step.action == "a" and env.waves == [["b", "a"]]


def test_failure_of_ours_in_the_second_wave_is_a_failure_of_the_episode():
    env = TableEnv({"a": "one", "b": "two"})
    trajectory = one_step(LikelyPolicy(["a", "b", "boom"], [-1.0, -1.0, -2.0]), env, 3)
    assert env.waves == [["a", "b"]]
    assert trajectory.stop_reason is StopReason.FAILED and trajectory.failure is not None
    assert trajectory.failure.failure_class is FailureClass.ENVIRONMENT


@pytest.mark.timeout(120)
def test_hosts_of_ray_preview_in_waves_and_put_passages_in_front_of_questions(ray_cluster):
    import ray

    from envs.pool import EnvSpec, RemoteEnv, start_env_hosts
    from envs.retrieval import Hit, Passage

    def search(query: str, k: int) -> list[Hit]:
        return [Hit(passage=Passage(id="1", title="Six", text="Six times seven is 42."), score=1.0)] * k

    [code_host] = start_env_hosts(EnvSpec(), count=1, slots_per_host=1, search=search)
    [answer_host] = start_env_hosts(
        EnvSpec(name="answer", context_passages=2), count=1, slots_per_host=1, search=search
    )
    bodies = ["x = 1\nx", "x = 2\nx", "x = 40 + 2\nx", "x = 42\nx"]
    policy = ScriptedPolicy(lambda messages, i: code(bodies[i] if len(messages) == 2 else "final_answer(x)"))
    settings_ = EpisodeSettings(max_steps=3, candidates=4, temperature=0.7, prompt="teacher")

    async def play() -> list[Trajectory]:
        env = RemoteEnv(code_host, 0, can_preview=True, timeout_s=60)
        voted = await run_episode(TASK, policy=policy, env=env, settings=settings_)
        reading = RemoteEnv(answer_host, 0, can_preview=True, timeout_s=60)
        speaker = ScriptedPolicy(lambda messages, i: "Answer: 42")
        cot = EpisodeSettings(dialect="cot", candidates=2, temperature=0.7)
        return [voted, await run_episode(TASK, policy=speaker, env=reading, settings=cot)]

    try:
        voted, read = asyncio.run(play())
    finally:
        ray.kill(code_host)
        ray.kill(answer_host)
    assert voted.success and [candidate.votes for candidate in voted.steps[0].candidates] == [1, 1, 2, 2]
    assert "- web_search(query: str)" in (voted.shown_system_prompt or "")
    assert read.success and (read.user_prompt or "").count("Six: Six times seven is 42.") == 2


@pytest.fixture(scope="module")
def sandbox() -> Iterator[Sandbox]:
    with Sandbox(tool_names=["look"], modules=["math"]) as sandbox:
        yield sandbox


def test_votes_over_the_real_sandbox_share_tool_calls_and_keep_the_winners_state(sandbox: Sandbox):
    asked: list[str] = []

    def look(name: str) -> str:
        """Look."""
        asked.append(name)
        return f"{name} is found"

    env = CodeEnv(sandbox=sandbox, tools=[Tool.from_function(look)], grade=grade)
    # Two pairs disagree, so that it takes all: the fourth decides.
    first = ["x = 1\nlook('a')", "x = 2\nx", "x = 3\n2", "x = 4\nlook('a')", "x = 5\nprint(look('a'))"]
    policy = ScriptedPolicy(lambda messages, i: code(first[i] if len(messages) == 2 else "final_answer(x * 42)"))
    settings_ = EpisodeSettings(max_steps=3, candidates=5, temperature=0.7)
    trajectory = asyncio.run(run_episode(TASK, policy=policy, env=ThreadedEnv(env), settings=settings_))
    assert asked == ["a"]
    votes = [candidate.votes for candidate in trajectory.steps[0].candidates]
    assert votes == [2, 2, 2, 2, 1] and trajectory.steps[0].chosen == 0
    assert trajectory.prediction == "42" and trajectory.success
