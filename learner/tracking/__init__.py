"""Where a run's numbers go: loss and accuracy by span type, speed, utilization, memory, validation.

The learner's rank 0 hands each step's `Progress` to a `Tracker`, which gives it to the sinks that `TrackingConfig`
names: `sinks` of this machine (JSON lines, console) and `services` (TensorBoard, Weights & Biases, MLflow). A sink
never stops or slows a run: services work in a thread of their own, and one that fails is dropped with a warning. What
is not installed is refused before the run starts. Nothing is sent anywhere unless a service is configured.

After a resume, what was recorded behind the checkpoint is removed where the sink can (JSON lines, TensorBoard), so the
record is the curve of one run, however often it was cut.

Example::

    with Tracker.start(config.tracking, folder=Path("runs/a/learner"), after_step=0, settings={}) as tracker:
        tracker.step(progress)
"""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from types import TracebackType
from typing import Any

from learner.base import Progress
from learner.config import ConfigError, TrackingConfig
from learner.tracking.record import figures, record
from learner.tracking.sinks import ConsoleLines, JsonLines, Sink

__all__ = ["Sink", "Tracker", "check_installed", "figures", "record"]

_PACKAGES = {"tensorboard": "tensorboard", "wandb_project": "wandb", "mlflow_experiment": "mlflow"}


def check_installed(config: TrackingConfig) -> None:
    """Raises `ConfigError` for a service that is asked for and whose package is not there."""
    for setting, package in _PACKAGES.items():
        if getattr(config, setting) and find_spec(package) is None:
            raise ConfigError(
                f"tracking.{setting} is {getattr(config, setting)!r}, but the package {package} is not installed; "
                f"install it (pip install {package}), or leave tracking.{setting} out: metrics.jsonl is always written"
            )


class Tracker:
    """Rank 0's sinks. Make one with `start`."""

    def __init__(self, sinks: Sequence[Sink], *, every_steps: int = 1) -> None:
        self._sinks = list(sinks)
        self._every = every_steps
        self._recorded: int | None = None

    @classmethod
    def start(
        cls, config: TrackingConfig, *, folder: Path, after_step: int, settings: Mapping[str, Any], fresh: bool = False
    ) -> Tracker:
        """Open what `config` names. `folder`: the learner's; `after_step`: where a resumed run goes on, 0 for a new
        one; `settings`: the run's, to be shown beside its curves; `fresh`: a new run even where an
        earlier one left its id. Raises `ConfigError`."""
        from learner.tracking import services

        check_installed(config)
        folder.mkdir(parents=True, exist_ok=True)
        if fresh:
            services.forget_runs(folder)
        name = config.run_name or folder.absolute().parent.name or folder.name
        sinks: list[Sink] = []
        if config.jsonl:
            sinks.append(JsonLines(folder / "metrics.jsonl", after_step=after_step))
        if config.console:
            sinks.append(ConsoleLines(every_s=config.console_every_s))
        if config.tensorboard:
            opened = services.TensorBoard.opener(folder / "tensorboard", after_step=after_step)
            sinks.append(services.InBackground("TensorBoard", opened))
        if config.wandb_project:
            opened = services.WeightsAndBiases.opener(config.wandb_project, name, folder, settings)
            sinks.append(services.InBackground("Weights & Biases", opened))
        if config.mlflow_experiment:
            opened = services.MLflow.opener(config.mlflow_experiment, name, folder, settings)
            sinks.append(services.InBackground("MLflow", opened))
        return cls(sinks, every_steps=config.every_steps)

    def step(self, progress: Progress, *, last: bool = False) -> None:
        """Record the step; `last` records it even if it is not one of every `every_steps`."""
        if progress.step == self._recorded or not (last or progress.step % self._every == 0):
            return
        self._recorded = progress.step
        for sink in list(self._sinks):
            try:
                sink.write(progress)
            except Exception as error:  # a full disk must not end a run that trains
                print(f"warning: {type(sink).__name__} is given up: {error}", file=sys.stderr)
                self._sinks.remove(sink)

    def close(self) -> None:
        """Write what is left; waits for services a few seconds at most."""
        for sink in self._sinks:
            sink.close()
        self._sinks = []

    def __enter__(self) -> Tracker:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()
