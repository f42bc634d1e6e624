"""Importing runs that others recorded: every format, what is refused, and what a learner then accepts.

The files of tests/data/interchange are real excerpts or made up in the same shape; its SOURCE.md says which.
"""

from __future__ import annotations

import ast
import json
import string
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from envs.base import ObservationKind
from learner.examples import Example, ExampleMaker, Refusal, RefusedRow
from rollout.dialects import CODE, DIALECTS
from rollout.interchange import FORMATS, Imported, InterchangeError, Refused, detect, read
from rollout.interchange.recorded import Importer, ReadOptions
from rollout.interchange.rewording import code_turn, react_turn, write_code_turn
from rollout.interchange.tora import boxed
from rollout.records import from_table, to_table
from rollout.trajectory import StopReason, Trajectory

ROOT = Path(__file__).parents[1]
DATA = ROOT / "tests" / "data" / "interchange"
FILES = sorted(path for path in DATA.iterdir() if path.name != "SOURCE.md")


def imported(name: str, **options: Any) -> list[Trajectory]:
    return [each.trajectory for each in read(DATA / name, **options) if isinstance(each, Imported)]


def refused(name: str, **options: Any) -> list[Refused]:
    return [each for each in read(DATA / name, **options) if isinstance(each, Refused)]


def lines(path: Path, *rows: Any) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def only(path: Path, **options: Any) -> Trajectory:
    (each,) = read(path, **options)
    assert isinstance(each, Imported), each
    return each.trajectory


def why(path: Path, **options: Any) -> str:
    (each,) = read(path, **options)
    assert isinstance(each, Refused), each
    return each.reason


@pytest.fixture(scope="module")
def maker() -> ExampleMaker:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(ROOT / "learner" / "base_student" / "checkpoint")
    return ExampleMaker(tokenizer, max_row_tokens=1_000_000)


@pytest.mark.parametrize(
    ("name", "format_name", "rows", "refusals", "successes"),
    [
        ("agent_distillation.jsonl", "agent_distillation", 7, 1, 5),
        ("fireact_alpaca.json", "react_alpaca", 3, 0, 3),
        ("fireact_trajs.json", "fireact", 3, 0, 2),
        ("reflexion_react.txt", "react_log", 7, 1, 2),
        ("smolagents_runs.jsonl", "smolagents_runs", 5, 0, 3),
        ("sweagent_marshmallow.traj", "swe_agent", 1, 0, 0),
        ("taubench_airline.json", "tau_bench", 2, 0, 1),
        ("tora_corpus.jsonl", "tora", 2, 0, 2),
        ("tora_gsm8k.jsonl", "tora", 4, 0, 2),
    ],
)
def test_a_file_is_recognised_and_every_row_accounted_for(name, format_name, rows, refusals, successes):
    assert detect(DATA / name) == format_name
    got = list(read(DATA / name))
    kept = [each for each in got if isinstance(each, Imported)]
    assert (len(got), len(got) - len(kept)) == (rows, refusals)
    assert sum(each.trajectory.success for each in kept) == successes


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.name)
def test_what_is_trainable_is_accepted_by_the_learner_and_nothing_else(path, maker):
    for trajectory in imported(path.name):
        made = maker.make(trajectory)
        if trajectory.trainable:
            assert isinstance(made, Example), made
        else:
            assert isinstance(made, RefusedRow) and made.reason is Refusal.NOT_TRAINABLE


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.name)
def test_imported_runs_can_be_kept_as_records(path):
    trajectories = imported(path.name)
    assert [each.key for each in from_table(to_table(trajectories))] == [each.key for each in trajectories]


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.name)
def test_spans_cover_every_turn(path):
    for trajectory in imported(path.name):
        for step in trajectory.steps:
            assert "".join(step.completion.text[s.start : s.end] for s in step.spans) == step.completion.text


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.name)
def test_keys_are_the_same_each_time_and_differ_within_a_file(path):
    keys = [each.key for each in imported(path.name)]
    assert keys == [each.key for each in imported(path.name)]
    assert len(set(keys)) == len(keys)


