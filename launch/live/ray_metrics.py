"""`RayMetrics`: a job's metrics through Ray. The driver hands them to the agent of its node, which Prometheus scrapes
at `metrics_url` (`ray.util.metrics`; https://docs.ray.io/en/latest/cluster/metrics.html).

Ray sends them every ten seconds, and forgets the gauges of a driver that has ended. A Ray without its agent
(`pip install ray` instead of `ray[default]`) exports nothing, and nothing breaks.

Example::

    LiveView(sinks=[RayMetrics()])          # inside `ray_cluster`; before Ray is there it waits
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from typing import Any

from launch.live.metrics import METRICS, Metric, samples
from launch.live.status import JobStatus

EVERY_S = 2.0


def ray_is_there() -> bool:
    """This process is connected to a Ray."""
    ray = sys.modules.get("ray")
    return ray is not None and ray.is_initialized()


def ray_metric(metric: Metric) -> Any:
    from ray.util.metrics import Counter, Gauge

    make: Callable[..., Any] = Gauge if metric.kind == "gauge" else Counter
    return make(metric.name, metric.help, tag_keys=("run", *metric.labels))


class RayMetrics:
    """A `StatusSink`. One job at a time: counters count what is new since its last status.

    `make`: what a metric is exported with (`set` of a gauge, `inc` of a counter); `there`: whether it can be now.
    """

    def __init__(self, make: Callable[[Metric], Any] = ray_metric, there: Callable[[], bool] = ray_is_there) -> None:
        self._make, self._there = make, there
        self._exported: dict[str, Any] = {}
        self._counted: dict[tuple[str, tuple[tuple[str, str], ...]], float] = {}
        self._at_s = -EVERY_S
        self._shape: object = None

    def take(self, status: JobStatus) -> None:
        shape = (status.state, *((stage.state, len(stage.scores)) for stage in status.stages))
        if not self._there() or (shape == self._shape and time.monotonic() - self._at_s < EVERY_S):
            return
        self._at_s, self._shape = time.monotonic(), shape
        if not self._exported:
            self._exported = {metric.name: self._make(metric) for metric in METRICS}
        for sample in samples(status):
            name, labels = sample.metric.name, dict(sample.labels)
            if sample.metric.kind == "gauge":
                self._exported[name].set(sample.value, labels)
                continue
            key = (name, tuple(sorted(labels.items())))
            # What has shrunk began again (a learner whose ranks were started again): it counts from there.
            new = sample.value - self._counted.get(key, 0.0)
            self._counted[key] = sample.value
            if new > 0:
                self._exported[name].inc(new, labels)

    def close(self) -> None:
        """Ray ends them with the driver."""


def metrics_url() -> str:
    """Where the metrics of this driver's node are; "" where Ray exports none, or there is no Ray."""
    if not ray_is_there():
        return ""
    import ray

    here = ray.get_runtime_context().get_node_id()
    for node in ray.nodes():
        port = node.get("MetricsExportPort") or 0
        if node["NodeID"] == here and port > 0:
            return f"http://{node['NodeManagerAddress']}:{port}/metrics"
    return ""
