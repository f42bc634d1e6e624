"""The metrics of a job: their names and labels, what is exported of a status, and that the dashboard asks for them."""

from __future__ import annotations

import json
import re
import time
import urllib.request
from collections import defaultdict
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from learner_samples import trajectory
from live_samples import LEARNING, collected, learned, learning_status, scored_status, spent

from launch.live.metrics import EXPORTED, METRICS, Metric, samples
from launch.live.ray_metrics import RayMetrics, metrics_url
from rollout.episode_metrics import HISTOGRAMS, EpisodeMetrics
from rollout.spend import SpendCap
from rollout.trajectory import Trajectory

DASHBOARD = Path(__file__).parents[1] / "launch" / "dashboards" / "apprentice.json"
UNITS = ("seconds", "ratio", "bytes", "usd", "tokens", "trajectories", "total", "info")
COUNTS = {
    "job_warnings", "stage_running", "episodes_expected", "episodes_finished", "episodes_running",
    "episodes_running_limit", "workers", "learner_step", "learner_epoch", "learner_loss", "learner_validation_loss",
    "learner_gradient_norm", "learner_learning_rate", "learner_skipped_steps", "learner_restarts",
}  # fmt: skip
"""Gauges of what has no unit."""


def values(status) -> dict[str, dict[tuple[str, ...], float]]:
    """name -> {values of its own labels: number}"""
    found: dict[str, dict[tuple[str, ...], float]] = defaultdict(dict)
    for sample in samples(status):
        found[sample.metric.name][tuple(sample.labels[name] for name in sample.metric.labels)] = sample.value
    return found


@pytest.mark.parametrize("metric", METRICS, ids=lambda metric: metric.name)
def test_names_are_as_prometheus_wants_them(metric):
    assert re.fullmatch(r"apprentice_[a-z]+(_[a-z]+)*", metric.name)
    assert metric.name.endswith("_total") == (metric.kind == "counter")
    name = metric.name.removeprefix("apprentice_")
    assert name.rpartition("_")[2] in UNITS or name in COUNTS
    assert metric.help and not set(metric.labels) & {"run", "worker", "task", "key", "le", "instance", "job_id"}


def test_names_are_used_once():
    names = [metric.name for metric in METRICS] + list(HISTOGRAMS)
    assert len(names) == len(set(names))


@pytest.mark.parametrize("status", [learning_status(), scored_status()], ids=["learning", "scored"])
def test_each_sample_has_the_labels_of_its_metric(status):
    seen = set()
    for sample in samples(status):
        assert set(sample.labels) == {"run", *sample.metric.labels} and sample.labels["run"] == "starter-seed0"
        assert all(isinstance(value, str) for value in sample.labels.values())
        key = (sample.metric.name, *sorted(sample.labels.items()))
        assert key not in seen
        seen.add(key)


def test_every_metric_is_told_by_some_status():
    seen = collected()
    busy = replace(learning_status().stages[0], by_policy={"expert": seen})
    capped = replace(spent(), cap=SpendCap(usd=20.0, tokens=10**6))
    told = values(replace(learning_status(), stages=(busy,), spent=capped)).keys() | values(scored_status()).keys()
    assert {metric.name for metric in METRICS} == told


def test_numbers_are_those_of_the_status():
    found = values(learning_status())
    assert found["apprentice_queue_trajectories"] == {(): 205.0}
    assert found["apprentice_learner_loss"] == {("all",): 0.019, ("thought",): 0.021, ("code",): 0.01, ("answer",): 0.3}
    assert found["apprentice_learner_peak_memory_bytes"] == {(): 2883.0 * 2**20}
    assert found["apprentice_episodes_total"][LEARNING, "m", "two_hop"] == 1240
    assert found["apprentice_episode_failures_total"][LEARNING, "m", "engine"] == 5
    assert found["apprentice_left_seconds"] == {(LEARNING, "episodes"): 300.0, (LEARNING, "training"): 660.0}
    assert found["apprentice_spent_cap_usd"] == {(): 20.0}


def test_what_has_ended_is_not_shown_as_if_it_ran():
    found = values(scored_status())
    assert found["apprentice_episodes_running"][LEARNING, "m"] == 0.0
    assert found["apprentice_left_seconds"][LEARNING, "training"] == 0.0
    assert found["apprentice_episodes_running"]["evaluation: student", "student"] == 28.0
    assert found["apprentice_score_ratio"]["evaluation: untrained", "arithmetic"] == 0.03


def test_what_is_not_finite_is_left_out():
    found = values(replace(learning_status(), learning=replace(learned(), grad_norm=float("nan"))))
    assert "apprentice_learner_gradient_norm" not in found and "apprentice_learner_step" in found


# -- what is exported


class Kept:
    """Stands where a gauge or counter of Ray's stands."""

    def __init__(self) -> None:
        self.values: dict[tuple[tuple[str, str], ...], float] = defaultdict(float)

    def set(self, value: float, tags: dict[str, str]) -> None:
        self.values[tuple(sorted(tags.items()))] = value

    def inc(self, value: float, tags: dict[str, str]) -> None:
        assert value > 0  # Ray refuses others
        self.values[tuple(sorted(tags.items()))] += value

    @property
    def only(self) -> float:
        (value,) = self.values.values()
        return value


