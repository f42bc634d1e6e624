"""`ToolEnv` and `SearchEnv`, their dialects, and both through the episode loop."""

from __future__ import annotations

import asyncio
import json
import threading
import time
from collections.abc import Sequence
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from envs import make_env
from envs.base import EnvError, ObservationKind, StepResult, Task
from envs.check import ContractError, check_env
from envs.pool import EnvHost, EnvSpec
from envs.search_env import INVALID, SearchEnv
from envs.tool_env import ToolEnv
from envs.tools import Tool, ToolError
from rollout.async_env import ThreadedEnv
from rollout.dialects import SEARCH, TOOL, ToolDialect
from rollout.episode import EpisodeSettings, run_episode
from rollout.policy import ScriptedPolicy
from rollout.trajectory import SpanType, StopReason

TASK = Task(id="t1", question="What is 40 + 2?", answer="42", kind="arithmetic")


def add(a: int, b: int = 2) -> int:
    """Add two numbers.

    Args:
        a: the first.
        b: the second.
    """
    if a == 13:
        raise ToolError("13 is not added here")
    if a == 99:
        raise OSError("the adding service is down")
    return a + b


def echo(text: str) -> dict[str, str]:
    """Say it again."""
    return {"said": text}


TOOLS = [Tool.from_function(add), Tool.from_function(echo)]


def grade(task: Task, answer: str) -> float:
    return float(task.answer == answer)


def call(name: str, /, **arguments: Any) -> str:
    return json.dumps({"name": name, "arguments": arguments})


@pytest.fixture
def env() -> ToolEnv:
    env = ToolEnv(tools=TOOLS, grade=grade)
    env.reset(TASK, seed=0)
    return env


def look(query: str) -> str:
    if query == "nonsense":
        raise ToolError("this cannot be searched for")
    if query == "down":
        raise OSError("the index is gone")
    return f"Doc 1(Title: {query}) text about {query}\n"


@pytest.fixture
def search_env() -> SearchEnv:
    env = SearchEnv(search=look, grade=grade)
    env.reset(TASK, seed=0)
    return env


# -- JSON function calls


def test_result_comes_back_as_a_tool_response(env: ToolEnv):
    result = env.step(call("add", a=40))
    assert result.observation.text == "<tool_response>\n42\n</tool_response>"
    assert result.observation.kind is ObservationKind.OK
    assert (result.info["tool_calls"], result.info["results"]) == (1, ["42"])


def test_calls_of_one_turn_run_together_and_answer_in_order():
    meeting = threading.Barrier(2, timeout=30)

    def meet(name: str) -> str:
        """Wait for the other."""
        meeting.wait()
        return name

    env = ToolEnv(tools=[Tool.from_function(meet)], grade=grade)
    env.reset(TASK, seed=0)
    result = env.step(f"[{call('meet', name='a')}, {call('meet', name='b')}]")
    assert result.observation.text == "<tool_response>\na\n</tool_response>\n<tool_response>\nb\n</tool_response>"


def test_final_answer_ends_and_is_graded(env: ToolEnv):
    result = env.step(call("final_answer", answer=42))
    assert result.observation.kind is ObservationKind.FINAL
    assert (result.observation.text, result.reward, result.terminated) == ("42", 1.0, True)
    with pytest.raises(RuntimeError, match="reset"):
        env.step(call("add", a=1))


