"""The list of runs is that of `smolray status`, and reads again only what has changed."""

import re
import shutil
import time

import pytest

from smolray.run.lease import owning
from smolray.run.queue import enter
from smolray.run.status import list_runs
from smolray.web.run_list import RunList
from tests.commands import append
from tests.webpages import Browser, site_of, write_folder

pytestmark = pytest.mark.seconds


@pytest.fixture(scope="module")
def many(tmp_path_factory):
    """200 runs, of which each has 2,000 steps."""
    root = tmp_path_factory.mktemp("many") / "runs"
    first = write_folder(root, "run-000", steps=2000)
    for number in range(1, 200):
        shutil.copytree(first, root / f"run-{number:03d}")
    return root


def test_the_first_page_comes_within_a_second_with_200_runs(many):
    """Also when the storage was never looked at before: what is not read yet follows. CPU-seconds: other tests run
    beside this one.
    """
    browser = Browser(site_of(many))
    browser.get("/login")  # the templates are compiled
    began = time.process_time()
    text = browser.get("/").text
    assert time.process_time() - began < 1.0
    assert "reading" in text.lower() or "200 runs" in text
    deadline = time.monotonic() + 120
    while "200 runs: 200 finished" not in text:
        assert time.monotonic() < deadline, text[:3000]
        text = browser.get("/").text
    began = time.process_time()
    assert browser.get("/").text.count('id="run:') == 200
    assert time.process_time() - began < 1.0


def test_the_list_is_that_of_status_and_follows_every_change(tmp_path):
    root = tmp_path / "runs"
    write_folder(root, "done")
    going = write_folder(root, "going", status="")
    (root / "shards").mkdir()
    runs = RunList(str(root))
    runs.poll = 0.0
    assert {run.name: run for run in runs.look(10)} == {run.name: run for run in list_runs(str(root))}
    assert [run.name for run in runs.look(10)] == ["going", "done"]  # what goes on stands first

    append(going, event="end", status="stopped", step=30)
    assert {run.name: run.state for run in runs.look(10)} == {"going": "stopped", "done": "finished"}
    (going / "control").mkdir()
    (going / "control" / "stop").write_text("now")
    assert [run.stop_requested for run in runs.look(10) if run.name == "going"] == [True]
    shutil.rmtree(root / "done")
    write_folder(root, "new", status="")
    assert [run.name for run in runs.look(10)] == ["new", "going"]


def test_the_queue_is_shown_in_its_order(tmp_path):
    root = tmp_path / "runs"
    write_folder(root, "first", status="")
    browser = Browser(site_of(root))
    assert "Queue</h2>" not in browser.get("/").text
    with owning(f"{root}/first", "train"), owning(f"{root}/urgent", "train"):
        enter(str(root), "first", "ann <b>", 0, 2)
        enter(str(root), "urgent", "bob", 5, 1)
        site = site_of(root)
        site.runs.look(None)
        text = Browser(site).get("/").text
    table = text[text.index("Queue</h2>") :]
    rows = re.findall(r"<tr><td>(\d)</td><th scope=\"row\"><a href=\"/runs/(\w+)\">", table)
    assert rows == [("1", "urgent"), ("2", "first")] and "ann &lt;b&gt;" in table and "less than a minute" in table


def test_a_run_that_has_not_changed_is_not_read_again(tmp_path):
    root = tmp_path / "runs"
    write_folder(root, "done")
    runs = RunList(str(root))
    runs.poll = 0.0
    before = runs.look(10)
    (root / "done" / "events.jsonl").chmod(0o000)  # root reads it nevertheless: its time and size are the same
    assert runs.look(10)[0] is before[0]


def test_a_storage_that_is_away_is_told(tmp_path):
    runs = RunList("unknown://nowhere")
    assert runs.look(10) == [] and "unknown" in runs.error