@pytest.fixture
def exporter() -> tuple[RayMetrics, dict[str, Kept]]:
    kept: dict[str, Kept] = {}

    def make(metric: Metric) -> Kept:
        return kept.setdefault(metric.name, Kept())

    return RayMetrics(make, lambda: True), kept


def at_rows(rows: int, state: Any):
    """`state` makes each of them one that is told at once."""
    return replace(learning_status(), state=state, learning=replace(learned(), rows=rows))


def test_counters_count_what_is_new(exporter):
    metrics, kept = exporter
    for rows, state in ((100, "running"), (100, "done"), (250, "running")):
        metrics.take(at_rows(rows, state))
    assert kept["apprentice_learner_rows_total"].only == 250


def test_a_counter_goes_on_where_a_learner_began_again(exporter):
    metrics, kept = exporter
    for rows, state in ((100, "running"), (40, "done"), (70, "running")):
        metrics.take(at_rows(rows, state))
    assert kept["apprentice_learner_rows_total"].only == 130


def test_nothing_is_exported_before_ray_is_there():
    def make(metric: Metric) -> Kept:
        raise AssertionError(metric.name)

    RayMetrics(make, lambda: False).take(learning_status())


# -- the dashboard

PROMQL = {"max", "sum", "by", "rate", "histogram_quantile", "or", "vector"}


@cache
def panels() -> list[dict[str, Any]]:
    return json.loads(DASHBOARD.read_text())["panels"]


def queries() -> list[tuple[str, dict[str, Any]]]:
    return [(panel["title"], target) for panel in panels() for target in panel.get("targets", ())]


@pytest.mark.parametrize(
    ("title", "target"), queries(), ids=[f"{title}-{target['refId']}" for title, target in queries()]
)
def test_panels_ask_for_what_is_exported(title, target):
    bare = re.sub(r'"[^"]*"', "", target["expr"])
    assert bare.count("(") == bare.count(")") and bare.count("{") == bare.count("}")
    words = set(re.findall(r"(?<![\w$])[a-z_][a-z_0-9]*", re.sub(r"\[[^\]]*\]", "", bare)))
    metrics = {word for word in words if word.startswith("ray_")}
    assert metrics and metrics <= EXPORTED.keys()
    labels = set.intersection(*(set(EXPORTED[name]) for name in metrics))
    assert words - metrics - PROMQL <= labels
    kept = {name for group in re.findall(r"by \(([^)]*)\)", bare) for name in re.split(r",\s*", group)}
    assert set(re.findall(r"{{(\w+)}}", target["legendFormat"])) <= kept - {"le"}
    for name in metrics:  # a counter is of use as a rate, or as a part of another
        if name.endswith("_total"):
            assert f"rate({name}" in bare or "/" in bare or bare.startswith("sum(")


def test_the_dashboard_asks_for_no_thing_twice_and_fits_the_grid():
    used: set[tuple[int, int]] = set()
    for panel in panels():
        place = panel["gridPos"]
        cells = {(place["x"] + i, place["y"] + j) for i in range(place["w"]) for j in range(place["h"])}
        assert not cells & used and max(x for x, _ in cells) < 24
        used |= cells
    assert len({panel["id"] for panel in panels()}) == len(panels())
    assert len({panel["title"] for panel in panels()}) == len(panels())


def test_the_dashboard_names_no_server_of_ours():
    dashboard = json.loads(DASHBOARD.read_text())
    assert dashboard["uid"] == "apprentice" and "id" not in dashboard
    sources = {panel["datasource"]["uid"] for panel in panels() if "datasource" in panel}
    sources |= {target["datasource"]["uid"] for _, target in queries()}
    assert sources == {"${datasource}"}
    names = [variable["name"] for variable in dashboard["templating"]["list"]]
    assert names == ["datasource", "run"]
    assert "label_values(ray_apprentice_job_info, run)" in json.dumps(dashboard["templating"])


# -- Ray


@pytest.mark.slow  # Ray sends metrics every ten seconds
@pytest.mark.timeout(180)
def test_ray_exports_what_it_is_told(ray_cluster):
    run = f"scraped-{time.time_ns()}"
    sink = RayMetrics()

    def observe(trajectory: Trajectory) -> None:
        EpisodeMetrics(run=run, policy="p").observe(trajectory)

    ray_cluster.get(ray_cluster.remote(observe).remote(trajectory(0)))
    deadline_s, url = time.monotonic() + 120, metrics_url()
    assert url
    wanted = {f"ray_{metric.name}" for metric in METRICS if metric.name in values(learning_status())}
    wanted |= {f"ray_{name}_bucket" for name in HISTOGRAMS}
    found: dict[str, dict[str, str]] = {}
    while wanted - found.keys():
        assert time.monotonic() < deadline_s, sorted(wanted - found.keys())
        sink.take(replace(learning_status(), run=run))
        time.sleep(1)
        for line in urllib.request.urlopen(url, timeout=30).read().decode().splitlines():
            if f'run="{run}"' in line:
                name, _, rest = line.partition("{")
                found[name] = dict(re.findall(r'(\w+)="([^"]*)"', rest))
    assert found.keys() <= EXPORTED.keys()
    for name, labels in found.items():
        assert set(EXPORTED[name]) <= labels.keys(), name
