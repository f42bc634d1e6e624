"""The page of a report: whole for every job, however it ended; small whatever the run; nothing but text of models."""

from __future__ import annotations

import base64
import hashlib
import json
import re
from collections.abc import Iterator
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import pytest
from browser import open_chromium
from report_samples import failed, run_folder, sampled, whole_run
from viewer_samples import HOSTILE, hostile, numbered, voted

from launch.evaluation.intervals import Score
from launch.report import REPORT, reported, write_report
from launch.report.__main__ import main
from launch.report.charts import Line, line_chart, nice_ticks
from launch.report.page import LARGEST_BYTES
from launch.report.rate_charts import Rate, rate_chart
from rollout.ledger import LedgerWriter
from rollout.storage import open_storage
from rollout.trajectory import Trajectory

TAGS = set(
    "html head meta title style body header footer main nav section figure figcaption ul ol li div span p a b i h1 "
    "h2 h3 h4 table thead tbody tr th td dl dt dd details summary pre code svg g line polyline circle rect text".split()
)


class Page(HTMLParser):
    """What a browser would make of a page: its tags and attributes, its text, its style."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.tags: set[str] = set()
        self.attributes: set[str] = set()
        self.links: list[str] = []
        self.text: list[str] = []
        self.styles: list[str] = []
        self.policy = ""
        self._in_style = False
        self.feed(html)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)
        self._in_style = tag == "style"
        found = dict(attrs)
        self.attributes |= found.keys()
        self.links += [value or "" for name, value in attrs if name in ("href", "src", "action", "srcdoc")]
        if found.get("http-equiv"):
            self.policy = f"{found['http-equiv']}: {found.get('content')}"

    def handle_data(self, data: str) -> None:
        (self.styles if self._in_style else self.text).append(data)

    def handle_endtag(self, tag: str) -> None:
        self._in_style = False


def page_of(place: Path) -> str:
    return Path(write_report(place, place / "page.html")).read_text(encoding="utf-8")


def ledger_of(folder: Path, trajectories: list[Trajectory]) -> Path:
    LedgerWriter(folder, "w").append(trajectories)
    return folder


@pytest.fixture(scope="module")
def hostile_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Hostile text in every place of trajectories, in failures, names, results and the status."""
    rows = [hostile(i, text) for i, text in enumerate(HOSTILE)]
    rows += [failed(90 + i, text) for i, text in enumerate(HOSTILE[:6])]
    run = run_folder(tmp_path_factory.mktemp("hostile"), collected=rows, evaluated={"student": rows}, steps=5)
    scores = {text: {text: {"mean": 0.5, "low": 0.1, "high": 0.9, "n": 4}} for text in HOSTILE}
    (run / "results.json").write_text(json.dumps({"scores": scores, "environment": {"python": HOSTILE[0]}}))
    said = [{"unix_s": 1.0, "text": text} for text in HOSTILE]
    (run / "status.json").write_text(json.dumps({"state": "failed", "error": HOSTILE[0], "said": said}))
    return run


@pytest.fixture(scope="module")
def hostile_page(hostile_run: Path) -> str:
    return page_of(hostile_run)


# -- what models wrote is text


def test_no_tag_but_ours_comes_of_hostile_text(hostile_page: str) -> None:
    page = Page(hostile_page)
    assert page.tags <= TAGS
    assert not [name for name in page.attributes if name.startswith("on") or name in ("style", "src", "srcdoc")]


def test_no_link_leads_out_of_the_page(hostile_page: str) -> None:
    links = Page(hostile_page).links
    assert links and all(re.fullmatch(r"#\w+", link) for link in links)


def test_hostile_text_is_shown_as_it_was_written(hostile_page: str) -> None:
    text = "".join(Page(hostile_page).text)
    assert "<script>window.hacked = 1</script>" in text
    assert "</pre></main></body><iframe" in text


def test_characters_that_cannot_be_seen_are_named(hostile_page: str) -> None:
    assert not re.search(
        "[\x00-\x08\x0b-\x1f\x7f-\x9f\u200b\u200e\u200f\u202a-\u202e\u2066-\u2069\ufeff]", hostile_page
    )
    text = "".join(Page(hostile_page).text)
    assert "⟨U+202E⟩" in text and "␛[31mred" in text and "nul␀" in text and "⟨U+D83D⟩" in text


