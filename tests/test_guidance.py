"""Guided episodes: what is shown, what is stripped, and which turns only make sense to a reader of the guide."""

from __future__ import annotations

import asyncio
import json

import pytest

from envs.answer_env import AnswerEnv
from envs.base import ObservationKind, Task, TaskError
from envs.grading import grade
from rollout.async_env import ThreadedEnv
from rollout.dialects import DIALECTS
from rollout.episode import EpisodeSettings, run_episode
from rollout.guidance import guide_leaks, guide_text
from rollout.policy import ScriptedPolicy
from rollout.trajectory import Completion, FailureClass, Step, StopReason, Trajectory

GSM_SOLUTION = "Natalia sold 48/2 = 24 clips in May.\nNatalia sold 48+24 = 72 clips altogether in April and May."
GSM = Task(
    id="gsm8k-0",
    question="Natalia sold clips to 48 of her friends in April, and then she sold half as many clips in May. "
    "How many clips did Natalia sell altogether in April and May?",
    answer="72",
    kind="math",
    grader="numeric",
    metadata={"solution": GSM_SOLUTION},
)
MATH = Task(
    id="math-7",
    question="If $x^2+bx+16$ has at least one real root, find all possible values of $b$.",
    answer="(-\\infty,-8]\\cup [8,\\infty)",
    kind="math",
    grader="math",
    metadata={
        "level": "Level 5",
        "solution": "If $x^2+bx+16$ has at least one real root, then its discriminant must be greater than or equal to "
        "zero. That is, $b^2-64 \\geq 0$. The quadratic factors as $(b-8)(b+8)\\geq 0$, which is solved by "
        "$b \\in \\boxed{(-\\infty,-8]\\cup [8,\\infty)}$.",
    },
)
HOTPOT = Task(
    id="5a8d",
    question='Musician and satirist Allie Goertz wrote a song about the "The Simpsons" character Milhouse, who Matt '
    "Groening named after who?",
    answer="President Richard Nixon",
    kind="factual",
    metadata={
        "supporting_facts": {"title": ["Allie Goertz", "Milhouse Van Houten"], "sent_id": [1, 0]},
        "context": {
            "title": ["Milhouse Van Houten", "Allie Goertz"],
            "sentences": [
                [
                    "Milhouse Mussolini van Houten is a fictional character voiced by Pamela Hayden, whose name was "
                    "taken from the middle name of President Richard Nixon."
                ],
                ["Allison Beth Goertz is an American musician.", "Goertz is known for her satirical songs."],
            ],
        },
    },
)
OBSERVED_NIXON = (
    "[1] Milhouse Van Houten: Milhouse Mussolini van Houten is a character created by Matt Groening, who named him "
    "after President Richard Nixon's middle name."
)


def code(thought: str, body: str) -> str:
    return f"Thought: {thought}\nCode:\n```py\n{body}\n```<end_code>"


def guided(task: Task, *turns: tuple[str, str], dialect: str = "code", prediction: str | None = None) -> Trajectory:
    """A guided trajectory of (turn's text, observation); the last one ends it."""
    steps = []
    for at, (text, observation) in enumerate(turns):
        parsed = DIALECTS[dialect].parse(text)
        last = at + 1 == len(turns)
        steps.append(
            Step(
                completion=Completion(text=text),
                spans=parsed.spans,
                action=parsed.action,
                observation=observation,
                observation_kind=ObservationKind.FINAL if last else ObservationKind.OK,
            )
        )
    return Trajectory(
        key="k",
        task=task,
        dialect=dialect,
        system_prompt="",
        steps=tuple(steps),
        policy="p",
        prediction=task.answer if prediction is None else prediction,
        guide=guide_text(task, "solution"),
    )


# -- what is shown


@pytest.mark.parametrize(
    ("task", "told"),
    [
        (GSM, "Natalia sold 48/2 = 24 clips in May."),
        (MATH, "its discriminant must be greater than or equal to zero"),
        (HOTPOT, "Allie Goertz: Goertz is known for her satirical songs.\nMilhouse Van Houten: Milhouse Mussolini"),
    ],
)
def test_a_solution_is_found_where_the_data_sets_keep_it(task, told):
    text = guide_text(task, "solution")
    assert text is not None and told in text and "act as if it were not there" in text


def test_tutorials_may_be_lists_of_steps():
    task = Task(id="t", question="q", answer="a", kind="k", metadata={"tutorial": ["Open the page.", "Read it."]})
    assert "--- Tutorial ---\n1. Open the page.\n2. Read it.\n--- End" in (guide_text(task, "tutorial") or "")


