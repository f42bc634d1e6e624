"""smolagents' own memory: the steps of an agent as dictionaries. Read and written.

Read are `agent.memory.get_full_steps()` and `get_succinct_steps()`, `RunResult.dict()`, and objects of `system_prompt`
and `steps`, one in a JSON file or one a line. Written is one such object a line; `agent_memory` makes smolagents'
`AgentMemory` of it, which `replay()`s and turns into messages. Source: smolagents 1.26, `memory.py`, `agents.py`.

Example::

    memory = agent_memory(json.loads(line))
    memory.steps[1].code_action
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from envs.base import ObservationKind
from rollout.dialects import CODE
from rollout.interchange.chat_turns import prediction_of
from rollout.interchange.fields import (
    ANSWERS,
    OUTCOMES,
    answer_text,
    content_text,
    count,
    first,
    listed,
    mapping,
    real,
    verdict,
)
from rollout.interchange.recorded import ReadOptions, RecordedRun, RowError, Turn
from rollout.interchange.rewording import code_turn, tool_response, tool_turn
from rollout.interchange.smolagents_messages import INTERPRETER, TASK_LABEL
from rollout.trajectory import Message, Step, StopReason, Trajectory

if TYPE_CHECKING:
    from smolagents.memory import AgentMemory

_OUT_OF_STEPS = "AgentMaxStepsError"
_ERRORS = {
    ObservationKind.PARSE_ERROR: "AgentParsingError",
    ObservationKind.CODE_ERROR: "AgentExecutionError",
    ObservationKind.LIMIT: "AgentExecutionError",
}


_SAYS_SO = re.compile(r"\w*(?:Error|Exception)\b|Limit \(|Traceback|Execution logs:")
"""What needs no heading to be told as an error."""
_TOLD = re.compile(r"^(?=Error:|Limit \()", re.MULTILINE)


def matches(record: Any) -> bool:
    return isinstance(record, Mapping) and isinstance(record.get("steps"), list) and "trajectory" not in record


def read(record: Any, options: ReadOptions) -> RecordedRun:
    row = mapping(record, "the run")
    question, system = "", row.get("system_prompt")
    system = str(system.get("system_prompt") or "") if isinstance(system, Mapping) else answer_text(system) or ""
    actions: list[Mapping[str, Any]] = []
    for given in listed(row, "steps"):
        step = mapping(given, "a step")
        if isinstance(step.get("task"), str):
            if question:
                raise RowError("more than one task in a run")
            question = step["task"]
        elif "plan" in step:
            raise RowError("a planning step", "no dialect here has one")
        elif "system_prompt" in step:
            system = str(step["system_prompt"])
        elif "step_number" in step:
            actions.append(step)
    out_of_steps = row.get("state") == "max_steps_error"
    if actions and _error(actions[-1])[0] == _OUT_OF_STEPS:
        out_of_steps, actions = True, actions[:-1]
    as_code = any(step.get("code_action") for step in actions) or not any(step.get("tool_calls") for step in actions)
    turns = tuple(_code(step) if as_code else _tool(step) for step in actions)
    said = [_output(step) for step in actions]
    reworded = any(turn.text != output for turn, output in zip(turns, said, strict=True))
    dialect = "code" if as_code else "tool"
    prediction = answer_text(row.get("output"))
    if prediction is None and actions:
        prediction = answer_text(actions[-1].get("action_output")) if actions[-1].get("is_final_answer") else None
    if prediction is None and turns:
        prediction = prediction_of(turns[-1].text, dialect)
    original = row.get("original_question") if isinstance(row.get("original_question"), str) else None
    identity, outcome = row.get("task_id"), first(row, OUTCOMES)
    return RecordedRun(
        question=question.removeprefix(TASK_LABEL),
        turns=turns,
        dialect=dialect,
        answer=answer_text(first(row, ANSWERS)) or "",
        kind=str(row.get("kind") or "smolagents"),
        task_id=identity if isinstance(identity, str) else "",
        policy=str(row.get("policy") or row.get("model_id") or ""),
        prediction=prediction,
        success=verdict(outcome),
        stop_reason=StopReason.MAX_STEPS if out_of_steps or prediction is None else StopReason.FINAL,
        shown_system_prompt=system or None,
        reworded=(("code blocks as this dialect's" if as_code else "tool calls as <tool_call>"),) if reworded else (),
        metadata={"original_question": original} if original else {},
    )


def _output(step: Mapping[str, Any]) -> str:
    said = step.get("model_output")
    if said is None and isinstance(step.get("model_output_message"), Mapping):
        said = step["model_output_message"].get("content")
    return content_text(said)


def _error(step: Mapping[str, Any]) -> tuple[str, str]:
    """(smolagents' class of it, message), both empty when there was none."""
    error = step.get("error")
    if isinstance(error, Mapping):
        return str(error.get("type", "")), str(error.get("message", ""))
    return ("", "") if error is None else ("AgentExecutionError", str(error))


def _kind(step: Mapping[str, Any]) -> ObservationKind:
    name, message = _error(step)
    if not name:
        return ObservationKind.OK
    if "Parsing" in name:
        return ObservationKind.PARSE_ERROR
    return ObservationKind.LIMIT if message.startswith("Limit (") else ObservationKind.CODE_ERROR


def _seen(step: Mapping[str, Any]) -> str:
    observed, (name, message) = step.get("observations"), _error(step)
    pieces = [observed] if isinstance(observed, str) else []
    if name:
        pieces.append(message if _SAYS_SO.match(message) else f"Error:\n{message}")
    return "\n".join(pieces)


def _code(step: Mapping[str, Any]) -> Turn:
    ran = step.get("code_action")
    return Turn(
        text=code_turn(_output(step)),
        observation=CODE.observation(_seen(step)),
        kind=_kind(step),
        ran=ran if isinstance(ran, str) else None,
        **_measured(step),
    )


def _tool(step: Mapping[str, Any]) -> Turn:
    calls = []
    for given in step.get("tool_calls") or []:
        call = mapping(given, "a tool call")
        function = mapping(call.get("function", call), "a tool call")
        calls.append((str(function.get("name")), function.get("arguments")))
    return Turn(
        text=tool_turn(_output(step), calls),
        observation=tool_response(_seen(step)),
        kind=_kind(step),
        **_measured(step),
    )


def _measured(step: Mapping[str, Any]) -> dict[str, Any]:
    usage, timing = step.get("token_usage"), step.get("timing")
    usage = usage if isinstance(usage, Mapping) else {}
    timing = timing if isinstance(timing, Mapping) else {}
    return {
        "prompt_tokens": count(usage.get("input_tokens")),
        "completion_tokens": count(usage.get("output_tokens")),
        "policy_s": max(real(timing.get("duration")), 0.0),
    }


def rows(trajectory: Trajectory, messages: Sequence[Message]) -> Iterator[dict[str, Any]]:
    """One object; the action steps are as `ActionStep.dict()` makes them. Only runs of code: smolagents' CodeAgent."""
    task = trajectory.task
    system = messages[0].content if messages and messages[0].role == "system" else ""
    asked = next(message.content for message in messages if message.role == "user")
    yield {
        "system_prompt": {"system_prompt": system},
        "steps": [
            {"task": asked, "task_images": None},
            *(_action_step(number, step, trajectory) for number, step in enumerate(trajectory.steps, start=1)),
        ],
        "output": trajectory.prediction,
        "state": "success" if trajectory.stop_reason is StopReason.FINAL else "max_steps_error",
        "key": trajectory.key,
        "task_id": task.id,
        "answer": task.answer,
        "kind": task.kind,
        "policy": trajectory.policy,
        "success": trajectory.success,
    }


def _action_step(number: int, step: Step, trajectory: Trajectory) -> dict[str, Any]:
    code = trajectory.dialect == "code"
    final = step.observation_kind is ObservationKind.FINAL
    seen = step.observation if final or not code else step.observation.removeprefix(CODE.observation(""))
    failed, message = _ERRORS.get(step.observation_kind), ""
    told = _TOLD.search(seen)
    if failed and not told and not _SAYS_SO.match(seen) and CODE.parse(step.completion.text).action is None:
        failed = None  # an imported turn in another's words, which whoever reads this again cannot read either
    if failed:
        printed = seen[: told.start()].removesuffix("\n") if told and told.start() else None
        seen, message = printed, seen[told.start() :] if told else seen
        bare = message.removeprefix("Error:\n")  # smolagents puts that heading there itself
        message = message if _SAYS_SO.match(bare) else bare
    call = {"id": f"call_{number}", "type": "function", "function": {"name": INTERPRETER, "arguments": step.action}}
    return {
        "step_number": number,
        "timing": {"start_time": 0.0, "end_time": step.policy_s + step.env_s, "duration": step.policy_s + step.env_s},
        "model_input_messages": None,
        "tool_calls": [call] if step.action is not None else [],
        "error": {"type": failed, "message": message} if failed else None,
        "model_output_message": None,
        "model_output": step.completion.text,
        "code_action": step.action,
        "observations": seen,
        "observations_images": None,
        "action_output": trajectory.prediction if final else None,
        "token_usage": {
            "input_tokens": step.completion.prompt_tokens,
            "output_tokens": step.completion.completion_tokens,
            "total_tokens": step.completion.prompt_tokens + step.completion.completion_tokens,
        },
        "is_final_answer": final,
    }


def agent_memory(run: Mapping[str, Any]) -> AgentMemory:
    """smolagents' memory of a run as written here, or as `system_prompt` and `get_full_steps()`.

    Raises `RowError` for a step that is neither a task nor an action, ImportError without smolagents.
    """
    from smolagents.memory import ActionStep, AgentMemory, TaskStep, Timing, ToolCall
    from smolagents.monitoring import AgentLogger, LogLevel, TokenUsage
    from smolagents.utils import AgentError, AgentExecutionError, AgentMaxStepsError, AgentParsingError

    errors = {each.__name__: each for each in (AgentExecutionError, AgentMaxStepsError, AgentParsingError)}
    quiet = AgentLogger(level=LogLevel.OFF)
    system = run.get("system_prompt")
    memory = AgentMemory(str(system.get("system_prompt", "") if isinstance(system, Mapping) else system or ""))
    for given in listed(run, "steps"):
        step = mapping(given, "a step")
        if isinstance(step.get("task"), str):
            memory.steps.append(TaskStep(task=step["task"]))
            continue
        if "step_number" not in step:
            raise RowError("a step that is neither a task nor an action", f"its fields are {', '.join(step)}")
        timing, usage, error = step.get("timing") or {}, step.get("token_usage"), step.get("error")
        memory.steps.append(
            ActionStep(
                step_number=count(step["step_number"]),
                timing=Timing(start_time=real(timing.get("start_time")), end_time=timing.get("end_time")),
                tool_calls=[
                    ToolCall(id=call["id"], name=call["function"]["name"], arguments=call["function"]["arguments"])
                    for call in step.get("tool_calls") or []
                ]
                or None,
                error=errors.get(error["type"], AgentError)(error["message"], quiet) if error else None,
                model_output=step.get("model_output"),
                code_action=step.get("code_action"),
                observations=step.get("observations"),
                action_output=step.get("action_output"),
                token_usage=TokenUsage(count(usage["input_tokens"]), count(usage["output_tokens"])) if usage else None,
                is_final_answer=bool(step.get("is_final_answer")),
            )
        )
    return memory
