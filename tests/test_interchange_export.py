"""Exporting trajectories, and reading back what was exported: chat, prompt and completion, ShareGPT, smolagents memory.

What TRL and smolagents do with the files is done here by TRL and smolagents themselves.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from envs.base import ObservationKind
from rollout.dialects import CODE, SEARCH, TOOL, Dialect
from rollout.interchange import FORMATS, Imported, InterchangeError, Refused, read, write
from rollout.interchange.recorded import RowError
from rollout.interchange.smolagents_memory import agent_memory
from rollout.trajectory import Completion, Step, StopReason, Trajectory
from tests.learner_samples import trajectory as sample

ROOT = Path(__file__).parents[1]
DATA = ROOT / "tests" / "data" / "interchange"
TOKENIZER = ROOT / "learner" / "base_student" / "checkpoint"


def made(dialect: Dialect, turns: list[tuple[str, str, ObservationKind]], **changes: Any) -> Trajectory:
    """A run in a dialect: (text, observation as shown, kind) of each turn."""
    steps = []
    for text, observation, kind in turns:
        parsed = dialect.parse(text)
        completion = Completion(text=text, prompt_tokens=9, completion_tokens=4)
        steps.append(
            Step(
                completion=completion,
                spans=parsed.spans,
                action=None if kind is ObservationKind.PARSE_ERROR else parsed.action,
                observation=observation,
                observation_kind=kind,
            )
        )
    base = sample(0, system_prompt=dialect.system_prompt)
    return replace(base, dialect=dialect.name, steps=tuple(steps), **changes)


CODE_RUN = made(
    CODE,
    [
        ("I have no code yet.", "Observation:\nError in code parsing: no code block", ObservationKind.PARSE_ERROR),
        (
            "Thought: add – “exactly”.\nCode:\n```py\nprint('so far')\nprint(1 / 0)\n```<end_code>",
            "Observation:\nExecution logs:\nso far\nError: ZeroDivisionError: division by zero",
            ObservationKind.CODE_ERROR,
        ),
        (
            "Thought: again.\nCode:\n```py\nx = 20 + 22\nprint(x)\n```<end_code>",
            "Observation:\nExecution logs:\n42\nLast output from code snippet:\nNone",
            ObservationKind.OK,
        ),
        ('Thought: done.\nCode:\n```py\nfinal_answer("42")\n```<end_code>', "42", ObservationKind.FINAL),
    ],
    prediction="42",
)
TOOL_RUN = made(
    TOOL,
    [
        (
            '<tool_call>\n{"name": "add", "arguments": {"a": 40, "b": 2}}\n</tool_call>',
            "<tool_response>\n42\n</tool_response>",
            ObservationKind.OK,
        ),
        ("42", "42", ObservationKind.FINAL),
    ],
    prediction="42",
)
SEARCH_RUN = made(
    SEARCH,
    [
        ("<think>look</think>\n<search>capital</search>", "<information>Paris</information>", ObservationKind.OK),
        ("<answer>Paris</answer>", "Paris", ObservationKind.FINAL),
    ],
    prediction="Paris",
)
RUNS = [CODE_RUN, TOOL_RUN, SEARCH_RUN, sample(3, system_prompt="Work with code."), sample(4, success=False)]


def exported(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def back(path: Path, **options: Any) -> Iterator[Trajectory]:
    for each in read(path, **options):
        if isinstance(each, Imported):
            yield each.trajectory


def said(trajectory: Trajectory) -> list[tuple[str, str]]:
    return [(message.role, message.content) for message in trajectory.messages()]


@pytest.mark.parametrize("name", ["chat", "sharegpt", "prompt_completion"])
def test_messages_come_back_as_they_went(tmp_path, name):
    path = tmp_path / "out.jsonl"
    written = write(RUNS, path, name)
    assert written.trajectories == len(RUNS) and written.left_out == {}
    returned = list(back(path))
    assert list(map(said, returned)) == list(map(said, RUNS))
    assert [[step.spans for step in each.steps] for each in returned[:3]] == [
        [step.spans for step in each.steps] for each in RUNS[:3]
    ]
    assert [each.success for each in returned] == [each.success for each in RUNS]
    assert [each.task.id for each in returned] == [each.task.id for each in RUNS]


@pytest.mark.parametrize("name", ["chat", "sharegpt"])
def test_dialects_are_told_from_the_text_alone(tmp_path, name):
    path = tmp_path / "out.jsonl"
    write([CODE_RUN, TOOL_RUN, SEARCH_RUN], path, name)
    rows = [{key: row[key] for key in row if key in ("messages", "conversations")} for row in exported(path)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    assert [each.dialect for each in back(path)] == ["code", "tool", "search"]
    assert list(map(said, back(path))) == list(map(said, [CODE_RUN, TOOL_RUN, SEARCH_RUN]))


def test_prompt_and_completion_hold_every_turn_once(tmp_path):
    path = tmp_path / "out.jsonl"
    assert write([CODE_RUN], path, "prompt_completion").rows == 4
    rows = exported(path)
    assert [row["completion"][0]["content"] for row in rows] == [step.completion.text for step in CODE_RUN.steps]
    assert [(row["turn"], row["turns"]) for row in rows] == [(1, 4), (2, 4), (3, 4), (4, 4)]
    assert [type(each) for each in read(path)] == [Refused, Refused, Refused, Imported]


@pytest.mark.parametrize("name", ["chat", "prompt_completion"])
def test_trl_takes_the_rows_and_renders_them_as_the_student_is_prompted(tmp_path, name):
    from datasets import Dataset
    from transformers import AutoTokenizer
    from trl.data_utils import apply_chat_template, is_conversational

    from rollout.rendering import Renderer

    tokenizer = AutoTokenizer.from_pretrained(TOKENIZER)
    path = tmp_path / "out.jsonl"
    write(RUNS, path, name)
    rows: list[Any] = list(Dataset.from_list(exported(path)))
    assert rows and all(map(is_conversational, rows))
    texts = []
    for row in rows:
        rendered = apply_chat_template(row, tokenizer)
        if row.get("turn", 1) == row.get("turns", 1):
            texts.append(rendered.get("text") or rendered["prompt"] + rendered["completion"])
    renderer = Renderer(tokenizer)
    ours = [tokenizer.decode(renderer.row(each.messages()).token_ids, skip_special_tokens=False) for each in RUNS]
    # Our rows end with the stop token; a template may write a line break behind it.
    assert [text.rstrip("\n") for text in texts] == ours


@pytest.mark.timeout(60)
def test_trl_trains_on_exactly_the_turns(tmp_path):
    """Its own preparation of the data set, prompt masked."""
    from datasets import load_dataset
    from transformers import AutoTokenizer
    from trl.trainer.sft_config import SFTConfig
    from trl.trainer.sft_trainer import SFTTrainer

    from tests.learner_samples import save_tiny_student

    student = save_tiny_student(tmp_path / "student")
    tokenizer = AutoTokenizer.from_pretrained(student)
    path = tmp_path / "out.jsonl"
    write([CODE_RUN], path, "prompt_completion")
    data = load_dataset("json", data_files=str(path), split="train", cache_dir=str(tmp_path / "cache"))
    settings = SFTConfig(
        output_dir=str(tmp_path / "run"), completion_only_loss=True, max_length=1024, report_to="none", use_cpu=True
    )
    trainer = SFTTrainer(model=str(student), args=settings, train_dataset=data, processing_class=tokenizer)
    assert trainer.train_dataset is not None
    batch = trainer.data_collator([trainer.train_dataset[i] for i in range(4)])
    trained = [tokenizer.decode(row[row != -100]) for row in batch["labels"]]
    ends = tokenizer.eos_token
    assert [text.rstrip("\n") for text in trained] == [step.completion.text + ends for step in CODE_RUN.steps]


def test_smolagents_loads_replays_and_words_the_memory(tmp_path):
    import io

    from rich.console import Console
    from smolagents.memory import ActionStep
    from smolagents.monitoring import AgentLogger, LogLevel

    path = tmp_path / "memory.jsonl"
    write([CODE_RUN], path, "smolagents_memory")
    (row,) = exported(path)
    memory = agent_memory(row)
    shown = io.StringIO()
    logger = AgentLogger(level=LogLevel.DEBUG, console=Console(file=shown, width=200))
    memory.replay(logger)
    assert "Step 4" in shown.getvalue() and "x = 20 + 22" in shown.getvalue()
    messages = [message for step in memory.steps for message in step.to_messages()]
    told = [message.content[0]["text"] for message in messages if isinstance(message.content, list)]
    assert told[1] == "I have no code yet." and told[2].startswith("Error:\nError in code parsing")
    assert "Observation:\nExecution logs:\n42\nLast output from code snippet:\nNone" in told
    assert [step.dict() for step in memory.steps if isinstance(step, ActionStep)] == row["steps"][1:]
    assert memory.return_full_code().endswith('final_answer("42")')


def test_smolagents_memory_comes_back_with_the_same_actions_and_observations(tmp_path):
    path = tmp_path / "memory.jsonl"
    write([CODE_RUN, sample(5)], path, "smolagents_memory")
    returned = list(back(path))
    for sent, got in zip([CODE_RUN, sample(5)], returned, strict=True):
        assert [step.action for step in got.steps] == [step.action for step in sent.steps]
        assert [step.completion.text for step in got.steps] == [step.completion.text for step in sent.steps]
        assert [step.observation for step in got.steps] == [step.observation for step in sent.steps]
        assert [step.observation_kind for step in got.steps] == [step.observation_kind for step in sent.steps]
        assert (got.prediction, got.success, got.task.question) == (sent.prediction, sent.success, sent.task.question)


def test_an_agents_own_memory_is_read(tmp_path):
    """Steps as a smolagents CodeAgent leaves them: `agent.memory.get_full_steps()`."""
    from smolagents import CodeAgent
    from smolagents.models import ChatMessage, MessageRole, Model

    first = "Thought: add.\n<code>\nx = 20 + 22\nprint(x)\n</code>"

    class Scripted(Model):
        def __init__(self) -> None:
            super().__init__(model_id="scripted")
            self.turns = iter((first, "<code>\nfinal_answer(x)\n</code>"))

        def generate(self, messages, stop_sequences=None, response_format=None, tools_to_call_from=None, **kwargs):
            return ChatMessage(role=MessageRole.ASSISTANT, content=next(self.turns))

    agent = CodeAgent(tools=[], model=Scripted(), verbosity_level=0)
    assert agent.run("What is 20 + 22?") == 42
    path = tmp_path / "steps.json"
    path.write_text(json.dumps(agent.memory.get_full_steps()))
    (run,) = back(path, assume_success=True)
    assert [step.action for step in run.steps] == ["x = 20 + 22\nprint(x)", "final_answer(x)"]
    assert run.steps[0].observation.startswith("Observation:\nExecution logs:\n42")
    assert (run.task.question, run.prediction, run.trainable) == ("What is 20 + 22?", "42", True)


def test_a_plan_is_refused_since_no_dialect_has_one(tmp_path):
    path = tmp_path / "steps.json"
    path.write_text(json.dumps([{"task": "x"}, {"plan": "first think"}, {"step_number": 1, "model_output": "y"}]))
    (each,) = read(path)
    assert isinstance(each, Refused) and each.reason == "a planning step"
    with pytest.raises(RowError, match="neither a task nor an action"):
        agent_memory({"steps": [{"plan": "first think"}]})


def test_only_what_a_student_should_learn_is_written_on_request(tmp_path):
    wrong = replace(CODE_RUN, steps=(), key="none")
    runs = [CODE_RUN, sample(1), sample(2, success=False), wrong]
    written = write(runs, tmp_path / "out.jsonl", "chat", only_trainable=True)
    assert (written.trajectories, written.rows) == (1, 1)
    assert written.left_out == {"not trainable": 2, "no steps": 1}


def test_other_dialects_are_no_memory_of_a_code_agent(tmp_path):
    written = write([TOOL_RUN, CODE_RUN], tmp_path / "out.jsonl", "smolagents_memory")
    assert written.trajectories == 1 and list(written.left_out.values()) == [1]


def test_the_prompt_is_the_trained_or_the_shown_one(tmp_path):
    guided = replace(TOOL_RUN, system_prompt="short", shown_system_prompt="long", guide="It is 42.")
    for prompt, expected in (("trained", "short"), ("shown", "long")):
        write([guided], tmp_path / "out.jsonl", "chat", prompt=prompt)
        (row,) = exported(tmp_path / "out.jsonl")
        assert row["messages"][0]["content"] == expected
        assert ("It is 42." in row["messages"][1]["content"]) is (prompt == "shown")


def test_a_truncated_run_stays_one(tmp_path):
    cut = replace(CODE_RUN, steps=CODE_RUN.steps[:3], stop_reason=StopReason.MAX_STEPS, success=False, prediction=None)
    write([cut], tmp_path / "out.jsonl", "smolagents_memory")
    (run,) = back(tmp_path / "out.jsonl")
    assert run.stop_reason is StopReason.MAX_STEPS and not run.success


def test_half_a_surrogate_pair_survives(tmp_path):
    odd = made(TOOL, [("broken \ud83d end", "", ObservationKind.FINAL)])
    write([odd], tmp_path / "out.jsonl", "chat")
    (run,) = back(tmp_path / "out.jsonl")
    assert run.steps[0].completion.text == "broken \ud83d end"


def test_a_write_that_fails_leaves_the_old_file_and_nothing_else(tmp_path):
    path = tmp_path / "out.jsonl"
    write([TOOL_RUN], path, "chat")
    before = path.read_bytes()

    def broken() -> Iterator[Trajectory]:
        yield CODE_RUN
        raise RuntimeError("the source is gone")

    with pytest.raises(RuntimeError, match="source is gone"):
        write(broken(), path, "chat")
    assert path.read_bytes() == before and list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize(
    ("name", "where", "options", "says"),
    [
        ("tora", "out.jsonl", {}, "can be read but not written"),
        ("parquet", "out.jsonl", {}, "is unknown"),
        ("chat", "no/such/out.jsonl", {}, "no folder"),
        ("chat", ".", {}, "is a folder"),
        ("chat", "out.jsonl", {"prompt": "teacher"}, "'trained' or 'shown'"),
    ],
)
def test_what_cannot_be_written_is_said(tmp_path, name, where, options, says):
    with pytest.raises(InterchangeError, match=says):
        write([TOOL_RUN], tmp_path / where, name, **options)


@pytest.mark.parametrize("name", [each.name for each in FORMATS.values() if each.rows])
def test_real_runs_go_out_and_come_back(tmp_path, name):
    """What was imported from other people's files, exported again."""
    first = [
        each.trajectory
        for path in sorted(DATA.iterdir())
        if path.name != "SOURCE.md"
        for each in read(path)
        if isinstance(each, Imported)
    ]
    written = write(first, tmp_path / "out.jsonl", name)
    again = list(back(tmp_path / "out.jsonl"))
    sent = [each for each in first if name != "smolagents_memory" or each.dialect == "code"]
    assert written.trajectories == len(again) == len(sent)
    assert [[(step.action, step.observation) for step in each.steps[:-1]] for each in again] == [
        [(step.action, step.observation) for step in each.steps[:-1]] for each in sent
    ]
    assert [each.steps[-1].action for each in again] == [each.steps[-1].action for each in sent]
    assert [each.success for each in again] == [each.success for each in sent]
