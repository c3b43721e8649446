"""A real browser for tests of the pages: Debian's chromium, driven by Playwright (PyPI), without a screen."""

import shutil
from contextlib import contextmanager

import pytest


def require_chromium():
    """The path of chromium; skips the test where it, or Playwright, is not there."""
    pytest.importorskip("playwright", reason="Playwright is not installed: pip install playwright")
    path = shutil.which("chromium") or shutil.which("google-chrome")
    if path is None:
        pytest.skip("chromium is not installed: apt-get install chromium")
    return path


@contextmanager
def chromium():
    """A browser, for `new_context`."""
    from playwright.sync_api import sync_playwright

    path = require_chromium()
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=path, args=["--no-sandbox", "--disable-dev-shm-usage"])
        yield browser
        browser.close()


def log_in(context, address, key):
    """A page of a browser that is logged in. Its scripts' errors, refusals of the policy and dialogs fail the test."""
    page = context.new_page()
    page.faults = []
    page.on("dialog", lambda dialog: (page.faults.append(f"dialog {dialog.message}"), dialog.dismiss()))
    page.on("pageerror", lambda error: page.faults.append(f"error {error}"))
    page.on("console", lambda said: page.faults.append(said.text) if said.type in ("error", "warning") else None)
    page.goto(f"{address}/login")
    page.get_by_label("Key").fill(key)
    page.get_by_role("button", name="Log in").click()
    page.wait_for_url(lambda url: "/login" not in url)
    return page
