"""The episode loop: whose mistake is whose, first-thought prefix, self-consistent actions, limits."""

import asyncio
from dataclasses import replace

import pytest

from envs.answer_env import AnswerEnv
from envs.base import EnvError, Observation, ObservationKind, StepResult, Task, TaskError
from envs.grading import grade
from rollout.async_env import ThreadedEnv
from rollout.dialects import CODE, COT
from rollout.early_exit import EarlyExit
from rollout.episode import EpisodeSettings, run_episode
from rollout.policy import PolicyError, ScriptedPolicy
from rollout.self_consistency import ballot, likelihoods, vote
from rollout.teacher_prompts import COT_TEACHER
from rollout.trajectory import Completion, FailureClass, SpanType, StopReason, Usage, trajectory_key

TASK = Task(id="t1", question="What is 6 times 7?", answer="42", kind="arithmetic")


class CounterEnv:
    """A tiny forkable env: `add n` changes a number, `say` answers with it, `boom` is our own failure."""

    def __init__(self, can_preview: bool = True) -> None:
        self.can_preview = can_preview
        self.total = 0
        self.ran: list[str] = []
        self._previews: list[tuple[int, StepResult]] = []

    def reset(self, task, seed):
        self.total, self.ran, self.task = 0, [], task
        return Observation(text=task.question), {}

    def _run(self, action: str) -> tuple[int, StepResult]:
        self.ran.append(action)
        verb, _, number = action.partition(" ")
        info = {"final_answer": None, "tool_calls": 0}
        if verb == "boom":
            raise EnvError("the sandbox is gone")
        if verb == "say":
            info["final_answer"] = str(self.total)
            final = Observation(text=str(self.total), kind=ObservationKind.FINAL)
            return self.total, StepResult(final, grade(self.task, str(self.total)), True, False, info)
        if verb != "add":
            return self.total, StepResult(
                Observation(text="?", kind=ObservationKind.CODE_ERROR), 0.0, False, False, info
            )
        total = self.total + int(number)
        return total, StepResult(Observation(text=str(total)), 0.0, False, False, info)

    def step(self, action):
        self.total, result = self._run(action)
        return result

    def preview(self, actions):
        self._previews = [self._run(action) for action in actions]
        return [result for _, result in self._previews]

    def commit(self, index):
        self.total, result = self._previews[index]
        return result

    def close(self):
        pass


def code(body: str) -> str:
    return f"Thought: go\nCode:\n```py\n{body}\n```<end_code>"


def run(reply, env=None, **settings):
    policy = reply if isinstance(reply, ScriptedPolicy) else ScriptedPolicy(reply)
    env = env or CounterEnv()
    episode = run_episode(TASK, policy=policy, env=ThreadedEnv(env), settings=EpisodeSettings(**settings))
    return asyncio.run(episode)


def in_order(*bodies):
    return lambda messages, i: code(bodies[sum(m.role == "assistant" for m in messages)])


def test_solves_and_records_each_step():
    trajectory = run(in_order("add 40", "add 2", "say"))
    assert trajectory.success and trajectory.prediction == "42" and trajectory.stop_reason is StopReason.FINAL
    assert [step.observation for step in trajectory.steps] == ["Observation:\n40", "Observation:\n42", "42"]
    assert [m.role for m in trajectory.messages()] == ["system", "user"] + ["assistant", "user"] * 2 + ["assistant"]
    assert trajectory.trainable


def test_each_step_is_told_of_as_it_ends():
    told = []

    def reply(messages, i):
        told.append("asked")
        return code("add 42") if len(messages) == 2 else code("say it")

    episode = run_episode(
        TASK,
        policy=ScriptedPolicy(reply),
        env=ThreadedEnv(CounterEnv()),
        settings=EpisodeSettings(),
        on_step=told.append,
    )
    first, second = asyncio.run(episode).steps
    assert told == ["asked", first, "asked", second]


