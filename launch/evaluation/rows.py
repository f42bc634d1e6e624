"""From ledgers to scores: what each task came to, scores by kind, averages over benchmarks, pass@k, pairs of policies.

A task's value is in [0, 1]: the reward of its run, the mean over its runs, or the vote's. Right or wrong gives Wilson's
interval, anything else a bootstrap over tasks (`launch.evaluation.intervals`); two rows are compared on the tasks that
both have (`launch.evaluation.significance`).

Example::

    row = Row.read("student, agent", Ledger(folder), tasks=tasks, keys=keys)
    row.scores()["arithmetic"].mean
    pairs([row, other])[0].test.p_value
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import combinations
from typing import Any

from envs.base import Task
from launch.evaluation.intervals import Score, average, mean_score
from launch.evaluation.pass_at_k import ks, pass_at_k
from launch.evaluation.significance import PairedTest, holm, paired_average, paired_test
from launch.evaluation.summary import Summary, summarize
from rollout.ledger import Ledger
from rollout.run_vote import vote_runs

IN_DOMAIN, OUT_OF_DOMAIN, AVERAGE = "in-domain average", "out-of-domain average", "average"


class OtherTaskError(ValueError):
    """A ledger whose task of that id asks something else."""


@dataclass(frozen=True, slots=True)
class TaskResult:
    """What the runs of one task came to."""

    kind: str
    value: float
    """In [0, 1]."""
    runs: int
    right: int
    """Runs that succeeded."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """A policy in a mode, as its ledger tells."""

    name: str
    results: dict[str, TaskResult]
    """By task id; tasks without a result are left out."""
    missing: int
    """Episodes that were asked for and have no result."""
    votes: bool
    summary: Summary

    @classmethod
    def read(
        cls,
        name: str,
        ledger: Ledger,
        *,
        keys: Mapping[str, Task] | None = None,
        only: Collection[str] | None = None,
        votes: bool = False,
    ) -> Row:
        """`keys`: the episodes that count, with the tasks that they should be of; `only`: the same without; neither:
        all.

        Raises `OtherTaskError` where a task of the ledger is another than that of its key, `LedgerError`.
        """
        if keys is not None:
            refuse_other_tasks(name, ledger, keys)
        selected = keys if keys is not None else only
        runs: dict[str, list[tuple[float, bool]]] = {}
        kinds: dict[str, str] = {}
        read: set[str] = set()
        for table in ledger.scan(["key", "task_id", "kind", "reward", "success"]):
            for each in table.to_pylist():
                if selected is not None and each["key"] not in selected:
                    continue
                read.add(each["key"])
                kinds[each["task_id"]] = each["kind"]
                runs.setdefault(each["task_id"], []).append((each["reward"], each["success"]))
        results = {
            task: TaskResult(
                kind=kinds[task],
                value=sum(reward for reward, _ in each) / len(each),
                runs=len(each),
                right=sum(success for _, success in each),
            )
            for task, each in runs.items()
        }
        if votes:
            chosen = vote_runs(each for each in ledger.trajectories() if each.key in read)
            results = {
                vote.task.id: TaskResult(
                    kind=vote.task.kind,
                    value=vote.reward,
                    runs=results[vote.task.id].runs,
                    right=results[vote.task.id].right,
                )
                for vote in chosen
            }
        if keys is not None:  # in the order of the tasks, not of their ends
            results = {task.id: results[task.id] for task in keys.values() if task.id in results}
        return cls(
            name=name,
            results=results,
            missing=0 if keys is None else len(keys) - len(read),
            votes=votes,
            summary=summarize(ledger, keys=selected),
        )

    @property
    def kinds(self) -> list[str]:
        return list(dict.fromkeys(each.kind for each in self.results.values()))

    def scores(self) -> dict[str, Score]:
        """By kind."""
        values: dict[str, list[float]] = {}
        for each in self.results.values():
            values.setdefault(each.kind, []).append(each.value)
        return {kind: mean_score(of_kind) for kind, of_kind in values.items()}

    def averages(self, domains: Mapping[str, str]) -> dict[str, Score]:
        """Over kinds, each counting the same: in-domain, out-of-domain and all, where `domains` (kind -> in or out)
        says which are which, else all. Of kinds that are all there alone; none for a single kind."""
        scores = self.scores()
        groups = {AVERAGE: list(domains) or list(scores)}
        if domains:
            inside = {name: [kind for kind in domains if domains[kind] == name] for name in ("in", "out")}
            groups = {IN_DOMAIN: inside["in"], OUT_OF_DOMAIN: inside["out"]} | groups
        return {
            name: average([scores[kind] for kind in kinds])
            for name, kinds in groups.items()
            if (len(kinds) > 1 or domains) and kinds and all(kind in scores for kind in kinds)
        }

    def pass_at(self) -> dict[int, Score]:
        """k -> pass@k over all tasks that have as many runs as most; nothing where each has one."""
        most = max((each.runs for each in self.results.values()), default=0)
        if most < 2:
            return {}
        whole = [each for each in self.results.values() if each.runs == most]
        return {k: mean_score([pass_at_k(n=most, right=each.right, k=k) for each in whole]) for k in ks(most)}

    def mean_at_n(self) -> Score | None:
        """The mean over the runs of each task, also where the score is a vote's; None where each has one run."""
        if all(each.runs < 2 for each in self.results.values()):
            return None
        return mean_score([each.right / each.runs for each in self.results.values()])

    def to_json(self, domains: Mapping[str, str]) -> dict[str, Any]:
        mean = self.mean_at_n()
        return {
            "tasks": len(self.results),
            "missing": self.missing,
            "votes": self.votes,
            "scores": {kind: asdict(score) for kind, score in self.scores().items()},
            "averages": {name: asdict(score) for name, score in self.averages(domains).items()},
            "pass_at_k": {str(k): asdict(score) for k, score in self.pass_at().items()},
            "mean_at_n": asdict(mean) if mean is not None else None,
            **self.summary.to_json(),
        }