def test_the_parts_of_a_multi_hop_question_are_a_solution():
    parts = [{"question": "Who wrote it?", "answer": "Ann"}, {"question": "Where was #1 born?", "answer": "Rome"}]
    task = Task(id="t", question="q", answer="Rome", kind="k", metadata={"decomposition": parts})
    assert "1. Who wrote it?: Ann\n2. Where was #1 born?: Rome" in (guide_text(task, "solution") or "")


def test_no_guide_is_none():
    assert guide_text(GSM, "none") is None


@pytest.mark.parametrize("metadata", [{}, {"solution": "  "}, {"solution": 3, "level": "hard"}, {"context": "x"}])
def test_a_task_without_its_guide_is_named_and_not_tried_again(metadata):
    task = Task(id="t-17", question="q", answer="a", kind="k", metadata=metadata)
    with pytest.raises(TaskError, match="task 't-17' has no solution to guide with: metadata.'solution'."):
        guide_text(task, "solution")
    policy = ScriptedPolicy(lambda messages, i: "Answer: a")
    settings = EpisodeSettings(dialect="cot", guide="solution")
    episode = run_episode(task, policy=policy, env=ThreadedEnv(AnswerEnv(grade=grade)), settings=settings)
    trajectory = asyncio.run(episode)
    assert trajectory.stop_reason is StopReason.FAILED and not policy.calls
    assert trajectory.failure is not None and trajectory.failure.failure_class is FailureClass.INPUT


def test_the_guide_is_shown_behind_the_question_and_stripped_from_what_is_learned():
    policy = ScriptedPolicy(lambda messages, i: "Half of 48 is 24, and 48 + 24 = 72.\nAnswer: 72")
    settings = EpisodeSettings(dialect="cot", guide="solution")
    episode = run_episode(GSM, policy=policy, env=ThreadedEnv(AnswerEnv(grade=grade)), settings=settings)
    trajectory = asyncio.run(episode)
    [(messages, _, _)] = policy.calls
    assert messages[1].content.startswith(f"{GSM.question}\n\n") and GSM_SOLUTION in messages[1].content
    assert list(messages) == trajectory.shown()[:-1]
    assert trajectory.messages()[1].content == GSM.question
    assert trajectory.guide is not None and trajectory.leaks == () and trajectory.trainable


def test_a_leak_is_recorded_and_keeps_the_trajectory_from_training():
    policy = ScriptedPolicy(lambda messages, i: "The reference solution says that it is 72.\nAnswer: 72")
    settings = EpisodeSettings(dialect="cot", guide="solution")
    episode = run_episode(GSM, policy=policy, env=ThreadedEnv(AnswerEnv(grade=grade)), settings=settings)
    trajectory = asyncio.run(episode)
    assert trajectory.success and not trajectory.trainable
    assert trajectory.leaks == ('step 1 speaks of the guide: "reference solution"',)


def test_guides_are_part_of_the_key_and_unguided_keys_stay():
    plain, with_guide = EpisodeSettings(), EpisodeSettings(guide="solution")
    assert plain.key(GSM, "p", 0) != with_guide.key(GSM, "p", 0)
    assert with_guide.key(GSM, "p", 0) != EpisodeSettings(guide="tutorial").key(GSM, "p", 0)


# -- leaks: words about the guide


@pytest.mark.parametrize(
    "thought",
    [
        "The reference solution shows that we need half of 48.",
        "According to the tutorial, I should first divide.",
        "The guide says to add both months.",
        "As the solution explains, May is half of April.",
        "I was given the answer, so I only have to confirm it.",
        "I already know the answer is 72, but let me compute it.",
        "The provided solution adds 48 and 24.",
        "I should not mention the text, so I compute it anew.",
        "I will act as if it were not there and divide.",
        "Based on the solution, I divide by two.",
        "This matches the answer key.",
        "The hint suggests that I add both months.",
    ],
)
def test_words_about_the_guide_are_a_leak(thought):
    trajectory = guided(
        GSM, (code(thought, "x = 48 + 48 // 2\nprint(x)"), "72"), (code("Done.", "final_answer(x)"), "72")
    )
    assert [leak.partition(":")[0] for leak in guide_leaks(trajectory)] == ["step 1 speaks of the guide"]


def test_words_about_the_guide_in_a_comment_are_a_leak():
    body = "# as given in the worked solution\nx = 48 + 24\nfinal_answer(x)"
    assert guide_leaks(guided(GSM, (code("I compute it.", body), "72"))) != ()


