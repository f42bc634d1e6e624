"""The built-in teacher of the starter world: a rule-based expert, no model.

It sees exactly what a model would see, the messages, and never a task's reference answer: it reads the question with
the starter world's grammar, writes Thought / Code turns in the paper's format, and takes what it needs for the next
step out of the observations. Where an observation does not hold what it looks for, it fails like any teacher would.

Its style decides how fast a small student learns, as it turns each alignment over the whole question into a local one.
Each sentence of a word problem is quoted as a comment above the line of code that serves it, and the quotation begins
at the number that the line before has used: that number says where to go on. For a two-hop question the second hop is
asked of an X and named, then X is quoted and named, so that each name follows from the words just before it.

Asked with the chain-of-thought prompt it reasons in words; for the two-hop questions it then relies on facts that it
knows by heart (`known_facts`), as a large model would.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from itertools import pairwise

from envs.answer_env import question_of
from envs.starter_arithmetic import Problem, read_problem
from envs.starter_two_hop import TwoHop, read_page, read_two_hop
from rollout.dialects import COT
from rollout.policy import Sampling
from rollout.teacher_prompts import COT_TEACHER
from rollout.trajectory import Completion, Message

_RESULT = re.compile(r"^\[\d+\] (?P<title>[^:\n]+): (?P<text>.+)$", re.MULTILINE)


class ExpertPolicy:
    """`known_facts` maps an entity's name to its facts; it is used for chain of thought alone."""

    name = "starter-expert"
    weights_version = "rules-1"

    def __init__(self, known_facts: Mapping[str, Mapping[str, str]] | None = None) -> None:
        self._facts = known_facts or {}

    async def complete(self, messages: Sequence[Message], sampling: Sampling, *, prefix: str = "") -> list[Completion]:
        text = _continue(prefix, self._turn(messages))
        for stop in sampling.stop:
            head, found, _ = text.partition(stop)
            text = head + found
        # Rules have no tokens; words are counted, so that throughput figures of this teacher mean something.
        completion = Completion(text=text, completion_tokens=len(text.split()), weights_version=self.weights_version)
        return [completion] * sampling.n

    async def close(self) -> None:
        pass

    def _turn(self, messages: Sequence[Message]) -> str:
        question = question_of(next(message.content for message in messages if message.role == "user"))
        in_words = messages[0].role == "system" and messages[0].content in (COT.system_prompt, COT_TEACHER)
        observations = [message.content for message in messages if message.role == "user"][1:]
        if problem := read_problem(question):
            return _reason_arithmetic(problem) if in_words else _act_arithmetic(problem, observations)
        if hops := read_two_hop(question):
            return self._reason_two_hop(hops) if in_words else _act_two_hop(hops, observations)
        return "I do not know this kind of question.\nAnswer: unknown" if in_words else _give_up()

    def _reason_two_hop(self, hops: TwoHop) -> str:
        bridge = self._facts.get(hops.entity, {}).get(hops.first.name, "unknown")
        answer = self._facts.get(bridge, {}).get(hops.second.name, "unknown")
        thought = f"The {hops.first.label} of {hops.entity} is {bridge}. The {hops.second.label} is {answer}."
        return f"{thought}\nAnswer: {answer}"


def _act_arithmetic(problem: Problem, observations: list[str]) -> str:
    if observations:
        return _turn_text("I have the result.", "final_answer(x)")
    changes = [f"x = {problem.start}", *(f"x = x {operator} {n}" for operator, n in problem.changes)]
    lines = [f"# {problem.sentences[0]}", changes[0]]
    told = pairwise([*problem.sentences, problem.ask])
    for (before, after), number, change in zip(told, problem.numbers, [*changes[1:], "print(x)"], strict=True):
        lines += [f"# {before[before.index(str(number)) :]} {after}", change]
    return _turn_text(f"Apply each change to the {problem.items} in order.", "\n".join(lines))


def _reason_arithmetic(problem: Problem) -> str:
    lines = [f"Apply each change to the {problem.items} in order.", problem.sentences[0]]
    amount = problem.start
    for sentence, (operator, n), after in zip(problem.sentences[1:], problem.changes, problem.amounts, strict=True):
        lines.append(f"{sentence} {amount} {operator} {n} = {after}")
        amount = after
    return "\n".join(lines) + f"\nAnswer: {amount}"


def _act_two_hop(hops: TwoHop, observations: list[str]) -> str:
    if not observations:
        plan = f"{hops.asked} I want the {hops.second.label}. X is {hops.middle}. Find the {hops.first.label}."
        return _search(plan, hops.entity)
    bridge = _found(observations[0], hops.entity, hops.first.name)
    if bridge is None:
        return _give_up()
    if len(observations) == 1:
        return _search(f"The {hops.first.label} is {bridge}. Find the {hops.second.label}.", bridge)
    answer = _found(observations[1], bridge, hops.second.name)
    if answer is None:
        return _give_up()
    return _turn_text(f"The {hops.second.label} is {answer}.", f'final_answer("{answer}")')


def _found(observation: str, entity: str, fact: str) -> str | None:
    """A fact about `entity`, read out of the search results shown; None when they do not tell."""
    pages = {result["title"]: result["text"] for result in _RESULT.finditer(observation)}
    return read_page(pages.get(entity, "")).get(fact)


def _search(thought: str, query: str) -> str:
    return _turn_text(thought, f'print(web_search("{query}"))')


def _give_up() -> str:
    return _turn_text("I cannot find it.", 'final_answer("unknown")')


def _turn_text(thought: str, code: str) -> str:
    return f"Thought: {thought}\nCode:\n```py\n{code}\n```<end_code>"


def _continue(prefix: str, turn: str) -> str:
    """The turn, begun with `prefix` (a first thought): what the rules would have thought is then already said."""
    if not prefix or turn.startswith(prefix):
        return turn
    return prefix + turn[turn.index("\nCode:") :] if "\nCode:" in turn else prefix + turn