@pytest.mark.parametrize(
    ("action", "kind", "says"),
    [
        ('{"name": "add", "arguments": {"a": 1}', "parse_error", "not JSON: Expecting ',' delimiter at character"),
        ("add(1, 2)", "parse_error", "not JSON: Expecting value at character 0"),
        ("[]", "parse_error", "there is no call"),
        ("[1]", "parse_error", 'a call is {"name": "...", "arguments": {...}}, not 1'),
        ('{"arguments": {}}', "parse_error", "a call needs a 'name', a string, got null"),
        ('{"name": "add", "arguments": "a=1"}', "parse_error", "a call needs 'arguments', an object, got \"a=1\""),
        ("[" * 100_000, "parse_error", "no JSON that can be read"),
        ("9" * 10_000, "parse_error", "no JSON that can be read"),
        (call("substract", a=1), "code_error", "there is no tool 'substract'; there are add, echo, final_answer"),
        (call("add", b=1), "code_error", "add() needs argument 'a'"),
        (call("add", a="1"), "code_error", "'a' must be integer, got str '1'"),
        (call("add", a=13), "code_error", "13 is not added here"),
        (call("final_answer"), "parse_error", "final_answer needs argument 'answer' and no other, got none"),
        (f"[{call('add', a=1)}, {call('final_answer', answer=1)}]", "parse_error", "must be the only call"),
        (f"[{', '.join([call('add', a=1)] * 9)}]", "limit", "9 calls in one turn, 8 are allowed"),
    ],
)
def test_models_mistake_is_told_to_it(env: ToolEnv, action: str, kind: str, says: str):
    observation = env.step(action).observation
    assert observation.kind == kind and says in observation.text and "Error: " in observation.text
    assert env.step(call("add", a=40)).observation.valid  # and the episode goes on


def test_one_wrong_call_leaves_the_other_its_result(env: ToolEnv):
    result = env.step(f"[{call('add', a=1)}, {call('add', a=13)}]")
    assert result.observation.kind is ObservationKind.CODE_ERROR
    assert result.info["results"] == ["3", "Error: 13 is not added here"]


def test_failing_and_hanging_tools_are_ours():
    def hang(seconds: float) -> str:
        """Hang."""
        time.sleep(seconds)
        return "late"

    env = ToolEnv(tools=[*TOOLS, Tool.from_function(hang)], grade=grade, tool_s=1)
    env.reset(TASK, seed=0)
    with pytest.raises(EnvError, match="the adding service is down"):
        env.step(call("add", a=99))
    with pytest.raises(EnvError, match="did not answer within 1 s"):
        env.step(call("hang", seconds=5))


def test_candidates_of_a_step_share_the_result_of_the_same_call():
    calls: list[str] = []

    def count(word: str) -> int:
        """Count."""
        calls.append(word)
        return len(calls)

    env = ToolEnv(tools=[Tool.from_function(count)], grade=grade)
    env.reset(TASK, seed=0)
    results = env.preview([call("count", word="a"), call("count", word="a"), call("final_answer", answer="42")])
    assert results[0].info["results"] == results[1].info["results"] == ["1"]
    [more] = env.preview_more([f"[{call('count', word='a')}, {call('count', word='b')}]"])
    assert more.info["results"] == ["1", "2"] and calls == ["a", "b"]
    assert env.commit(1) == results[1]


def test_tools_that_change_something_are_not_previewed():
    env = ToolEnv(tools=TOOLS, grade=grade, stateless=False)
    env.reset(TASK, seed=0)
    assert not env.can_preview
    with pytest.raises(RuntimeError, match="cannot preview"):
        env.preview([call("add", a=1)])
    assert env.step(call("add", a=1)).observation.valid


def test_long_results_lose_their_middle():
    env = ToolEnv(tools=TOOLS, grade=grade, output_chars=20)
    env.reset(TASK, seed=0)
    [text] = env.step(call("echo", text="x" * 500)).info["results"]
    assert text.startswith('{"said": ') and text.endswith('x"}') and "characters left out" in text


def test_last_step_truncates():
    env = ToolEnv(tools=TOOLS, grade=grade, max_steps=1)
    env.reset(TASK, seed=0)
    assert env.step("nonsense").truncated


@pytest.mark.parametrize("stateless", [True, False])
def test_tool_env_keeps_the_contract(stateless: bool):
    actions = [call("add", a=40), "{", call("add", a="x"), call("final_answer", answer="42")]
    check_env(lambda: ToolEnv(tools=TOOLS, grade=grade, max_steps=3, stateless=stateless), [TASK], actions)


