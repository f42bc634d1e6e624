"""Interchange: runs that others recorded become trajectories, and trajectories become files that others read.

`read` turns every row of a file into an `Imported` trajectory or a `Refused` that says why not; `write` exports. A turn
is put into our dialects' words only where that is exact (`rewording.py`); what cannot be read so is kept as it was and
is never trained on. This is no ledger: put what was imported into one with `LedgerWriter.append`.

Example::

    for each in read("runs.jsonl"):
        match each:
            case Imported(trajectory=trajectory): trajectories.append(trajectory)
            case Refused(row=row, reason=reason): print(f"row {row}: {reason}")
    write(trajectories, "sft.jsonl", "chat", only_trainable=True)

A new format is a file with `matches(record)` and `read(record, options)` and a line in `FORMATS`.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from rollout.interchange import (
    agent_distillation,
    chat,
    react,
    smolagents_memory,
    smolagents_runs,
    swe_agent,
    tau_bench,
    tora,
)
from rollout.interchange.files import Unreadable, records, whole_file
from rollout.interchange.recorded import (
    AsDialect,
    Imported,
    Importer,
    InterchangeError,
    ReadOptions,
    RecordedRun,
    Refused,
)
from rollout.trajectory import Message, Trajectory

__all__ = ["FORMATS", "Format", "Imported", "InterchangeError", "Refused", "Written", "detect", "read", "write"]

Prompt = Literal["trained", "shown"]
_LOOKED_AT = 20
"""Records of a file that `detect` looks at before it gives up."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Format:
    """One way in which runs are recorded."""

    name: str
    about: str
    """A line for people: what writes it, and what its rows hold."""
    matches: Callable[[Any], bool]
    """Whether a record looks like it; formats are asked in the order of `FORMATS`."""
    read: Callable[[Any, ReadOptions], RecordedRun]
    """Raises `RowError`."""
    rows: Callable[[Trajectory, Sequence[Message]], Iterator[dict[str, Any]]] | None = None
    """The lines that a trajectory becomes; None: this format is only read."""
    dialects: tuple[str, ...] = ()
    """Those that it can write; empty: all."""


