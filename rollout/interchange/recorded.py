"""What an importer hands over, and how it becomes a `Trajectory`: `RecordedRun`, `Turn`, `Imported`, `Refused`.

A reader of a format says what was recorded; everything that is the same for all formats is decided here, once: spans by
the dialect's own parser, deterministic keys, success by the recorded score or by grading, and what cannot be read
exactly is a parse error, so that it is kept and not trained on. No files in here.

What a person may want to know of an imported run stands in `task.metadata["imported"]`::

    {"format": "fireact", "row": 3, "outcome": "recorded", "reworded": ["action as code"], "unread": {"2": "..."}}

`outcome` is "recorded" (the file says whether it succeeded), "graded" (here, by exact or numeric match with the
recorded answer), "unknown" (neither; counted as a failure) or "assumed" (unknown, and the caller vouches for it).
Symbolic equality is left to the ledger's regrading: such tasks name the grader "math".
"""

from __future__ import annotations

import ast
import hashlib
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from envs.base import ObservationKind, Task
from envs.grading import GRADERS, number
from rollout.dialects import DIALECTS
from rollout.interchange.rewording import syntax_nodes
from rollout.trajectory import Completion, Step, StopReason, Trajectory, Usage, trajectory_key

AsDialect = Literal["code", "search"]
SEARCHES = frozenset({"web_search", "search", "lookup", "wikipedia_search", "visit_webpage", "wiki", "retriever"})
"""Functions that count as tools where the record does not list its own."""


class InterchangeError(ValueError):
    """A file or an option that cannot be used at all; the message names it and what would be right."""


class RowError(ValueError):
    """A row that cannot be imported: (reason, detail) as in `Refused`."""

    def __init__(self, reason: str, detail: str = "") -> None:
        super().__init__(f"{reason}: {detail}" if detail else reason)
        self.reason, self.detail = reason, detail


@dataclass(frozen=True, slots=True, kw_only=True)
class Refused:
    """A row that was not imported."""

    row: int
    """From 1; of JSONL the line, of text the run."""
    reason: str
    """The same words for the same cause, so that refusals can be counted."""
    detail: str = ""
    """What was found in this row."""

    def __str__(self) -> str:
        return f"row {self.row}: {self.reason}" + (f" ({self.detail})" if self.detail else "")


@dataclass(frozen=True, slots=True, kw_only=True)
class Imported:
    """A row that was."""

    row: int
    trajectory: Trajectory

    @property
    def outcome(self) -> str:
        """"recorded", "graded", "unknown" or "assumed"; see the module."""
        return self.trajectory.task.metadata["imported"]["outcome"]

    @property
    def reworded(self) -> tuple[str, ...]:
        """What stands in other words than the file's."""
        return tuple(self.trajectory.task.metadata["imported"]["reworded"])


@dataclass(frozen=True, slots=True, kw_only=True)
class ReadOptions:
    """How to read; see `rollout.interchange.read`."""

    as_dialect: AsDialect = "code"
    policy: str = ""
    assume_success: bool = False
    tools: Mapping[str, str] = field(default_factory=lambda: {"search": "web_search", "finish": "final_answer"})
    answers: tuple[tuple[str, str], ...] = ()
    """[n] (question, answer) that rows point into by number."""
    file_stem: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Turn:
    """One turn of the agent and what came back, worded as the dialect words them."""

    text: str
    observation: str = ""
    kind: ObservationKind = ObservationKind.OK
    ran: str | None = None
    """The code that the record says was run; the dialect must read the same out of `text`."""
    tool_calls: int | None = None
    """None: counted in the code."""
    prompt_tokens: int = 0
    completion_tokens: int = 0
    policy_s: float = 0.0