class _PreviewsAnyway(ToolEnv):
    """Says that it cannot preview, and does."""

    def preview(self, actions: Sequence[str]) -> list[StepResult]:
        return [self.step(action) for action in actions]


def test_env_that_cannot_preview_must_refuse_to():
    with pytest.raises(ContractError, match="cannot preview raises RuntimeError"):
        check_env(lambda: _PreviewsAnyway(tools=TOOLS, grade=grade, stateless=False), [TASK], [call("add", a=1)])


def test_tool_names_must_differ():
    with pytest.raises(ValueError, match="'add', 'add'"):
        ToolEnv(tools=[TOOLS[0], TOOLS[0]], grade=grade)


# -- Search-R1's tags


def test_search_shows_information(search_env: SearchEnv):
    result = search_env.step("<think>hm</think><search> Paris </search> and so on")
    assert result.observation.text == "<information>Doc 1(Title: Paris) text about Paris</information>"
    assert result.info["tool_calls"] == 1


def test_answer_ends_and_is_graded(search_env: SearchEnv):
    result = search_env.step("<answer> 42 </answer>")
    assert (result.observation.text, result.reward, result.terminated) == ("42", 1.0, True)


@pytest.mark.parametrize("action", ["", "Paris", "<search></search>", "<search>Paris", "<answer>  </answer>"])
def test_other_text_is_answered_as_search_r1_does(search_env: SearchEnv, action: str):
    observation = search_env.step(action).observation
    assert (observation.text, observation.kind) == (INVALID, ObservationKind.PARSE_ERROR)


def test_search_mistakes_are_told_and_failures_are_ours(search_env: SearchEnv):
    observation = search_env.step("<search>nonsense</search>").observation
    assert observation.kind is ObservationKind.CODE_ERROR and "this cannot be searched for" in observation.text
    with pytest.raises(EnvError, match="the index is gone"):
        search_env.step("<search>down</search>")


def test_search_env_keeps_the_contract():
    actions = ["<search>a</search>", "nothing", "<search>nonsense</search>", "<answer>42</answer>"]
    check_env(lambda: SearchEnv(search=look, grade=grade, max_steps=3), [TASK], actions)


# -- by name, and on a host


def test_make_env_by_name():
    tool_env = make_env("tool", tools=TOOLS)
    tool_env.reset(TASK, seed=0)
    assert tool_env.step(call("final_answer", answer="42")).reward == 1.0
    search_env = make_env("search", search=look)
    search_env.reset(TASK, seed=0)
    assert search_env.step("<answer>42</answer>").reward == 1.0


def test_a_second_wave_asks_no_query_again():
    asked: list[str] = []

    def look(query: str) -> str:
        asked.append(query)
        return "found"

    env = make_env("search", search=look)
    env.reset(TASK, seed=0)
    env.preview(["<search>a</search>"])
    [more] = env.preview_more(["<search>a</search>"])  # type: ignore[attr-defined]
    assert more.info["tool_calls"] == 1 and asked == ["a"]
    env.commit(1)
    env.step("<search>a</search>")
    assert asked == ["a", "a"]


