"""An open page is told what has changed, and nothing else, until its key is revoked."""

import json
import threading

import pytest
import requests

from smolray.serve.keys import add_key, revoke_key
from smolray.web.app import make_app
from tests.commands import append
from tests.server import serving
from tests.webpages import site_of, write_folder


@pytest.fixture
def site(tmp_path):
    write_folder(tmp_path / "runs", "going", status="")
    write_folder(tmp_path / "runs", "done")
    return site_of(tmp_path / "runs", tmp_path / "keys.json")


def messages(address, path, cookie):
    """What a page receives, as (event, data)."""
    response = requests.get(
        f"{address}{path}", cookies={"smolray_session": cookie}, stream=True, timeout=60, headers={"host": "localhost"}
    )
    assert response.status_code == 200, response.text
    event = "message"
    for line in response.iter_lines(decode_unicode=True):
        name, _, value = line.partition(": ")
        event = value if name == "event" else event
        if name == "data":
            yield event, json.loads(value)
            event = "message"


def test_a_page_receives_what_changes_until_its_key_is_revoked(site, tmp_path):
    cookie = site.sessions.begin(add_key(tmp_path / "keys.json", "user", ("view",)))
    with serving(make_app(site)) as address:
        stream = messages(address, "/live", cookie)
        _, first = next(stream)
        assert [part["id"] for part in first] == ["summary", "queue", "rows", "run:going", "run:done"]
        append(tmp_path / "runs" / "going", event="step", step=31, loss=0.125, seconds=1.0, samples=8)
        _, second = next(stream)
        assert [part["id"] for part in second] == ["run:going"] and "0.1250" in second[0]["html"]
        threading.Timer(0.1, revoke_key, (tmp_path / "keys.json", "user")).start()
        kinds = [event for event, _ in stream]
        assert kinds[-1] == "over"


def test_the_page_of_a_run_receives_its_curves(site, tmp_path):
    cookie = site.sessions.begin(add_key(tmp_path / "keys.json", "user", ("operate",)))
    with serving(make_app(site)) as address:
        stream = messages(address, "/runs/going/live", cookie)
        _, first = next(stream)
        append(tmp_path / "runs" / "going", event="step", step=31, loss=0.125, seconds=1.0, samples=8)
        _, second = next(stream)
        changed = {part["id"] for part in second}
        assert {"charts", "now", "log"} <= changed and not {"answers", "events", "actions"} & changed
        assert len(first) > len(second)
        stream.close()