def test_smolagents_code_is_reworded_and_what_ran_is_what_is_read():
    first = imported("smolagents_runs.jsonl")[0]
    assert first.messages()[2].content == (
        "Thought: I multiply the rows by the jars.\nCode:\n```py\njars = rows * 14\nprint(jars)\n```<end_code>"
    )
    assert [step.observation_kind.value for step in first.steps] == ["code_error", "ok", "final"]
    assert first.steps[1].observation == (
        "Observation:\nExecution logs:\n42\nLast output from code snippet:\nNone"
    )
    assert first.system_prompt == CODE.system_prompt
    assert first.shown()[0].content.startswith("You are an expert assistant")


def test_a_recorded_parse_error_is_kept_and_not_trained_on():
    second = imported("smolagents_runs.jsonl")[1]
    assert second.success and not second.trainable
    assert second.steps[0].observation_kind is ObservationKind.PARSE_ERROR and second.steps[0].action is None
    assert second.steps[0].completion.text == "I will look for the author of the tale."


def test_tool_calls_are_counted_with_the_prompts_own_tools():
    assert [each.tool_calls for each in imported("smolagents_runs.jsonl")] == [0, 1, 1, 1, 0]


def test_a_run_out_of_steps_is_no_success_though_its_answer_is_right():
    third = imported("smolagents_runs.jsonl")[2]
    assert third.prediction == third.task.answer
    assert third.stop_reason is StopReason.MAX_STEPS and not third.success


def test_a_tool_calling_run_speaks_the_tool_dialect():
    fourth = imported("smolagents_runs.jsonl")[3]
    assert fourth.dialect == "tool" and fourth.trainable
    assert fourth.messages()[2].content == (
        "I compute the product.\n<tool_call>\n"
        '{"name": "calculator", "arguments": {"expression": "19 * 23"}}\n</tool_call>'
    )
    assert fourth.messages()[3].content == "<tool_response>\n437\n</tool_response>"


def test_code_that_reads_differently_from_what_ran_is_not_trained_on(tmp_path):
    row = json.loads((DATA / "smolagents_runs.jsonl").read_text().splitlines()[4])
    row["answer"] = "12"
    ran = {"name": "python_interpreter", "arguments": "final_answer(12)"}
    called = [{"id": "call_1", "type": "function", "function": ran}]
    row["intermediate_steps"][3]["content"][0]["text"] = f"Calling tools:\n{called}"
    run = only(lines(tmp_path / "runs.jsonl", row))
    assert run.success and not run.trainable
    assert "another action" in run.task.metadata["imported"]["unread"]["1"]


@pytest.mark.parametrize(("row", "outcome"), [(0, "recorded"), (1, "recorded"), (2, "graded"), (4, "recorded")])
def test_scores_of_one_true_and_blank_are_read(row, outcome):
    each = list(read(DATA / "agent_distillation.jsonl"))[row]
    assert isinstance(each, Imported) and each.outcome == outcome
    assert each.trajectory.success is (row != 4)


def test_the_runs_own_cost_is_told_from_the_judges():
    costs = [each.usage.cost_usd for each in imported("agent_distillation.jsonl")]
    assert costs == [0.02, 0.0, 0.0, 0.0, 0.0, 0.001]


@pytest.mark.parametrize(
    ("cost", "told", "expected"),
    [({"total_cost": 0.02}, {}, 0.02), (0.03, {"score": True}, 0.03), (None, {"score": 1}, 0.0), (None, {}, 0.5)],
)
def test_cost_is_found_where_a_subset_has_it(tmp_path, cost, told, expected):
    """In `log_data`, as an object or a number; else the row's, which is the judge's once there is a score."""
    row = json.loads((DATA / "agent_distillation.jsonl").read_text(encoding="utf-8").splitlines()[0])
    row["log_data"]["metadata"]["cost"] = cost
    row = {name: row[name] for name in row if name != "score"} | {"cost": 0.5} | told
    assert only(lines(tmp_path / "logs.jsonl", row)).usage.cost_usd == expected


def test_log_data_of_parquet_is_read_as_that_of_json_lines(tmp_path):
    rows = [json.loads(line) for line in (DATA / "agent_distillation.jsonl").read_text(encoding="utf-8").splitlines()]
    as_struct = {name: rows[0][name] for name in ("model_id", "question", "true_answer", "log_data", "score")}
    pq.write_table(pa.Table.from_pylist([as_struct]), tmp_path / "logs.parquet")
    run = only(tmp_path / "logs.parquet")
    first = imported("agent_distillation.jsonl")[0]
    assert run.key == first.key and run.messages() == first.messages() and run.success