def test_host_makes_both_over_its_retriever():
    from envs.retrieval import Hit, Passage

    def search(query: str, k: int) -> list[Hit]:
        return [Hit(passage=Passage(id="1", title="France", text="Paris is its capital."), score=1.0)][:k]

    host = EnvHost(EnvSpec(name="tool"), search)
    host.reset(0, TASK, 0)
    assert "Paris is its capital." in host.step(0, call("web_search", query="capital")).observation.text
    host.close()
    host = EnvHost(EnvSpec(name="search"), search)
    host.reset(0, TASK, 0)
    assert "Paris is its capital." in host.step(0, "<search>capital</search>").observation.text
    host.close()
    with pytest.raises(ValueError, match="needs something to search"):
        EnvHost(EnvSpec(name="search"))
    with pytest.raises(ValueError, match="env 'answer' with context_passages=3 needs something to search"):
        EnvHost(EnvSpec(name="answer", context_passages=3))
    with pytest.raises(ValueError, match="context_passages=3 is for env 'answer'; in env 'code' the agent searches"):
        EnvSpec(context_passages=3)
    with pytest.raises(ValueError, match="context_passages=-1 must not be negative"):
        EnvSpec(name="answer", context_passages=-1)
    with pytest.raises(ValueError, match="env 'tools' is unknown; there are answer, code, search, tool"):
        EnvSpec(name="tools")


# -- dialects


def covered(text: str, spans: Sequence[Any]) -> list[tuple[str, str]]:
    """(type, text) of spans that cover the text without gap or overlap."""
    assert [span.start for span in spans] == [0, *(span.end for span in spans)][: len(spans)]
    assert not spans or spans[-1].end == len(text)
    return [(span.type.value, text[span.start : span.end]) for span in spans]


def test_tool_turn_is_thought_and_calls():
    first, second = '{"name": "add", "arguments": {"a": 40}}', '{"name": "b"}'
    text = f"I add.\n<tool_call>\n{first}\n</tool_call>\n<tool_call>{second}</tool_call>"
    turn = TOOL.parse(text)
    assert json.loads(turn.action or "") == [{"name": "add", "arguments": {"a": 40}}, {"name": "b"}]
    assert covered(text, turn.spans) == [
        ("thought", "I add."),
        ("format", "\n"),
        ("format", "<tool_call>\n"),
        ("code", first),
        ("format", "\n</tool_call>"),
        ("format", "\n"),
        ("format", "<tool_call>"),
        ("code", second),
        ("format", "</tool_call>"),
    ]


def test_tool_turn_without_a_call_is_the_answer():
    text = "<think>\n40 + 2\n</think>\n\n42\n"
    turn = TOOL.parse(text)
    assert json.loads(turn.action or "") == [{"name": "final_answer", "arguments": {"answer": "42"}}]
    pieces = [piece for piece in covered(text, turn.spans) if piece[1].strip()]
    assert pieces == [("format", "<think>"), ("thought", "40 + 2"), ("format", "</think>"), ("answer", "42")]


def test_final_answer_call_is_an_answer_span():
    turn = TOOL.parse('<tool_call>\n{"name": "final_answer", "arguments": {"answer": "42"}}\n</tool_call>')
    assert SpanType.ANSWER in [span.type for span in turn.spans]
    assert SpanType.CODE not in [span.type for span in turn.spans]


def test_tags_inside_strings_and_thoughts_are_text():
    call_text = '{"name": "echo", "arguments": {"text": "</tool_call> <tool_call> {"}}'
    turn = TOOL.parse(f"<think>a <tool_call> is next</think><tool_call>{call_text}</tool_call>")
    assert json.loads(turn.action or "") == [json.loads(call_text)]


def test_call_that_was_cut_off_at_its_closing_tag_is_read():
    assert TOOL.parse('<tool_call>\n{"name": "add", "arguments": {}}\n').action is not None
    assert TOOL.parse('<think>hm <tool_call>{"name": "add", "arguments": {}}').action is not None


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("", "neither a <tool_call> nor an answer"),
        ("<think>hm</think>\n", "neither a <tool_call> nor an answer"),
        ("<tool_call>\n{'name': 1}\n</tool_call>", "call 1 is not JSON: Expecting property name"),
        ('<tool_call>{"name": "a", "arguments": {}}</tool_call><tool_call>{"na', "call 2 is not JSON: Unterminated"),
        ('<tool_call>{"name": "a"} and {"name": "b"}</tool_call>', "call 1 must end with </tool_call>"),
        ("<tool_call>" + "[" * 100_000, "call 1 is no JSON that can be read"),
        ('<tool_call>{"name": "a"}</tool_call>\n<tool_response>\n5', "never by you"),
    ],
)
def test_tool_turn_that_cannot_be_parsed_says_why(text: str, says: str):
    turn = TOOL.parse(text)
    assert turn.action is None and says in (turn.error or "")
    covered(text, turn.spans)


