"""The pages in a real browser: they follow their runs, do what their buttons say, and run no text as code."""

import re

import pytest

from smolray.run.status import stop_requested
from smolray.serve.keys import add_key, revoke_key
from smolray.web.app import make_app
from tests.browser import chromium, log_in
from tests.commands import append
from tests.server import serving
from tests.webpages import EVIL, site_of, write_folder

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1800)]
PATIENCE = 120_000  # ms
STEP = {"loss": 0.5, "seconds": 1.0, "samples": 64, "data_wait_seconds": 0.1, "memory_bytes": 2**30}


@pytest.fixture
def root(tmp_path):
    folder = tmp_path / "runs"
    write_folder(folder, "done")
    write_folder(folder, "better", right=(True, True))
    write_folder(folder, "going", status="")
    write_folder(folder, "<img src=x onerror=alert(1)>", question=EVIL, wrong=EVIL)
    return folder


@pytest.fixture
def keys(tmp_path):
    return tmp_path / "keys.json"


def test_a_page_follows_its_run_and_its_buttons_do_what_they_say(root, keys):
    operator_key, viewer_key = add_key(keys, "anna", ("operate",)), add_key(keys, "ben", ("view",))
    with serving(make_app(site_of(root, keys))) as address, chromium() as browser:
        operator = log_in(browser.new_context(), address, operator_key)
        viewer = log_in(browser.new_context(), address, viewer_key)
        for page in (operator, viewer):
            page.set_default_timeout(PATIENCE)
            page.evaluate("window.loaded = 'once'")

        append(root / "going", event="step", step=31, **STEP)
        for page in (operator, viewer):
            page.locator("tr", has_text="going").get_by_text("31 / 60").wait_for()
            assert page.evaluate("window.loaded") == "once", "the page was loaded again"
        operator.get_by_label("Filter").fill("finished better")
        assert operator.locator("#rows tr:visible").count() == 1
        operator.get_by_label("Filter").fill("going")
        operator.get_by_role("link", name="going").click()
        viewer.goto(f"{address}/runs/going")
        assert viewer.get_by_role("button", name="Stop").count() == 0

        curve = operator.locator("#charts polyline").first.get_attribute("points")
        for step in range(32, 40):
            append(root / "going", event="step", step=step, **STEP | {"loss": 5 / step})
        operator.wait_for_function(
            "before => document.querySelector('#charts polyline').getAttribute('points') !== before", arg=curve
        )
        operator.get_by_role("button", name="Stop").click()
        operator.get_by_text("stops as soon as it has saved").wait_for()
        assert stop_requested(str(root / "going"))
        append(root / "going", event="end", status="stopped", step=39)
        for page in (operator, viewer):
            page.locator(".badge.stopped").first.wait_for()
        operator.locator("button:has-text('Resume'):enabled").wait_for()

        operator.goto(f"{address}/compare")
        operator.locator("select[name=a]").select_option("done")
        operator.locator("select[name=b]").select_option("better")
        operator.get_by_role("button", name="Compare").click()
        operator.get_by_text("+50.0 %").first.wait_for()
        assert operator.faults == viewer.faults == []

        viewer.goto(address)
        revoke_key(keys, "ben")
        viewer.wait_for_url(re.compile("/login"))


def test_text_of_a_data_set_stays_text(root, keys):
    key = add_key(keys, "anna", ("operate",))
    with serving(make_app(site_of(root, keys))) as address, chromium() as browser:
        page = log_in(browser.new_context(), address, key)
        page.set_default_timeout(PATIENCE)
        page.get_by_role("link", name="<img src=x onerror=alert(1)>").click()
        page.get_by_text(EVIL).first.wait_for()
        append(next(root.glob("<img*")), event="skipped", what=EVIL, why=EVIL)
        page.locator("#events").get_by_text("alert").first.wait_for()  # also what came while the page was open
        page.locator("summary", has_text="Data, settings").click()
        page.wait_for_timeout(500)
        assert page.faults == []


def test_a_page_is_read_by_keyboard_alone(root, keys):
    key = add_key(keys, "anna", ("operate",))
    with serving(make_app(site_of(root, keys))) as address, chromium() as browser:
        page = log_in(browser.new_context(viewport={"width": 390, "height": 844}), address, key)
        reached = []
        for _ in range(12):
            page.keyboard.press("Tab")
            reached.append(page.evaluate("document.activeElement.innerText || document.activeElement.type"))
        assert reached[0] == "Skip to the content" and {"Runs", "Compare", "Log out", "search", "going"} <= set(reached)
        assert page.evaluate("document.documentElement.scrollWidth <= window.innerWidth")
