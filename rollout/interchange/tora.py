"""ToRA's tool-integrated runs: text with ```python and ```output blocks, then the answer in `\\boxed{}` (arXiv
2309.17452).

Two shapes: evaluation output (`code`, `pred`, `gt`, a list of one run each) and corpus examples (`messages`, `gt`).
Each ```python block becomes a code turn, its ```output block the observation, and the closing words the thought of a
last turn that calls `final_answer` with the recorded prediction: that call is ours, its argument is the run's.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from typing import Any

from envs.base import ObservationKind
from rollout.dialects import CODE
from rollout.interchange.fields import answer_text, listed, mapping, text
from rollout.interchange.recorded import ReadOptions, RecordedRun, RowError, Turn
from rollout.interchange.rewording import write_code_turn
from rollout.trajectory import StopReason

_BLOCK = re.compile(r"```(python|output)[ \t]*\n(.*?)\n?```", re.DOTALL)
_ERROR = re.compile(r"^\w*(?:Error|Exception)\b", re.MULTILINE)
_TIMEOUT = re.compile(r"time(?:d )?out", re.IGNORECASE)


def matches(record: Any) -> bool:
    if not isinstance(record, Mapping) or "gt" not in record:
        return False
    return ("code" in record and "pred" in record) or ("gt_cot" in record and "messages" in record)


def read(record: Any, options: ReadOptions) -> RecordedRun:
    row = mapping(record, "the row")
    if "messages" in row:
        messages = [mapping(message, "a message") for message in listed(row, "messages")]
        if [message.get("role") for message in messages] != ["user", "assistant"]:
            raise RowError("no question and answer", f"roles {[message.get('role') for message in messages]}")
        question, run = text(messages[0], "content"), text(messages[1], "content")
        prediction = boxed(run)
    else:
        runs = listed(row, "code")
        if len(runs) != 1 or not isinstance(runs[0], str):
            raise RowError("not exactly one run in 'code'", f"{len(runs)} of them")
        question, run = text(row, "question"), runs[0]
        told = row.get("pred")
        prediction = answer_text(told[0]) if isinstance(told, list) and told else boxed(run)
    turns, closed = _turns(run, prediction)
    number = row.get("idx", row.get("id"))
    dataset = str(row.get("dataset") or "tora")
    return RecordedRun(
        question=question,
        turns=turns,
        dialect="code",
        answer=answer_text(row.get("gt")) or "",
        grader="math",
        kind="math",
        task_id=f"{dataset}-{number}" if number is not None else "",
        prediction=prediction if closed else None,
        stop_reason=StopReason.FINAL if closed else StopReason.MAX_STEPS,
        reworded=("python blocks as turns", *(("closing words as final_answer",) if closed else ())),
        metadata={"level": row["level"]} if isinstance(row.get("level"), str) else {},
    )


def _turns(run: str, prediction: str | None) -> tuple[tuple[Turn, ...], bool]:
    """(turns, whether the run came to its answer)."""
    turns: list[Turn] = []
    at = 0
    blocks = list(_BLOCK.finditer(run))
    for block, following in zip(blocks, [*blocks[1:], None], strict=False):
        if block[1] == "output":
            if not turns or turns[-1].observation:
                raise RowError("an output block without code before it")
            at = block.end()
            shown = block[2]
            kind = ObservationKind.OK
            if _ERROR.search(shown.rpartition("\n")[2]):
                kind = ObservationKind.CODE_ERROR
            elif _TIMEOUT.match(shown.strip()):
                kind = ObservationKind.LIMIT
            turns[-1] = Turn(
                text=turns[-1].text, observation=CODE.observation(shown), kind=kind, ran=turns[-1].ran
            )
            continue
        code = block[2]
        turn = write_code_turn(run[at : block.start()], code)
        if turn is None:
            raise RowError("a python block that cannot be a turn", code[:80])
        turns.append(Turn(text=turn, ran=code.strip("\n")))
        at = block.end()
        if following is not None and following[1] == "python":
            raise RowError("a python block without its output", code[:80])
    closing = run[at:].strip()
    if prediction is None or (not closing and blocks) or (turns and not turns[-1].observation):
        return tuple(turns), False
    last = write_code_turn(closing, f"final_answer({json.dumps(prediction, ensure_ascii=False)})")
    if last is None:
        raise RowError("closing words that cannot be a thought", closing[:80])
    return (*turns, Turn(text=last)), True


def boxed(said: str) -> str | None:
    """What stands in the last `\\boxed{}`, its braces balanced; None when there is none."""
    start = said.rfind("\\boxed{")
    if start < 0:
        return None
    depth, at = 1, start + len("\\boxed{")
    for end in range(at, len(said)):
        depth += {"{": 1, "}": -1}.get(said[end], 0)
        if depth == 0:
            return said[at:end]
    return None