def test_a_reference_becomes_a_guide_and_a_turn_that_speaks_of_it_a_leak():
    fourth = imported("agent_distillation.jsonl")[3]
    assert fourth.guide is not None and "3 * 3 * 3 * 3 = 81" in fourth.guide
    assert "3 * 3 * 3 * 3" not in "".join(message.content for message in fourth.messages())
    assert fourth.leaks and not fourth.trainable


def test_the_rows_of_the_baseline_become_chain_of_thought():
    last = imported("agent_distillation.jsonl")[-1]
    assert last.dialect == "cot" and last.trainable
    assert last.steps[0].completion.text == "Six sevens are 42.\nAnswer: 42"


def test_a_run_that_failed_says_why_it_is_refused():
    (refusal,) = refused("agent_distillation.jsonl")
    assert refusal.row == 6 and "Connection refused" in str(refusal)


def test_react_becomes_code_for_our_student():
    first = imported("fireact_alpaca.json")[-1]
    assert first.steps[0].action == (
        'print(web_search("best kick boxer in the world unsportsmanlike conducts crimes of violence"))'
    )
    assert first.steps[-1].action == 'final_answer("Badr Hari")'
    assert first.steps[0].observation.startswith("Observation:\nBadr Hari (born")


def test_react_becomes_search_tags_when_asked(maker):
    first = imported("fireact_alpaca.json", as_dialect="search")[-1]
    assert first.dialect == "search" and isinstance(maker.make(first), Example)
    assert first.steps[-1].completion.text.endswith("<answer>Badr Hari</answer>")
    assert first.steps[0].observation.startswith("<information>Badr Hari (born")


def test_an_action_without_a_function_is_kept_unread_until_one_is_named():
    third = imported("reflexion_react.txt")[2]
    assert third.steps[1].completion.text.endswith("Action 2: Lookup[father]")
    assert third.steps[1].observation_kind is ObservationKind.PARSE_ERROR
    tools = {"search": "web_search", "lookup": "lookup", "finish": "final_answer"}
    assert imported("reflexion_react.txt", tools=tools)[2].steps[1].action == 'print(lookup("father"))'


def test_trials_of_a_question_are_samples_of_one_task():
    runs = imported("reflexion_react.txt")
    assert runs[0].task.id == runs[-1].task.id
    assert (runs[0].sample_index, runs[-1].sample_index) == (0, 1)


def test_a_run_listed_twice_is_refused_once():
    (refusal,) = refused("reflexion_react.txt")
    assert refusal.reason == "listed twice in its trial"


def test_a_halted_run_ran_out_of_steps():
    halted = [each for each in imported("reflexion_react.txt") if each.stop_reason is StopReason.MAX_STEPS]
    assert [each.prediction for each in halted] == [None] and not halted[0].success


def test_fireact_takes_full_answers_from_its_questions(tmp_path):
    rows = [{"question": "", "answer": ""}] * 6109
    runs = json.loads((DATA / "fireact_trajs.json").read_text())
    for index, run in runs.items():
        rows[int(index)] = {"question": run["traj"][0]["content"], "answer": run["gt"].upper()}
    answers = tmp_path / "dev.json"
    answers.write_text(json.dumps(rows))
    assert imported("fireact_trajs.json", answers=answers)[1].task.answer == "ADELAIDE"
    rows[3556] = {"question": "Another one?", "answer": "x"}
    answers.write_text(json.dumps(rows))
    (refusal,) = refused("fireact_trajs.json", answers=answers)
    assert refusal.reason == "the file of answers has another question there"


def test_tora_blocks_become_turns_and_the_answer_is_given():
    first = imported("tora_gsm8k.jsonl")[0]
    assert first.steps[0].observation == "Observation:\n18"
    assert first.steps[1].completion.text == (
        "Thought: Janet makes $\\boxed{18}$ dollars every day at the farmers' market.\n"
        'Code:\n```py\nfinal_answer("18")\n```<end_code>'
    )


def test_a_tora_run_without_output_never_came_to_an_answer():
    last = imported("tora_gsm8k.jsonl")[-1]
    assert last.prediction is None and last.stop_reason is StopReason.MAX_STEPS and not last.success


def test_boxed_answers_keep_their_braces():
    assert boxed(r"so $\boxed{\frac{1}{2}}$.") == r"\frac{1}{2}"
    assert boxed("none") is None and boxed(r"\boxed{never closed") is None


