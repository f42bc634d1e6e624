"""The exact-prefix property: over whole episodes, whatever is sampled, each prompt begins with the prompt before it and
the ids that were sampled then, and the row that a student is trained on begins with them all."""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import Sequence

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoTokenizer

from envs.base import Observation, ObservationKind, StepResult, Task
from learner.base_student import BASE_STUDENT_FOLDER
from rollout.async_env import ThreadedEnv
from rollout.early_exit import EarlyExit
from rollout.episode import EpisodeSettings, run_episode
from rollout.policy import Sampling
from rollout.rendering import Renderer
from rollout.trajectory import Completion, Message, SpanType, StopReason, Trajectory

TASK = Task(id="t", question="How many eggs are in 3 boxes of 12?", answer="36", kind="arithmetic")


@pytest.fixture(scope="module")
def renderer() -> Renderer:
    return Renderer(AutoTokenizer.from_pretrained(BASE_STUDENT_FOLDER))


class EchoEnv:
    """Shows the given texts one after the other, whatever is done; candidates are previewed."""

    can_preview = True

    def __init__(self, observations: Sequence[str]) -> None:
        self._texts = itertools.cycle(observations)
        self._shown: list[StepResult] = []

    def reset(self, task, seed):
        return Observation(text=task.question), {}

    def step(self, action):
        info = {"final_answer": None, "tool_calls": 0}
        return StepResult(Observation(text=next(self._texts), kind=ObservationKind.OK), 0.0, False, False, info)

    def preview(self, actions):
        self._shown = [self.step(action) for action in actions]
        return list(self._shown)

    def commit(self, index):
        return self._shown[index]

    def close(self):
        pass


class SampledPolicy:
    """Renders as the engines' policies do, and "samples" the given ids, one list a completion."""

    name, weights_version = "sampled", "v1"

    def __init__(self, renderer: Renderer, turns: Sequence[Sequence[int]]) -> None:
        self._renderer, self._turns = renderer, itertools.cycle(turns)

    async def complete(self, messages: Sequence[Message], sampling: Sampling, *, prefix: str = "") -> list[Completion]:
        prompt = self._renderer.prompt(messages, prefix)
        prefix_ids = prompt[len(self._renderer.prompt(messages)) :]
        return [self._completion(prompt, prefix_ids, prefix, tuple(next(self._turns))) for _ in range(sampling.n)]

    def _completion(self, prompt, prefix_ids, prefix: str, sampled: tuple[int, ...]) -> Completion:
        stopped = bool(sampled) and sampled[-1] == self._renderer.stop_token_id
        decode = self._renderer.tokenizer.decode
        return Completion(
            text=decode(list(prefix_ids + sampled), skip_special_tokens=True),
            token_ids=prefix_ids + sampled,
            logprobs=tuple(-0.5 for _ in sampled),
            finish_reason="stop" if stopped else "length",
            prompt_tokens=len(prompt),
            completion_tokens=len(sampled),
            prompt_ids=prompt,
            prefix_by="tokens" if prefix else "",
        )

    async def close(self) -> None:
        pass


@st.composite
def sampled_turns(draw, tokenizer, stop_token_id: int):
    """Ids of turns as they come out of an engine: code, noise, both; some cut off, some of nothing at all."""
    specials = set(tokenizer.all_special_ids) | set(tokenizer.added_tokens_decoder)
    plain = [i for i in range(len(tokenizer)) if i not in specials]
    turns = []
    for _ in range(draw(st.integers(1, 5))):
        noise = draw(st.lists(st.sampled_from(plain), max_size=12))
        number = draw(st.integers(0, 99))
        code = tokenizer(f"Thought: go\nCode:\n```py\nprint({number})\n```<end_code>", add_special_tokens=False)
        ids = draw(st.sampled_from([noise, code["input_ids"], [*noise, *code["input_ids"]]]))
        turns.append([*ids, stop_token_id] if draw(st.booleans()) else list(ids))
    return turns


texts = st.text(st.characters(codec="utf-8", exclude_categories=["Cs"]), max_size=30)


def known_ids(completion: Completion) -> tuple[int, ...]:
    """Prompt and sampled ids."""
    assert completion.prompt_ids is not None and completion.sampled_ids is not None
    return completion.prompt_ids + completion.sampled_ids