def test_key_and_seed_depend_on_task_policy_and_settings_alone():
    one, again = run(in_order("say")), run(in_order("say"))
    other = run(in_order("say"), max_tokens=99)
    assert (one.key, one.seed) == (again.key, again.seed) and one.key != other.key
    assert run(in_order("say"), deadline_s=5.0).key == one.key


def test_keys_of_before_later_knobs_were_there_stay():
    before = {
        "dialect": "code", "max_steps": 5, "max_tokens": 256, "temperature": 0.0, "top_p": 1.0, "candidates": 1,
        "first_thought": False, "fruitless_steps": 2, "seed": 3,
    }  # fmt: skip
    key = trajectory_key(task_id="t1", policy="p", sample_index=1, settings=before)
    settings = EpisodeSettings(seed=3, early_exit=EarlyExit(unparsed_turns=2), deadline_s=9.0, logprobs=False)
    assert settings.key(TASK, "p", 1) == key
    assert replace(settings, temperature=0, top_p=1).key(TASK, "p", 1) == key


def test_every_later_knob_changes_the_key():
    knobs = [
        {}, {"early_exit": EarlyExit(same_action=2)}, {"early_exit": EarlyExit(no_progress=2)}, {"guide": "solution"},
        {"guide": "tutorial"}, {"prompt": "teacher"},
    ]  # fmt: skip
    assert len({EpisodeSettings(**knob).key(TASK, "p", 0) for knob in knobs}) == len(knobs)


@pytest.mark.parametrize(
    ("knob", "wrong"),
    [({"guide": "hint"}, "guide 'hint' is unknown"), ({"prompt": "long"}, "prompt 'long' is unknown")],
)
def test_unknown_knobs_are_refused(knob, wrong):
    with pytest.raises(ValueError, match=wrong):
        EpisodeSettings(**knob)


def test_a_model_mistake_is_shown_to_the_model():
    trajectory = run(lambda messages, i: "no code here" if len(messages) == 2 else code("say"))
    assert trajectory.steps[0].observation_kind is ObservationKind.PARSE_ERROR
    assert "no code block was found" in trajectory.messages()[3].content
    assert trajectory.failure is None and not trajectory.trainable


def test_our_failure_ends_the_episode_and_is_never_shown():
    trajectory = run(in_order("add 1", "boom", "say"))
    assert trajectory.stop_reason is StopReason.FAILED
    assert trajectory.failure.failure_class is FailureClass.ENVIRONMENT
    assert all("sandbox" not in message.content for message in trajectory.messages())
    assert not trajectory.trainable


@pytest.mark.parametrize(
    ("failure_class", "stop"), [(FailureClass.ENGINE, StopReason.FAILED), (FailureClass.LIMIT, StopReason.LENGTH)]
)
def test_policy_errors_are_classified(failure_class, stop):
    def reply(messages, i):
        raise PolicyError("prompt too long", failure_class)

    trajectory = run(reply)
    assert trajectory.stop_reason is stop and trajectory.stop_detail == "prompt too long"
    assert (trajectory.failure is not None) == (stop is StopReason.FAILED)


def test_fruitless_turns_in_a_row_end_it():
    replies = ["nothing", code("add 1"), "nothing", "nothing", code("say")]
    rule = EarlyExit(unparsed_turns=2)
    trajectory = run(lambda messages, i: replies[sum(m.role == "assistant" for m in messages)], early_exit=rule)
    assert trajectory.stop_reason is StopReason.FRUITLESS and len(trajectory.steps) == 4
    assert trajectory.stop_detail == "2 turns in a row without an action" and trajectory.truncated


def test_an_exhausted_budget_ends_more_than_the_episode():
    class NoMoney(PolicyError):
        ends_collection = True

    def reply(messages, i):
        raise NoMoney("the cap of 3 USD is reached", FailureClass.LIMIT)

    with pytest.raises(NoMoney):
        run(reply)


def test_a_task_that_cannot_be_used_is_an_input_failure():
    class Refusing(CounterEnv):
        def reset(self, task, seed):
            raise TaskError("task 't1' has no board")

    trajectory = run(in_order("say"), Refusing())
    assert trajectory.failure.failure_class is FailureClass.INPUT
    assert trajectory.stop_detail == trajectory.failure.message == "task 't1' has no board"


