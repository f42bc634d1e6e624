"""What a report says of cost, failures and the data that was trained on. Each section is HTML, "" where nothing is
known.

Example::

    data_sections.cost(figures)
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence

from launch.report.charts import Part, bar, stacked_bar
from launch.report.figures import Figures
from launch.report.ledger_figures import Tally
from launch.report.markup import Markup, clipped, joined, table, tag
from launch.report.run_files import Role
from launch.report.style import SPAN_CLASSES
from launch.report.wording import ledger_name, usd

_MOST_ROWS = 40


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