def check_exact(trajectory: Trajectory, renderer: Renderer) -> None:
    """Raises `AssertionError` unless the trajectory keeps the property."""
    steps = trajectory.steps
    for before, after in itertools.pairwise(steps):
        known = known_ids(before.completion)
        assert known_ids(after.completion)[: len(known)] == known
        assert after.completion.prompt_tokens >= len(known)
    row = renderer.row(trajectory.messages())
    whole = known_ids(steps[-1].completion)
    assert row.token_ids[: len(whole)] == whole
    # what is trained is what was sampled, stop tokens of turns that were cut off aside
    trained = [token for token, train in zip(row.token_ids, row.trained, strict=True) if train]
    assert trained == [token for step in steps for token in step.completion.token_ids or ()]


@settings(max_examples=60, deadline=None)
@given(data=st.data(), observations=st.lists(texts, min_size=1, max_size=4), first_thought=st.booleans())
def test_prompts_only_grow_and_are_prefixes_of_the_row(renderer, data, observations, first_thought):
    turns = data.draw(sampled_turns(renderer.tokenizer, renderer.stop_token_id))
    k = data.draw(st.sampled_from([1, 3]))
    episode = EpisodeSettings(
        max_steps=4, first_thought=first_thought, candidates=k, temperature=1.0, early_exit=EarlyExit(same_action=4)
    )
    policy, env = SampledPolicy(renderer, turns), ThreadedEnv(EchoEnv(observations))
    trajectory = asyncio.run(run_episode(TASK, policy=policy, env=env, settings=episode))
    assert trajectory.failure is None and trajectory.tokens == "sampled"
    check_exact(trajectory, renderer)
    for step in trajectory.steps if k > 1 else ():
        assert len(step.candidates) == k
        chosen = step.candidates[step.chosen]
        assert (chosen.token_ids, chosen.logprobs) == (step.completion.token_ids, step.completion.logprobs)


def test_a_thought_given_as_prefix_is_part_of_the_turn_and_of_the_prompt(renderer):
    tokenizer = renderer.tokenizer
    spoken = ["Multiply the boxes by 12.\n\nAnswer: 36", "\nCode:\n```py\nprint(3 * 12)\n```<end_code>"]
    turns = [[*tokenizer(text, add_special_tokens=False)["input_ids"], renderer.stop_token_id] for text in spoken]
    settings_ = EpisodeSettings(max_steps=1, first_thought=True)
    episode = run_episode(
        TASK, policy=SampledPolicy(renderer, turns), env=ThreadedEnv(EchoEnv(["36"])), settings=settings_
    )
    trajectory = asyncio.run(episode)
    [step] = trajectory.steps
    prefix = tokenizer("Thought: Multiply the boxes by 12.", add_special_tokens=False)["input_ids"]
    assert step.completion.prompt_ids[-len(prefix) :] == step.completion.token_ids[: len(prefix)] == tuple(prefix)
    assert step.completion.sampled_ids == tuple(turns[1]) and step.completion.prefix_by == "tokens"
    assert trajectory.usage.requests == 2
    assert trajectory.usage.completion_tokens == len(turns[0]) + len(turns[1])
    check_exact(trajectory, renderer)


def test_a_teachers_own_prompt_and_guide_are_in_no_training_row(renderer):
    tokenizer = renderer.tokenizer
    turn = tokenizer("Thought: go\nCode:\n```py\nprint(1)\n```<end_code>", add_special_tokens=False)["input_ids"]
    task = Task(
        id="g", question=TASK.question, answer="36", kind="arithmetic", metadata={"solution": "Twelve dozens thrice."}
    )
    settings_ = EpisodeSettings(max_steps=2, guide="solution", prompt="teacher")
    policy = SampledPolicy(renderer, [[*turn, renderer.stop_token_id]])
    trajectory = asyncio.run(run_episode(task, policy=policy, env=ThreadedEnv(EchoEnv(["1"])), settings=settings_))
    assert trajectory.stop_reason is StopReason.MAX_STEPS
    shown, trained = renderer.row(trajectory.shown()), renderer.row(trajectory.messages())
    whole = known_ids(trajectory.steps[-1].completion)
    assert shown.token_ids[: len(whole)] == whole
    assert "thrice" in tokenizer.decode(list(shown.token_ids))
    assert "final_answer(" in (trajectory.shown_system_prompt or "")
    assert "thrice" not in tokenizer.decode(list(trained.token_ids))
    assert SpanType.SYSTEM in trained.span_types and len(trained) < len(shown)