def test_the_policy_allows_nothing_but_the_style_of_the_page(hostile_page: str) -> None:
    page = Page(hostile_page)
    assert len(page.styles) == 1
    digest = base64.b64encode(hashlib.sha256(page.styles[0].encode()).digest()).decode()
    assert page.policy.startswith("Content-Security-Policy: default-src 'none'; ")
    assert f"style-src 'sha256-{digest}';" in page.policy and "unsafe" not in page.policy


def test_nothing_in_the_style_loads_anything(hostile_page: str) -> None:
    (style,) = Page(hostile_page).styles
    assert "url(" not in style and "@import" not in style


def test_a_secret_of_the_configuration_is_not_in_the_page(tmp_path: Path) -> None:
    run = run_folder(tmp_path, collected=[sampled(1)],
                     overrides=("teacher=openai", "teacher.model=m", "teacher.base_url=http://host/v1",
                                "teacher.extra_body={headers: {X-Own: s3cr3t-value}}"))  # fmt: skip
    (run / "status.json").write_text(json.dumps({"state": "failed", "error": "refused: Bearer s3cr3t-value"}))
    page = page_of(run)
    assert "s3cr3t-value" not in page and "refused" in page


# -- size


def test_texts_of_a_megabyte_are_clipped(tmp_path: Path) -> None:
    long = "<" * 1_000_000
    task = replace(numbered(1).task, question=long, answer=long)
    page = page_of(ledger_of(tmp_path, [replace(hostile(1, long), key="k", task=replace(task, kind=long))]))
    assert len(page) < 300_000
    assert "more characters)" in page


def test_the_page_stays_small_with_hundreds_of_kinds_and_policies(tmp_path: Path) -> None:
    rows = [
        replace(
            voted(sampled(i, policy=f"policy {i % 40}", kind=f"kind {i % 300}", success=i % 2 > 0)),
            system_prompt="x" * 2_000,
        )
        for i in range(1200)
    ]
    path = write_report(ledger_of(tmp_path, rows), tmp_path / "page.html")
    assert Path(path).stat().st_size < LARGEST_BYTES


# -- every job, however it ended


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return whole_run(tmp_path_factory.mktemp("run"))


def test_a_run_is_shown_whole(run: Path) -> None:
    text = "".join(Page(page_of(run)).text)
    for expected in (
        "Loss", "Accuracy", "thought", "distilled, greedy", "75% [55, 88]", "two hop", "2 steps", "Queue",
        "the engine went away", "no_parse_error", "too_long", "What ran when", "python launch/distill.py", "torch", "$",
        "What the rows are made of", "Sampled tokens", "The whole configuration", "train_count: 5500",
    ):  # fmt: skip
        assert expected in text, expected


@pytest.mark.parametrize(
    ("status", "told"),
    [
        ({"state": "failed", "error": "the disk is full"}, ["failed", "the disk is full"]),
        ({"state": "interrupted"}, ["interrupted", "goes on where it was"]),
        ({"state": "running"}, ["not ended"]),
        (None, ["not ended"]),
    ],
)
def test_a_job_that_did_not_end_well_says_so(tmp_path: Path, status: dict[str, str] | None, told: list[str]) -> None:
    run = run_folder(tmp_path, collected=[sampled(1)])
    if status is not None:
        (run / "status.json").write_text(json.dumps(status))
    text = "".join(Page(page_of(run)).text)
    assert all(each in text for each in told)


def test_a_job_that_recorded_nothing_has_a_page(tmp_path: Path) -> None:
    assert "Nothing has been recorded yet." in page_of(run_folder(tmp_path, collected=[]))


def test_candidates_are_shown_with_their_votes(tmp_path: Path) -> None:
    text = "".join(Page(page_of(ledger_of(tmp_path, [voted(numbered(1))]))).text)
    assert "2 of 3 candidates agree" in text and "NameError: x" in text and "chosen" in text


