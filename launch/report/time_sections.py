"""What a report says of what went on over time: learning, throughput, the queue, waiting. Each section is HTML, ""
where nothing is known.

Example::

    time_sections.learning(figures)
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from launch.report.charts import Line, line_chart, span_chart
from launch.report.figures import Figures
from launch.report.markup import Markup, details, joined, table, tag
from launch.report.run_files import Role
from launch.report.style import SPAN_CLASSES
from launch.report.thinning import Thinned
from launch.report.throughput import over_time
from launch.report.training_figures import ALL
from launch.report.wording import ledger_name, number, row_title


def learning(figures: Figures) -> Markup:
    """Loss and accuracy by span type, and what was held out."""
    training = figures.training
    if not training.found:
        return Markup("")
    tokens = "million tokens"
    loss = [*_curves(training.loss)]
    if len(training.validation):
        loss.append(Line("held out", _pairs(training.validation), 3, strong=True, dots=len(training.validation) < 30))
    charts = [
        line_chart(loss, title="Loss", x=tokens, y="cross-entropy, nats a token (log)", log=True),
        line_chart(
            _curves(training.accuracy, times=100), title="Accuracy", x=tokens,
            y="% of tokens the student finds likeliest", top=100,
        ),
        line_chart([Line("Learning rate", _pairs(training.lr), 0)], title="Learning rate", x=tokens, y="", bottom=0),
        line_chart([Line("Gradient norm", _pairs(training.grad_norm), 4)], title="Gradient norm", x=tokens,
                   y="before clipping (log)", log=True),
    ]  # fmt: skip
    last = training.last
    facts = [f"{int(last.get('step') or 0):,} optimizer steps", f"{number(float(last.get('tokens') or 0))} tokens"]
    if last.get("loss") is not None:
        facts.append(f"last loss {number(float(last['loss']))}")
    if last.get("skipped_steps"):
        facts.append(f"{last['skipped_steps']} steps skipped, whose gradient was not finite")
    if last.get("restarts"):
        facts.append(f"{last['restarts']} restarts after a rank died")
    return joined(
        [
            tag("h2", "Learning"),
            tag("p", "; ".join(facts), ". Each point is the mean of neighbouring steps.", class_="intro"),
            tag("div", *charts[:2], class_="charts"),
            details("learning rate and gradients", tag("div", *charts[2:], class_="charts")),
        ]
    )


def _curves(series: Mapping[str, Thinned], *, times: float = 1.0) -> list[Line]:
    spans = [name for name in SPAN_CLASSES if name in series]
    others = sorted(set(series) - set(spans) - {ALL})
    lines = [Line(name, _pairs(series[name], times), SPAN_CLASSES[name]) for name in spans]
    lines += [Line(name, _pairs(series[name], times), at) for at, name in enumerate(others)]
    return [*lines, Line(ALL, _pairs(series[ALL], times), "strong-line", strong=True)] if ALL in series else lines


def _pairs(series: Thinned, times: float = 1.0) -> list[tuple[float, float]]:
    return [(point.x, point.y * times) for point in series.points]


# -- speed


def speed(figures: Figures) -> Markup:
    """Throughput, the queue and waiting over time, and what lasted when."""
    training = figures.training
    charts: list[Markup] = []
    cuts = 0
    for name, ledger in figures.of(Role.TRAINING).items() or figures.of(Role.EVALUATION).items():
        rates = over_time(ledger.ended_s, ledger.tokens)
        if rates is None or len(charts) >= 4:
            continue
        cuts += rates.cuts
        suffix = "" if name == "training" or len(figures.ledgers) == 1 else f", {row_title(name)}"
        minutes = rates.minutes
        charts.append(
            line_chart(
                [Line(f"Episodes{suffix}", list(zip(minutes, rates.episodes, strict=True)), 0)],
                title=f"Episodes{suffix}", x="minutes of collecting", y="a minute", bottom=0,
            )
        )  # fmt: skip
        charts.append(
            line_chart(
                [Line(f"Tokens{suffix}", list(zip(minutes, rates.tokens, strict=True)), 5)],
                title=f"Sampled tokens{suffix}", x="minutes of collecting", y="a minute", bottom=0,
            )
        )  # fmt: skip
    if training.found:
        minutes_x = "minutes since the start"
        charts += [
            line_chart([Line("Learner", _pairs(training.tokens_per_s), 2)], title="Learner", x=minutes_x,
                       y="tokens a second, of rows trained on", bottom=0),
            line_chart([Line("Queue", _pairs(training.queue_depth), 1)], title="Queue", x=minutes_x,
                       y="trajectories that wait for the learner", bottom=0),
            line_chart(
                [
                    Line("in the ledger", _pairs(training.recorded), 0),
                    Line("trained on", _pairs(training.trained_rows), 2),
                ],
                title="Trajectories and rows", x=minutes_x, y="so far; each pass counts", bottom=0,
            ),
            line_chart([Line("Learner's waiting", _pairs(training.waiting, 100), 3)], title="Learner's waiting",
                       x=minutes_x, y="% of the time, for trajectories", bottom=0, top=100),
        ]  # fmt: skip
    charts = [chart for chart in charts if chart]
    timeline = _timeline(figures)
    latency = _latency(figures)
    if not charts and not timeline and not latency:
        return Markup("")
    pause = f" {cuts} pauses of more than a quarter of an hour are cut out." if cuts else ""
    queue = ""
    if training.found and not len(training.queue_depth):
        queue = " This run recorded no queue depth."
    return joined(
        [
            tag("h2", "Speed"),
            tag("p", f"Throughput over time, and who waited for whom.{pause}{queue}", class_="intro"),
            timeline,
            tag("div", *charts, class_="charts"),
            latency,
        ]
    )


def _timeline(figures: Figures) -> Markup:
    """When each part ran."""
    rows: list[tuple[str, float, float, int | str]] = []
    for at, (name, ledger) in enumerate(figures.of(Role.TRAINING, Role.EVALUATION).items()):
        begun = ledger.ended_s - ledger.durations_s
        begun = begun[begun > 0]
        if len(begun):
            title = "collecting" if name == "training" else f"evaluating: {row_title(name)}"
            rows.append((title, float(begun.min()), float(ledger.ended_s.max()), 0 if name == "training" else 5))
        if at == 0 and figures.learned_between_s is not None:
            rows.append(("learning", *figures.learned_between_s, 2))
    if len(rows) < 2:
        return Markup("")
    start = min(row[1] for row in rows)
    return span_chart(
        [(name, begun - start, ended - start, colour) for name, begun, ended, colour in rows], title="What ran when"
    )


def _latency(figures: Figures) -> Markup:
    rows = []
    for name, ledger in figures.of(Role.TRAINING, Role.EVALUATION).items():
        if not len(ledger.durations_s):
            continue
        middle, late = np.percentile(ledger.durations_s, [50, 95])
        total = ledger.total
        rows.append(
            [
                ledger_name(name),
                f"{total.n:,}",
                f"{middle:.2f}",
                f"{late:.2f}",
                f"{total.steps / total.n:.2f}",
                f"{total.tool_calls / total.n:.2f}",
                f"{total.completion_tokens / total.n:,.0f}",
            ]
        )
    if not rows:
        return Markup("")
    head = ["", "episodes", "median, s", "95th percentile, s", "steps", "tool calls", "tokens sampled"]
    return joined(
        [tag("h3", "Episodes: how long, and the mean of what they took"), table(head, rows, numeric=range(1, 7))]
    )
