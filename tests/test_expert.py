"""The built-in teacher: it sees only messages, reads observations, fails where they do not tell, and continues a
prefix."""

import asyncio

import pytest

from envs.answer_env import AnswerEnv
from envs.base import Task
from envs.check import check_env
from envs.grading import grade
from envs.pool import EnvHost, EnvSpec
from envs.retrieval.bm25 import Bm25Retriever
from envs.retrieval.corpus import Corpus, Passage
from envs.starter import StarterWorld
from rollout.async_env import ThreadedEnv
from rollout.dialects import CODE, COT
from rollout.episode import EpisodeSettings, run_episode
from rollout.expert import ExpertPolicy
from rollout.policy import Sampling
from rollout.trajectory import Message, observation_message


@pytest.fixture(scope="module")
def world():
    return StarterWorld(seed=1)


@pytest.fixture(scope="module")
def host(world):
    pages = Corpus(Passage(id=i, title=title, text=text) for i, title, text in world.passages())
    retriever = Bm25Retriever.build(pages)
    host = EnvHost(EnvSpec(), lambda query, k: retriever.search([query], k)[0])
    yield host
    host.close()


def say(*messages: Message, prefix: str = "") -> str:
    completions = asyncio.run(ExpertPolicy().complete(messages, Sampling(stop=CODE.stop), prefix=prefix))
    return completions[0].text


def shown(title: str, text: str) -> Message:
    return observation_message(f"Observation:\nExecution logs:\n[1] {title}: {title} {text}")


SYSTEM = Message(role="system", content=CODE.system_prompt)


def test_it_solves_held_out_tasks_of_every_kind_with_the_real_sandbox_and_search(world, host):
    env = ThreadedEnv(host.make())
    tasks = world.test_tasks(6)

    async def solve() -> list:
        done = [await run_episode(t, policy=ExpertPolicy(), env=env, settings=EpisodeSettings()) for t in tasks]
        await env.close()
        return done

    trajectories = asyncio.run(solve())
    assert [t.prediction for t in trajectories] == [task.answer for task in tasks]
    searches = [sum(step.tool_calls for step in t.steps) for t in trajectories]
    assert {t.task.kind.split("_unseen")[0]: n for t, n in zip(trajectories, searches, strict=True)} == {
        "arithmetic": 0,
        "two_hop": 2,
    }


def test_first_thought_goes_through_the_whole_episode(world, host):
    env = ThreadedEnv(host.make())
    facts = {name: entity.facts for name, entity in world.encyclopedia.entities.items()}
    task = next(task for task in world.train_tasks(20) if task.kind == "two_hop")
    settings = EpisodeSettings(first_thought=True)
    trajectory = asyncio.run(run_episode(task, policy=ExpertPolicy(facts), env=env, settings=settings))
    assert trajectory.success and trajectory.first_thought
    assert trajectory.steps[0].completion.text.startswith(f"Thought: {trajectory.first_thought}\nCode:")


@pytest.mark.parametrize("prompt", ["student", "teacher"])
def test_it_reasons_in_words_behind_retrieved_passages(world, prompt):
    pages = Corpus(Passage(id=i, title=title, text=text) for i, title, text in world.passages())
    retriever = Bm25Retriever.build(pages)
    spec = EnvSpec(name="answer", context_passages=2, search_format="paper")
    host = EnvHost(spec, lambda query, k: retriever.search([query], k)[0])
    facts = {name: entity.facts for name, entity in world.encyclopedia.entities.items()}
    settings = EpisodeSettings(dialect="cot", prompt=prompt)
    for task in world.train_tasks(4):
        episode = run_episode(task, policy=ExpertPolicy(facts), env=ThreadedEnv(host.make()), settings=settings)
        trajectory = asyncio.run(episode)
        assert trajectory.success
        assert trajectory.user_prompt.count("===== Document") == 2 and trajectory.user_prompt.endswith(task.question)
        assert trajectory.messages()[1].content == trajectory.user_prompt
    host.close()


def test_the_answer_is_taken_from_the_pages_not_known(world):
    """With a page that tells another fact, the expert answers with what the page says."""
    question = Message(role="user", content="In which city was the author of The Silver Harbor born?")
    book = shown("The Silver Harbor", "is a novel written by Ada Zun, published by Ro Labs in 1950.")
    author = shown("Ada Zun", "is a singer born in Nowhereton in 1900, studied at Mo University and works for Ro Labs.")
    first = say(SYSTEM, question)
    assert 'web_search("The Silver Harbor")' in first
    turns = [SYSTEM, question, Message(role="assistant", content=first), book]
    second = say(*turns)
    assert "The author is Ada Zun." in second and 'web_search("Ada Zun")' in second
    turns += [Message(role="assistant", content=second), author]
    assert 'final_answer("Nowhereton")' in say(*turns)


def test_it_gives_up_when_the_search_does_not_tell(world):
    question = Message(role="user", content="In which city was the author of The Silver Harbor born?")
    turns = [
        SYSTEM,
        question,
        Message(role="assistant", content="x"),
        observation_message("Observation:\nNo results found."),
    ]
    assert 'final_answer("unknown")' in say(*turns)


def test_it_continues_a_prefix():
    problem = "Nia has 500 pens at home. Then 20 pens arrive by post. How many pens are there at the end?"
    question = Message(role="user", content=problem)
    text = say(SYSTEM, question, prefix="Thought: Let me think differently.")
    assert text.startswith("Thought: Let me think differently.\nCode:\n```py\n# Nia has 500 pens at home.\nx = 500\n")
    assert text.endswith("```<end_code>")


def test_an_unknown_question_is_no_crash():
    assert 'final_answer("unknown")' in say(SYSTEM, Message(role="user", content="Why?"))
    assert say(Message(role="system", content=COT.system_prompt), Message(role="user", content="Why?")).endswith(
        "unknown"
    )


def test_both_envs_keep_the_contract(host):
    tasks = [Task(id=str(i), question=f"What is {i} + 1?", answer=str(i + 1), kind="sum") for i in range(3)]
    check_env(host.make, tasks, ["x = 1", "print(2)", "1 / 0", "final_answer(1)"])
    check_env(lambda: AnswerEnv(grade=grade), tasks, ["1", "2", "three"])
