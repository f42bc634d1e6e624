"""What a configuration's tasks and corpus are, loaded and checked before anything is started."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from envs.base import Task, TaskError
from envs.retrieval.corpus import Passage
from envs.retrieval.spec import RetrieverSpec
from envs.starter import StarterWorld
from envs.task_leakage import check_disjoint, without_overlap
from envs.tasks import load_tasks
from launch.config import JobConfig, TasksConfig, TaskSet


@dataclass(frozen=True, slots=True)
class World:
    """Tasks by split, and what `web_search` searches."""

    train: list[Task]
    test: list[Task]
    retriever: RetrieverSpec | None


def load_world(config: JobConfig, index_folder: Path) -> World:
    """Raises `TaskError` or `CorpusError`-like errors that name file and line."""
    tasks = config.tasks
    starter = StarterWorld(tasks.seed) if tasks.source == "starter" else None
    if starter is not None:
        train = starter.train_tasks(tasks.train_count, seed=config.seed, arithmetic_share=tasks.arithmetic_share)
        test = starter.test_tasks(tasks.test_count)
    else:
        train = [task for task_set in tasks.train for task in _load(task_set)][: tasks.train_count]
        test = [task for task_set in tasks.test for task in _load(task_set)]
        if tasks.drop_overlap:
            train = without_overlap(train, test)
        check_disjoint(train, test)
    return World(train, test, _retriever(config, starter, index_folder))


def test_tasks_of(tasks: TasksConfig) -> list[Task]:
    """The held-out tasks alone, in order; two files may use one id. Raises `TaskError`."""
    if tasks.source == "starter":
        return StarterWorld(tasks.seed).test_tasks(tasks.test_count)
    return [task for task_set in tasks.test for task in _load(task_set)]


def retriever_of(config: JobConfig, index_folder: Path) -> RetrieverSpec | None:
    """What is searched alone, without the tasks. Raises as `load_world` does."""
    starter = StarterWorld(config.tasks.seed) if config.tasks.source == "starter" else None
    return _retriever(config, starter, index_folder)


def _load(task_set: TaskSet) -> list[Task]:
    return load_tasks(
        task_set.path, kind=task_set.kind, grader=task_set.grader, columns=task_set.columns, limit=task_set.count
    )


def _retriever(config: JobConfig, starter: StarterWorld | None, index_folder: Path) -> RetrieverSpec | None:
    retrieval = config.retrieval
    env = config.env
    if env.name == "answer" and not env.context_passages:
        return None
    if retrieval.kind == "none":
        if env.name == "search" or env.context_passages:
            what = "env 'search'" if env.name == "search" else f"env.context_passages={env.context_passages}"
            raise TaskError(f"retrieval.kind is 'none', but {what} needs something to search: set it to bm25 or hybrid")
        return None
    if retrieval.corpus and not Path(retrieval.corpus).is_file():
        raise TaskError(f"retrieval.corpus {retrieval.corpus!r} does not exist")
    if not retrieval.corpus and starter is None:
        raise TaskError("retrieval.corpus is empty: name a JSON-lines file of passages, or set retrieval.kind=none")
    passages = None
    if starter is not None and not retrieval.corpus:
        passages = tuple(Passage(id=name, title=title, text=text) for name, title, text in starter.passages())
    return RetrieverSpec(
        kind=retrieval.kind,
        corpus_path=retrieval.corpus or None,
        passages=passages,
        index_folder=str(index_folder),
        encoder=retrieval.encoder,
        encoder_dtype=retrieval.dtype,
        query_prefix=retrieval.query_prefix,
        passage_prefix=retrieval.passage_prefix,
    )
