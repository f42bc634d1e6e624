"""The viewer in a real headless Chromium: by keyboard, on a phone, in the dark, and with texts that want to be run."""

from __future__ import annotations

import json
import re
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
import uvicorn
from browser import open_chromium
from learner_samples import TOKENIZER
from viewer_samples import HOSTILE, failed, hostile, numbered, voted, write

from launch.viewer.access import Access
from launch.viewer.catalog import Catalog
from launch.viewer.pages import make_app
from launch.viewer.token_view import TokenViews
from rollout.ledger import Ledger

if TYPE_CHECKING:
    from playwright.sync_api import Browser, Page

sync_api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed: pip install playwright")

WAIT_S = 60.0
PHONE = {"width": 390, "height": 844}


@pytest.fixture(scope="module")
def chromium() -> Iterator[Browser]:
    with open_chromium() as browser:
        yield browser


@contextmanager
def served(*folders: Path) -> Iterator[str]:
    """The address of a viewer in a thread."""
    with Catalog([Ledger(folder) for folder in folders], cache=None) as catalog:
        assert catalog.wait_words(WAIT_S)
        app = make_app(catalog, TokenViews(tokenizer=str(TOKENIZER)), Access())
        server = uvicorn.Server(uvicorn.Config(app, port=0, log_level="error", lifespan="off", ws="none"))
        thread = threading.Thread(target=server.run)
        thread.start()
        try:
            deadline = time.monotonic() + WAIT_S
            while not server.started and time.monotonic() < deadline:
                time.sleep(0.01)
            port = server.servers[0].sockets[0].getsockname()[1]
            yield f"http://127.0.0.1:{port}/"
        finally:
            server.should_exit = True
            thread.join(WAIT_S)


@pytest.fixture(scope="module")
def ledgers(tmp_path_factory) -> tuple[Path, Path]:
    folder = tmp_path_factory.mktemp("browser")
    write(folder / "teacher", [*(numbered(i) for i in range(70)), failed(500)])
    student = [numbered(i, policy="student", success=i % 3 != 0) for i in range(30)]
    write(folder / "student", [voted(student[0]), *student[1:]])
    return folder / "teacher", folder / "student"


@pytest.fixture(scope="module")
def address(ledgers) -> Iterator[str]:
    with served(*ledgers) as found:
        yield found


@contextmanager
def page_of(chromium: Browser, **settings) -> Iterator[Page]:
    """A page of a context of its own; what it complains of fails the test."""
    context = chromium.new_context(**settings)
    page = context.new_page()
    complaints: list[str] = []
    page.on("pageerror", lambda error: complaints.append(str(error)))
    page.on("console", lambda message: complaints.append(message.text) if message.type == "error" else None)
    page.set_default_timeout(30_000)
    try:
        yield page
    finally:
        context.close()
    assert complaints == []


def test_by_keyboard_alone_from_a_filter_to_a_step_and_back(chromium, address):
    with page_of(chromium) as page:
        page.goto(address)
        page.keyboard.press("/")
        page.keyboard.type("crates")
        page.wait_for_url("**/?q=crates")
        page.keyboard.press("Escape")
        page.keyboard.press("f")
        page.keyboard.press("Tab")
        page.keyboard.press("Space")  # the second outcome: not solved
        page.wait_for_url("**/?q=crates&outcome=wrong")
        assert page.locator("#results h1").inner_text().startswith("10 of 101")
        page.keyboard.press("j")
        page.keyboard.press("j")
        page.keyboard.press("k")
        row = page.locator("a.row").first
        assert row.evaluate("each => each === document.activeElement && each.matches(':focus-visible')")
        page.keyboard.press("Enter")
        page.wait_for_url("**/t/*")
        first = page.url
        page.keyboard.press("ArrowRight")
        page.keyboard.press("ArrowRight")
        assert page.evaluate("document.activeElement.id") == "step-2"
        page.keyboard.press("n")
        page.wait_for_url(lambda url: first not in url)
        page.keyboard.press("u")
        page.wait_for_url("**/?q=crates&outcome=wrong")
        page.keyboard.press("?")
        assert page.locator("dialog[open]").is_visible()
        page.keyboard.press("Escape")
        page.keyboard.press("x")
        page.wait_for_url(address)
        page.go_back()
        page.wait_for_url("**/?q=crates&outcome=wrong")
        sync_api.expect(page.locator("#results h1")).to_contain_text("10 of 101")
        assert page.locator("#q").input_value() == "crates" and page.locator("#outcome-wrong").is_checked()


@pytest.mark.slow
def test_rows_that_are_written_meanwhile_come_by_themselves(chromium, tmp_path):
    folder = write(tmp_path / "a", [numbered(1)])
    with served(folder) as address, page_of(chromium) as page:
        page.goto(address)
        write(folder, [numbered(2)])
        sync_api.expect(page.locator("a.row")).to_have_count(2)
        page.keyboard.press("j")
        write(folder, [numbered(3)])
        page.locator("#fresh").wait_for()  # a list that is being used does not move
        assert page.locator("a.row").count() == 2
        page.keyboard.press("r")
        sync_api.expect(page.locator("a.row")).to_have_count(3)