@dataclass(frozen=True, slots=True, kw_only=True)
class RecordedRun:
    """One run as a file records it; empty where it does not."""

    question: str
    turns: tuple[Turn, ...]
    dialect: str
    answer: str = ""
    aliases: tuple[str, ...] = ()
    grader: str = ""
    """Of the task; "" chooses "numeric" for an answer that is a number, else "exact"."""
    kind: str = "imported"
    task_id: str = ""
    """"" makes one from the question."""
    policy: str = ""
    sample_index: int | None = None
    """None: how many runs of this task and policy came before in the file."""
    prediction: str | None = None
    success: bool | None = None
    reward: float | None = None
    stop_reason: StopReason = StopReason.FINAL
    stop_detail: str = ""
    system_prompt: str | None = None
    """What a student shall learn it with; None: the dialect's own."""
    shown_system_prompt: str | None = None
    user_prompt: str | None = None
    guide: str | None = None
    leaks: tuple[str, ...] = ()
    usage: Usage | None = None
    started_at_s: float = 0.0
    duration_s: float = 0.0
    tool_names: frozenset[str] = SEARCHES
    reworded: tuple[str, ...] = ()
    notes: Mapping[str, Any] = field(default_factory=dict)
    """More for `metadata["imported"]`."""
    metadata: Mapping[str, Any] = field(default_factory=dict)
    """More for the task's metadata."""


class Importer:
    """Makes trajectories of one file's runs; counts the samples of each task."""

    def __init__(self, format_name: str, options: ReadOptions) -> None:
        self._format, self._options = format_name, options
        self._seen: dict[tuple[str, str], int] = {}

    def convert(self, record: Any, row: int, read: Callable[[Any, ReadOptions], RecordedRun]) -> Imported | Refused:
        """The trajectory of one record, or why there is none; never raises for what a record holds."""
        try:
            return Imported(row=row, trajectory=self._trajectory(read(record, self._options), row))
        except RowError as error:
            return Refused(row=row, reason=error.reason, detail=" ".join(error.detail.split()))
        except (AttributeError, IndexError, KeyError, RecursionError, TypeError, ValueError) as error:
            told = " ".join(f"{type(error).__name__}: {error}".split())
            return Refused(row=row, reason="malformed", detail=told[:200])

    def _trajectory(self, run: RecordedRun, row: int) -> Trajectory:
        if not run.question.strip():
            raise RowError("no question")
        if not run.turns:
            raise RowError("no assistant turn")
        if run.dialect not in DIALECTS:
            raise RowError("unknown dialect", f"{run.dialect!r}; there are {', '.join(DIALECTS)}")
        policy = run.policy or self._options.policy or "unknown"
        task_id = run.task_id or f"{run.kind}-{_digest(run.question)}"
        steps, unread = _steps(run)
        finished = run.stop_reason is StopReason.FINAL
        success, outcome, grader = _outcome(run, finished, assume=self._options.assume_success)
        index = self._seen.get((task_id, policy), 0)
        self._seen[task_id, policy] = index + 1
        if run.sample_index is not None:
            index = run.sample_index
        told: dict[str, Any] = {"format": self._format, "row": row, "outcome": outcome, "reworded": list(run.reworded)}
        if unread:
            told["unread"] = unread
        reward = run.reward if run.reward is not None else float(success)
        return Trajectory(
            key=trajectory_key(
                task_id=task_id,
                policy=policy,
                sample_index=index,
                settings={"imported": self._format, "run": _digest(*(turn.text for turn in run.turns))},
            ),
            task=Task(
                id=task_id,
                question=run.question,
                answer=run.answer,
                kind=run.kind,
                grader=grader,
                aliases=run.aliases,
                metadata={**run.metadata, "imported": {**told, **run.notes}},
            ),
            dialect=run.dialect,
            system_prompt=DIALECTS[run.dialect].system_prompt if run.system_prompt is None else run.system_prompt,
            steps=steps,
            policy=policy,
            sample_index=index,
            reward=min(max(reward, 0.0), 1.0),
            success=success,
            prediction=run.prediction,
            stop_reason=run.stop_reason,
            stop_detail=run.stop_detail,
            shown_system_prompt=run.shown_system_prompt,
            user_prompt=run.user_prompt,
            guide=run.guide,
            leaks=run.leaks,
            usage=run.usage or _usage(run),
            started_at_s=run.started_at_s,
            duration_s=run.duration_s,
        )