@dataclass(frozen=True, slots=True, kw_only=True)
class Pair:
    """Two rows on the tasks that both have."""

    first: str
    second: str
    test: PairedTest
    """Of benchmarks, of their average; else over all tasks."""
    holm_p: float
    """The p-value, adjusted for the number of pairs that are looked at together."""
    kinds: dict[str, PairedTest]
    """By kind of task, not adjusted; nothing where there is one kind."""

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


def pairs(rows: Sequence[Row], domains: Mapping[str, str] | None = None) -> list[Pair]:
    """Every two rows that share tasks. With `domains`, of benchmarks that count the same."""
    found: list[tuple[Row, Row, PairedTest, dict[str, PairedTest]]] = []
    for first, second in combinations(rows, 2):
        shared = sorted(first.results.keys() & second.results.keys())
        if not shared:
            continue
        kinds = list(dict.fromkeys(first.results[task].kind for task in shared))
        by_kind = {
            kind: _test(first, second, [task for task in shared if first.results[task].kind == kind]) for kind in kinds
        }
        whole = _test(first, second, shared)
        if domains:
            whole = paired_average([_values(first, second, shared, kind) for kind in kinds])
        found.append((first, second, whole, by_kind if len(kinds) > 1 else {}))
    adjusted = holm([test.p_value for _, _, test, _ in found])
    return [
        Pair(first=first.name, second=second.name, test=test, holm_p=p, kinds=by_kind)
        for (first, second, test, by_kind), p in zip(found, adjusted, strict=True)
    ]


def refuse_other_tasks(name: str, ledger: Ledger, keys: Mapping[str, Task]) -> None:
    """Raises `OtherTaskError` where a trajectory with one of `keys` is of another task than it should be."""
    for table in ledger.scan(["key", "task"]):
        for key, recorded in zip(table.column("key").to_pylist(), table.column("task").to_pylist(), strict=True):
            if key in keys:
                _check_same(name, keys[key], recorded)


def keys_of(tasks: Iterable[Task], key: Any, runs: int) -> dict[str, Task]:
    """`key(task_id, sample)` of each run of each task -> the task."""
    return {key(task.id, sample): task for task in tasks for sample in range(runs)}


def _values(first: Row, second: Row, tasks: Sequence[str], kind: str) -> tuple[list[float], list[float]]:
    of_kind = [task for task in tasks if first.results[task].kind == kind]
    return [first.results[task].value for task in of_kind], [second.results[task].value for task in of_kind]


def _test(first: Row, second: Row, tasks: Sequence[str]) -> PairedTest:
    return paired_test([first.results[task].value for task in tasks], [second.results[task].value for task in tasks])


def _check_same(name: str, task: Task, recorded: Mapping[str, Any]) -> None:
    for field in ("question", "answer", "grader"):
        if recorded[field] != getattr(task, field):
            raise OtherTaskError(
                f"{name}: the ledger's task {task.id!r} has the {field} {_short(recorded[field])}, here it is "
                f"{_short(getattr(task, field))}; choose another out for other tasks"
            )


def _short(text: str) -> str:
    return repr(text if len(text) <= 60 else text[:57] + "...")