@pytest.mark.parametrize(
    "thought",
    [
        "She sold half as many clips in May, so I add 48 and its half.",
        "The solution of this equation is the number of clips; let me solve it.",
        "Following the question, April has 48 clips and May half of them.",
        "I need to provide a solution, and the answer must be a whole number.",
        "We know that the answer must be larger than 48.",
        "The given numbers are 48 and one half.",
        "I check the solution with a second computation.",
        "The expected answer is one number, so I print it.",
    ],
)
def test_words_that_tasks_use_themselves_are_none(thought):
    trajectory = guided(
        GSM, (code(thought, "x = 48 + 48 // 2\nprint(x)"), "72"), (code("Done.", "final_answer(x)"), "72")
    )
    assert guide_leaks(trajectory) == ()


def test_a_later_turn_may_speak_of_the_solution_that_its_code_found():
    answer = "final_answer('(-\\\\infty,-8]\\\\cup [8,\\\\infty)')"
    turns = (
        (code("I solve for the roots of the discriminant.", "print(solve(b**2 - 64))"), "[-8, 8]"),
        (code("From the solution, b is at most -8 or at least 8.", answer), "x"),
    )
    assert guide_leaks(guided(MATH, *turns)) == ()


def test_what_the_question_says_itself_is_no_leak():
    question = "A reference solution of 4 litres holds 30% acid. How much acid is in it?"
    task = Task(id="t", question=question, answer="1.2", kind="math", metadata={"solution": "4 * 0.3 = 1.2"})
    turn = code("The reference solution holds 4 * 0.3 litres of acid.", "final_answer(4 * 0.3)")
    assert guide_leaks(guided(task, (turn, "1.2"))) == ()


# -- leaks: its text


def test_long_stretches_of_its_text_are_a_leak():
    thought = "It has one if its discriminant must be greater than or equal to zero. That is what I solve."
    trajectory = guided(MATH, (code(thought, "x = solve(1)\nprint(x)"), "-8 8"), (code("Now.", "final_answer(x)"), "x"))
    [leak] = guide_leaks(trajectory)
    assert leak.startswith('step 1 repeats the guide: "its discriminant must be greater')


@pytest.mark.parametrize(
    "thought",
    [
        "The discriminant b^2 - 64 has to be at least zero, so I solve b^2 - 64 >= 0 for b.",
        "If x^2+bx+16 has at least one real root, find all possible values of b: that is the question.",
        "The quadratic factors as (b-8)(b+8), so I look at the sign of both.",
    ],
)
def test_the_same_idea_in_words_of_its_own_is_none(thought):
    trajectory = guided(MATH, (code(thought, "x = solve(1)\nprint(x)"), "-8 8"), (code("Now.", "final_answer(x)"), "x"))
    assert guide_leaks(trajectory) == ()


def test_what_an_observation_showed_may_be_repeated():
    sentence = HOTPOT.metadata["context"]["sentences"][0][0]
    repeat = code(f"The page says: {sentence}", 'final_answer("President Richard Nixon")')
    search = code("I look up Milhouse.", 'print(web_search("Milhouse The Simpsons"))')
    assert guide_leaks(guided(HOTPOT, (search, f"[1] {sentence}"), (repeat, "x"))) == ()
    [leak] = guide_leaks(guided(HOTPOT, (search, OBSERVED_NIXON), (repeat, "x")))
    assert leak.startswith("step 2 repeats the guide")


# -- leaks: names that only the guide told


def test_a_query_about_what_only_the_guide_told_is_a_leak():
    search = code("I look that up.", 'print(web_search("Richard Nixon middle name"))')
    answer = code("It is him.", 'final_answer("President Richard Nixon")')
    [leak] = guide_leaks(guided(HOTPOT, (search, "President Richard Milhous Nixon"), (answer, "x")))
    assert leak == "step 1 asks for 'Richard', which only the guide had told"


@pytest.mark.parametrize(
    ("dialect", "turn"),
    [
        ("search", "<think>Him.</think>\n<search>Nixon middle name</search>"),
        ("tool", 'Him.\n<tool_call>\n{"name": "web_search", "arguments": {"query": "Nixon name"}}\n</tool_call>'),
    ],
)
def test_queries_of_every_dialect_are_read(dialect, turn):
    last = "<answer>President Richard Nixon</answer>" if dialect == "search" else "President Richard Nixon"
    [leak] = guide_leaks(guided(HOTPOT, (turn, "President Richard Nixon"), (last, "x"), dialect=dialect))
    assert leak.startswith("step 1 asks for 'Nixon'")