def test_a_time_limit_that_is_not_the_episodes_is_a_failure():
    class Impatient(ScriptedPolicy):
        async def complete(self, messages, sampling, *, prefix=""):
            raise TimeoutError("30 s")

    trajectory = run(Impatient(lambda messages, i: ""))
    assert trajectory.failure.failure_class is FailureClass.ENGINE
    assert trajectory.failure.message == "a call timed out in step 1, waiting for the policy: 30 s"


def test_max_steps_ends_it():
    trajectory = run(lambda messages, i: code("add 1"), max_steps=3)
    assert len(trajectory.steps) == 3 and trajectory.stop_reason is StopReason.MAX_STEPS and not trajectory.success
    assert trajectory.stop_detail == "no final answer in max_steps=3" and trajectory.truncated


def test_a_straggler_is_cut_off_at_its_deadline():
    class Slow(ScriptedPolicy):
        async def complete(self, messages, sampling, *, prefix=""):
            await asyncio.sleep(30)
            return []

    trajectory = run(Slow(lambda messages, i: ""), deadline_s=0.2)
    assert trajectory.stop_reason is StopReason.DEADLINE and trajectory.duration_s < 5
    assert trajectory.stop_detail == "0.2 s had passed in step 1, waiting for the policy" and trajectory.truncated


def test_an_env_that_hangs_is_cut_off_at_the_deadline_with_the_steps_so_far():
    class Hanging(ThreadedEnv):
        async def step(self, action):
            if action == "say":
                await asyncio.sleep(30)
            return await super().step(action)

    episode = run_episode(
        TASK,
        policy=ScriptedPolicy(in_order("add 1", "say")),
        env=Hanging(CounterEnv()),
        settings=EpisodeSettings(deadline_s=0.5),
    )
    trajectory = asyncio.run(episode)
    assert trajectory.stop_reason is StopReason.DEADLINE and len(trajectory.steps) == 1
    assert trajectory.stop_detail == "0.5 s had passed in step 2, waiting for the env"


class PaidPolicy(ScriptedPolicy):
    """Tells of tokens and money as an endpoint does: one prompt a request, and a price for each completion."""

    async def complete(self, messages, sampling, *, prefix=""):
        completions = await super().complete(messages, sampling, prefix=prefix)
        return [
            replace(each, prompt_tokens=100, completion_tokens=7, cost_usd=0.25, token_ids=(i,), logprobs=(-1.0 - i,))
            for i, each in enumerate(completions)
        ]


def test_usage_counts_every_request_and_the_candidates_that_lost():
    def reply(messages, i):
        if messages[0].content == COT.system_prompt:
            return "Multiply.\n\nAnswer: 42"
        return "\nCode:\n```py\nadd 42\n```<end_code>" if len(messages) == 2 else code("say")

    trajectory = run(PaidPolicy(reply), first_thought=True, candidates=3, temperature=0.5)
    assert trajectory.success and len(trajectory.steps) == 2
    assert trajectory.usage == Usage(requests=3, prompt_tokens=300, completion_tokens=49, cost_usd=7 * 0.25)
    assert trajectory.completion_tokens == 14


def test_losers_are_recorded_with_their_ids():
    bodies = ["add 1", "add 42", "add 42"]
    policy = PaidPolicy(lambda messages, i: code(bodies[i]) if len(messages) == 2 else code("say"))
    step = run(policy, candidates=3, temperature=0.7).steps[0]
    assert [(c.token_ids, c.logprobs) for c in step.candidates] == [((i,), (-1.0 - i,)) for i in range(3)]
    assert (step.chosen, step.completion.token_ids, step.agreement) == (1, (1,), pytest.approx(2 / 3))


@pytest.mark.parametrize(("asked", "k", "told"), [(True, 1, True), (False, 1, False), (False, 2, True)])
def test_logprobs_are_asked_for_where_they_are_wanted_or_decide(asked, k, told):
    policy = ScriptedPolicy(lambda messages, i: code("say"))
    run(policy, logprobs=asked, candidates=k, temperature=0.5)
    assert policy.calls[0][1].logprobs is told


