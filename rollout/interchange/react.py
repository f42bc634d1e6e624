"""ReAct runs, `Thought:` / `Action: search[...]` / `Observation:`, as FireAct and Reflexion record them (arXiv
2210.03629, 2310.05915, 2303.11366).

Three shapes, one format each: FireAct's trajectories (a JSON object: index -> reward, em, gt, pred, traj), its
fine-tuning rows (instruction, input, output) and Reflexion's text logs of several trials. As `as_dialect="code"` (what
our student speaks) `search[x]` becomes `print(web_search("x"))` and `finish[y]` becomes `final_answer("y")`; as
"search" they become Search-R1's tags. The original text is not kept beside it. An action without a counterpart
(`lookup`, unless `tools` names a function for it) and a turn that is no single action stay as they are, unread.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

from envs.base import ObservationKind
from rollout.dialects import CODE
from rollout.interchange.fields import answer_text, listed, mapping, real, text, verdict
from rollout.interchange.recorded import ReadOptions, RecordedRun, RowError, Turn
from rollout.interchange.rewording import FINAL, react_turn
from rollout.trajectory import StopReason

_PIECE = re.compile(r"^(Thought|Action|Observation)(?: \d+)?:", re.MULTILINE)
_FINISHED = re.compile(r"Episode finished, reward = (True|False)")
_JUDGED = re.compile(r"Answer is (CORRECT|INCORRECT)\b")
_CORRECT_ANSWER = re.compile(r"^Correct answer: ?(.*)\Z", re.MULTILINE | re.DOTALL)


def matches_fireact(record: Any) -> bool:
    return isinstance(record, Mapping) and isinstance(record.get("traj"), list) and "gt" in record


def matches_alpaca(record: Any) -> bool:
    return isinstance(record, Mapping) and isinstance(record.get("instruction"), str) and "output" in record


def matches_log(record: Any) -> bool:
    return isinstance(record, Mapping) and "react_log" in record


def looks_like_react(said: str) -> bool:
    return bool(re.search(r"^Action(?: \d+)?:[ \t]*\w+\[", said, re.MULTILINE))


def read_fireact(record: Any, options: ReadOptions) -> RecordedRun:
    row = mapping(record, "the run")
    messages = listed(row, "traj")
    if not messages:
        raise RowError("no conversation", "'traj' is empty")
    question = text(mapping(messages[0], "a message"), "content")
    pairs = [text(mapping(message, "a message"), "content") for message in messages[1:]]
    answer = answer_text(row.get("gt")) or ""
    if options.answers:
        answer = _answer_by_index(row, question, options.answers)
    turns, reworded, prediction = react_turns(pairs[0::2], pairs[1::2], options)
    prediction = prediction if prediction is not None else answer_text(row.get("pred"))
    return RecordedRun(
        question=question,
        turns=turns,
        dialect=options.as_dialect,
        answer=answer,
        kind="factual",
        task_id=f"hotpotqa-{row['index']}" if "index" in row else "",
        prediction=prediction,
        success=verdict(row.get("em")) if row.get("em") is not None else verdict(row.get("reward")),
        stop_reason=StopReason.FINAL if _ends(pairs, _FINISHED) else StopReason.MAX_STEPS,
        reworded=reworded,
        metadata={"f1": real(row.get("f1"))},
    )


def _answer_by_index(row: Mapping[str, Any], question: str, answers: Sequence[tuple[str, str]]) -> str:
    try:
        asked, answer = answers[int(row["index"])]
    except (KeyError, ValueError, IndexError) as error:
        raise RowError("no such question in the file of answers", f"index {row.get('index')!r}") from error
    if asked.strip() != question.strip():
        raise RowError("the file of answers has another question there", f"index {row['index']}: {asked[:60]!r}")
    return answer


def read_alpaca(record: Any, options: ReadOptions) -> RecordedRun:
    row = mapping(record, "the row")
    output, given = text(row, "output"), row.get("input")
    question = text(row, "instruction") + (f"\n{given}" if isinstance(given, str) and given.strip() else "")
    if not looks_like_react(output):
        raise RowError("no action in it", "its 'output' has no line 'Action: name[argument]'")
    completions, observations = split_react(output)
    turns, reworded, prediction = react_turns(completions, observations, options)
    judged = _FINISHED.search(observations[-1]) if observations else None
    right = judged is not None and judged[1] == "True"
    return RecordedRun(
        question=question,
        turns=turns,
        dialect=options.as_dialect,
        kind="factual",
        answer=prediction or "" if right else "",
        prediction=prediction,
        success=judged[1] == "True" if judged else None,
        stop_reason=StopReason.FINAL if prediction is not None else StopReason.MAX_STEPS,
        reworded=reworded,
        notes={"answer": "the run's own, which was judged right"} if right else {},
    )


def read_log(record: Any, options: ReadOptions) -> RecordedRun:
    row = mapping(record, "the run")
    run = text(row, "react_log")
    gold = _CORRECT_ANSWER.search(run)
    body = run[: gold.start()] if gold else run
    start = _PIECE.search(body)
    if start is None:
        raise RowError("no turn in it", body[:80])
    question = body[: start.start()].removeprefix("Question:").strip()
    completions, observations = split_react(body[start.start() :])
    turns, reworded, prediction = react_turns(completions, observations, options)
    judged = _JUDGED.search(observations[-1]) if observations else None
    if row.get("section") == "halted" and judged:
        raise RowError("listed twice in its trial", "a finished run among the halted ones")
    return RecordedRun(
        question=question,
        turns=turns,
        dialect=options.as_dialect,
        answer=gold[1].strip() if gold else "",
        kind="factual",
        sample_index=max(int(row.get("trial", 1)) - 1, 0),
        prediction=prediction,
        success=judged[1] == "CORRECT" if judged else False,
        stop_reason=StopReason.FINAL if judged else StopReason.MAX_STEPS,
        reworded=reworded,
        notes={"trial": row.get("trial")},
    )


def split_react(run: str) -> tuple[list[str], list[str]]:
    """(what the agent wrote, what came back) of each turn of one text."""
    completions: list[str] = []
    observations: list[str] = []
    pieces = list(_PIECE.finditer(run))
    for piece, following in zip(pieces, [*pieces[1:], None], strict=False):
        said = run[piece.start() : following.start() if following else len(run)].strip()
        if piece[1] == "Observation":
            if len(completions) <= len(observations):
                raise RowError("an observation before any action", said[:80])
            observations.append(said)
        elif len(completions) == len(observations):
            completions.append(said)
        else:
            completions[-1] += "\n" + said
    return completions, observations


def react_turns(
    completions: Sequence[str], observations: Sequence[str], options: ReadOptions
) -> tuple[tuple[Turn, ...], tuple[str, ...], str | None]:
    """(turns, what was reworded, what `finish` gave)."""
    turns, reworded, prediction = [], False, None
    for i, written in enumerate(completions):
        seen = re.sub(r"\AObservation(?: \d+)?: ?", "", observations[i]) if i < len(observations) else ""
        understood = react_turn(written, options.tools)
        as_code = options.as_dialect == "code"
        said = (understood.text if as_code else understood.searched) if understood else None
        if understood and said and options.tools.get(understood.name) == FINAL:
            prediction = understood.argument.strip()
        reworded = reworded or said is not None
        turns.append(
            Turn(
                text=said or written,
                observation=CODE.observation(seen) if as_code else f"<information>{seen}</information>",
                kind=ObservationKind.PARSE_ERROR if seen.startswith("Invalid Action") else ObservationKind.OK,
                tool_calls=int(said is not None and understood is not None and understood.name != "finish"),
            )
        )
    words = "action as code" if options.as_dialect == "code" else "action as Search-R1's tags"
    return tuple(turns), (words,) if reworded else (), prediction


def _ends(pairs: Sequence[str], mark: re.Pattern[str]) -> bool:
    return bool(pairs) and len(pairs) % 2 == 0 and bool(mark.search(pairs[-1]))
