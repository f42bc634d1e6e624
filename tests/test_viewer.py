"""The viewer without a browser: what it finds, what it shows, whom it answers, what it gives away as files."""

from __future__ import annotations

import functools
import io
import json
import os
import re
import signal
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pyarrow.parquet as pq
import pytest
from learner_samples import TOKENIZER
from starlette.testclient import TestClient
from viewer_samples import HOSTILE, failed, hostile, numbered, voted, write

from launch.viewer import shown_text, word_query
from launch.viewer.access import Access
from launch.viewer.catalog import Catalog
from launch.viewer.pages import make_app
from launch.viewer.selection import Selection, SelectionError
from launch.viewer.token_view import TokenViews
from launch.viewer.wording import labels
from rollout.ledger import Ledger
from rollout.records import from_table

ROOT = Path(__file__).parents[1]
WAIT_S = 60.0


def opened(*folders: Path, cache: Path | None = None) -> Catalog:
    """All words read."""
    catalog = Catalog([Ledger(folder) for folder in folders], cache=cache)
    catalog.__enter__()
    assert catalog.wait_words(WAIT_S)
    return catalog


@functools.lru_cache(maxsize=8)
def client(catalog: Catalog, access: Access = Access()) -> TestClient:  # noqa: B008 - it is frozen
    """Kept, since templates are compiled once an app."""
    app = make_app(catalog, TokenViews(tokenizer=str(TOKENIZER)), access)
    return TestClient(app, base_url="http://127.0.0.1:8000", follow_redirects=False)


@pytest.fixture(scope="module")
def two_policies(tmp_path_factory) -> Iterator[Catalog]:
    """A ledger of a teacher with a failure, and one of a student that is wrong on every third task."""
    folder = tmp_path_factory.mktemp("two")
    write(folder / "teacher", [*(numbered(i) for i in range(120)), failed(500)])
    student = [numbered(i, policy="student", success=i % 3 != 0) for i in range(60)]
    write(folder / "student", [voted(student[0]), *student[1:]])
    catalog = opened(folder / "teacher", folder / "student")
    yield catalog
    catalog.close()


def keys(catalog: Catalog, **selection) -> list[str]:
    return [row.key for row in catalog.page(Selection(**selection), limit=1000).rows]


# -- finding


@pytest.mark.parametrize(
    ("selection", "wanted"),
    [
        ({}, lambda of: True),
        ({"outcome": ("wrong",)}, lambda of: not of.success and of.failure is None),
        ({"outcome": ("failed",)}, lambda of: of.failure is not None),
        ({"failure": ("engine",)}, lambda of: of.failure is not None),
        ({"policy": ("student",), "score_min": 0.5}, lambda of: of.policy == "student" and of.success),
        ({"task": "task-0007"}, lambda of: of.task.id == "task-0007"),
        ({"ledger": ("1",)}, lambda of: of.policy == "student"),
        ({"steps_min": 3}, lambda of: False),
        ({"stop": ("failed",)}, lambda of: of.failure is not None),
        ({"kind": ("arithmetic",), "outcome": ("success",)}, lambda of: of.success),
        ({"q": "17"}, lambda of: "17" in re.findall(r"\w+", _text(of))),
        ({"q": '"crates are there" -failed'}, lambda of: True),
        ({"q": "engine went"}, lambda of: of.failure is not None),
    ],
    ids=lambda value: str(value) if isinstance(value, dict) else "rows",  # a function has no name that stays
)
def test_a_filter_finds_exactly_the_rows_that_are_like_that(two_policies, selection, wanted):
    everything = [
        of for index in two_policies.indices for of in (*index.ledger.trajectories(), *index.ledger.failures())
    ]
    found = two_policies.page(Selection(**selection), limit=1000)
    assert sorted(row.key for row in found.rows) == sorted(of.key for of in everything if wanted(of))
    assert found.total == len(found.rows)


def _text(of) -> str:
    steps = "\n".join(f"{step.completion.text}\n{step.observation}" for step in of.steps)
    return "\n".join([of.task.question, of.task.answer, of.prediction or "", steps])


