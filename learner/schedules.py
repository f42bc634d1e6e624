"""The learning rate over a run, as a share of its peak: linear, cosine, constant and WSD, after a warm-up by steps.

A schedule is a function of the run's fraction, not of a number of steps: while trajectories stream in, nobody knows how
many steps there will be. The warm-up counts steps, as it is there for the optimizer's statistics. "wsd" is
warm-up-stable-decay (arXiv 2404.06395, there with a fall that is exponential; linear here, as arXiv 2405.18392 found no
worse).

Not torch's schedulers: those count their own calls, which a checkpoint would have to carry.

Example::

    lr_factor(step=0, fraction=0.0, config=config)       # 1 / warmup_steps
    lr_factor(step=500, fraction=1.0, config=config)     # final_lr_fraction
"""

from __future__ import annotations

import math
from collections.abc import Callable

from learner.config import LearnerConfig


def lr_factor(step: int, fraction: float, config: LearnerConfig) -> float:
    """Share of the peak in [0, 1]. `step`: optimizer steps so far; `fraction` of the whole run, in [0, 1]."""
    warm = min(1.0, (step + 1) / config.warmup_steps) if config.warmup_steps else 1.0
    return warm * SCHEDULES[config.schedule](fraction, config)


def _linear(fraction: float, config: LearnerConfig) -> float:
    return 1.0 - (1.0 - config.final_lr_fraction) * fraction


def _cosine(fraction: float, config: LearnerConfig) -> float:
    floor = config.final_lr_fraction
    return floor + (1.0 - floor) * 0.5 * (1.0 + math.cos(math.pi * min(1.0, fraction)))


def _constant(fraction: float, config: LearnerConfig) -> float:
    return 1.0


def _wsd(fraction: float, config: LearnerConfig) -> float:
    fallen = max(0.0, fraction - (1.0 - config.decay_share)) / config.decay_share
    return 1.0 - (1.0 - config.final_lr_fraction) * min(1.0, fallen)


SCHEDULES: dict[str, Callable[[float, LearnerConfig], float]] = {
    "linear": _linear,
    "cosine": _cosine,
    "constant": _constant,
    "wsd": _wsd,
}
"""Name -> share of the peak at a fraction of the run."""
