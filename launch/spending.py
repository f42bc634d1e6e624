"""One spend meter for a job, as a Ray actor beside its driver, where the log of what was spent is kept.

Workers ask it before every paid call; the driver shows where it stands. It ends with the job, and the log stays.
"""

from __future__ import annotations

import uuid
from pathlib import Path
from typing import Any

from launch.config import JobConfig
from rollout.policy_spec import PolicySpec
from rollout.spend import SpendMeter, SpendSnapshot

START_S = 300.0
METER_S = 30.0


def is_endpoint(spec: PolicySpec) -> bool:
    """Its calls go over the network, and may cost money."""
    return spec.kind in ("openai", "vllm_server")


class JobMeter:
    """A job's meter. `name` is what workers find it by."""

    def __init__(self, handle: Any, name: str) -> None:
        self.handle, self.name = handle, name
        self._last: SpendSnapshot | None = None

    @classmethod
    def start(cls, config: JobConfig, log: Path | str) -> JobMeter | None:
        """None where no teacher is an endpoint. Raises `ValueError` for a log that cannot be used."""
        if not any(is_endpoint(share.teacher) for share in config.all_teachers):
            return None
        import ray
        from ray.exceptions import RayError
        from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

        here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
        name = f"spend-{uuid.uuid4().hex[:12]}"
        actor = ray.remote(SpendMeter).options(  # type: ignore[attr-defined]
            name=name, num_cpus=0, max_restarts=-1, scheduling_strategy=here
        )
        meter = cls(actor.remote(config.spend, str(log)), name)
        try:
            meter._last = ray.get(meter.handle.snapshot.remote(), timeout=START_S)
        except (RayError, TimeoutError) as error:
            reason = str(getattr(error, "cause", None) or error).strip().splitlines()[-1]
            raise ValueError(f"the spend meter cannot start: {reason}") from None
        return meter

    def snapshot(self) -> SpendSnapshot:
        """What was spent so far, by earlier jobs on this folder too; the last known when the meter does not answer."""
        import ray
        from ray.exceptions import RayError

        try:
            self._last = ray.get(self.handle.snapshot.remote(), timeout=METER_S)
        except (RayError, TimeoutError):
            pass  # workers that cannot ask it spend nothing
        assert self._last is not None
        return self._last

    def close(self) -> None:
        """The log is complete when it returns."""
        import ray
        from ray.exceptions import RayError

        try:
            ray.get(self.handle.close.remote(), timeout=METER_S)
        except (RayError, TimeoutError):
            pass  # each charge was written when it was made
        ray.kill(self.handle)