@pytest.mark.parametrize("sort", ["-time", "time", "score", "-steps", "task", "-task", "cost"])
def test_pages_forward_and_back_show_every_row_once(two_policies, sort):
    selection, after, forward, last = Selection(sort=sort), "", [], None
    while True:
        found = two_policies.page(selection, after=after, limit=50)
        forward += [row.number for row in found.rows]
        if found.after is None:
            break
        after, last = found.after, found
    backward, before = [row.number for row in found.rows], found.before
    while before:
        found = two_policies.page(selection, before=before, limit=50)
        backward = [row.number for row in found.rows] + backward
        before = found.before
    assert last is not None and len(forward) == 181 == len(set(forward))
    assert backward == forward


def test_counts_beside_a_filter_tell_what_choosing_it_would_show(two_policies):
    found = two_policies.page(Selection(outcome=("wrong",), policy=("student",)))
    for facet in ("outcome", "policy", "ledger"):
        for value, count in found.facets[facet]:
            chosen = replace(Selection(outcome=("wrong",), policy=("student",)), **{facet: (value,)})
            assert two_policies.page(chosen).total == count


def test_an_address_says_the_whole_selection():
    selection = Selection(
        q='two "words here"',
        task="a&b",
        outcome=("wrong", "failed"),
        kind=("k=1",),
        steps_min=2,
        score_max=0.5,
        sort="task",
    )
    assert Selection.from_query(selection.pairs()) == selection


@pytest.mark.parametrize(
    "query",
    ["sort=size", "outcome=good", "steps_min=two", "score_max=nan", "ledger=7", "ledger=x", "q=-only", "after=x"],
)
def test_a_wrong_address_is_refused_with_its_value(two_policies, query):
    answer = client(two_policies).get(f"/?{query}")
    assert answer.status_code == 400 and query.split("=")[1] in answer.text


def test_words_are_found_by_their_beginning_without_case_or_accents(tmp_path):
    row = numbered(1)
    row = replace(row, task=replace(row.task, question="Wer führte Regie bei 静かな森の映画?"))
    catalog = opened(write(tmp_path / "a", [row, numbered(2)]))
    try:
        for text in ("FUHRTE", "füh", "静かな森", "森の映", '"regie bei"'):
            assert keys(catalog, q=text) == [row.key], text
        assert keys(catalog, q='"bei regie"') == []
    finally:
        catalog.close()


def test_what_is_looked_for_only_to_be_left_out_is_refused():
    with pytest.raises(word_query.QueryError, match="only leaves out"):
        word_query.parse("-novel")


# -- a ledger that lives


def test_rows_that_are_written_meanwhile_are_found(tmp_path):
    folder = write(tmp_path / "a", [numbered(1)])
    catalog = opened(folder)
    try:
        before = catalog.progress().version
        write(folder, [numbered(2)])
        _until(catalog, 2)
        assert keys(catalog, q="crates") == [numbered(2).key, numbered(1).key]
        assert catalog.progress().version > before
    finally:
        catalog.close()


def test_a_compaction_loses_and_doubles_nothing(tmp_path):
    folder = tmp_path / "a"
    for i in range(10):
        write(folder, [numbered(i)])
    write(folder, [numbered(3, success=False)])  # the first of a key counts
    catalog = opened(folder)
    try:
        before = {row.identity: row.key for row in catalog.page(Selection(), limit=100).rows}
        Ledger(folder).compact()
        for name in (folder / "shards").glob("w-*"):
            name.unlink()
        write(folder, [numbered(100)])
        _until(catalog, 11)
        rows = catalog.page(Selection(q="crates"), limit=100).rows
        assert {row.identity: row.key for row in rows if row.key != numbered(100).key} == before
        assert all(catalog.trajectory(row).key == row.key for row in rows)
    finally:
        catalog.close()


def _until(catalog: Catalog, rows: int) -> None:
    for _ in range(600):
        catalog.refresh()
        if catalog.progress().rows == rows and catalog.wait_words(WAIT_S):
            return
        time.sleep(0.05)
    raise AssertionError(f"{catalog.progress()}, wanted {rows} rows")


def test_an_index_is_used_again(tmp_path):
    folder = write(tmp_path / "a", [numbered(i) for i in range(5)])
    opened(folder, cache=tmp_path / "cache").close()
    catalog = Catalog([Ledger(folder)], cache=tmp_path / "cache")  # nothing is read: it is not entered
    try:
        assert catalog.progress().words == 5 and len(keys(catalog, q="crates")) == 5
    finally:
        catalog.close()