def test_what_the_env_shows_first_is_the_question():
    passages = AnswerEnv(grade=grade, context=lambda question: "[1] Six: Six times seven is forty-two.")
    policy = ScriptedPolicy(lambda messages, i: "So it is 42.\nAnswer: 42")
    trajectory = run(policy, passages, dialect="cot")
    shown = f"Passages that may help:\n[1] Six: Six times seven is forty-two.\n\nQuestion: {TASK.question}"
    assert trajectory.user_prompt == shown == trajectory.messages()[1].content == policy.calls[0][0][1].content
    assert trajectory.success
    assert run(policy, AnswerEnv(grade=grade), dialect="cot").user_prompt is None


def test_passages_that_cannot_be_had_are_our_failure():
    def context(question):
        raise ConnectionError("retrieval is down")

    trajectory = run(lambda messages, i: "Answer: 42", AnswerEnv(grade=grade, context=context), dialect="cot")
    assert trajectory.failure.failure_class is FailureClass.ENVIRONMENT
    assert "retrieval is down" in trajectory.failure.message


def test_a_teacher_is_shown_its_own_prompt_with_the_tools_of_the_env():
    class WithTools(CounterEnv):
        def reset(self, task, seed):
            schema = {"name": "dig", "description": "Dig.", "parameters": {"type": "object", "properties": {}}}
            return super().reset(task, seed)[0], {"tools": [{"type": "function", "function": schema}]}

    policy = ScriptedPolicy(in_order("add 42", "say"))
    trajectory = run(policy, WithTools(), prompt="teacher", max_steps=4)
    [system, *_] = policy.calls[0][0]
    assert "- dig()\n    Dig." in system.content and "at most 4 of them" in system.content
    assert trajectory.shown_system_prompt == system.content
    assert list(policy.calls[1][0]) == trajectory.shown()[:-1]
    assert trajectory.messages()[0].content == CODE.system_prompt and trajectory.trainable


def test_a_first_thought_of_a_teacher_is_asked_for_with_its_own_words():
    def reply(messages, i):
        return "Multiply.\n\nAnswer: 42" if messages[0].content == COT_TEACHER else code("say")

    policy = ScriptedPolicy(reply)
    assert run(policy, prompt="teacher", first_thought=True).first_thought == "Multiply."


def test_an_answer_without_a_thought_seeds_nothing():
    policy = ScriptedPolicy(
        lambda messages, i: "Answer: 42" if messages[0].content == COT.system_prompt else code("say")
    )
    trajectory = run(policy, first_thought=True)
    assert trajectory.first_thought is None and [prefix for _, _, prefix in policy.calls] == ["", ""]


def test_self_consistency_follows_the_majority_and_runs_nothing_twice():
    bodies = ["add 1", "add 42", "nonsense", "add 42", "add 7"]
    env = CounterEnv()
    policy = ScriptedPolicy(lambda messages, i: code(bodies[i]) if len(messages) == 2 else code("say"))
    trajectory = run(policy, env, candidates=5, temperature=0.7)
    first = trajectory.steps[0]
    assert (first.chosen, [c.votes for c in first.candidates]) == (1, [1, 2, 0, 2, 1])
    assert trajectory.prediction == "42" and trajectory.success
    assert env.ran[:4] == ["add 1", "add 42", "nonsense", "add 7"] and env.ran.count("say") == 1


def test_self_consistency_without_a_valid_candidate_takes_the_first():
    replies = ["not code", code("nonsense")]
    trajectory = run(lambda messages, i: replies[i], candidates=2, temperature=0.7, max_steps=1)
    assert trajectory.steps[0].chosen == 0
    assert trajectory.steps[0].observation_kind is ObservationKind.PARSE_ERROR


