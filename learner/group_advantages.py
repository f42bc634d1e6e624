"""How much better than its siblings each rollout of a task did: `group_advantages`, the rewards' part of `grpo`.

Plain numbers: whoever has a group's rewards calls it once and puts the results into `TokenScores.advantage`. A group
whose rewards are all the same has advantages of 0 and teaches nothing; DAPO samples such groups anew.

Example::

    group_advantages([1, 0, 0, 1], ["t1", "t1", "t2", "t2"], scale=False)      # [0.5, -0.5, -0.5, 0.5]
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Hashable, Sequence
from statistics import fmean, stdev

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
