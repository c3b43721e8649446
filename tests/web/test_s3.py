"""Runs in a bucket: the pages show them, follow them, stop them, and are written there as files."""

import re

import pyarrow.fs as pafs
import pytest

from smolray import storage
from smolray.run.events import EventLog
from smolray.run.status import stop_requested
from smolray.serve.keys import KeyRing, add_key
from smolray.tune.report import read_report, searches_in
from smolray.web.app import make_app
from smolray.web.exported import export_pages
from smolray.web.processes import Processes
from smolray.web.run_list import RunList
from smolray.web.sessions import Sessions
from smolray.web.site import Searches, Site
from tests.s3 import s3_server as s3_server
from tests.server import serving
from tests.unit.web.test_live import messages
from tests.webpages import Browser, write_folder

pytestmark = pytest.mark.slow
ROOT = "s3://bucket/web/runs"
STEP = {"loss": 0.5, "seconds": 1.0, "samples": 64}


@pytest.fixture(scope="module")
def bucket(s3_server, tmp_path_factory):
    """A finished run and one that goes on, as they lie in a bucket."""
    local = tmp_path_factory.mktemp("runs")
    write_folder(local, "done", storage=ROOT)
    write_folder(local, "going", status="", storage=ROOT)
    fs, path = storage.filesystem(ROOT)
    pafs.copy_files(str(local), path, destination_filesystem=fs)
    return ROOT


@pytest.fixture
def site(bucket, tmp_path):
    keys = tmp_path / "keys.json"
    add_key(keys, "first", ("view",))
    runs = RunList(bucket)
    runs.poll = 1.0
    return Site(
        bucket, Sessions(KeyRing(keys)), Processes(tmp_path / "commands"), runs, Searches(searches_in, read_report)
    )


@pytest.fixture
def key(site, tmp_path):
    return add_key(tmp_path / "keys.json", "anna", ("operate",))


def test_runs_of_a_bucket_are_listed_shown_followed_and_stopped(site, key):
    browser = Browser(site, key)
    site.runs.look(None)
    text = browser.get("/").text
    assert "2 runs: 1 running, 1 finished" in text and 'href="/runs/done"' in text
    shown = browser.get("/runs/done").text
    assert "✓ correct" in shown and "Training loss" in shown
    image = browser.get(re.search(r'src="(/runs/done/image[^"]+)"', shown)[1])
    assert image.headers["content-type"] == "image/png" and image.content.startswith(b"\x89PNG")
    assert "the report" in browser.get("/runs/done/report").text
    assert "+0.0 %" in browser.get("/compare?a=done&b=going").text
    for path in ("/data", "/searches", "/cluster"):
        assert browser.get(path).status_code == 200
    assert browser.get("/runs/..%2fruns").status_code == 404

    cookie = site.sessions.begin(key)
    with serving(make_app(site)) as address:
        stream = messages(address, "/runs/going/live", cookie)
        next(stream)
        log = EventLog(f"{ROOT}/going", flush_seconds=0)
        log.write("step", step=31, **STEP)
        _, changed = next(stream)
        assert {"charts", "now", "log"} <= {part["id"] for part in changed}
        stream.close()
    assert browser.post("/runs/going/stop").status_code == 303 and stop_requested(f"{ROOT}/going")


def test_a_run_that_has_ended_is_not_read_at_every_look(site):
    site.runs.poll = 0.0
    before, after = ({run.name: run for run in site.runs.look(None)} for _ in range(2))
    assert after["done"] is before["done"]


def test_pages_in_a_bucket_tell_browsers_what_they_are(bucket, s3_server):
    assert export_pages(RunList(bucket), "s3://bucket/web/pages") == 2
    fs, _ = storage.filesystem("s3://bucket")
    for name, kind in (("index.html", "text/html"), ("web.css", "text/css"), ("runs/done/index.html", "text/html")):
        with fs.open_input_stream(f"bucket/web/pages/{name}") as file:
            assert file.metadata()["Content-Type"].decode().startswith(kind), name
    image = storage.list_files("s3://bucket/web/pages/runs/done/images")[0]
    with fs.open_input_stream(image.path) as file:
        assert file.metadata()["Content-Type"] == b"image/png"