def test_an_evaluation_shows_what_differs_and_what_several_runs_give(tmp_path: Path) -> None:
    for mode in ("agent", "agent_sc"):
        ledger_of(tmp_path / "p" / mode / "ledger", [sampled(i, policy="p") for i in range(4)])
    cell = {"mean": 0.5, "low": 0.2, "high": 0.8, "n": 4}
    test = {
        "difference": 0.25,
        "low": -0.1,
        "high": 0.5,
        "n": 4,
        "first_better": 2,
        "second_better": 1,
        "p_value": 0.625,
    }
    results = {
        "scores": {f"p, {mode}": {"arithmetic": cell, "two_hop": cell} for mode in ("agent", "agent_sc")},
        "averages": {"p, agent": {"average": cell}},
        "rows": {"p, agent": {"pass_at_k": {"1": cell, "4": cell}, "mean_at_n": cell}},
        "pairs": [{"first": "p, agent", "second": "p, agent_sc", "test": test, "holm_p": 0.71}],
    }
    (tmp_path / "results.json").write_text(json.dumps(results))
    text = "".join(Page(page_of(tmp_path)).text)
    assert all(each in text for each in ("+25.0 [-10.0, +50.0]", "0.625", "0.71", "pass@4", "mean@n", "average"))


def test_a_job_leaves_its_report_and_its_own_error(tmp_path: Path) -> None:
    run, said = run_folder(tmp_path, collected=[sampled(1)]), []
    with pytest.raises(RuntimeError, match="the teacher is away"), reported(run, say=said.append):
        raise RuntimeError("the teacher is away")
    assert (run / REPORT).is_file() and said == [f"report: {run / REPORT}"]


def test_a_report_that_cannot_be_made_costs_a_job_nothing_but_a_line(tmp_path: Path) -> None:
    said: list[str] = []
    with reported(tmp_path / "gone", say=said.append):
        done = True
    assert done and len(said) == 1 and said[0].startswith("no report could be made: ") and "gone" in said[0]


def test_a_complete_run_that_is_shown_again_keeps_its_report(tmp_path: Path) -> None:
    run, said = run_folder(tmp_path, collected=[], finished=True), []
    (run / REPORT).write_text("as it was")
    with reported(run, say=said.append):
        pass
    assert (run / REPORT).read_text() == "as it was" and not said


def test_a_collection_in_a_bucket_has_its_report_there(bucket: str) -> None:
    LedgerWriter(f"{bucket}/mine/ledger", "w").append([sampled(i) for i in range(4)])
    storage = open_storage(f"{bucket}/mine")
    config = {"recipe": "starter", "out": f"{bucket}/mine", "split": "train", "scratch": ""}
    storage.replace("config.json", json.dumps(config).encode())
    assert write_report(f"{bucket}/mine") == f"{bucket}/mine/{REPORT}"
    assert b"4 of 4 training tasks" in storage.read(REPORT)


def test_a_run_whose_ledgers_are_in_a_bucket_has_its_report_beside_its_files(tmp_path: Path, bucket: str) -> None:
    run = run_folder(tmp_path, collected=[])
    LedgerWriter(f"{bucket}/run/ledger", "w").append([sampled(i) for i in range(4)])
    LedgerWriter(f"{bucket}/run/evaluation/student", "w").append([sampled(i, policy="student") for i in range(3)])
    page = Path(write_report(run, ledgers=f"{bucket}/run")).read_text()
    assert "4 of 4 training tasks" in page and "100% [44, 100]" in page


# -- the command


def test_the_command_writes_page_and_figures(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([str(run), "--out", str(tmp_path / "a.html"), "--json", str(tmp_path / "a.json")]) == 0
    assert capsys.readouterr().out.strip() == str(tmp_path / "a.html")
    assert json.loads((tmp_path / "a.json").read_text())["kind"] == "distillation"
    assert (tmp_path / "a.html").read_text().startswith("<!doctype html>") and not (run / REPORT).exists()


@pytest.mark.parametrize(
    ("place", "more", "told"),
    [("nowhere", [], "nowhere is no folder"), ("run", ["--out", "no/such/folder/a.html"], "cannot be written")],
)
def test_what_cannot_be_done_is_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], place: str, more: list[str], told: str
) -> None:
    run_folder(tmp_path / "run", collected=[sampled(1)])
    assert main([str(tmp_path / place), *more]) == 2
    error = capsys.readouterr().err
    assert told in error and error.count("\n") == 1


