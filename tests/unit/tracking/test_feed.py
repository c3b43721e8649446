"""A tracker that fails or hangs stops nothing, and later has what it missed."""

import socket
import threading
import time

from smolray.tracking import feed as feed_module
from smolray.tracking.feed import fed
from smolray.tracking.registry import tracker_consumers
from tests.tracked import add_events, end, step, tracked_run


class Memory:
    """A consumer that remembers; `fault(number of the call)` may raise or wait."""

    name, remedy = "memory", "send it again"

    def __init__(self, received=0, fault=lambda call: None):
        self.received, self.fault = received, fault
        self.calls, self.steps, self.status = 0, [], None

    def start(self):
        return self.received, "here"

    def take(self, events, received):
        self.calls += 1
        self.fault(self.calls)
        self.steps += [event["step"] for event in events if event["event"] == "step"]
        self.received = received

    def idle(self):
        pass

    def end(self, status):
        self.status = status


def test_history_then_what_is_written_live_then_the_end(tmp_path, monkeypatch):
    monkeypatch.setattr(feed_module, "LOCAL_SECONDS", 0.2)
    config, memory, said = tracked_run(tmp_path), Memory(), []
    with fed(config.run_dir, [memory], said.append, 30):
        wait_for(lambda: memory.steps == [1, 2, 3, 4])  # the first step 3 was discarded by the resume
        add_events(config, step(5))
        wait_for(lambda: memory.steps[-1] == 5)  # live, not only at the end
        add_events(config, step(6), end("stopped"))
    assert memory.steps == [1, 2, 3, 4, 5, 6] and memory.status == "stopped" and said == ["memory: here"]


def wait_for(condition, seconds=20):
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.05)


def test_a_consumer_continues_behind_what_it_has(tmp_path):
    config, first = tracked_run(tmp_path), Memory()
    with fed(config.run_dir, [first], print, 30):
        pass
    add_events(config, step(5))
    second = Memory(first.received)
    with fed(config.run_dir, [second], print, 30):
        pass
    assert second.steps == [5]


def test_what_a_failing_tracker_has_missed_is_sent_again(tmp_path, monkeypatch):
    monkeypatch.setattr(feed_module, "RETRY_SECONDS", 0.1)

    def fault(call):
        if call <= 2:
            raise SystemExit("no network")

    config, memory, said = tracked_run(tmp_path), Memory(fault=fault), []
    with fed(config.run_dir, [memory], said.append, 30):
        wait_for(lambda: memory.steps)
    assert memory.steps == [1, 2, 3, 4] and memory.status
    assert [line for line in said if "failed" in line] == [
        "memory failed: SystemExit: no network; the run goes on, and this is tried again"
    ]


def test_a_tracker_that_hangs_delays_the_end_by_its_limit_and_others_not_at_all(tmp_path):
    never = threading.Event()
    config, said = tracked_run(tmp_path), []
    stuck, healthy = Memory(fault=lambda call: never.wait()), Memory()
    began = time.monotonic()
    with fed(config.run_dir, [stuck, healthy], said.append, 1.0):
        wait_for(lambda: healthy.steps)
        assert time.monotonic() - began < 10
        add_events(config, end())
        ending = time.monotonic()
    assert time.monotonic() - ending < 5 and healthy.status == "finished" and stuck.status is None
    assert "memory does not answer, and the run does not wait for it; send it again" in said
    never.set()


def test_a_server_that_never_answers_does_not_hold_the_run(tmp_path, monkeypatch):
    """MLflow's real client, and a server that accepts and says nothing."""
    config, said = tracked_run(tmp_path), []
    with socket.create_server(("127.0.0.1", 0)) as server:
        monkeypatch.setenv("MLFLOW_TRACKING_URI", f"http://127.0.0.1:{server.getsockname()[1]}")
        monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
        began = time.monotonic()
        with fed(config.run_dir, list(tracker_consumers(config, ["mlflow"], dict)), said.append, 1.0) as feeds:
            wait_for(lambda: feeds[0].consumer.tracker.__dict__.get("client"), 60)
            ending = time.monotonic()
        assert time.monotonic() - ending < 5 and time.monotonic() - began < 90
        assert not feeds[0].complete and "smolray track demo mlflow" in said[-1]
    feeds[0].join(60)  # while MLflow still has this address, or it would make a store in the current folder
    assert not feeds[0].is_alive()


def test_a_run_that_fails_is_told_as_failed(tmp_path):
    config, memory = tracked_run(tmp_path), Memory()
    try:
        with fed(config.run_dir, [memory], print, 30):
            raise RuntimeError("out of memory")
    except RuntimeError:
        pass
    assert memory.status == "failed"
