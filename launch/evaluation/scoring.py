"""Scores of a policy on held-out tasks: by really running its code and searches. Results are a ledger like any other.

The command for people is `launch/evaluate.py`; this is what it and the jobs are made of.

Example::

    scores = run_evaluation(config, environments, workers, tasks, policy=spec.policy_name,
                            settings=student_settings(config, "greedy"), ledger=folder, view=view, title="student")
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from envs.base import Task
from launch.config import DistillConfig
from launch.evaluation.intervals import Score, score
from launch.evaluation.modes import OLD_NAMES
from launch.fleet import Fleet, Fleets
from launch.live.view import LiveView
from launch.spending import JobMeter
from launch.wiring import Environments, start_evaluation
from rollout.collector import Collection, Weights
from rollout.early_exit import EarlyExit
from rollout.episode import EpisodeSettings
from rollout.ledger import Ledger
from rollout.policy_spec import PolicySpec
from rollout.run_vote import vote_runs

MODES = ("greedy", "self_consistent", "whole_run_vote")
"""What the main job calls them; `launch.evaluation.modes` names all that the command knows."""


class EvaluationError(RuntimeError):
    """Scores that cannot be given: some tasks have no result even after being tried again."""


def student_spec(config: DistillConfig, folder: str) -> PolicySpec:
    """The student in `folder` on vLLM, as `config.evaluate` says."""
    evaluate = config.evaluate
    return PolicySpec(
        kind="vllm",
        name="student",
        model=folder,
        dtype=evaluate.dtype,
        max_model_len=evaluate.max_model_len,
        max_num_seqs=max(evaluate.concurrency, 8) * 4,
        kv_cache_bytes=evaluate.kv_cache_mb << 20 if evaluate.kv_cache_mb else None,
        enforce_eager=evaluate.enforce_eager,
        engine=evaluate.engine,
    )


def student_settings(config: DistillConfig, mode: str) -> EpisodeSettings:
    """How students are run in `mode`, by either of its names: greedy, k candidates a step with a vote, or k whole runs
    of a task to vote on. Raises `ValueError` for the modes that have another env (`launch.evaluation.modes`)."""
    mode = {new: old for old, new in OLD_NAMES.items()}.get(mode, mode)
    if mode not in MODES:
        raise ValueError(f"mode {mode!r} is none of {', '.join(MODES)}; launch/evaluate.py has others")
    evaluate = config.evaluate
    settings = replace(
        config.episode,
        first_thought=False,
        guide="none",
        prompt="student",
        max_tokens=evaluate.max_tokens,
        early_exit=EarlyExit(unparsed_turns=evaluate.fruitless_steps),
        candidates=1,
        temperature=0.0,
        top_p=1.0,
        top_k=0,
    )
    if mode == "greedy":
        return settings
    sampled = replace(settings, temperature=evaluate.temperature, top_p=evaluate.top_p, top_k=evaluate.top_k)
    return sampled if mode == "whole_run_vote" else replace(sampled, candidates=evaluate.candidates)


def run_evaluation(
    config: DistillConfig,
    environments: Environments,
    workers: list[Any],
    tasks: list[Task],
    *,
    policy: str,
    settings: EpisodeSettings,
    ledger: Path,
    view: LiveView,
    title: str,
    weights: Weights | None = None,
    samples: int = 1,
) -> dict[str, Score]:
    """Runs what `ledger` does not hold yet and returns the scores by kind; of several `samples` a task, those of the
    vote over them. Raises `EvaluationError`."""
    collection = start_evaluation(
        config, environments, workers, tasks, policy=policy, settings=settings, ledger=ledger, weights=weights,
        samples=samples,
    )  # fmt: skip
    watch_evaluation(collection, view, title, policy=policy)
    scores = ledger_scores(ledger, tasks)
    view.scored(title, scores)
    return scores


def watch_evaluation(
    collection: Collection, view: LiveView, title: str, *, policy: str = "", meter: JobMeter | None = None
) -> None:
    """Until it ends, and is closed; `policy`: who acts; `meter`: what it costs.

    Raises `EvaluationError` when it stops before that.
    """
    collection.say = view.say
    fleets = Fleets([Fleet(collection, say=view.say)], say=view.say)
    try:
        with view.stage(title):
            finished = False
            while not finished:
                fleets.look()
                finished = collection.poll(timeout_s=0.5)
                progress = collection.progress()
                spent = meter.snapshot() if meter is not None else None
                view.update(episodes=progress, by_policy={policy: progress}, spent=spent, last=finished)
                if progress.stopped:
                    raise EvaluationError(progress.stopped)
    finally:
        collection.close()


def ledger_scores(ledger: Path, tasks: Sequence[Task]) -> dict[str, Score]:
    """Success by kind over exactly `tasks`, of the vote where a task has several runs. Raises `EvaluationError` when
    some have no result."""
    outcome = {vote.task.id: vote.success for vote in vote_runs(Ledger(ledger).trajectories())}
    missing = [task.id for task in tasks if task.id not in outcome]
    if missing:
        raise EvaluationError(
            f"{len(missing)} of {len(tasks)} tasks have no result in {ledger}, {missing[0]!r} for one: "
            "see its failures/ for why; the same command tries them again"
        )
    kinds = dict.fromkeys(task.kind for task in tasks)
    return {
        kind: score(sum(outcome[t.id] for t in tasks if t.kind == kind), sum(t.kind == kind for t in tasks))
        for kind in kinds
    }
