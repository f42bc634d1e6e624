"""`launch.ledger regrade`: the recorded predictions graded again, into a new ledger. Nothing is generated.

With `--grader` another way of grading, with `--tasks` other reference answers (by question and task id). Where a
trajectory gave no answer, its reward stays 0.
"""

from __future__ import annotations

import argparse
import dataclasses
from collections import Counter, deque
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from envs.base import Task
from envs.grading import GRADERS, grade_many
from launch.ledger.output import Output, new_ledger
from launch.ledger.sources import Sources, UsageError
from rollout.curation_sets import same_question
from rollout.trajectory import Trajectory

_MATH_PROCESSES = 2


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--out", required=True, help="the new ledger")
    parser.add_argument("--grader", help=f"one of {', '.join(GRADERS)} (default: each task's own)")
    parser.add_argument("--tasks", help="task file with other reference answers, found by question or id")
    parser.add_argument("--judge-model", help="the model of grader 'judge'")
    parser.add_argument("--judge-url", help="its endpoint (default: OpenAI's own)")
    parser.add_argument("--judge-key-env", default="OPENAI_API_KEY", help="variable with its key (default %(default)s)")
    parser.add_argument("--judge-cache", help="SQLite file of its verdicts")
    parser.add_argument("--unsafe", action="store_true", help="grade 'math' where there is no kernel confinement")
    parser.add_argument("--examples", type=int, default=10, help="changed verdicts to list (default %(default)s)")


def run(options: argparse.Namespace, output: Output) -> int:
    if not options.grader and not options.tasks:
        raise UsageError("nothing to grade by: give --grader, --tasks, or both")
    if options.grader and options.grader not in GRADERS:
        raise UsageError(f"grader {options.grader!r} is unknown; there are {', '.join(GRADERS)}")
    sources = Sources(options.ledgers)
    answers = _Answers.load(options.tasks) if options.tasks else None
    _configure(options)
    total = sources.count()
    changed: list[dict[str, Any]] = []
    counts: Counter[str] = Counter()
    with new_ledger(options.out, writer="regrade") as fill:
        graded = _graded(sources.trajectories(), options, answers, counts)
        for before, after in output.progress("grading", graded, total=total):
            fill(after)
            counts["results"] += 1
            counts["rewards_changed"] += before.reward != after.reward
            if before.success != after.success:
                counts["now_right" if after.success else "now_wrong"] += 1
                if len(changed) < options.examples:
                    changed.append(_change(before, after))
        for table in sources.failure_tables():
            fill.failures(table)
        if answers is not None and counts["results"] and not counts["matched"]:
            raise UsageError(f"no task of {options.tasks} is one of the ledger's, by id or question")
    data = {
        "out": options.out,
        "results": counts["results"],
        "now_right": counts["now_right"],
        "now_wrong": counts["now_wrong"],
        "rewards_changed": counts["rewards_changed"],
        "without_new_answer": counts["unmatched"],
        "changes": changed,
    }
    _show(data, output)
    output.data(data)
    return 0


class _Answers:
    """Reference answers by task id and by question."""

    def __init__(self, tasks: Iterable[Task]) -> None:
        self._by_id: dict[str, Task] = {}
        self._by_question: dict[str, Task] = {}
        for task in tasks:
            self._by_id[task.id] = task
            self._by_question.setdefault(same_question(task.question), task)

    @classmethod
    def load(cls, path: str) -> _Answers:
        from envs.tasks import load_tasks

        return cls(load_tasks(path))

    def of(self, task: Task) -> Task | None:
        """By id where the question is the same too, else by question, else by id."""
        question = same_question(task.question)
        named = self._by_id.get(task.id)
        if named is not None and same_question(named.question) == question:
            return named
        return self._by_question.get(question, named)


def _graded(
    trajectories: Iterator[Trajectory], options: argparse.Namespace, answers: _Answers | None, counts: Counter[str]
) -> Iterator[tuple[Trajectory, Trajectory]]:
    """(before, after) in order; several are graded at the same moment."""

    def task_of(task: Task) -> Task:
        found = answers.of(task) if answers else None
        if found is not None:
            task = dataclasses.replace(task, answer=found.answer, aliases=found.aliases)
        if answers is not None:
            counts["unmatched" if found is None else "matched"] += 1
        task = dataclasses.replace(task, grader=options.grader or task.grader)
        if task.grader == "judge" and not options.judge_model:
            raise UsageError(f"task {task.id!r} is graded by 'judge': name its model with --judge-model")
        if task.grader not in GRADERS:
            raise UsageError(f"task {task.id!r} has grader {task.grader!r}; name one of {', '.join(GRADERS)}")
        return task

    waiting: deque[tuple[Trajectory, Task]] = deque()

    def answers_to_grade() -> Iterator[tuple[Task, str | None]]:
        for each in trajectories:
            waiting.append((each, task_of(each.task)))
            yield waiting[-1][1], each.prediction

    for reward in grade_many(answers_to_grade(), at_once=16 if options.judge_model else _MATH_PROCESSES):
        before, task = waiting.popleft()
        yield before, dataclasses.replace(before, task=task, reward=reward, success=reward >= 1.0)


def _configure(options: argparse.Namespace) -> None:
    """Graders belong to the process and end with it."""
    from envs.grading_math import MathSpec, configure_math

    configure_math(MathSpec(processes=_MATH_PROCESSES, unsafe=options.unsafe))
    if options.judge_model:
        from envs.judge import JudgeSpec, configure_judge

        configure_judge(
            JudgeSpec(
                model=options.judge_model,
                base_url=options.judge_url,
                api_key_env=options.judge_key_env,
                cache_path=options.judge_cache,
            )
        )


def _change(before: Trajectory, after: Trajectory) -> dict[str, Any]:
    return {
        "key": after.key,
        "answer": after.task.answer,
        "prediction": after.prediction,
        "was": before.success,
        "is": after.success,
    }


def _show(data: Mapping[str, Any], output: Output) -> None:
    from rich import box
    from rich.table import Table
    from rich.text import Text

    output.say(
        f"{data['results']:,} graded again into {data['out']}: {data['now_right']:,} wrong ones are right now, "
        f"{data['now_wrong']:,} right ones are wrong now, {data['rewards_changed']:,} rewards changed"
    )
    if data["without_new_answer"]:
        output.say(f"{data['without_new_answer']:,} have no new answer and were graded by their old one")
    if not data["changes"]:
        return
    table = Table("key", "answer", "prediction", "verdict", box=box.SIMPLE_HEAD, pad_edge=False)
    for each in data["changes"]:
        verdict = "now right" if each["is"] else "now wrong"
        table.add_row(Text(each["key"]), Text(each["answer"][:60]), Text((each["prediction"] or "-")[:60]), verdict)
    output.show(table)