def test_hostile_texts_are_inert(chromium, tmp_path):
    folder = write(tmp_path / "a", [hostile(0, " ".join(HOSTILE)), hostile(1, "<b>" * 350_000)])
    outside: list[str] = []
    with served(folder) as address, page_of(chromium) as page:
        page.on("request", lambda request: None if request.url.startswith(address) else outside.append(request.url))
        page.on("dialog", lambda dialog: outside.append(dialog.message))
        page.goto(address)
        assert page.locator("a.row").count() == 2
        for path in page.locator("a.row").evaluate_all("all => all.map(each => each.getAttribute('href'))"):
            for each in (path, f"{path}/tokens", f"/compare?a={path[3:]}"):
                page.goto(address[:-1] + each)
                assert page.evaluate("window.hacked") is None
                assert page.evaluate("document.scripts.length") == 1
                assert page.locator("iframe, img, main script, main style, meta[http-equiv]").count() == 0
                assert (
                    page.locator("a[href^='javascript'], a[href^='data'], [onerror], [onmouseover], [onload]").count()
                    == 0
                )
                assert "49" not in page.locator("h1").inner_text()  # {{ 7 * 7 }} stays as it is
        page.goto(address)
        page.locator("label.facet", has_text="<script>").first.click()  # a value that a model wrote, as a filter
        sync_api.expect(page.locator("a.row")).to_have_count(1)
    assert outside == []


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_on_a_phone_nothing_is_wider_than_the_screen(chromium, address, scheme):
    with page_of(chromium, viewport=PHONE, color_scheme=scheme, has_touch=True, is_mobile=True) as page:
        page.goto(f"{address}?policy=student&sort=time")
        first = page.locator("a.row").first.get_attribute("href").split("?")[0]
        pages = [
            "",
            "?q=crates&outcome=wrong",
            first[1:],
            f"{first[1:]}/tokens",
            f"compare?a={first[3:]}",
            "policies",
        ]
        for path in pages if scheme == "light" else pages[:3]:
            page.goto(address + path)
            assert page.evaluate("document.documentElement.scrollWidth") <= PHONE["width"], path
            assert page.locator("h1").first.is_visible()
            ground = page.evaluate("getComputedStyle(document.body).backgroundColor")
            light = sum(map(int, re.findall(r"\d+", ground)[:3])) > 3 * 128
            assert light == (scheme == "light")


def test_dark_and_light_are_switched_and_remembered(chromium, address):
    with page_of(chromium, color_scheme="light") as page:
        page.goto(address)
        page.keyboard.press("t")
        page.goto(f"{address}policies")
        assert page.locator("html").get_attribute("data-theme") == "dark"


def test_two_policies_stand_side_by_side(chromium, address):
    with page_of(chromium, viewport={"width": 1200, "height": 900}) as page:
        page.goto(f"{address}policies")
        with page.expect_navigation():  # a key that is pressed before would go to the page that is left
            page.locator(".quarters a", has_text="A better").click()
        page.keyboard.press("j")
        page.keyboard.press("Enter")
        page.wait_for_url("**/compare?*")
        left, right = (page.locator(".two.step .half").nth(i).bounding_box() for i in (0, 1))
        assert left["y"] == right["y"] and left["x"] + left["width"] <= right["x"]
        said = [page.locator(".heads .gave").nth(i).inner_text() for i in (0, 1)]
        assert said[0] != said[1] == "17"


def test_a_selection_is_exported_as_it_is_shown(chromium, address):
    with page_of(chromium) as page:
        page.goto(f"{address}?outcome=wrong")
        page.keyboard.press("e")
        with page.expect_download() as started:
            page.keyboard.press("Enter")  # the first format has the focus
        lines = Path(started.value.path()).read_text().splitlines()
        assert started.value.suggested_filename == "trajectories.jsonl"
        assert len(lines) == 10 and all(json.loads(line)["success"] is False for line in lines)


@pytest.mark.slow
def test_tokens_are_gone_through_by_keyboard(chromium, address):
    with page_of(chromium) as page:
        page.goto(f"{address}?policy=teacher&outcome=success")
        page.keyboard.press("j")
        page.keyboard.press("Enter")
        page.wait_for_url("**/t/*")
        page.keyboard.press("v")
        page.wait_for_url("**/tokens*")
        for _ in range(3):
            page.keyboard.press("ArrowRight")
        assert page.locator(".tok.at").count() == 1
        assert "only read" in page.locator("#token").inner_text()
        page.locator("#tokens .tok.on").first.click()
        assert "weight\n1" in page.locator("#token").inner_text()
