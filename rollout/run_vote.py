"""Voting over whole runs: n samples of a task, the answer that most of them give (arXiv 2402.05120).

For comparison with self-consistent actions, which vote at every step: this costs n whole runs. It generates nothing:
any trajectories will do, such as those of a ledger that was collected with `samples=n`.

Example::

    votes = vote_runs(Ledger("runs/x/ledger").trajectories())
    sum(vote.success for vote in votes) / len(votes)
"""

from __future__ import annotations

from collections.abc import Hashable, Iterable
from dataclasses import dataclass

from envs.base import Task
from envs.grading import normalise, number
from rollout.trajectory import Trajectory


@dataclass(frozen=True, slots=True, kw_only=True)
class RunVote:
    """What the runs of one task agree on."""

    task: Task
    prediction: str | None
    """The chosen run's answer in its own words; None when no run gave one."""
    success: bool
    """The chosen run's."""
    reward: float
    """The chosen run's, in [0, 1]."""
    votes: int
    """Runs that gave this answer; 0 when no run gave one."""
    n: int
    """Runs that count: those without a failure."""
    key: str
    """The chosen run's."""

    @property
    def agreement(self) -> float:
        """Share of the runs that gave this answer, in [0, 1]."""
        return self.votes / self.n


def vote_runs(trajectories: Iterable[Trajectory]) -> list[RunVote]:
    """One vote a task, in the order in which tasks first come; failures are left out, and so are tasks with nothing
    else.

    Among answers with as many votes, and for the wording within an answer, the likeliest run decides where every run
    tells its log-probabilities, else the one with the lowest sample index.
    """
    runs: dict[str, list[_Run]] = {}
    for trajectory in trajectories:
        if trajectory.failure is None:
            runs.setdefault(trajectory.task.id, []).append(_Run.of(trajectory))
    return [_vote(sorted(each, key=lambda run: run.sample_index)) for each in runs.values()]


def answer_key(task: Task, prediction: str) -> Hashable:
    """What two predictions share that are the same answer: their number, else their words as the task's grader takes
    them.

    Expressions that are equal but look different stay apart, but for "exact" and "f1" answers case, articles and
    punctuation are as one.
    """
    value = number(prediction)
    if value is not None:
        return round(float(value), 9) if value.denominator != 1 else int(value)
    text = " ".join(prediction.split()).casefold()
    if task.grader in ("math", "numeric"):
        return (
            text.replace(" ", "").replace("\\left", "").replace("\\right", "").replace("\\dfrac", "\\frac").strip("$")
        )
    return normalise(prediction) or text


@dataclass(frozen=True, slots=True)
class _Run:
    """Of a trajectory, what a vote needs: all runs of a benchmark are held at once."""

    task: Task
    key: str
    sample_index: int
    prediction: str | None
    success: bool
    reward: float
    likelihood: float | None

    @classmethod
    def of(cls, run: Trajectory) -> _Run:
        return cls(run.task, run.key, run.sample_index, run.prediction, run.success, run.reward, _likelihood(run))


def _vote(runs: list[_Run]) -> RunVote:
    """`runs` of one task, by sample index."""
    answers: dict[Hashable, list[_Run]] = {}
    for run in runs:
        if run.prediction is not None:
            answers.setdefault(answer_key(run.task, run.prediction), []).append(run)
    most = max(map(len, answers.values()), default=0)
    tied = [run for group in answers.values() if len(group) == most for run in group] or runs
    if any(run.likelihood is None for run in tied):
        chosen = min(tied, key=lambda run: run.sample_index)
    else:
        chosen = max(tied, key=lambda run: run.likelihood or 0.0)
    return RunVote(
        task=chosen.task,
        prediction=chosen.prediction,
        success=chosen.success,
        reward=chosen.reward,
        votes=most,
        n=len(runs),
        key=chosen.key,
    )


def _likelihood(run: Trajectory) -> float | None:
    """Mean log-probability of a run's tokens: a sum would favour short runs; None when a turn does not tell."""
    told = [step.completion.logprobs for step in run.steps]
    if not told or any(logprobs is None for logprobs in told):
        return None
    count = sum(len(logprobs or ()) for logprobs in told)
    return sum(sum(logprobs or ()) for logprobs in told) / count if count else None
