"""The tasks of an evaluation, loaded and checked before anything starts: the starter world's, files, or a benchmark's.

Example::

    world = load_tasks_of(config, index_folder)
    world.tasks, world.retriever("cot_rag"), world.domains       # {"hotpotqa": "in", "bamboogle": "out", ...}
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from envs.base import Task, TaskError
from envs.retrieval.spec import RetrieverSpec
from launch.config import TasksConfig, TaskSet
from launch.evaluation.config import BenchmarkConfig, BenchmarkSet, EvaluationConfig, EvaluationJob
from launch.world import retriever_of, test_tasks_of

_DEPTH = 4
"""How far below its folder a benchmark's files are looked for."""


@dataclass(frozen=True, slots=True, kw_only=True)
class EvaluationWorld:
    """What a policy is evaluated on."""

    tasks: list[Task]
    jobs: dict[str, EvaluationJob]
    """By mode, with the files of the benchmark in their place."""
    retrievers: dict[str, RetrieverSpec | None]
    """By mode: what is searched."""
    domains: Mapping[str, str]
    """kind -> "in" or "out"; empty where no benchmark is."""
    notes: list[str]
    """What a person should know, such as files that hold fewer tasks than the paper's."""

    @property
    def kinds(self) -> list[str]:
        return list(dict.fromkeys(task.kind for task in self.tasks))


def load_tasks_of(config: EvaluationConfig, index: Path) -> EvaluationWorld:
    """Raises `TaskError` for a missing file, a malformed row, a judge that is not there."""
    benchmark = config.benchmark
    found = benchmark_files(benchmark) if benchmark.name else {}
    tasks = _benchmark_tasks(benchmark, found) if found else config.tasks
    jobs = {mode: config.job(mode, tasks) for mode in config.modes}
    retrievers = {mode: retriever_of(job, index) for mode, job in jobs.items()}
    test = _distinct(test_tasks_of(tasks))
    if not any(task.grader == "judge" for task in test):  # a judge that is never asked needs no key
        jobs = {mode: replace(job, env=replace(job.env, judge=None)) for mode, job in jobs.items()}
    else:
        _check_judge(config)
    counts = Counter(task.kind for task in test)
    fewer = [
        f"{each.kind} {counts[each.kind]} of {each.count}"
        for each in benchmark.sets
        if found and counts[each.kind] < each.count
    ]
    return EvaluationWorld(
        tasks=test,
        jobs=jobs,
        retrievers=retrievers,
        domains={each.kind: each.domain for each in benchmark.sets} if found else {},
        notes=[f"fewer questions than the benchmark has: {', '.join(fewer)}"] if fewer else [],
    )


def benchmark_files(benchmark: BenchmarkConfig) -> dict[str, Path]:
    """kind -> its file. Raises `TaskError` that names all that are missing."""
    folder = Path(benchmark.folder)
    if not folder.is_dir():
        raise TaskError(f"benchmark.folder {benchmark.folder!r} is no folder; it should hold {_names(benchmark.sets)}")
    found: dict[str, Path] = {}
    missing: list[BenchmarkSet] = []
    for each in benchmark.sets:
        files = sorted(path for depth in range(_DEPTH) for path in folder.glob("*/" * depth + each.file))
        if len(files) > 1:
            raise TaskError(
                f"benchmark.folder {benchmark.folder!r} holds {len(files)} files that may be {each.kind}: "
                f"{', '.join(str(path.relative_to(folder)) for path in files[:3])}; name a folder with one of each"
            )
        if files:
            found[each.kind] = files[0]
        else:
            missing.append(each)
    if missing:
        raise TaskError(f"benchmark.folder {benchmark.folder!r} lacks {_names(missing)}")
    return found


def _names(sets: tuple[BenchmarkSet, ...] | list[BenchmarkSet]) -> str:
    return ", ".join(each.file for each in sets)


def _benchmark_tasks(benchmark: BenchmarkConfig, found: Mapping[str, Path]) -> TasksConfig:
    sets = tuple(
        TaskSet(
            path=str(found[each.kind]),
            kind=each.kind,
            grader="math" if each.answers == "math" else benchmark.factual,
            count=min(each.count, benchmark.count or each.count),
        )
        for each in benchmark.sets
    )
    return TasksConfig(source="files", test=sets)


def _distinct(tasks: list[Task]) -> list[Task]:
    """Two files may number their tasks alike: then an id gets its kind in front. Raises `TaskError` where that is not
    enough."""
    counts = Counter(task.id for task in tasks)
    named = [replace(task, id=f"{task.kind}/{task.id}") if counts[task.id] > 1 else task for task in tasks]
    twice = [name for name, count in Counter(task.id for task in named).items() if count > 1]
    if twice:
        raise TaskError(
            f"two tasks have the id {twice[0]!r}; give their files different kinds, or tasks ids of their own"
        )
    return named


def _check_judge(config: EvaluationConfig) -> None:
    judge = config.env.judge
    instead = "; or say who grades instead: benchmark.factual=exact or =f1" if config.benchmark.name else ""
    if judge is None:
        raise TaskError(f"some tasks have the grader 'judge', so env.judge.model must be set{instead}")
    if judge.base_url is None and not os.environ.get(judge.api_key_env):
        raise TaskError(
            f"env.judge: the variable {judge.api_key_env} is not set; it holds the key of the judge {judge.model!r}"
            f"{instead}"
        )