def test_an_env_that_cannot_fork_is_voted_on_by_action():
    env = CounterEnv(can_preview=False)
    bodies = ["add 1", "add  42", "add 42"]
    policy = ScriptedPolicy(lambda messages, i: code(bodies[i]) if len(messages) == 2 else code("say"))
    trajectory = run(policy, env, candidates=3, temperature=0.7)
    assert trajectory.success and env.ran == ["add  42", "say"]


@pytest.mark.parametrize(
    ("ballots", "winner", "counts"),
    [
        (["a", "b", "b"], 1, (1, 2, 2)),
        (["a", "b", "c"], 0, (1, 1, 1)),
        ([None, "b", "a"], 1, (0, 1, 1)),
        ([None, None], 0, (0, 0)),
        (["a", "b", "b", "a"], 0, (2, 2, 2, 2)),
    ],
)
def test_vote(ballots, winner, counts):
    outcome = vote(ballots)
    assert (outcome.winner, outcome.counts) == (winner, counts)


def test_the_likeliest_turn_of_the_majority_is_kept():
    assert vote(["a", "b", "b"], [-1.0, -9.0, -2.0]).winner == 2
    assert vote(["a", "b", "b", "a"], [-9.0, -3.0, -2.0, -1.0]).winner == 3
    assert vote(["a", None, "c"], [-5.0, -1.0, -4.0]).winner == 2


def test_likelihoods_are_sums_over_the_turn_or_nothing():
    told = [Completion(text="x", logprobs=(-1.0, -0.5)), Completion(text="y", logprobs=(-0.25,))]
    assert likelihoods(told) == [-1.5, -0.25]
    assert likelihoods([*told, Completion(text="z")]) is None


def test_ballots_are_normalised_and_final_answers_are_apart():
    assert ballot(Observation(text=" Paris \n")) == ballot(Observation(text="paris"))
    assert ballot(Observation(text="paris")) != ballot(Observation(text="paris", kind=ObservationKind.FINAL))
    assert ballot(Observation(text="paris", kind=ObservationKind.CODE_ERROR)) is None


def test_first_thought_seeds_the_first_turn_alone():
    def reply(messages, i):
        if messages[0].content == COT.system_prompt:
            return "Multiply the two numbers.\n\nThen answer.\nAnswer: 42"
        return "\nCode:\n```py\nadd 42\n```<end_code>" if len(messages) == 2 else code("say")

    policy = ScriptedPolicy(reply)
    trajectory = run(policy, first_thought=True)
    assert trajectory.first_thought == "Multiply the two numbers."
    assert trajectory.steps[0].completion.text.startswith("Thought: Multiply the two numbers.\nCode:")
    assert [prefix for _, _, prefix in policy.calls] == ["", "Thought: Multiply the two numbers.", ""]
    assert trajectory.success


def test_chain_of_thought_is_an_episode_of_one_step():
    policy = ScriptedPolicy(lambda messages, i: "6 times 7 is 42.\nAnswer: 42")
    settings = EpisodeSettings(dialect="cot", max_steps=1)
    env = ThreadedEnv(AnswerEnv(grade=grade))
    trajectory = asyncio.run(run_episode(TASK, policy=policy, env=env, settings=settings))
    assert trajectory.success and len(trajectory.steps) == 1
    assert {span.type for span in trajectory.steps[0].spans} == {SpanType.THOUGHT, SpanType.ANSWER}


@pytest.mark.parametrize(
    ("text", "action"),
    [
        (code("x = 1"), "x = 1"),
        ("Thought: t\nCode:\n```python\nx = 1\n```", "x = 1"),
        ("```py\nx = 1\n```<end_code>", "x = 1"),
        ("Thought: none", None),
        ("```py\n\n```", None),
        ("", None),
    ],
)
def test_code_dialect_parses(text, action):
    turn = CODE.parse(text)
    assert turn.action == action and (turn.error is None) == (action is not None)
    assert "".join(text[span.start : span.end] for span in turn.spans) == text


def test_greedy_candidates_are_refused():
    with pytest.raises(ValueError, match="candidates=8 need a temperature above 0"):
        EpisodeSettings(candidates=8)
