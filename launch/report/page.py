"""The page: figures as one HTML file that needs nothing else. No script, no request; a policy says so to the browser.

Its sections are in `score_sections`, `time_sections`, `data_sections` and `run_sections`; they are strung together
here, and sample trajectories are added until the page is as large as it may be.

Example::

    Path("report.html").write_bytes(html_page(gather(find("runs/a"))))
"""

from __future__ import annotations

import base64
import hashlib
import time
from collections import Counter
from collections.abc import Iterator

from launch.report import data_sections, event_section, run_sections, score_sections, time_sections
from launch.report.figures import Figures, Sample
from launch.report.ledger_figures import NAME_CHARS
from launch.report.markup import Markup, details, html, joined, tag
from launch.report.run_files import ReportError
from launch.report.style import style_sheet
from launch.report.trajectory_page import show_trajectory
from launch.report.wording import ledger_name

LARGEST_BYTES = 5_000_000
_SAMPLES_BYTES = 2_600_000
"""Of that, for sample trajectories."""
_CLIPS = (3_000, 1_000, 300)
"""Characters of a text in a sample: less when there is much to show."""


def html_page(figures: Figures) -> bytes:
    """UTF-8, below `LARGEST_BYTES`."""
    page = _page(figures, figures.samples)
    if len(page) >= LARGEST_BYTES:  # of some part that nobody thought could be so large
        page = _page(figures, [])
    if len(page) >= LARGEST_BYTES:
        raise ReportError(f"the page would have {len(page):,} bytes, above {LARGEST_BYTES:,}")
    return page


def _page(figures: Figures, samples: list[Sample]) -> bytes:
    parts = [
        ("scores", "Scores", score_sections.scores(figures)),
        ("success", "Success", score_sections.success(figures)),
        ("learning", "Learning", time_sections.learning(figures)),
        ("speed", "Speed", time_sections.speed(figures)),
        ("events", "What went wrong", event_section.went_wrong(figures)),
        ("cost", "Cost", data_sections.cost(figures)),
        ("failures", "Failures", data_sections.failures(figures)),
        ("data", "Training data", data_sections.training_data(figures)),
        ("samples", "Trajectories", _samples(samples)),
        ("run", "What ran", run_sections.what_ran(figures)),
    ]
    parts = [(name, title, content) for name, title, content in parts if content]
    nav = tag("nav", tag("ul", *(tag("li", tag("a", title, href=f"#{name}")) for name, title, _ in parts)))
    body = joined(
        [
            tag("header", run_sections.heading(figures), class_="top"),
            nav,
            tag("main", *(tag("section", content, id=name, class_="part") for name, _, content in parts)),
            tag("footer", _footer(figures)),
        ]
    )
    return _document(f"{figures.files.name}: {figures.files.kind.value} report", body)


def _document(title: str, body: Markup) -> bytes:
    style = style_sheet()
    digest = base64.b64encode(hashlib.sha256(style.encode()).digest()).decode()
    policy = f"default-src 'none'; style-src 'sha256-{digest}'; base-uri 'none'; form-action 'none'"
    text = (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        f'<meta http-equiv="Content-Security-Policy" content="{policy}">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        '<meta name="referrer" content="no-referrer">\n<meta name="color-scheme" content="light dark">\n'
        f"<title>{html(title)}</title>\n<style>{style}</style>\n</head>\n<body>\n{body}\n</body>\n</html>\n"
    )
    return text.encode("utf-8", "replace")


def _samples(samples: list[Sample]) -> Markup:
    """By ledger and kind, of each group the next one in turn, until there is no room: every group has its share."""
    if not samples:
        return Markup("")
    groups: dict[tuple[str, str, str], list[Sample]] = {}
    for sample in samples:
        trajectory = sample.trajectory
        kind = "failed attempts" if trajectory.failure is not None else trajectory.task.kind
        groups.setdefault((sample.ledger, trajectory.policy[:NAME_CHARS], kind[:NAME_CHARS]), []).append(sample)
    shown: dict[tuple[str, str, str], list[Markup]] = {group: [] for group in groups}
    room, left_out = _SAMPLES_BYTES, 0
    for group, sample in _in_turn(groups):
        for clip in _CLIPS:
            made = show_trajectory(sample.trajectory, clip=clip)
            size = len(made.encode("utf-8", "replace"))
            if size <= min(room, _SAMPLES_BYTES // 12):
                shown[group].append(made)
                room -= size
                break
        else:
            left_out += 1
    several = Counter(ledger for ledger, _ in {(ledger, policy) for ledger, policy, _ in groups})
    by_ledger: dict[str, list[Markup]] = {}
    for (ledger, policy, kind), made in shown.items():
        if made:
            title = kind.replace("_", " ") + (f", {policy}" if several[ledger] > 1 else "")
            by_ledger.setdefault(ledger, []).append(joined([tag("h4", title), *made]))
    content: list[object] = [
        tag("h2", "Trajectories"),
        tag(
            "p",
            "Some of each kind, drawn by lot: what succeeded first, then what failed. Long texts are cut; characters "
            "that could not be seen are named.",
            class_="intro",
        ),
    ]
    for at, (ledger, made) in enumerate(by_ledger.items()):
        count = sum(len(shown[group]) for group in shown if group[0] == ledger)
        summary = joined([tag("b", ledger_name(ledger)), tag("span", f" {count} trajectories", class_="facts")])
        content.append(details(summary, *made, opened=at == 0, class_="group-of-samples"))
    if left_out:
        content.append(tag("p", f"{left_out} more did not fit into this page.", class_="note"))
    return joined(content)


def _in_turn(
    groups: dict[tuple[str, str, str], list[Sample]],
) -> Iterator[tuple[tuple[str, str, str], Sample]]:
    """The first of each group, the second of each, ..."""
    for at in range(max(map(len, groups.values()), default=0)):
        for group, samples in groups.items():
            if at < len(samples):
                yield group, samples[at]


def _footer(figures: Figures) -> Markup:
    made = time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime(figures.made_at_s))
    place = figures.files.name
    return tag("p", f"Made {made} from {place} by `python -m launch.report`. Intervals are 95% intervals.")
