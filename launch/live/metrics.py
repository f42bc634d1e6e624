"""The metrics of a job, for Prometheus: names, units, labels, and how each is read off a `JobStatus`.

Names follow Prometheus' conventions (base units as suffixes, `_total` on counters, ratios in [0, 1]); Ray puts `ray_`
before each. Labels have few values: a run, its teachers (or other policies), kinds of tasks, span types, classes of
failures, titles of stages; never a task, a worker or a text of a model. `EXPORTED` has the histograms too, which are
observed where episodes run (`rollout.episode_metrics`). It exports nothing; `launch.live.ray_metrics` does.

Example::

    for sample in samples(status):
        sample.metric.name, sample.labels, sample.value    # "apprentice_queue_trajectories", {"run": "a"}, 205.0
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Literal

from launch.live.status import JobStatus, Stage
from rollout.episode_metrics import HISTOGRAMS, LABELS
from rollout.task_feed import CollectProgress

PREFIX = "apprentice_"
EXPORTED_PREFIX = "ray_"
"""What Ray puts before every name."""
Labelled = Iterator[tuple[dict[str, str], float]]


@dataclass(frozen=True, slots=True, kw_only=True)
class Metric:
    """A gauge or counter. `read` tells (labels but for `run`, value); a counter's value is what it has counted in this
    job, and may only grow."""

    name: str
    kind: Literal["gauge", "counter"]
    help: str
    labels: tuple[str, ...] = ()
    read: Callable[[JobStatus], Labelled]


@dataclass(frozen=True, slots=True)
class Sample:
    """One value."""

    metric: Metric
    labels: Mapping[str, str]
    """Of all of `metric.labels`, and `run`."""
    value: float


def samples(status: JobStatus) -> Iterator[Sample]:
    """All that is known now. What is not finite is left out."""
    for metric in METRICS:
        for labels, value in metric.read(status):
            if math.isfinite(value):
                yield Sample(metric, {"run": status.run, **labels}, float(value))


def _one(read: Callable[[JobStatus], float | None]) -> Callable[[JobStatus], Labelled]:
    def labelled(status: JobStatus) -> Labelled:
        value = read(status)
        if value is not None:
            yield {}, value

    return labelled


def _learning(name: str, scale: float = 1.0) -> Callable[[JobStatus], Labelled]:
    """A number of the learner's."""

    def value(status: JobStatus) -> float | None:
        number = getattr(status.learning, name, None)
        return None if number is None else number * scale

    return _one(value)


def _spans(whole: str, by_span: str) -> Callable[[JobStatus], Labelled]:
    def labelled(status: JobStatus) -> Labelled:
        at = status.learning
        if at is not None and at.step:
            yield {"span": "all"}, getattr(at, whole)
            for span, value in getattr(at, by_span).items():
                yield {"span": span}, value

    return labelled


def _policies(status: JobStatus) -> Iterator[tuple[dict[str, str], CollectProgress]]:
    """Every stage's rollouts, of each policy."""
    for stage in status.stages:
        if stage.episodes is not None:
            for policy, seen in (stage.by_policy or {"": stage.episodes}).items():
                yield {"stage": stage.title, "teacher": policy}, seen


def _episodes(read: Callable[[CollectProgress], float]) -> Callable[[JobStatus], Labelled]:
    return lambda status: ((labels, read(seen)) for labels, seen in _policies(status))


def _now(read: Callable[[CollectProgress], float | None]) -> Callable[[JobStatus], Labelled]:
    """Of the stages that run; 0 once they have ended, since a gauge keeps what it was told last."""

    def labelled(status: JobStatus) -> Labelled:
        running = {stage.title for stage in status.stages if stage.state == "running"}
        for labels, seen in _policies(status):
            value = read(seen)
            if value is not None:
                yield labels, value if labels["stage"] in running else 0.0

    return labelled


def _by_kind(which: int) -> Callable[[JobStatus], Labelled]:
    return lambda status: (
        ({**labels, "kind": kind}, counts[which])
        for labels, seen in _policies(status)
        for kind, counts in seen.by_kind.items()
    )


def _failures(status: JobStatus) -> Labelled:
    for labels, seen in _policies(status):
        for failure_class, number in seen.failures.items():
            yield {**labels, "failure_class": failure_class}, number


