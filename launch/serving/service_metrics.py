"""What a served agent tells Prometheus; names begin with `apprentice_serve_`, units are in the names.

Each service has a registry of its own, so that several in one process do not mix.
"""

from __future__ import annotations

from collections.abc import Callable

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, ProcessCollector, generate_latest

from rollout.trajectory import Step, Trajectory

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"
_SECONDS = (0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 20, 40, 80, 160, 320)
_PREFIX = "apprentice_serve"


class ServiceMetrics:
    """Counters of requests, episodes and tokens; gauges that are asked when they are read."""

    def __init__(self) -> None:
        self._registry = registry = CollectorRegistry()
        ProcessCollector(registry=registry)

        def counter(name: str, text: str, labels: tuple[str, ...] = ()) -> Counter:
            return Counter(f"{_PREFIX}_{name}", text, labels, registry=registry)

        def seconds(name: str, text: str) -> Histogram:
            return Histogram(f"{_PREFIX}_{name}_seconds", text, buckets=_SECONDS, registry=registry)

        self.requests = counter("requests", "HTTP requests answered", ("path", "status"))
        self.disconnects = counter("disconnects", "clients that left before their answer was there")
        self._episodes = counter("episodes", "episodes that came to an end, by why", ("stop_reason",))
        self._steps = counter("steps", "steps of agents")
        self._tool_calls = counter("tool_calls", "calls of tools by agents' code")
        self._prompt_tokens = counter("prompt_tokens", "tokens of prompts, once a request")
        self._completion_tokens = counter("completion_tokens", "tokens sampled, candidates that lost included")
        self._cost = counter("cost_usd", "what endpoints charged, in US dollars")
        self._episode_s = seconds("episode", "from the first request of an episode to its end")
        self._step_s = seconds("step", "sampling and acting of one step")
        self.line_s = seconds("line", "waiting for a place")
        self.recorded = counter("recorded", "episodes written to the ledger")
        self.unrecorded = counter("unrecorded", "episodes that could not be written to the ledger")

    def gauge(self, name: str, text: str, value: Callable[[], float]) -> None:
        """`value` is asked whenever the metrics are read."""
        Gauge(f"{_PREFIX}_{name}", text, registry=self._registry).set_function(value)

    def step(self, step: Step) -> None:
        self._steps.inc()
        self._tool_calls.inc(step.tool_calls)
        self._step_s.observe(step.policy_s + step.env_s)

    def episode(self, trajectory: Trajectory) -> None:
        self._episodes.labels(trajectory.stop_reason.value).inc()
        self._prompt_tokens.inc(trajectory.usage.prompt_tokens)
        self._completion_tokens.inc(trajectory.usage.completion_tokens)
        self._cost.inc(trajectory.usage.cost_usd)
        self._episode_s.observe(trajectory.duration_s)

    def text(self) -> bytes:
        """Prometheus' text format."""
        return generate_latest(self._registry)