def _steps(run: RecordedRun) -> tuple[tuple[Step, ...], dict[str, str]]:
    """The steps, and why a turn is not read though the record has it run: {number from 1: reason}."""
    steps: list[Step] = []
    unread: dict[str, str] = {}
    dialect = DIALECTS[run.dialect]
    for i, turn in enumerate(run.turns):
        parsed = dialect.parse(turn.text)
        action, kind = parsed.action, turn.kind
        last = i + 1 == len(run.turns)
        if kind is ObservationKind.PARSE_ERROR:
            action = None
        elif action is None:
            kind = ObservationKind.PARSE_ERROR
            unread[str(i + 1)] = f"the dialect {run.dialect!r} finds no action in it"
        elif turn.ran is not None and action.strip() != turn.ran.strip():
            kind, action = ObservationKind.PARSE_ERROR, None
            unread[str(i + 1)] = f"the dialect {run.dialect!r} reads another action out of it than the one that ran"
        final = last and run.stop_reason is StopReason.FINAL and kind is ObservationKind.OK
        if final and run.prediction is not None:
            kind = ObservationKind.FINAL
        steps.append(
            Step(
                completion=Completion(
                    text=turn.text,
                    prompt_tokens=turn.prompt_tokens,
                    completion_tokens=turn.completion_tokens,
                ),
                spans=parsed.spans,
                action=action,
                observation=run.prediction or "" if kind is ObservationKind.FINAL else turn.observation,
                observation_kind=kind,
                tool_calls=calls_in(action, run) if turn.tool_calls is None else turn.tool_calls,
                policy_s=turn.policy_s,
            )
        )
    return tuple(steps), unread


def _outcome(run: RecordedRun, finished: bool, *, assume: bool) -> tuple[bool, str, str]:
    """(success, how it is known, the task's grader)."""
    grader = run.grader or ("numeric" if number(run.answer) is not None else "exact")
    if run.success is not None:
        return run.success and finished, "recorded", grader
    if run.prediction is None and not finished:
        return False, "graded", grader  # it never came to an answer
    if run.answer.strip() and run.prediction is not None:
        # Never by a grader that needs a process or an endpoint: those regrade the ledger later.
        quick = grader if grader in ("exact", "f1", "numeric") else "numeric"
        task = Task(id="", question=run.question, answer=run.answer, kind=run.kind, grader=quick, aliases=run.aliases)
        return finished and GRADERS[quick](task, run.prediction) >= 1.0, "graded", grader
    return (finished, "assumed", grader) if assume else (False, "unknown", grader)


def _usage(run: RecordedRun) -> Usage:
    return Usage(
        requests=len(run.turns),
        prompt_tokens=sum(turn.prompt_tokens for turn in run.turns),
        completion_tokens=sum(turn.completion_tokens for turn in run.turns),
    )


def calls_in(action: str | None, run: RecordedRun) -> int:
    """Tool calls that an action asks for: written calls of code (a loop counts once), calls of JSON, one search."""
    if action is None:
        return 0
    if run.dialect == "search":
        return int(action.startswith("<search>"))
    if run.dialect == "tool":
        calls = json.loads(action)
        return sum(isinstance(call, dict) and call.get("name") != "final_answer" for call in calls)
    if run.dialect != "code":
        return 0
    return sum(
        isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in run.tool_names
        for node in syntax_nodes(action)
    )


def _digest(*texts: str) -> str:
    hashed = hashlib.sha256()
    for text in texts:
        hashed.update(text.encode("utf-8", "backslashreplace") + b"\0")
    return hashed.hexdigest()[:12]