# -- charts


@pytest.mark.parametrize(("low", "high"), [(0.0, 1.0), (3.2, 3.3), (-5.0, 1e6), (0.0, 0.0), (1e-9, 2e-9)])
def test_ticks_enclose_what_they_are_of(low: float, high: float) -> None:
    ticks = nice_ticks(low, high, 5)
    assert ticks[0] <= low + 1e-15 and ticks[-1] >= high and 2 <= len(ticks) <= 12


def test_a_chart_tells_its_values_in_words_and_where_it_is_pointed_at() -> None:
    chart = line_chart([Line("loss", [(0.0, 4.0), (1.0, 0.5)])], title="Loss", x="million tokens", y="nats", log=True)
    assert 'aria-label="Loss: nats over million tokens. loss from 4 to 0.5"' in chart
    assert "<title>1 million tokens\nloss: 0.5</title>" in chart


def test_a_rate_is_where_its_interval_says() -> None:
    chart = rate_chart([("all", [Rate("student", Score(0.5, 0.25, 0.75, 16))])])
    assert 'x1="25%" x2="75%"' in chart and 'cx="50%"' in chart and "50% [25, 75]" in chart


# -- in a browser


@pytest.fixture(scope="module")
def screens(hostile_run: Path, run: Path) -> Iterator[dict[str, dict[str, object]]]:
    """What Chromium makes of a whole run's page and of the hostile one, on a phone in the dark and on a desk."""
    found: dict[str, dict[str, object]] = {}
    pages = {place: Path(write_report(place, place / "page.html")).as_uri() for place in (run, hostile_run)}
    with open_chromium() as chromium:
        for name, place, width, scheme in (
            ("desk", run, 1200, "light"), ("phone", run, 390, "dark"), ("hostile", hostile_run, 390, "light"),
        ):  # fmt: skip
            context = chromium.new_context(viewport={"width": width, "height": 900}, color_scheme=scheme)  # type: ignore[arg-type]
            page, told, asked = context.new_page(), [], []
            page.on("console", lambda message, told=told: told.append(message.text))
            page.on("request", lambda request, asked=asked: asked.append(request.url))
            page.goto(pages[place])
            page.evaluate("document.querySelectorAll('details').forEach(each => each.open = true)")
            found[name] = {
                "console": told,
                "requests": asked,
                "wider": page.evaluate("document.documentElement.scrollWidth - innerWidth"),
                "ground": page.evaluate("getComputedStyle(document.body).backgroundColor"),
                "hacked": page.evaluate("window.hacked ?? null"),
                "curve": page.evaluate("document.querySelector('polyline')?.getBoundingClientRect().width ?? 0"),
                "bold": page.evaluate("getComputedStyle(document.querySelector('h1')).fontWeight"),
            }
            context.close()
    yield found


def test_a_browser_finds_nothing_to_complain_of(screens: dict[str, dict[str, object]]) -> None:
    assert {name: each["console"] for name, each in screens.items()} == {"desk": [], "phone": [], "hostile": []}


def test_a_page_asks_for_nothing_but_itself(screens: dict[str, dict[str, object]]) -> None:
    assert all(len(each["requests"]) == 1 for each in screens.values())  # type: ignore[arg-type]


def test_no_script_of_a_model_runs(screens: dict[str, dict[str, object]]) -> None:
    assert screens["hostile"]["hacked"] is None


def test_no_page_is_wider_than_its_screen(screens: dict[str, dict[str, object]]) -> None:
    assert {name: each["wider"] for name, each in screens.items()} == {"desk": 0, "phone": 0, "hostile": 0}


def test_a_page_is_light_or_dark_as_its_reader_wants(screens: dict[str, dict[str, object]]) -> None:
    assert screens["desk"]["ground"] == "rgb(252, 252, 251)" and screens["phone"]["ground"] == "rgb(20, 23, 26)"


def test_curves_are_as_wide_as_their_place(screens: dict[str, dict[str, object]]) -> None:
    assert float(str(screens["desk"]["curve"])) > 300 and float(str(screens["phone"]["curve"])) > 250