def test_a_query_about_what_was_asked_or_seen_is_none():
    turns = (
        (code("First her.", 'print(web_search("Allie Goertz Milhouse"))'), "[1] Allie Goertz: ... Milhouse Van Houten"),
        (code("Now him.", 'print(web_search("Milhouse Van Houten named after"))'), OBSERVED_NIXON),
        (code("Found.", 'final_answer("President Richard Nixon")'), "x"),
    )
    assert guide_leaks(guided(HOTPOT, *turns)) == ()


# -- leaks: answers out of nothing


@pytest.mark.parametrize(
    "body",
    [
        "final_answer(72)",
        'final_answer("72")',
        "answer = 72\nfinal_answer(answer)",
        "final_answer(answer=str(72))",
        "total = '72 clips'\nfinal_answer(f'{total}')",
    ],
)
def test_an_answer_written_down_by_hand_is_a_leak(body):
    trajectory = guided(GSM, (code("I add both months.", body), "72"))
    assert guide_leaks(trajectory) == ("step 1 answers '72', which nothing before it shows",)


@pytest.mark.parametrize(
    ("first", "observation", "body"),
    [
        ("x = 48 + 24\nprint(x)", "Execution logs:\n72\n", "final_answer(72)"),
        ("x = 48 + 24\nprint(x)", "Execution logs:\n72.0\n", "final_answer('72')"),
        ("x = 48\ny = x // 2", "None", "final_answer(x + y)"),
        ("x = 48", "None", "for y in [24]:\n    x += y\nfinal_answer(x)"),
        ("print(1)", "1", "final_answer(48 + 48 // 2)"),
    ],
)
def test_an_answer_that_was_computed_or_shown_is_none(first, observation, body):
    trajectory = guided(GSM, (code("I compute.", first), observation), (code("Done.", body), "72"))
    assert guide_leaks(trajectory) == ()


@pytest.mark.parametrize(
    "body",
    [
        f"final_answer({'-' * 2500}72)",
        "final_answer(" + "(" * 150 + "72" + ")" * 150 + ")",
        "final_answer(" + "9" * 6000 + ")",
        "final_answer('\\ud800')",
        "x = (\nfinal_answer(72)",
        "[1, 2]\nfinal_answer(48 + 24)",
    ],
)
def test_odd_code_is_no_reason_to_fail(body):
    trajectory = guided(GSM, (code("I compute.", body), "72"))
    assert all(leak.startswith("step 1 answers") for leak in guide_leaks(trajectory))


def test_a_fact_that_was_never_looked_up_is_a_leak():
    turns = (
        (code("I look.", 'print(web_search("Milhouse song"))'), "[1] Milhouse: a song by Allie Goertz"),
        (code("It is the president.", 'final_answer("President Richard Nixon")'), "x"),
    )
    assert guide_leaks(guided(HOTPOT, *turns)) == (
        "step 2 answers 'President Richard Nixon', which nothing before it shows",
    )
    assert guide_leaks(guided(HOTPOT, ("<answer>President Richard Nixon</answer>", "x"), dialect="search")) != ()


def test_a_fact_that_was_shown_may_be_worded_otherwise():
    turns = (
        (code("I look.", 'print(web_search("Milhouse named after"))'), "Milhouse was named after Richard M. Nixon."),
        (code("It is him.", 'final_answer("President Richard Nixon")'), "x"),
    )
    assert guide_leaks(guided(HOTPOT, *turns)) == ()


def test_yes_and_no_need_something_to_judge_by():
    task = Task(id="t", question="Are both directors?", answer="yes", kind="f", metadata={"solution": "Both are."})
    look = (code("I look.", 'print(web_search("director"))'), "Both direct films.")
    assert guide_leaks(guided(task, look, (code("So yes.", 'final_answer("yes")'), "yes"))) == ()
    assert guide_leaks(guided(task, (code("So yes.", 'final_answer("yes")'), "yes"))) != ()


def test_an_answer_given_in_words_alone_was_reasoned():
    assert guide_leaks(guided(GSM, ("48 and 24 are 72.\nAnswer: 72", "72"), dialect="cot")) == ()


def test_a_sum_done_in_the_thought_of_a_dialect_without_code_is_none():
    calls = json.dumps({"name": "web_search", "arguments": {"query": "clips"}})
    turns = ((f"<tool_call>\n{calls}\n</tool_call>", "nothing"), ("72", "72"))
    assert guide_leaks(guided(GSM, *turns, dialect="tool")) == ()


def test_trajectories_without_guide_leak_nothing():
    import dataclasses

    trajectory = guided(GSM, (code("The reference solution says so.", "final_answer(72)"), "72"))
    assert guide_leaks(trajectory) and not guide_leaks(dataclasses.replace(trajectory, guide=None))