def test_taubench_turns_are_tool_calls_and_words_to_the_user():
    run = imported("taubench_airline.json")[0]
    assert run.reward == 1.0 and run.success and run.tool_calls == 2
    assert run.system_prompt.startswith("# Airline Agent Policy")
    assert run.steps[-1].observation.endswith("###STOP###")


def test_an_outcome_that_is_not_recorded_is_a_failure_unless_vouched_for():
    assert [each.success for each in imported("sweagent_marshmallow.traj")] == [False]
    (vouched,) = read(DATA / "sweagent_marshmallow.traj", assume_success=True)
    assert isinstance(vouched, Imported) and vouched.outcome == "assumed" and vouched.trajectory.trainable


def test_openai_tool_calls_are_read(tmp_path, maker):
    row = {
        "messages": [
            {"role": "user", "content": "What is 19 * 23?"},
            {
                "role": "assistant",
                "content": None,
                "tool_calls": [
                    {"id": "a", "type": "function", "function": {"name": "mul", "arguments": '{"a": 19, "b": 23}'}},
                    {"id": "b", "type": "function", "function": {"name": "add", "arguments": {"a": 1, "b": None}}},
                ],
            },
            {"role": "tool", "tool_call_id": "a", "content": "437"},
            {"role": "tool", "tool_call_id": "b", "content": "1"},
            {"role": "assistant", "content": "437"},
        ],
        "answer": 437,
    }
    run = only(lines(tmp_path / "chat.jsonl", row))
    assert run.steps[0].action == (
        '[{"name": "mul", "arguments": {"a": 19, "b": 23}}, {"name": "add", "arguments": {"a": 1}}]'
    )
    assert run.messages()[2].content == "<tool_response>\n437\n</tool_response>\n<tool_response>\n1\n</tool_response>"
    assert run.success and run.prediction == "437" and run.tool_calls == 2
    assert isinstance(maker.make(run), Example)


def test_parquet_rows_are_read(tmp_path):
    rows = [{"messages": [{"role": "user", "content": "2 + 2?"}, {"role": "assistant", "content": "Answer: 4"}]}]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "chat.parquet")
    assert only(tmp_path / "chat.parquet").dialect == "cot"


def test_sharegpt_speakers_are_read(tmp_path):
    conversation = [
        {"from": "human", "value": "2 + 2?"},
        {"from": "function_call", "value": '{"name": "add", "arguments": {"a": 2, "b": 2}}'},
        {"from": "observation", "value": "4"},
        {"from": "gpt", "value": "It is 4."},
    ]
    run = only(lines(tmp_path / "share.jsonl", {"system": "Use tools.", "conversations": conversation, "score": 1}))
    assert run.system_prompt == "Use tools." and run.success
    assert [step.tool_calls for step in run.steps] == [1, 0]


@pytest.mark.parametrize(
    ("messages", "reason"),
    [
        ([], "no question"),
        ([{"role": "user", "content": "2 + 2?"}], "no assistant turn"),
        ([{"role": "assistant", "content": "4"}], "an assistant turn before the question"),
        (
            [{"role": "user", "content": "?"}, *({"role": "assistant", "content": said} for said in "45")],
            "two assistant turns in a row",
        ),
        ([{"role": "user", "content": [{"type": "image_url"}]}], "a message with more than text"),
        ([{"role": "narrator", "content": "?"}], "a message of an unexpected role"),
        (["user: hello"], "a message is no object"),
    ],
)
def test_a_chat_that_is_none_says_why(tmp_path, messages, reason):
    assert why(lines(tmp_path / "chat.jsonl", {"messages": messages})) == reason


def test_bad_lines_and_foreign_rows_are_refused_one_by_one(tmp_path):
    path = lines(tmp_path / "mixed.jsonl", {"messages": [{"role": "user", "content": "2?"}]}, {"rows": 1})
    path.write_text(path.read_text() + '{"messages": [\n\n')
    assert [(each.row, each.reason) for each in read(path) if isinstance(each, Refused)] == [
        (1, "no assistant turn"),
        (2, "no row of format 'chat'"),
        (3, "no JSON"),
    ]


