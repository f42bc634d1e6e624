"""How much better than its siblings each rollout of a task did: the rewards' part of `grpo`.

A group is one task's rollouts by one policy at one version of its weights; it must be complete before the first of its
rows is trained on. A group whose rewards are all the same has advantages of 0 and teaches nothing; DAPO samples such
groups anew.

Example::

    group_advantages([1, 0, 0, 1], ["t1", "t1", "t2", "t2"], scale=False)      # [0.5, -0.5, -0.5, 0.5]
    scorer = AdvantageScorer(advantages_of(ledger.trajectories()))              # what a learner's `scorer` may be
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from statistics import fmean, stdev

from learner.token_scores import TokenScores
from rollout.trajectory import Trajectory

EPSILON = 1e-4
"""Added to a group's standard deviation; as in TRL."""


def group_advantages(rewards: Sequence[float], groups: Sequence[Hashable], *, scale: bool = True) -> list[float]:
    """Reward less its group's mean, one for each of `rewards`; `groups` says which is in which, such as task ids.

    `scale`: divided by the group's standard deviation (n - 1) as in GRPO (arXiv 2402.03300); without, as in Dr. GRPO
    (arXiv 2503.20783), which finds that the division favours tasks that are too easy or too hard. A group of one is 0.
    """
    if len(rewards) != len(groups):
        raise ValueError(f"{len(rewards)} rewards for {len(groups)} groups; give each reward its group")
    members: dict[Hashable, list[float]] = defaultdict(list)
    for reward, group in zip(rewards, groups, strict=True):
        members[group].append(float(reward))
    means = {group: fmean(of_group) for group, of_group in members.items()}
    spread = {
        group: stdev(of_group) + EPSILON if scale and len(of_group) > 1 else 1.0 for group, of_group in members.items()
    }
    return [(float(reward) - means[group]) / spread[group] for reward, group in zip(rewards, groups, strict=True)]


def advantages_of(trajectories: Iterable[Trajectory], *, scale: bool = True) -> dict[str, float]:
    """Trajectory key -> advantage; what failed by our fault has no reward and is left out."""
    played = [trajectory for trajectory in trajectories if trajectory.failure is None]
    found = group_advantages(
        [trajectory.reward for trajectory in played],
        [(trajectory.task.id, trajectory.policy, trajectory.weights_version) for trajectory in played],
        scale=scale,
    )
    return {trajectory.key: advantage for trajectory, advantage in zip(played, found, strict=True)}


@dataclass(frozen=True, slots=True)
class AdvantageScorer:
    """A learner's scorer: each row's advantage, beside what `scorer` says of its tokens (a reference policy, say)."""

    advantages: Mapping[str, float]
    """Trajectory key -> advantage."""
    scorer: Callable[[str, tuple[int, ...]], TokenScores | None] | None = None

    def __call__(self, key: str, token_ids: tuple[int, ...]) -> TokenScores | None:
        scores = None if self.scorer is None else self.scorer(key, token_ids)
        if key not in self.advantages:
            return scores
        return replace(scores or TokenScores(), advantage=self.advantages[key])