def _stages(read: Callable[[Stage], float | None]) -> Callable[[JobStatus], Labelled]:
    def labelled(status: JobStatus) -> Labelled:
        for stage in status.stages:
            value = read(stage)
            if value is not None:
                yield {"stage": stage.title}, value

    return labelled


def _info(status: JobStatus) -> Labelled:
    yield {"job": status.job, "note": status.note}, 1.0


def _left(status: JobStatus) -> Labelled:
    """0 of a part that has ended, since a gauge keeps what it was told last."""
    for stage in status.stages:
        if stage.state == "running" and stage.episodes_left_s is not None:
            yield {"stage": stage.title, "part": "episodes"}, stage.episodes_left_s
        if stage.state == "running" and stage.learns and status.learning_left_s is not None:
            yield {"stage": stage.title, "part": "training"}, status.learning_left_s
        if stage.state in ("done", "failed"):
            yield {"stage": stage.title, "part": "episodes"}, 0.0
            if stage.learns:
                yield {"stage": stage.title, "part": "training"}, 0.0


def _share(stage: Stage) -> float | None:
    if stage.state == "done":
        return 1.0
    seen = stage.episodes
    return seen.finished / seen.total if seen is not None and seen.total else 0.0


def _scores(bound: str) -> Callable[[JobStatus], Labelled]:
    return lambda status: (
        ({"stage": stage.title, "kind": kind}, getattr(score, bound))
        for stage in status.stages
        for kind, score in stage.scores.items()
    )


def _cache(seen: CollectProgress) -> float | None:
    return max((each.kv_usage for each in seen.workers.values() if each.kv_usage is not None), default=None)


def _running(seen: CollectProgress) -> float:
    return sum(worker.running for worker in seen.workers.values())


def _limit(seen: CollectProgress) -> float:
    return sum(worker.limit for worker in seen.workers.values())


def _refused(status: JobStatus) -> Labelled:
    for reason, number in status.learning.refused.items() if status.learning is not None else ():
        yield {"reason": reason}, number


def _spent(read: Callable[[JobStatus], float | None]) -> Callable[[JobStatus], Labelled]:
    return _one(lambda status: read(status) if status.spent is not None else None)


def _spent_by_model(status: JobStatus) -> Labelled:
    for model, spent in status.spent.by_model.items() if status.spent is not None else ():
        yield {"model": model}, spent.usd


_OF_EPISODES = ("stage", "teacher")


def _gauge(name: str, text: str, read: Callable[[JobStatus], Labelled], *labels: str) -> Metric:
    return Metric(name=PREFIX + name, kind="gauge", help=text, labels=labels, read=read)


def _counter(name: str, text: str, read: Callable[[JobStatus], Labelled], *labels: str) -> Metric:
    return Metric(name=f"{PREFIX}{name}_total", kind="counter", help=text, labels=labels, read=read)