_ALL = (
    Format(
        name="smolagents_runs",
        about="recorded smolagents runs: rows with intermediate_steps, answer, true_answer",
        matches=smolagents_runs.matches,
        read=smolagents_runs.read,
    ),
    Format(
        name="agent_distillation",
        about="the published agent-distillation files: rows with log_data and score, or messages and response",
        matches=agent_distillation.matches,
        read=agent_distillation.read,
    ),
    Format(
        name="fireact",
        about="FireAct's ReAct runs: index -> traj, gt, pred, em",
        matches=react.matches_fireact,
        read=react.read_fireact,
    ),
    Format(
        name="react_alpaca",
        about="ReAct runs as fine-tuning rows: instruction, input, output with Thought/Action/Observation",
        matches=react.matches_alpaca,
        read=react.read_alpaca,
    ),
    Format(
        name="react_log",
        about="Reflexion's text logs of ReAct trials (.txt, .log): Question, Thought k, Action k, Observation k",
        matches=react.matches_log,
        read=react.read_log,
    ),
    Format(
        name="tora",
        about="ToRA's runs with ```python and ```output blocks: code, pred, gt, or messages, gt, gt_cot",
        matches=tora.matches,
        read=tora.read,
    ),
    Format(
        name="tau_bench",
        about="tau-bench's conversations with tools: task_id, reward, traj",
        matches=tau_bench.matches,
        read=tau_bench.read,
    ),
    Format(
        name="swe_agent",
        about="SWE-agent's .traj files: history, trajectory",
        matches=swe_agent.matches,
        read=swe_agent.read,
    ),
    Format(
        name="smolagents_memory",
        about="smolagents' memory: system_prompt and steps, as agent.memory.get_full_steps() gives them",
        matches=smolagents_memory.matches,
        read=smolagents_memory.read,
        rows=smolagents_memory.rows,
        dialects=("code",),
    ),
    Format(
        name="prompt_completion",
        about="TRL's prompt and completion, one row per assistant turn when written",
        matches=chat.matches_prompt_completion,
        read=chat.read_prompt_completion,
        rows=chat.prompt_completion_rows,
    ),
    Format(
        name="sharegpt",
        about="ShareGPT's conversations of from and value",
        matches=chat.matches_sharegpt,
        read=chat.read_sharegpt,
        rows=chat.sharegpt_rows,
    ),
    Format(
        name="chat",
        about="chat messages (OpenAI, TRL), with tool_calls or without",
        matches=chat.matches_chat,
        read=chat.read_chat,
        rows=chat.chat_rows,
    ),
)
FORMATS: dict[str, Format] = {each.name: each for each in _ALL}
"""By name, in the order in which a file is tried."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Written:
    """What `write` did."""

    trajectories: int
    rows: int
    left_out: dict[str, int]
    """Reason -> trajectories that were not written."""


def detect(path: str | Path) -> str:
    """Name of the format that a file is in. Raises `InterchangeError` when it is none of them."""
    path = _local(path)
    fields: list[str] = []
    for looked, (_, record) in enumerate(records(path), start=1):
        for each in _ALL:
            if not isinstance(record, Unreadable) and each.matches(record):
                return each.name
        if isinstance(record, Mapping) and not fields:
            fields = [str(name) for name in record][:12]
        if looked >= _LOOKED_AT:
            break
    found = f"its first row has {', '.join(fields)}" if fields else "it has no row that is a JSON object"
    raise InterchangeError(f"{path} is in no format that can be imported: {found}.\n{_known()}")


def read(
    path: str | Path,
    format: str = "auto",
    *,
    as_dialect: AsDialect = "code",
    policy: str = "",
    assume_success: bool = False,
    answers: str | Path | None = None,
    tools: Mapping[str, str] | None = None,
) -> Iterator[Imported | Refused]:
    """Every row of a local file (.jsonl, .json, .traj, .parquet, .txt, .log), in its order.

    `as_dialect`: what ReAct runs become, "code" or Search-R1's "search"; other formats keep their own. `policy`: who
    acted, where the file does not say. `assume_success`: runs without score and without answer count as successes.
    `answers`: a JSON list of {question, answer} that FireAct's runs point into. `tools`: ReAct action -> function that
    it becomes, {"search": "web_search", "finish": "final_answer"} if not given.

    Raises `InterchangeError` at once for an option or a file that cannot be used, never for a row.
    """
    path = _local(path)
    if as_dialect not in ("code", "search"):
        raise InterchangeError(f"as_dialect={as_dialect!r} must be 'code' or 'search'")
    for action, function in (tools or {}).items():
        if not function.isidentifier():
            raise InterchangeError(f"tools: {action!r} becomes {function!r}, which is no name of a function")
    name = detect(path) if format == "auto" else format
    chosen = _format(name)
    options = ReadOptions(
        as_dialect=as_dialect,
        policy=policy,
        assume_success=assume_success,
        answers=_answers(Path(answers)) if answers is not None else (),
        file_stem=path.stem,
        **({} if tools is None else {"tools": {action.lower(): function for action, function in tools.items()}}),
    )
    return _read(path, chosen, options)


def _read(path: Path, chosen: Format, options: ReadOptions) -> Iterator[Imported | Refused]:
    importer = Importer(chosen.name, options)
    for row, record in records(path):
        if isinstance(record, Unreadable):
            yield Refused(row=row, reason="no JSON", detail=record.reason)
        elif not chosen.matches(record):
            fields = ", ".join(map(str, record)) if isinstance(record, Mapping) else type(record).__name__
            yield Refused(row=row, reason=f"no row of format {chosen.name!r}", detail=f"it has {fields}"[:200])
        else:
            yield importer.convert(record, row, chosen.read)


def write(
    trajectories: Iterable[Trajectory],
    path: str | Path,
    format: str,
    *,
    only_trainable: bool = False,
    prompt: Prompt = "trained",
) -> Written:
    """Write a local file of JSON lines, whole or not at all; one that is there is replaced.

    `only_trainable`: leave out what no student should learn from. `prompt`: the system prompt and question as a student
    is trained with them, or as the policy was shown them (its own prompt, its guide).
    Raises `InterchangeError` for a format that is unknown or only read, and for a file that cannot be written.
    """
    chosen = _format(format)
    if chosen.rows is None:
        able = ", ".join(each.name for each in _ALL if each.rows)
        raise InterchangeError(f"format {format!r} can be read but not written; written are: {able}")
    if prompt not in ("trained", "shown"):
        raise InterchangeError(f"prompt={prompt!r} must be 'trained' or 'shown'")
    count = rows = 0
    left_out: dict[str, int] = {}
    with whole_file(_local(path)) as file:
        for trajectory in trajectories:
            reason = _unwritable(trajectory, chosen, only_trainable)
            if reason:
                left_out[reason] = left_out.get(reason, 0) + 1
                continue
            messages = trajectory.messages() if prompt == "trained" else trajectory.shown()
            for row in chosen.rows(trajectory, messages):
                file.write(json.dumps(row, ensure_ascii=False) + "\n")
                rows += 1
            count += 1
    return Written(trajectories=count, rows=rows, left_out=left_out)


def _unwritable(trajectory: Trajectory, chosen: Format, only_trainable: bool) -> str:
    if not trajectory.steps:
        return "no steps"
    if only_trainable and not trajectory.trainable:
        return "not trainable"
    if chosen.dialects and trajectory.dialect not in chosen.dialects:
        return f"dialect {trajectory.dialect!r}, which {chosen.name} does not have"
    return ""


def _format(name: str) -> Format:
    if name not in FORMATS:
        raise InterchangeError(f"format {name!r} is unknown.\n{_known()}")
    return FORMATS[name]


def _known() -> str:
    return "Formats: " + "; ".join(f"{each.name} ({each.about})" for each in _ALL)


def _local(path: str | Path) -> Path:
    if "://" in str(path):
        raise InterchangeError(f"{path} is no local file; copy it here first")
    return Path(path)


def _answers(path: Path) -> tuple[tuple[str, str], ...]:
    pairs = []
    for row, record in records(path):
        if not isinstance(record, Mapping) or not {"question", "answer"} <= set(record):
            raise InterchangeError(f"{path}, row {row}: a file of answers needs 'question' and 'answer' in every row")
        pairs.append((str(record["question"]), str(record["answer"])))
    return tuple(pairs)
