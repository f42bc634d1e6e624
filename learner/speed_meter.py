"""How fast a process learns, and what share of its time it waits: tokens per second, MFU, stall.

Example::

    meter = SpeedMeter.of(backend, config, ranks=1)
    meter.planned(plan, lengths); meter.stepped(seconds)
    meter.tokens_per_s, meter.mfu, meter.stall_share
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from learner.config import LearnerConfig
from learner.packing import StepPlan
from learner.tracking.flops import ModelFlops, peak_flops

if TYPE_CHECKING:
    from learner.deepspeed_backend import DeepSpeedBackend


@dataclass(slots=True)
class SpeedMeter:
    """Sums over the steps of this process."""

    flops: ModelFlops | None = None
    """None: unknown."""
    peak: float | None = None
    """FLOP/s of all ranks together."""
    train_s: float = 0.0
    _tokens: int = 0
    _flops_done: float = 0.0
    _stalled_s: float = 0.0

    @classmethod
    def of(cls, backend: DeepSpeedBackend, config: LearnerConfig, *, ranks: int) -> SpeedMeter:
        """For the backend's model on its device; ranks are taken to have the same device."""
        from transformers import AutoConfig

        peak = peak_flops(backend.device, threads=config.threads, bf16=config.precision != "fp32")
        return cls(
            flops=ModelFlops.of(AutoConfig.from_pretrained(config.model_path), lora=config.lora),
            peak=None if peak is None else peak * ranks,
        )

    def planned(self, plan: StepPlan, lengths: Sequence[int]) -> None:
        """The step that comes next; `lengths` of its rows, in tokens."""
        self._tokens += plan.tokens
        if self.flops is not None:
            self._flops_done += self.flops.of_rows(lengths, trained_tokens=plan.trained_tokens)

    def stepped(self, seconds: float) -> None:
        self.train_s += seconds

    def waited(self, seconds: float, *, learning: bool) -> None:
        """For trajectories; `learning`: the first step is over."""
        self._stalled_s += seconds if learning else 0.0

    @property
    def tokens_per_s(self) -> float:
        """Over the time spent in steps."""
        return self._tokens / self.train_s if self.train_s else 0.0

    @property
    def mfu(self) -> float | None:
        """In [0, 1], over the time spent in steps; None where it is unknown."""
        if self.flops is None or self.peak is None or not self.train_s:
            return None
        return self._flops_done / self.train_s / self.peak

    @property
    def stall_share(self) -> float:
        """In [0, 1]: of steps and waiting since the first step."""
        return self._stalled_s / (self._stalled_s + self.train_s) if self.train_s else 0.0