def test_a_second_viewer_of_a_ledger_makes_its_own_index(tmp_path):
    folder = write(tmp_path / "a", [numbered(1)])
    first, second = (opened(folder, cache=tmp_path / "cache") for _ in range(2))
    try:
        assert "another viewer" in second.notes[0]
        assert keys(first) == keys(second)
    finally:
        second.close()
        first.close()


def test_a_damaged_shard_is_named_and_the_rest_is_shown(tmp_path):
    folder = write(tmp_path / "a", [numbered(1)])
    (folder / "shards" / "w-damaged.parquet").write_bytes(b"no parquet")
    catalog = opened(folder)
    try:
        page = client(catalog).get("/")
        assert "w-damaged.parquet" in page.text and len(keys(catalog)) == 1
    finally:
        catalog.close()


def test_a_ledger_on_an_object_store_is_read(s3_endpoint, monkeypatch):
    from pyarrow.fs import S3FileSystem

    monkeypatch.setenv("AWS_ENDPOINT_URL", s3_endpoint)
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "a")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "b")
    monkeypatch.setenv("AWS_DEFAULT_REGION", "us-east-1")
    S3FileSystem(endpoint_override=s3_endpoint, allow_bucket_creation=True).create_dir("viewer")
    from rollout.ledger import LedgerWriter

    LedgerWriter("s3://viewer/run/ledger", writer="w").append([numbered(1)])
    catalog = Catalog([Ledger("s3://viewer/run/ledger")], cache=None)
    with catalog:
        assert catalog.wait_words(WAIT_S)
        (row,) = catalog.page(Selection(q="crates")).rows
        assert catalog.trajectory(row) == numbered(1)


# -- pages


def test_a_trajectory_shows_its_turns_its_votes_and_its_times(two_policies):
    row = two_policies.page(Selection(policy=("student",), task="task-0000")).rows[0]
    page = client(two_policies).get(f"/t/{row.identity}").text
    assert "3 candidates, 2 different; the chosen one has 2 votes" in page
    assert "candidates 2, 3" in page and "NameError" in page
    assert '<span class="nb">print</span>' in page  # highlighted
    assert "not solved" in page and row.key in page


def test_two_policies_are_compared_on_the_tasks_of_both(two_policies):
    page = client(two_policies).get("/policies").text
    assert "<b>60</b> tasks in common" in page
    assert [int(n) for n in re.findall(r"<b>(\d+)</b> (?:A better|B better|both|neither)", page)] == [20, 0, 40, 0]
    pair = re.search(r'href="(/compare\?a=\w{16}&amp;b=\w{16})"', page).group(1).replace("&amp;", "&")
    sides = client(two_policies).get(pair).text
    assert sides.count('<section class="two step"') == 2 and "✓ teacher" in sides and "✗ student" in sides


def test_tokens_carry_what_the_learner_trains_with_which_weight(two_policies):
    from learner_samples import example_of
    from transformers import PreTrainedTokenizerFast

    from learner.examples import ExampleMaker

    row = two_policies.page(Selection(outcome=("success",), policy=("teacher",))).rows[0]
    view = TokenViews(tokenizer=str(TOKENIZER)).of(two_policies.trajectory(row), "")
    tokenizer = PreTrainedTokenizerFast.from_pretrained(TOKENIZER)
    made = example_of(ExampleMaker(tokenizer, max_row_tokens=4096), two_policies.trajectory(row))
    assert [(t.id, t.weight, t.span) for t in view.tokens] == [
        (i, w, s.value) for i, w, s in zip(made.token_ids, made.loss_weights, made.span_types, strict=True)
    ]
    assert view.trained == sum(w > 0 for w in made.loss_weights) > 0


def test_a_row_that_is_not_trained_on_says_why(two_policies):
    row = two_policies.page(Selection(outcome=("wrong",))).rows[0]
    page = client(two_policies).get(f"/t/{row.identity}/tokens").text
    assert "The learner refuses this row." in page and "no success, stopped by final" in page


