"""`EpisodeMetrics`: how long recorded episodes and their steps took, as histograms through Ray, observed by the worker
that ran them. What is counted of a job is in `launch.live.metrics`; these need every episode.

Labels: the run, the policy (`teacher`, whoever it is) and the kind of task. It costs some microseconds an episode, and
nothing is exported where Ray has no agent.

Example::

    metrics = EpisodeMetrics(run="starter-seed0", policy="starter-expert")     # in a Ray worker
    metrics.observe(trajectory)
"""

from __future__ import annotations

from typing import Any

from rollout.trajectory import Trajectory

LABELS = ("run", "teacher", "kind")
EPISODE_BUCKETS_S = (0.1, 0.25, 0.5, 1, 2.5, 5, 10, 25, 50, 100, 250, 500, 1000, 2500)
STEP_BUCKETS_S = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 25, 50, 100, 250)
HISTOGRAMS = {
    "apprentice_episode_seconds": ("an episode, from its first prompt to its end", EPISODE_BUCKETS_S),
    "apprentice_step_policy_seconds": ("a step's completions, with waiting for the engine", STEP_BUCKETS_S),
    "apprentice_step_env_seconds": ("a step's action, with waiting for the env", STEP_BUCKETS_S),
}
"""Name -> (what is measured, bounds of the buckets)."""


class EpisodeMetrics:
    """Made in a process that is connected to Ray."""

    def __init__(self, *, run: str, policy: str) -> None:
        from ray.util.metrics import Histogram

        self._labels = {"run": run, "teacher": policy}
        made: list[Any] = [
            Histogram(name, text, boundaries=list(bounds), tag_keys=LABELS)
            for name, (text, bounds) in HISTOGRAMS.items()
        ]
        self._episode, self._policy, self._env = made

    def observe(self, trajectory: Trajectory) -> None:
        """One that has been recorded."""
        labels = {**self._labels, "kind": trajectory.task.kind}
        self._episode.observe(trajectory.duration_s, labels)
        for step in trajectory.steps:
            self._policy.observe(step.policy_s, labels)
            self._env.observe(step.env_s, labels)