def test_a_file_of_no_format_is_one_error_that_names_the_formats(tmp_path):
    path = lines(tmp_path / "tasks.jsonl", {"question": "2 + 2?", "answer": "4"})
    with pytest.raises(InterchangeError, match="question, answer") as error:
        detect(path)
    assert all(name in str(error.value) for name in FORMATS)


@pytest.mark.parametrize(
    ("make", "options", "says"),
    [
        (lambda path: path, {}, "is not there"),
        (lambda path: path.parent, {}, "is a folder"),
        (lambda path: lines(path, {"messages": []}), {"format": "gpt"}, "'gpt' is unknown"),
        (lambda path: lines(path, {"messages": []}), {"as_dialect": "react"}, "'code' or 'search'"),
        (lambda path: "s3://bucket/runs.jsonl", {}, "no local file"),
        (lambda path: lines(path, {"messages": []}), {"tools": {"search": "web search"}}, "'web search'"),
    ],
)
def test_what_cannot_be_read_at_all_is_said_at_once(tmp_path, make, options, says):
    with pytest.raises(InterchangeError, match=says):
        read(make(tmp_path / "runs.jsonl"), **options)


@pytest.mark.parametrize(
    ("name", "content", "says"),
    [
        ("runs.json", b'{"a": [', "is no JSON"),
        ("runs.parquet", b"PAR1 not", "no Parquet"),
        ("runs.jsonl", b"\xff\xfe\x00", "no UTF-8"),
        ("runs.jsonl", b"", "no row that is a JSON object"),
    ],
)
def test_a_damaged_file_is_one_error(tmp_path, name, content, says):
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises(InterchangeError, match=says):
        list(read(path))


def test_a_turn_that_cannot_be_written_exactly_stays_as_it_is():
    fence_in_thought = "Thought: as in\n```py\nx\n```\nso\n<code>\nprint(1)\n</code>"
    assert code_turn(fence_in_thought) == fence_in_thought
    assert write_code_turn("", 'print("```")') is None
    words_behind = "Thought: a\n<code>\nprint(1)\n</code>\nand so on"
    assert code_turn(words_behind) == words_behind


def test_a_turn_of_several_actions_is_no_react_turn():
    functions = {"search": "web_search"}
    assert react_turn("Thought: a\nAction: search[b]\nThought: c\nAction: search[d]", functions) is None
    assert react_turn("Thought: a\nAction: search[b] and more", functions) is None
    assert react_turn("just words", functions) is None


@settings(max_examples=60, deadline=None)
@given(thought=st.text(string.printable, max_size=60), argument=st.text(max_size=40).filter(lambda s: "\n" not in s))
def test_a_reworded_action_says_exactly_what_was_asked(thought, argument):
    understood = react_turn(f"Thought: {thought}\nAction: search[{argument}]", {"search": "web_search"})
    if understood is None or understood.text is None:
        return
    action = CODE.parse(understood.text).action
    assert action is not None
    called = ast.literal_eval(action.removeprefix("print(web_search(").removesuffix("))"))
    assert called == understood.argument


_JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=12),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=8,
)
_FIELDS = [
    *("messages", "steps", "conversations", "traj", "code", "pred", "gt", "log_data", "history", "trajectory"),
    *("intermediate_steps", "question", "answer", "score", "task_id", "prompt", "completion", "instruction", "output"),
]


@settings(max_examples=60, deadline=None)
@given(
    name=st.sampled_from(sorted(FORMATS)),
    record=st.dictionaries(st.sampled_from(_FIELDS), _JSON, max_size=6)
    | st.dictionaries(
        st.sampled_from(_FIELDS), st.lists(st.dictionaries(st.sampled_from(["role", "content"]), _JSON)), max_size=4
    ),
)
def test_no_record_however_odd_raises(name, record):
    got = Importer(name, ReadOptions()).convert(record, 1, FORMATS[name].read)
    assert isinstance(got, Refused) or got.trajectory.dialect in DIALECTS


def test_every_format_is_tested_with_a_file_or_by_writing_one():
    read_here = {detect(path) for path in FILES}
    written = {each.name for each in FORMATS.values() if each.rows}
    assert read_here | written == set(FORMATS)


def test_rows_stream(tmp_path):
    path = lines(tmp_path / "chat.jsonl", *({"messages": [{"role": "user", "content": "?"}]} for _ in range(3)))
    rows: Iterator[Any] = read(path)
    assert next(rows).row == 1 and next(rows).row == 2