def test_log_probabilities_and_the_likeliest_tokens_are_shown_where_they_were_kept():
    from transformers import PreTrainedTokenizerFast

    tokenizer = PreTrainedTokenizerFast.from_pretrained(TOKENIZER)
    made = numbered(1)
    steps = []
    for step in made.steps:
        ids = tuple(tokenizer(step.completion.text, add_special_tokens=False)["input_ids"]) + (tokenizer.eos_token_id,)
        n = len(ids)
        said = replace(
            step.completion,
            token_ids=ids,
            logprobs=(-0.1,) * n,
            completion_tokens=n,
            top_ids=tuple(each for i in ids for each in (i, 5)),
            top_logprobs=(-0.1, -3.0) * n,
        )
        steps.append(replace(step, completion=said))
    view = TokenViews(tokenizer=str(TOKENIZER)).of(replace(made, steps=tuple(steps)), "")
    said = [token for token in view.tokens if token.turn >= 0]
    assert {round(token.logprob or 0.0, 3) for token in said} == {-0.1} and {token.shade for token in said} == {1}
    assert [round(p, 3) for _, p in said[0].top] == [-0.1, -3.0]
    assert all(token.logprob is None for token in view.tokens if token.turn < 0)


def test_ledgers_are_called_by_the_shortest_ends_that_differ():
    assert labels(["/a/x/ledger", "/a/y/ledger"]) == ["x/ledger", "y/ledger"]
    assert labels(["/runs/ledger"]) == ["ledger"]


# -- hostile texts


@pytest.mark.parametrize(
    "path", ["/", "/t/{}", "/t/{}/tokens", "/compare?a={}", "/policies", "/?kind={kind}", "/?q={q}"]
)
def test_no_text_of_a_model_becomes_markup(hostile_rows, path):
    catalog, rows = hostile_rows
    # Every text alone where its page is about it; all of them in one row elsewhere.
    for row in rows if path == "/t/{}" else rows[:1]:
        address = path.format(row.identity, kind="<script>1</script>", q="<script>1</script>")
        page = client(catalog).get(address)
        assert page.status_code == 200
        body = page.text
        assert re.findall(r"<script(.*?)>", body) == [' type="module" src="/static/viewer.js"']
        for opened_by_text in (
            "<img",
            "<iframe",
            "<svg/",
            "<meta http-equiv",
            "<style",
            'href="javascript',
            "\x00",
        ):
            assert opened_by_text not in body, opened_by_text
        assert not re.search(r"<[^>]*\son\w+\s*=", re.sub(r'="[^"]*"', '=""', body))
        assert not re.search("[\u202a-\u202e\u2066-\u2069\x1b]", body)


@pytest.fixture(scope="module")
def hostile_rows(tmp_path_factory):
    folder = tmp_path_factory.mktemp("hostile")
    catalog = opened(write(folder / "a", [hostile(i, text) for i, text in enumerate((*HOSTILE, " ".join(HOSTILE)))]))
    yield catalog, catalog.page(Selection()).rows
    catalog.close()


def test_hidden_characters_stand_by_name():
    shown = str(shown_text.plain("a\u202eb\x00\x1b[1m").html)
    assert "U+202E" in shown and ">\u2400<" in shown and ">\u241b</span>[1m" in shown
    assert not re.search("[\u202e\x00\x1b]", shown)


def test_a_very_long_text_is_cut_and_can_be_had_whole(tmp_path):
    long = "x = 1\n" * 200_000
    row = numbered(1)
    row = replace(row, steps=(replace(row.steps[0], observation=long), *row.steps[1:]))
    catalog = opened(write(tmp_path / "a", [row]))
    try:
        (found,) = catalog.page(Selection()).rows
        page = client(catalog).get(f"/t/{found.identity}")
        assert len(page.content) < 200_000 and "all 1,200,000 characters" in page.text
        whole = client(catalog).get(f"/t/{found.identity}/text/observation-1")
        assert whole.text == long and whole.headers["content-type"].startswith("text/plain")
        assert client(catalog).get(f"/t/{found.identity}/text/observation-9").status_code == 404
    finally:
        catalog.close()


# -- whom it answers


def test_every_answer_forbids_scripts_that_are_not_its_own(two_policies):
    for path in ("/", "/nowhere", "/static/viewer.js", "/progress", "/export?format=ids", "/?sort=x"):
        policy = client(two_policies).get(path).headers["content-security-policy"]
        assert "default-src 'none'" in policy and "unsafe" not in policy


@pytest.mark.parametrize(
    ("host", "status"),
    [
        ("127.0.0.1:1", 200),
        ("localhost", 200),
        ("[::1]:80", 200),
        ("evil.test", 421),
        ("evil.test:8000", 421),
        ("127.0.0.1.evil.test", 421),
        ("10.0.0.7:80", 421),
        ("", 421),
    ],
)
def test_on_loopback_only_names_of_this_machine_are_answered(two_policies, host, status):
    assert client(two_policies).get("/progress", headers={"host": host}).status_code == status


