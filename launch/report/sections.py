"""What a report says of scores, learning, speed, cost, failures and data: each section as HTML, "" where nothing is
known.

Example::

    sections.scores(figures)
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence

from launch.intervals import Score, score
from launch.report.charts import (
    Line,
    Part,
    Rate,
    bar,
    interval,
    line_chart,
    number,
    percent,
    rate_chart,
    span_chart,
    stacked_bar,
)
from launch.report.figures import Figures, recorded_scores
from launch.report.ledger_figures import LENGTH_LABELS, Cell, LedgerFigures, Tally
from launch.report.markup import Markup, clipped, details, joined, table, tag
from launch.report.run_files import Kind, Role
from launch.report.scores import ROW_TITLES
from launch.report.style import SPAN_CLASSES
from launch.report.thinning import Thinned
from launch.report.throughput import over_time
from launch.report.training_figures import ALL

_MOST_ROWS = 40
_MOST_KINDS = 16
"""Columns of the table of scores; beyond them, kinds are rows of a chart."""
_CHARTED = 6
"""Policies in one chart."""
_SMALL = 3
"""Trajectories: fewer make no bucket worth showing."""


def row_title(row: str) -> str:
    return ROW_TITLES.get(row, row.replace("_", " "))


def ledger_name(ledger: str) -> str:
    return "collected for training" if ledger == "training" else row_title(ledger)


# -- scores


def scores(figures: Figures) -> Markup:
    """The table, and one dot with its interval for each row and kind."""
    rows = figures.scores
    if not rows:
        return Markup("")
    kinds = list(dict.fromkeys(kind for cells in rows.values() for kind in cells))
    pooled = {row: pool(cells.values()) for row, cells in rows.items()}
    what = "collected tasks" if figures.files.kind is Kind.COLLECT else "tasks"
    if figures.files.kind is Kind.DISTILL:
        what = "held-out tasks"
    far = ""
    if figures.scored == "ledgers" and figures.files.kind in (Kind.DISTILL, Kind.EVALUATE):
        far = " Not every evaluation has ended: this is what is recorded so far."
    averages = _averages(figures)
    order = list(rows)
    colour = {row: at for at, row in enumerate(order)}
    shown = kinds[:_MOST_KINDS]
    last = list(dict.fromkeys(name for each in averages.values() for name in each)) or ["all tasks"]
    last = last if len(kinds) > 1 else []
    head = ["policy", *(kind.replace("_", " ") for kind in shown), *last]
    body = []
    for row in order[:_MOST_ROWS]:
        cells: list[object] = [row_title(row)]
        cells += [_score_cell(rows[row].get(kind), colour[row]) for kind in shown]
        beside = averages.get(row, {}) if averages else {"all tasks": pooled[row]}
        cells += [_score_cell(beside.get(name), colour[row]) for name in last]
        body.append(cells)
    charted = order[:_CHARTED]
    groups = [
        (kind.replace("_", " "), [Rate(row_title(r), rows[r][kind], colour[r]) for r in charted if kind in rows[r]])
        for kind in kinds[:_MOST_ROWS]
    ]
    return joined(
        [
            tag("h2", "Scores"),
            tag("p", f"Success on {what}, with 95% intervals.{far}", class_="intro"),
            table(head, body, numeric=range(1, len(head)), class_="scores"),
            rate_chart(groups, unit=what) if len(kinds) * len(rows) > 1 else "",
            _comparisons(figures),
            _several_runs(figures),
            _watched(figures),
        ]
    )


def _averages(figures: Figures) -> dict[str, dict[str, Score]]:
    """Over kinds that count the same, as an evaluation gives them: row -> name -> average."""
    found = recorded_scores((figures.files.results or {}).get("averages"))
    return {row: each for row, each in found.items() if row in figures.scores}


def _comparisons(figures: Figures) -> Markup:
    """Every two rows on the tasks that both did, where an evaluation tested them."""
    rows: list[list[object]] = []
    pairs = (figures.files.results or {}).get("pairs")
    for pair in pairs if isinstance(pairs, list) else []:
        try:
            test = pair["test"]
            difference, low, high = (100 * float(test[name]) for name in ("difference", "low", "high"))
            rows.append(
                [
                    f"{row_title(str(pair['first']))} less {row_title(str(pair['second']))}",
                    f"{difference:+.1f} [{low:+.1f}, {high:+.1f}]",
                    f"{int(test['n']):,}",
                    f"{int(test['first_better']):,}",
                    f"{int(test['second_better']):,}",
                    f"{float(test['p_value']):.3g}",
                    f"{float(pair['holm_p']):.3g}",
                ]
            )
        except (KeyError, TypeError, ValueError):
            continue
    if not rows:
        return Markup("")
    head = ["on the same tasks", "difference, % points", "tasks", "first better", "second better", "p", "p, Holm"]
    return joined(
        [
            tag("h3", "Are they different?"),
            tag("p", "Paired tests: McNemar's exact one for right or wrong, else by permutation. Holm's p is adjusted "
                "for the number of pairs.", class_="intro"),
            table(head, rows[:_MOST_ROWS], numeric=range(1, 7)),
        ]
    )  # fmt: skip


def _several_runs(figures: Figures) -> Markup:
    """pass@k and mean@n, where tasks were run several times."""
    rows: list[list[object]] = []
    ks: list[str] = []
    found = (figures.files.results or {}).get("rows")
    for name, row in found.items() if isinstance(found, Mapping) else ():
        passes = recorded_scores({"row": row.get("pass_at_k")}).get("row", {}) if isinstance(row, Mapping) else {}
        if passes:
            ks += [k for k in passes if k not in ks]
            mean = recorded_scores({"row": {"mean": row.get("mean_at_n")}}).get("row", {}).get("mean")
            rows.append([row_title(str(name)), _score_cell(mean, 0), *(_score_cell(passes.get(k), 0) for k in ks)])
    if not rows:
        return Markup("")
    head = ["policy", "mean@n", *(f"pass@{k}" for k in ks)]
    return joined(
        [tag("h3", "Over several runs of each task"),
         table(head, [[*row, *[""] * (len(head) - len(row))] for row in rows], numeric=range(1, len(head)))]
    )  # fmt: skip


def pool(cells: object) -> Score | None:
    """All kinds together, each task counted once."""
    found = [each for each in cells if isinstance(each, Score)] if hasattr(cells, "__iter__") else []  # type: ignore[union-attr]
    n = sum(each.n for each in found)
    return score(min(n, round(sum(each.mean * each.n for each in found))), n) if n else None


def _score_cell(found: Score | None, colour: int) -> Markup:
    if found is None:
        return Markup("–")
    return joined(
        [
            tag("b", f"{100 * found.mean:.{1 if found.n >= 1000 else 0}f}%"),
            tag("i", f" [{100 * found.low:.0f}, {100 * found.high:.0f}]", title=f"n={found.n:,}"),
            interval(found, colour),
        ]
    )


def _watched(figures: Figures) -> Markup:
    if not figures.watched:
        return Markup("")
    points = [(float(step), 100 * each.mean) for step, each in figures.watched]
    low = [(float(step), 100 * each.low) for step, each in figures.watched]
    high = [(float(step), 100 * each.high) for step, each in figures.watched]
    n = max(each.n for _, each in figures.watched)
    return line_chart(
        [
            Line("success", points, 0, strong=True, dots=True),
            Line("interval, low", low, "muted"),
            Line("interval, high", high, "muted"),
        ],
        title="Success while it learned", x="optimizer steps", y=f"% of {n:,} tasks", top=100, bottom=0,
    )  # fmt: skip


# -- success by kind, steps, difficulty


def success(figures: Figures) -> Markup:
    """By kind, by the number of steps, by difficulty."""
    evaluated = figures.of(Role.EVALUATION)
    collected = figures.of(Role.TRAINING)
    parts: list[object] = []
    if collected and figures.files.kind is Kind.DISTILL:
        ledger = collected["training"]
        parts += [tag("h3", "Of the trajectories collected for training, by kind"), _by_kind(ledger)]
    series = _series(figures, evaluated or collected)
    by_steps = _grouped(series, lambda ledger, policy: ledger.by_steps.get(policy, {}), _steps_label, least=1)
    if by_steps:
        parts += [
            tag("h3", "By the number of steps that the policy took"),
            rate_chart(by_steps, unit="trajectories"),
        ]
    name, groups = _difficulty(series)
    if groups:
        parts += [tag("h3", f"By difficulty: {name}"), rate_chart(groups, unit="trajectories")]
    if not parts:
        return Markup("")
    return joined([tag("h2", "Success by kind, steps and difficulty"), *parts])


_Series = list[tuple[str, int, LedgerFigures, str]]
"""(title, colour, ledger, policy)"""


def _series(figures: Figures, ledgers: Mapping[str, LedgerFigures]) -> _Series:
    """Each policy of each ledger, in the colours of the scores."""
    colours = {row: at for at, row in enumerate(figures.scores)}
    found: _Series = []
    for name, ledger in ledgers.items():
        for policy in ledger.policies:
            title = name if len(ledger.policies) == 1 and name != "training" else policy
            found.append((row_title(title), colours.get(title, colours.get(name, len(found))), ledger, policy))
    return found[:_CHARTED]


def _grouped(
    series: _Series,
    cells: Callable[[LedgerFigures, str], Mapping[int, Cell]],
    label: Callable[[int], str],
    *,
    least: int = 2,
) -> list[tuple[str, list[Rate]]]:
    """Buckets that at least one policy fills; [] when there are fewer than `least`."""
    by_bucket: dict[int, list[Rate]] = {}
    for title, colour, ledger, policy in series:
        for bucket, (n, right) in cells(ledger, policy).items():
            if n >= _SMALL:
                by_bucket.setdefault(bucket, []).append(Rate(title, score(right, n), colour))
    if len(by_bucket) < least:
        return []
    return [(label(bucket), rates) for bucket, rates in sorted(by_bucket.items())][:_MOST_ROWS]


def _difficulty(series: _Series) -> tuple[str, list[tuple[str, list[Rate]]]]:
    """By the best measure that there is."""
    by_level: dict[str, list[Rate]] = {}
    for title, colour, ledger, policy in series:
        for level, (n, right) in sorted(ledger.by_level.get(policy, {}).items()):
            by_level.setdefault(level, []).append(Rate(title, score(right, n), colour))
    if len(by_level) > 1:
        return "what the tasks say of themselves", sorted(by_level.items())[:_MOST_ROWS]
    groups = _grouped(series, lambda ledger, policy: ledger.by_reference.get(policy, {}), _steps_label)
    if groups:
        return "the steps that the teacher needed for the same task", groups
    groups = _grouped(series, lambda ledger, policy: ledger.by_length.get(policy, {}), lambda at: LENGTH_LABELS[at])
    return "characters of the question", groups


def _steps_label(steps: int) -> str:
    return f"{steps} step{'s' if steps != 1 else ''}"


def _by_kind(ledger: LedgerFigures) -> Markup:
    policies = ledger.policies[:_CHARTED]
    groups = []
    for kind in ledger.kinds[:_MOST_ROWS]:
        rates = [
            Rate(policy, rate, at)
            for at, policy in enumerate(policies)
            if (rate := ledger.tallies.get((policy, kind), Tally()).rate) is not None
        ]
        groups.append((kind.replace("_", " "), rates))
    return rate_chart(groups, unit="trajectories")


# -- learning


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
    import numpy as np

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


# -- cost


def cost(figures: Figures) -> Markup:
    """Tokens and dollars, by policy, an accepted trajectory, and by model."""
    rows = []
    for name, ledger in figures.of(Role.TRAINING, Role.EVALUATION).items():
        for policy in ledger.policies[:_MOST_ROWS]:
            total = ledger.of_policy(policy)
            rows.append([ledger_name(name), policy, *_cost_cells(total)])
        if ledger.failed_cost_usd:
            rows.append([ledger_name(name), "failed attempts", "", "", "", "", "", usd(ledger.failed_cost_usd), ""])
    if not rows:
        return Markup("")
    head = [
        "",
        "policy",
        "results",
        "accepted",
        "requests",
        "prompt tokens",
        "sampled tokens",
        "USD",
        "USD an accepted",
    ]
    parts: list[object] = [
        tag("h2", "Cost"),
        tag(
            "p",
            "What was asked of each policy. Accepted: right, every turn parsed, no guide given away. A dollar is what "
            "the prices in the configuration say; local models have none.",
            class_="intro",
        ),
        table(head, rows, numeric=range(2, 9)),
    ]
    if figures.spent:
        parts += [
            tag("h3", "By the spend log, over all jobs on this folder"),
            table(
                ["model", "requests", "prompt tokens", "completion tokens", "USD", "of it, never answered"],
                [
                    [
                        model,
                        f"{each.requests:,}",
                        f"{each.prompt_tokens:,}",
                        f"{each.completion_tokens:,}",
                        "no prices" if each.unpriced and not each.usd else usd(each.usd),
                        usd(each.lost_usd),
                    ]
                    for model, each in sorted(figures.spent.items())
                ][:_MOST_ROWS],
                numeric=range(1, 6),
            ),
        ]
    return joined(parts)


def _cost_cells(total: Tally) -> list[str]:
    return [
        f"{total.n:,}",
        f"{total.accepted:,}",
        f"{total.requests:,}",
        f"{total.prompt_tokens:,}",
        f"{total.completion_tokens:,}",
        usd(total.cost_usd),
        usd(total.cost_usd / total.accepted) if total.accepted and total.cost_usd else "–",
    ]


def usd(value: float) -> str:
    if value == 0:
        return "0"
    return f"{value:,.2f}" if value >= 0.1 else f"{value:.5f}"


# -- failures and ends


def failures(figures: Figures) -> Markup:
    """Attempts that came to no result, with an example of each class; how the others ended."""
    rows = [
        [
            ledger_name(name),
            failure_class,
            f"{each.attempts:,}",
            tag("span", clipped(each.example, 600), class_="message"),
        ]
        for name, ledger in figures.of(Role.TRAINING, Role.EVALUATION).items()
        for failure_class, each in sorted(ledger.failures.items(), key=lambda item: -item[1].attempts)
    ]
    stops: list[list[object]] = []
    for name, ledger in figures.of(Role.TRAINING, Role.EVALUATION).items():
        for policy, counts in ledger.stops.items():
            total = sum(counts.values())
            for at, (reason, n) in enumerate(counts.most_common()):
                who = f"{ledger_name(name)}, {policy}" if at == 0 else ""
                share = bar(
                    n / total, "good-fill" if reason == "final" else "bad-fill", label=f"{100 * n / total:.1f}%"
                )
                stops.append([who, reason.replace("_", " "), f"{n:,}", f"{100 * n / total:.1f}%", share])
    if not stops and not rows:
        return Markup("")
    none = tag("p", "No attempt failed: every episode came to a result.", class_="intro")
    return joined(
        [
            tag("h2", "Failures and how episodes ended"),
            table(["", "class", "attempts", "most frequent message"], rows[:_MOST_ROWS], numeric=[2]) if rows else none,
            tag("h3", "How episodes ended"),
            table(["", "ended by", "episodes", "share", ""], stops[: 2 * _MOST_ROWS], numeric=[2, 3]) if stops else "",
        ]
    )


# -- training data


def training_data(figures: Figures) -> Markup:
    """What curation removed, what the learner refused, and what the rows are made of."""
    parts: list[object] = []
    curation = figures.curation
    if curation is not None:
        seen = int(curation.get("seen") or 0)
        rows: list[list[object]] = [["all that was recorded", "", f"{seen:,}", bar(1.0, 0) if seen else "", ""]]
        for each in curation.get("filters", []):
            examples = each.get("examples") or []
            rows.append(
                [
                    str(each.get("filter")),
                    f"{int(each.get('removed') or 0):,}",
                    f"{int(each.get('left') or 0):,}",
                    bar(int(each.get("left") or 0) / seen, 0) if seen else "",
                    tag("span", clipped(str(examples[0]), 120), class_="message") if examples else "",
                ]
            )
        parts += [
            tag("h3", "What curation removed, filter by filter"),
            _without_empty(["filter", "removed", "left", "", "for example"], rows, numeric=[1, 2]),
        ]
    refused = _refused(figures)
    if refused:
        parts += [
            tag("h3", "What the learner refused"),
            table(["reason", "trajectories"], [[name, f"{n:,}"] for name, n in refused.most_common()], numeric=[1]),
        ]
    composition = figures.composition
    if composition is not None:
        trained = _parts(composition.trained, composition.weights)
        read = _parts(composition.read, {})
        parts += [
            tag("h3", "What the rows are made of"),
            tag(
                "p",
                f"Of {composition.rows:,} rows, drawn from the ledger, that a student may learn from; in "
                f"{composition.unit}, without a chat template's own.",
                class_="intro",
            ),
            stacked_bar(trained, title="Trained: the student has to produce it", unit=composition.unit),
            stacked_bar(read, title="Read: it is context, and has no loss", unit=composition.unit),
        ]
    return joined([tag("h2", "Training data"), *parts]) if parts else Markup("")


def _without_empty(head: Sequence[str], rows: Sequence[Sequence[object]], *, numeric: Sequence[int]) -> Markup:
    """A table whose last column is left out where it says nothing."""
    if any(row[-1] for row in rows):
        return table(head, rows, numeric=numeric)
    return table(head[:-1], [row[:-1] for row in rows], numeric=numeric)


def _refused(figures: Figures) -> Counter[str]:
    for place in (figures.files.learned, (figures.files.results or {}).get("learner")):
        found = place.get("refused") if isinstance(place, Mapping) else None
        if isinstance(found, Mapping):
            return Counter({str(name): int(n) for name, n in found.items() if isinstance(n, int)})
    return Counter()


def _parts(counts: Mapping[str, int], weights: Mapping[str, float]) -> Sequence[Part]:
    return [
        Part(span, counts[span], name, note=f"weight {weights[span]:g}" if weights.get(span, 1.0) != 1.0 else "")
        for span, name in SPAN_CLASSES.items()
        if counts.get(span)
    ]


__all__ = [
    "cost", "failures", "learning", "ledger_name", "percent", "pool", "row_title", "scores", "speed", "success",
    "training_data", "usd",
]  # fmt: skip
