"""Policies beside one another: each one's rows in a ledger, and two of them on the tasks that both have results of.

Example::

    a, b = policies(cursor)[:2]
    meet(cursor, a, b).counts                           # {"a": 3, "b": 11, "both": 80, "neither": 6}
    met_tasks(cursor, a, b, "b", page=0, limit=50)      # the 11
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from typing import Any

_SIDE = (
    "select task_id, avg(success::int) as {0}_rate, count(*) as {0}_n, arg_min(identity, sample_index) as {0}_first, "
    "any_value(kind) as {0}_kind, any_value(question) as {0}_question "
    "from everything where ledger = ? and policy = ? and not failed group by task_id"
)
_MET = (
    f"select *, a_kind as kind, a_question as question from ({_SIDE.format('a')}) "
    f"join ({_SIDE.format('b')}) using (task_id)"
)
_WHICH = (
    "case when a_rate > b_rate then 'a' when b_rate > a_rate then 'b' when a_rate > 0 then 'both' else 'neither' end"
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Group:
    """A policy's rows in one ledger."""

    id: str
    """The ledger's number and a digest of the policy's name."""
    ledger: int
    policy: str
    rows: int
    tasks: int
    solved: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Meeting:
    """Two groups on the tasks that both have results of; a task with several samples counts by its share of
    successes."""

    tasks: int
    counts: dict[str, int]
    """"a", "b": which of them solves it more often; "both", "neither": as often, and ever or never."""
    rates: tuple[float, float]
    """Mean success of each on these tasks, in [0, 1]."""


@dataclass(frozen=True, slots=True, kw_only=True)
class MetTask:
    """One task of a `Meeting`."""

    task_id: str
    kind: str
    question: str
    identities: tuple[str, str]
    """Of each side's first sample."""
    rates: tuple[float, float]
    samples: tuple[int, int]


def policies(cursor: Any) -> list[Group]:
    """Every policy of every ledger that has results, those with the most tasks first within a ledger."""
    found = cursor.execute(
        "select ledger, policy, count(*), count(distinct task_id), sum(success::int) from everything "
        "where not failed group by all order by ledger, 3 desc, policy limit 500"
    ).fetchall()
    return [
        Group(
            id=f"{ledger}-{_digest(policy)}",
            ledger=ledger,
            policy=policy,
            rows=rows,
            tasks=tasks,
            solved=int(solved),
        )
        for ledger, policy, rows, tasks, solved in found
    ]


def meet(cursor: Any, a: Group, b: Group) -> Meeting:
    """How they compare."""
    found = cursor.execute(
        f"select {_WHICH}, count(*), sum(a_rate), sum(b_rate) from ({_MET}) group by 1", _sides(a, b)
    ).fetchall()
    counts = {name: 0 for name in ("a", "b", "both", "neither")} | {name: n for name, n, _, _ in found}
    tasks = sum(counts.values())
    return Meeting(
        tasks=tasks,
        counts=counts,
        rates=(sum(each[2] for each in found) / max(1, tasks), sum(each[3] for each in found) / max(1, tasks)),
    )


def met_tasks(cursor: Any, a: Group, b: Group, which: str, page: int, limit: int) -> list[MetTask]:
    """Those that count as `which`, by task."""
    found = cursor.execute(
        "select task_id, kind, question, printf('%016x', a_first), printf('%016x', b_first), a_rate, b_rate, "
        f"a_n, b_n from ({_MET}) where {_WHICH} = ? order by task_id limit ? offset ?",
        [*_sides(a, b), which, limit, page * limit],
    ).fetchall()
    return [
        MetTask(
            task_id=each[0],
            kind=each[1],
            question=each[2],
            identities=(each[3], each[4]),
            rates=(each[5], each[6]),
            samples=(each[7], each[8]),
        )
        for each in found
    ]


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:10]


def _sides(a: Group, b: Group) -> list[Any]:
    return [a.ledger, a.policy, b.ledger, b.policy]
