"""Self-consistent action generation (arXiv 2505.17612, section 3.2): of k candidate actions those that fail are
dropped and the majority of observations decides. Of the candidates that led to the majority's observation the likeliest
turn is kept: their observations agree, but a thought that was sampled badly would mislead the steps that follow.

The authors' code runs every candidate on the live interpreter and the winner again; here the env previews them on
forked state, equal actions once, and commits the winner without running it twice. Where the env can add to a preview,
as many as could decide the vote by agreeing go first, and the rest only when they did not (`waves`, `is_decided`): the
majority is the same, with fewer actions run. An env that cannot fork is voted on by the parsed action instead.

Example::

    first, rest = waves(["a", "b", "a", None], None)       # ["a"], ["b"]: two of three can decide
    is_decided(["seen", "seen"], waiting=1)                # True: run no more
    vote(["seen", None, "seen", None]).winner              # 0
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from envs.base import Observation, ObservationKind
from rollout.trajectory import Completion


@dataclass(frozen=True, slots=True, kw_only=True)
class Vote:
    """The outcome."""

    winner: int
    """Index of the chosen candidate."""
    counts: tuple[int, ...]
    """[k] how many valid candidates share each one's ballot; 0 for those that were dropped."""

    @property
    def agreement(self) -> float:
        """Share of all k candidates that agree with the winner, in [0, 1]."""
        return self.counts[self.winner] / len(self.counts)


def vote(ballots: Sequence[str | None], likelihoods: Sequence[float] | None = None) -> Vote:
    """Majority over `ballots` [k] (None: dropped); among the candidates with the most votes `likelihoods` [k] decide,
    larger is likelier; without them the earliest does. When all were dropped, that is among all."""
    if not ballots:
        raise ValueError("vote needs at least one candidate")
    tally = Counter(ballot for ballot in ballots if ballot is not None)
    counts = tuple(tally[ballot] if ballot is not None else 0 for ballot in ballots)
    tied = [i for i, count in enumerate(counts) if count == max(counts)]
    return Vote(winner=tied[0] if likelihoods is None else max(tied, key=lambda i: likelihoods[i]), counts=counts)


def waves(actions: Sequence[str | None], likelihoods: Sequence[float] | None) -> tuple[list[str], list[str]]:
    """The distinct actions of k candidates (None: nothing to run), those to run first and those that may be spared.

    First is the smallest set that would outvote all others if it agreed: the most frequent actions, and among those
    that are as frequent the likeliest or the earliest, whose turn would be kept.
    """
    count = Counter(action for action in actions if action is not None)
    best: dict[str, float] = {}
    if likelihoods is not None:
        for action, likelihood in zip(actions, likelihoods, strict=True):
            if action is not None:
                best[action] = max(likelihood, best.get(action, likelihood))
    order = sorted(count, key=lambda action: (-count[action], -best.get(action, 0.0)))  # stable: else the earliest
    votes, run = 0, 0
    while run < len(order) and 2 * votes <= count.total():
        votes += count[order[run]]
        run += 1
    return order[:run], order[run:]


def is_decided(ballots: Sequence[str | None], *, waiting: int) -> bool:
    """Whether `waiting` more candidates, whatever they lead to, leave the majority what it is."""
    if not waiting:
        return True
    first, second = (*sorted(Counter(each for each in ballots if each is not None).values(), reverse=True), 0, 0)[:2]
    return first > second + waiting


def likelihoods(completions: Sequence[Completion]) -> list[float] | None:
    """[k] log-probability of each turn under the policy; None when the policy does not tell."""
    totals = [sum(completion.logprobs) for completion in completions if completion.logprobs is not None]
    return totals if len(totals) == len(completions) else None


def ballot(observation: Observation) -> str | None:
    """What a previewed candidate votes for: its observation, white space and case aside; None when it failed."""
    if not observation.valid:
        return None
    final = "final" if observation.kind is ObservationKind.FINAL else "step"
    return f"{final}:{' '.join(observation.text.split()).casefold()}"


def action_ballot(action: str | None) -> str | None:
    """The ballot where nothing can be previewed: the parsed action itself."""
    return None if action is None else " ".join(action.split())