def test_signatures_stand_in_the_system_prompt():
    prompt = ToolDialect.for_tools("Be brief.", TOOLS).system_prompt
    assert prompt.startswith("Be brief.\n\n# Tools")
    line = next(line for line in prompt.splitlines() if line.startswith('{"type"'))
    assert json.loads(line)["function"]["parameters"]["required"] == ["a"]


def test_search_turn():
    text = "<think> who? </think>\n<search> Ada Lovelace </search>"
    turn = SEARCH.parse(text)
    assert turn.action == "<search>Ada Lovelace</search>"
    pieces = [piece for piece in covered(text, turn.spans) if piece[0] in ("thought", "code", "answer")]
    assert pieces == [("thought", "who?"), ("code", "Ada Lovelace")]


@pytest.mark.parametrize("end", ["</answer>", "", "</search>"])
def test_search_answer_is_read_whatever_the_endpoint_did_to_its_end(end: str):
    text = f"<think>So.</think> <answer> 42 {end}"
    turn = SEARCH.parse(text)
    assert turn.action == "<answer>42</answer>"
    assert ("answer", "42") in covered(text, turn.spans)


def test_unclosed_thought_ends_at_the_search():
    assert SEARCH.parse("<think>I look <search>Paris</search>").action == "<search>Paris</search>"


def test_search_turn_without_a_tag_is_told_so():
    assert SEARCH.parse("Paris").error == INVALID


PIECES = ["<think>", "</think>", "<tool_call>", "</tool_call>", "<search>", "</search>", "<answer>", "</answer>",
          '{"name": "add", "arguments": {"a": 1}}', " ", "\n", "word", "{", "é"]  # fmt: skip


@given(st.lists(st.sampled_from(PIECES), max_size=12).map("".join))
def test_any_turn_is_covered_and_has_an_action_or_an_error(text: str):
    for dialect in (TOOL, SEARCH):
        turn = dialect.parse(text)
        covered(text, turn.spans)
        assert (turn.action is None) == (turn.error is not None)


# -- the loop


def play(dialect: str, env: Any, turns: list[str], **settings: Any) -> Any:
    policy = ScriptedPolicy(lambda messages, _: turns[(len(messages) - 2) // 2])
    return asyncio.run(
        run_episode(TASK, policy=policy, env=ThreadedEnv(env), settings=EpisodeSettings(dialect=dialect, **settings))
    )


def test_episode_of_calls():
    turns = [
        "<tool_call>{oops}</tool_call>",
        f"I add.\n<tool_call>\n{call('add', a=40)}\n</tool_call>",
        "42",
    ]
    trajectory = play("tool", ToolEnv(tools=TOOLS, grade=grade), turns)
    assert (trajectory.stop_reason, trajectory.reward, trajectory.prediction) == (StopReason.FINAL, 1.0, "42")
    assert [step.observation_kind.value for step in trajectory.steps] == ["parse_error", "ok", "final"]
    assert trajectory.messages()[5].content == "<tool_response>\n42\n</tool_response>"


def test_episode_of_searches():
    turns = ["<think>who?</think><search>Ada</search>", "<think>so</think><answer>42</answer>"]
    trajectory = play("search", SearchEnv(search=look, grade=grade), turns)
    assert (trajectory.stop_reason, trajectory.reward) == (StopReason.FINAL, 1.0)
    assert trajectory.steps[0].observation.startswith("<information>Doc 1(Title: Ada)")
