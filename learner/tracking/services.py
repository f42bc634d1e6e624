"""Trackers of others: TensorBoard, Weights & Biases, MLflow. Each is imported only when it is configured.

They may wait for a disk or a network, so each works in a thread of its own (`InBackground`). The offline modes of the
services hold: WANDB_MODE=offline writes a folder to be synced later, and MLflow writes a database beside the run unless
MLFLOW_TRACKING_URI names a server. Neither reports on its own use unless its variables ask for it. A resumed run goes
on in the same run of the service; its id is kept in the learner's folder.

Example::

    sink = InBackground("TensorBoard", TensorBoard.opener(Path("tensorboard"), after_step=0))
    sink.write(progress); sink.close()
"""

from __future__ import annotations

import os
import queue
import sys
import threading
import uuid
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from learner.base import Progress
from learner.tracking.record import record
from learner.tracking.sinks import Sink

Opener = Callable[[], Sink]
"""Opens the service; called in the thread that writes to it."""

ROOM = 1000
"""Steps that may wait for a slow service; more are left out there, and counted."""
CLOSE_TIMEOUT_S = 20.0
WANDB_ID, MLFLOW_ID = "wandb_id", "mlflow_id"
"""Files in the learner's folder that hold a run's id."""


class InBackground:
    """A sink that writes in a thread. What fails there is a warning, and the end of that sink alone."""

    def __init__(self, name: str, opener: Opener) -> None:
        self._name, self._opener = name, opener
        self._waiting: queue.Queue[Progress | None] = queue.Queue(maxsize=ROOM)
        self._left_out = 0
        self._thread = threading.Thread(target=self._work, name=f"tracking-{name}", daemon=True)
        self._thread.start()

    def write(self, progress: Progress) -> None:
        try:
            self._waiting.put_nowait(progress)
        except queue.Full:
            self._left_out += 1

    def close(self) -> None:
        try:
            self._waiting.put(None, timeout=CLOSE_TIMEOUT_S)
        except queue.Full:
            pass
        self._thread.join(CLOSE_TIMEOUT_S)
        if self._thread.is_alive():
            self._warn(f"it did not end within {CLOSE_TIMEOUT_S:g} s; its last steps may be missing")
        if self._left_out:
            self._warn(f"it was too slow: {self._left_out} steps are missing there (metrics.jsonl has them)")

    def _work(self) -> None:
        try:
            sink = self._opener()
            while (progress := self._waiting.get()) is not None:
                sink.write(progress)
            sink.close()
        except Exception as error:
            self._warn(f"given up: {type(error).__name__}: {error}")
            while self._waiting.get() is not None:  # nobody must wait for room
                pass

    def _warn(self, text: str) -> None:
        print(f"warning: tracking with {self._name}: {text}", file=sys.stderr)


class TensorBoard:
    """Event files, by `torch.utils.tensorboard`."""

    def __init__(self, folder: Path, *, after_step: int) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self._writer = SummaryWriter(str(folder), purge_step=after_step + 1)

    @classmethod
    def opener(cls, folder: Path, *, after_step: int) -> Opener:
        return lambda: cls(folder, after_step=after_step)

    def write(self, progress: Progress) -> None:
        for name, value in record(progress).items():
            if name != "step":
                self._writer.add_scalar(name if "/" in name else f"run/{name}", value, progress.step)

    def close(self) -> None:
        self._writer.close()


class WeightsAndBiases:
    """A run of Weights & Biases, under its own settings (WANDB_MODE, WANDB_API_KEY, WANDB_ENTITY, ...)."""

    def __init__(self, project: str, name: str, folder: Path, settings: Mapping[str, Any]) -> None:
        os.environ.setdefault("WANDB_ERROR_REPORTING", "false")
        import wandb  # pyright: ignore[reportMissingImports]

        run_id = _kept_id(folder / WANDB_ID, lambda: uuid.uuid4().hex[:12])
        self._run = wandb.init(
            project=project, name=name, id=run_id, resume="allow", dir=str(folder), config=dict(settings)
        )
        # The steps are ours: after a resume they are told again, which W&B's own counter refuses.
        self._run.define_metric("step")
        self._run.define_metric("*", step_metric="step")

    @classmethod
    def opener(cls, project: str, name: str, folder: Path, settings: Mapping[str, Any]) -> Opener:
        return lambda: cls(project, name, folder, settings)

    def write(self, progress: Progress) -> None:
        self._run.log(record(progress))

    def close(self) -> None:
        self._run.finish()


class MLflow:
    """A run of MLflow, where MLFLOW_TRACKING_URI says; else in `mlflow.db` of the learner's folder (MLflow 3.17 refuses
    plain folders)."""

    def __init__(self, experiment: str, name: str, folder: Path, settings: Mapping[str, Any]) -> None:
        os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
        from mlflow.tracking import MlflowClient  # pyright: ignore[reportMissingImports]

        uri = os.environ.get("MLFLOW_TRACKING_URI") or f"sqlite:///{(folder / 'mlflow.db').absolute()}"
        self._client = MlflowClient(tracking_uri=uri)
        found = self._client.get_experiment_by_name(experiment)
        number = found.experiment_id if found is not None else self._client.create_experiment(experiment)
        fresh = not (folder / MLFLOW_ID).exists()
        self._run_id = _kept_id(folder / MLFLOW_ID, lambda: self._client.create_run(number, run_name=name).info.run_id)
        if fresh:
            for key, value in settings.items():
                self._client.log_param(self._run_id, key, str(value)[:500])  # its limit for a value

    @classmethod
    def opener(cls, experiment: str, name: str, folder: Path, settings: Mapping[str, Any]) -> Opener:
        return lambda: cls(experiment, name, folder, settings)

    def write(self, progress: Progress) -> None:
        import time

        from mlflow.entities import Metric  # pyright: ignore[reportMissingImports]

        now_ms = int(time.time() * 1000)
        numbers = [(name, value) for name, value in record(progress).items() if name != "step"]
        self._client.log_batch(self._run_id, metrics=[Metric(n, float(v), now_ms, progress.step) for n, v in numbers])

    def close(self) -> None:
        self._client.set_terminated(self._run_id)


def forget_runs(folder: Path) -> None:
    """The next run is a new one for the services."""
    for name in (WANDB_ID, MLFLOW_ID):
        (folder / name).unlink(missing_ok=True)


def _kept_id(path: Path, make: Callable[[], str]) -> str:
    """The id in `path`, or a new one that is put there."""
    if not path.exists():
        path.write_text(make())
    return path.read_text().strip()