def test_a_token_is_asked_for_and_then_kept_in_a_cookie(two_policies):
    asked = client(two_policies, Access(token="secret", digits=True))
    assert asked.get("/").status_code == asked.get("/static/viewer.css").status_code == 401
    assert asked.get("/?token=wrong").status_code == 401
    answer = asked.get("/?token=secret&sort=task")
    assert answer.status_code == 303 and answer.headers["location"] == "/?sort=task"
    assert "HttpOnly" in answer.headers["set-cookie"] and "SameSite=Strict" in answer.headers["set-cookie"]
    assert asked.get("/?sort=task").status_code == 200


def test_nothing_can_be_posted(two_policies):
    assert client(two_policies).post("/").status_code == 405


# -- files


def test_exported_lines_are_the_rows_of_the_selection(two_policies):
    answer = client(two_policies).get("/export?format=jsonl&outcome=wrong&outcome=failed")
    rows = [json.loads(line) for line in answer.text.splitlines()]
    assert sorted(row["key"] for row in rows) == sorted(keys(two_policies, outcome=("wrong", "failed")))
    assert answer.headers["content-disposition"] == 'attachment; filename="trajectories.jsonl"'


def test_an_exported_shard_makes_a_ledger(two_policies, tmp_path):
    write(tmp_path / "a", [])
    answer = client(two_policies).get("/export?format=parquet&policy=student")
    (tmp_path / "a" / "shards" / "exported.parquet").write_bytes(answer.content)
    ours = two_policies.indices[1].ledger
    assert {of.key: of for of in Ledger(tmp_path / "a").trajectories()} == {of.key: of for of in ours.trajectories()}


def test_failures_are_exported_apart_from_results(two_policies):
    results, failures = (
        from_table(pq.read_table(io.BytesIO(client(two_policies).get(f"/export?format={name}").content)))
        for name in ("parquet", "failures")
    )
    assert len(results) == 180 and [of.failure is not None for of in failures] == [True]


def test_exported_ids_are_keys(two_policies):
    answer = client(two_policies).get("/export?format=ids&ledger=1")
    assert sorted(answer.text.splitlines()) == sorted(keys(two_policies, ledger=("1",)))


# -- the command


@pytest.mark.parametrize("ended_by", [signal.SIGINT, signal.SIGTERM])
def test_the_command_says_where_it_is_and_leaves_nothing_when_it_is_ended(tmp_path, ended_by):
    folder = write(tmp_path / "a", [numbered(1)])
    command = [sys.executable, "-m", "launch.view", str(folder), "--no-cache"]
    (tmp_path / "tmp").mkdir()
    process = subprocess.Popen(
        command,
        cwd=ROOT,
        env={**os.environ, "TMPDIR": str(tmp_path / "tmp")},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        lines = [process.stdout.readline(), process.stdout.readline()]
        address = lines[1].strip()
        assert address.startswith("http://127.0.0.1:")
        with urllib.request.urlopen(address + "progress", timeout=30) as answer:
            assert answer.status == 200
        process.send_signal(ended_by)
        assert process.wait(30) == 0 and process.stderr.read() == ""
        assert list((tmp_path / "tmp").iterdir()) == []
    finally:
        process.kill()
        process.communicate()


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["{tmp}/nothing"], "nothing is no ledger"),
        (["{tmp}"], "no ledger and no run"),
        (["{ledger}", "--port", "70000"], "--port 70000"),
        (["{ledger}", "--tokenizer", "{tmp}"], "tokenizer_config.json"),
        (["{ledger}", "--token", ""], "--token is empty"),
        (["{ledger}", "--host", "203.0.113.7"], "cannot listen on 203.0.113.7"),
    ],
    ids=lambda each: each if isinstance(each, str) else "",
)
def test_a_command_that_cannot_be_done_is_refused_in_one_line(tmp_path, capsys, arguments, says):
    from launch.view import main

    write(tmp_path / "a" / "b", [numbered(1)])
    given = [each.format(tmp=tmp_path, ledger=tmp_path / "a" / "b") for each in arguments]
    assert main(given) == 2
    told = capsys.readouterr().err
    assert told.startswith("error: ") and says in told and told.count("\n") == 1


def test_a_selection_knows_no_other_sort():
    with pytest.raises(SelectionError, match="sort='size'"):
        Selection.from_query([("sort", "size")])
