"""Messages about a run reach a real HTTP server by Apprise; one that cannot be sent neither stops nor slows the run."""

import json
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Thread

import pytest

from smolray.config import ConfigError, load_config
from smolray.launch.session import started_run
from smolray.run.status import STALLED_SECONDS
from smolray.tracking.notify import NotifyConsumer, check_notify, notified, send
from tests.tracked import add_events, end, step, tracked_run


@pytest.fixture
def inbox(monkeypatch):
    """(title, message) pairs that a server at json://$PLACE has received."""
    received = []

    class Inbox(BaseHTTPRequestHandler):
        def do_POST(self):
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            received.append((body["title"], body["message"]))
            self.send_response(200)
            self.end_headers()

        def log_message(self, *args):
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Inbox)
    Thread(target=server.serve_forever, daemon=True).start()
    monkeypatch.setenv("PLACE", f"127.0.0.1:{server.server_port}")
    yield received
    server.shutdown()
    server.server_close()


def run_of(folder, *settings):
    return tracked_run(folder, "notify=json://$PLACE", *settings)


def test_the_end_of_a_run_and_its_lost_workers_are_told_once(tmp_path, inbox):
    config, said = run_of(tmp_path), []
    start = {"event": "start", "time": 1.0, "attempt": 3, "total_steps": 6, "config": {}}
    with notified(config, said.append):
        again = {"event": "resume", "time": 2.0, "attempt": 4, "step": 5}
        add_events(config, start, step(5, 3), start | {"attempt": 4}, again, step(6, 4), end())
    assert inbox == [("demo lost workers", "It goes on from step 5."), ("demo finished", "step 4")]
    assert said == ["notify: sends to 1 address"]


def test_a_resume_by_a_person_is_no_loss_and_a_stop_no_message(tmp_path, inbox):
    config = run_of(tmp_path)
    with notified(config, lambda line: None):
        resume = {"event": "resume", "time": 2.0, "attempt": 3, "step": 4}
        add_events(config, resume, step(5, 3), end() | {"status": "stopped"})
    assert inbox == []


def test_a_run_that_fails_before_its_first_step_is_told(tmp_path, inbox):
    settings = [f"storage={tmp_path}", "data.train=nothing", "notify=json://$PLACE", "name=early"]
    with pytest.raises(ValueError, match="cannot be read"), started_run(load_config(None, settings)):
        raise ValueError("data.train cannot be read")
    assert inbox == [("early failed", "ValueError: data.train cannot be read")]


def test_a_stall_is_told_once_until_the_run_writes_again(tmp_path, inbox):
    consumer = NotifyConsumer(run_of(tmp_path), lambda line: None)
    for number in (5, 6):
        consumer.take([step(number) | {"time": time.time() - STALLED_SECONDS - 1}], number)
        consumer.idle()
        consumer.idle()
    consumer.take([step(7) | {"time": time.time()}], 7)
    consumer.idle()
    assert [title for title, _ in inbox] == ["demo has stalled"] * 2
    assert inbox[0][1].startswith("Nothing was written for 12")


def test_a_service_that_does_not_answer_is_told_and_the_run_goes_on(tmp_path, monkeypatch):
    monkeypatch.setenv("PLACE", "127.0.0.1:9")
    config, said = run_of(tmp_path), []
    with notified(config, said.append):
        add_events(config, end())
    assert said[1] == "notify: the message that demo finished was not sent: a service did not take it"


@pytest.mark.parametrize(
    ("address", "why"),
    [
        ("no-such-service://x", "is no address that Apprise knows"),
        ("ntfy://$NO_SUCH_VARIABLE", "names \\$NO_SUCH_VARIABLE, which is not set"),
        ("mailto://me:secret@example.org", "holds the password of a mailto address"),
    ],
)
def test_an_address_that_cannot_be_used_is_refused_before_the_run(tmp_path, address, why):
    with pytest.raises(ConfigError, match=why):
        check_notify(run_of(tmp_path, f"notify={address}"))


def test_a_secret_stays_in_the_environment(tmp_path, monkeypatch):
    monkeypatch.setenv("PASSWORD", "hunter2")
    config = run_of(tmp_path, "notify=mailto://me:$PASSWORD@example.org")
    check_notify(config)
    assert "hunter2" not in config.model_dump_json()


def test_without_addresses_nothing_is_sent(tmp_path):
    assert send(tracked_run(tmp_path), "finished", "") == ""
