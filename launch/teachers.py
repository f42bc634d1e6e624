"""Which teacher does which episode, when there are several.

`split` gives each (task, sample) to one teacher by weighted rendezvous hashing (Thaler and Ravishankar 1998): the
choice depends on nothing but the names, the weights and the episode. So a run that goes on chooses as before, more
tasks or samples change no earlier choice, and a teacher that is added takes only what is its own. `all` gives every
episode to every teacher: for composing trajectories of two of them, and for votes over whole runs.

Example::

    assign(tasks, 2, [TeacherShare(teacher=a, weight=2), TeacherShare(teacher=b)], "split", settings)
    # [requests of a: about two thirds, requests of b: about one third]
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence
from typing import Literal

from envs.base import Task
from launch.config import TeacherShare
from rollout.episode import EpisodeSettings
from rollout.task_feed import EpisodeRequest


def assign(
    tasks: Sequence[Task],
    samples: int,
    teachers: Sequence[TeacherShare],
    share: Literal["split", "all"],
    settings: EpisodeSettings,
) -> list[list[EpisodeRequest]]:
    """Per teacher, the episodes that it does, first samples first."""
    assigned: list[list[EpisodeRequest]] = [[] for _ in teachers]
    for sample in range(samples):
        for task in tasks:
            chosen = range(len(teachers)) if share == "all" else [_owner(task.id, sample, teachers)]
            for i in chosen:
                key = settings.key(task, teachers[i].teacher.policy_name, sample)
                assigned[i].append(EpisodeRequest(key=key, task=task, sample_index=sample))
    return assigned


def _owner(task_id: str, sample: int, teachers: Sequence[TeacherShare]) -> int:
    if len(teachers) == 1:
        return 0
    scores = [-share.weight / math.log(_uniform(task_id, sample, share.teacher.policy_name)) for share in teachers]
    return scores.index(max(scores))


def _uniform(task_id: str, sample: int, policy: str) -> float:
    """In (0, 1), the same on every machine."""
    digest = hashlib.sha256(f"{task_id}\0{sample}\0{policy}".encode()).digest()
    return (int.from_bytes(digest[:7], "big") + 0.5) / 2**56