METRICS: tuple[Metric, ...] = (
    # the job
    _gauge("job_info", "1; its labels say what runs", _info, "job", "note"),
    _gauge("job_elapsed_seconds", "since the job began", _one(lambda s: s.elapsed_s)),
    _gauge("job_warnings", "warnings among the last lines", _one(lambda s: len(s.warnings))),
    _gauge("stage_running", "1 while the stage runs, else 0", _stages(lambda x: float(x.state == "running")), "stage"),
    _gauge("stage_done_ratio", "of the stage's episodes", _stages(_share), "stage"),
    _gauge("stage_elapsed_seconds", "spent in the stage", _stages(lambda x: x.elapsed_s), "stage"),
    _gauge("left_seconds", "until the part ends, at the pace of late", _left, "stage", "part"),
    # rollouts
    _gauge("episodes_expected", "of the stage, those found included", _episodes(lambda x: x.total), *_OF_EPISODES),
    _gauge("episodes_finished", "recorded, by earlier jobs too", _episodes(lambda x: x.finished), *_OF_EPISODES),
    _counter("episodes", "recorded by this job", _by_kind(0), *_OF_EPISODES, "kind"),
    _counter("episode_successes", "solved, of those recorded", _by_kind(1), *_OF_EPISODES, "kind"),
    _counter("episode_failures", "without a result, by whose fault", _failures, *_OF_EPISODES, "failure_class"),
    _counter("episode_steps", "of recorded episodes", _episodes(lambda x: x.steps), *_OF_EPISODES),
    _counter("tool_calls", "of recorded episodes", _episodes(lambda x: x.tool_calls), *_OF_EPISODES),
    _counter("completion_tokens", "made in recorded episodes", _episodes(lambda x: x.completion_tokens), *_OF_EPISODES),
    _counter("prompt_tokens", "read in recorded episodes", _episodes(lambda x: x.prompt_tokens), *_OF_EPISODES),
    _gauge("episodes_running", "at the moment", _now(_running), *_OF_EPISODES),
    _gauge("episodes_running_limit", "that the workers let run at a time", _now(_limit), *_OF_EPISODES),
    _gauge("engine_cache_used_ratio", "of the fullest engine's KV cache", _now(_cache), *_OF_EPISODES),
    _gauge("workers", "that report", _now(lambda x: float(len(x.workers))), *_OF_EPISODES),
    # between the two
    _gauge("queue_trajectories", "between rollout and learner", _one(lambda s: s.queue and s.queue.depth)),
    _gauge("queue_capacity_trajectories", "that fit", _one(lambda s: s.queue and s.queue.capacity)),
    _counter("queue_trajectories_read", "by the learner", _one(lambda s: s.queue and s.queue.got)),
    _counter("queue_full_waits", "rollout found no room", _one(lambda s: s.queue and s.queue.put_waits)),
    _counter("queue_empty_waits", "the learner found nothing", _one(lambda s: s.queue and s.queue.get_waits)),
    # the learner
    _gauge("learner_step", "optimizer steps, those before a resume included", _learning("step")),
    _gauge("learner_epoch", "passes that are complete", _learning("epoch")),
    _gauge("learner_done_ratio", "of the training", _learning("fraction")),
    _gauge("learner_loss", "of the last step, by span type", _spans("loss", "loss_by_span"), "span"),
    _gauge("learner_accuracy_ratio", "tokens found likeliest", _spans("accuracy", "accuracy_by_span"), "span"),
    _gauge("learner_validation_loss", "when it was last measured", _learning("validation_loss")),
    _gauge("learner_gradient_norm", "before clipping", _learning("grad_norm")),
    _gauge("learner_learning_rate", "of the last step", _learning("lr")),
    _gauge("learner_step_seconds", "the last optimizer step took", _learning("step_s")),
    _counter("learner_tokens", "of rows trained on, padding not counted", _learning("tokens")),
    _counter("learner_rows", "trained on, each pass counted", _learning("rows")),
    _gauge("learner_mfu_ratio", "of the device's peak", _learning("mfu")),
    _gauge("learner_peak_memory_bytes", "of the rank that needs most", _learning("peak_memory_mb", 1 << 20)),
    _counter("learner_wait_seconds", "spent waiting for trajectories", _learning("wait_s")),
    _gauge("learner_stall_ratio", "of the time since its first step, waited", _learning("stall_share")),
    _gauge("learner_skipped_steps", "whose gradient was not finite", _learning("skipped_steps")),
    _gauge("learner_restarts", "of dead ranks", _learning("restarts")),
    _gauge("learner_refused_trajectories", "not trained on", _refused, "reason"),
    # money
    _gauge("spent_usd", "by this job and earlier ones", _spent(lambda s: s.spent and s.spent.spent_usd)),
    _gauge("spent_cap_usd", "what may be spent", _spent(lambda s: s.spent and s.spent.cap.usd)),
    _gauge("spent_tokens", "prompt and completion", _spent(lambda s: s.spent and s.spent.tokens)),
    _gauge("spent_cap_tokens", "what may be spent", _spent(lambda s: s.spent and s.spent.cap.tokens)),
    _gauge("spent_model_usd", "on each model", _spent_by_model, "model"),
    # scores
    _gauge("score_ratio", "held-out success", _scores("mean"), "stage", "kind"),
    _gauge("score_low_ratio", "its 95% interval's lower end", _scores("low"), "stage", "kind"),
    _gauge("score_high_ratio", "its upper end", _scores("high"), "stage", "kind"),
)  # fmt: skip
EXPORTED: dict[str, tuple[str, ...]] = {
    **{EXPORTED_PREFIX + metric.name: ("run", *metric.labels) for metric in METRICS},
    **{
        f"{EXPORTED_PREFIX}{name}_{part}": (*LABELS, *(("le",) if part == "bucket" else ()))
        for name in HISTOGRAMS
        for part in ("bucket", "sum", "count")
    },
}
"""Every name that Prometheus is shown -> its labels, those apart that Ray adds."""
