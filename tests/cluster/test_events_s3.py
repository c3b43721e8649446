"""The log of a run on S3: what is sent grows with the log, not with its square, and every reader sees the events that a
local log gives.
"""

import json
import uuid
from dataclasses import replace

import pytest

from smolray import storage
from smolray.report.run import write_report
from smolray.run.events import EventLog, EventTail, read_events, surviving
from smolray.run.folder import EVENTS, RunFolder
from smolray.run.status import list_runs, require_run, run_status, wait_for_end
from smolray.tracking.points import point_of

STEPS, PER_FLUSH, PER_CHECKPOINT = 240, 2, 60


def a_step(number):
    """As long as that of a real run."""
    return {
        "step": number,
        "total_steps": 100_000,
        "position": [0, 16 * number],
        "epoch": number / 1e5,
        "loss": 7.101574778556824 / number,
        "grad_norm": 23.69839859008789,
        "learning_rate": 1.2345678901e-05,
        "samples": 2200,
        "tokens": 45_100,
        "label_tokens": 6_600,
        "seconds": 1.0812844624000718,
        "data_wait_seconds": 0.027660393967499658,
        "memory_bytes": 78_392_524_800,
        "skipped": False,
        "loss_scale": None,
        "token_accuracy": 0.8123456789012345,
        "eta_seconds": 72_000.3,
    }


@pytest.fixture
def run_dir(s3_server):
    return f"s3://bucket/logs/{uuid.uuid4().hex[:8]}"


class Meter:
    """Counts the bytes of every file that appears or changes in a folder."""

    def __init__(self, folder):
        self.folder, self.sent, self.seen = folder, 0, set()

    def look(self):
        for file in storage.list_files(self.folder, recursive=True):
            about = (file.path, file.size, file.mtime_ns)
            self.sent += 0 if about in self.seen else file.size
            self.seen.add(about)
        return self.sent


def test_what_is_sent_grows_with_the_log_and_each_line_is_sent_twice_at_most(run_dir):
    meter, log = Meter(run_dir), EventLog(run_dir)
    log.write("start", workers=1, total_steps=100_000)
    sent = [0]
    for number in range(1, STEPS + 1):
        log.flush_seconds = 0.0 if number % PER_FLUSH == 0 else 1e9  # one flush for some steps, as after five seconds
        log.write("step", **a_step(number))
        if number % PER_CHECKPOINT == 0:
            log.flush()
        if number % PER_FLUSH == 0:
            meter.look()
        if number % (STEPS // 2) == 0:
            sent.append(meter.sent)

    events = read_events(run_dir)
    written = sum(len(json.dumps(event)) + 1 for event in events)
    print(f"{STEPS} steps, {STEPS // PER_FLUSH} flushes: {written} bytes of events, {meter.sent} bytes sent")
    assert [e["step"] for e in events if e["event"] == "step"] == list(range(1, STEPS + 1))
    assert written <= meter.sent <= 2.05 * written
    assert sent[2] - sent[1] <= 1.1 * sent[1], "the second half costs what the first does"


def history(run_dir):
    """Two attempts; the second discards a step of the first."""
    first = EventLog(run_dir, flush_seconds=0.0)
    first.write("preparing")
    first.write("start", workers=2, total_steps=30)
    for number in range(1, 31):
        first.write("step", **a_step(number))
    first.write("checkpoint", step=20, path="checkpoints/step-00000020")
    first.flush()
    EventLog(run_dir, flush_seconds=0.0).write("end", status="failed", error="a node died")

    second = EventLog(run_dir)
    second.write("start", workers=1, total_steps=30)
    second.write("resume", step=20, position=(0, 320))
    for number in range(21, 31):
        second.write("step", **a_step(number))
    second.write("evaluate", step=30, accuracy={"overall": 0.5}, samples=10)
    second.write("end", status="finished", step=30, seconds=3.0)
    second.flush()


def without_times(events):
    return [{k: v for k, v in e.items() if k != "time"} for e in events]


def test_status_report_and_curves_are_those_of_a_local_log(run_dir, tmp_path):
    local = str(tmp_path / RunFolder(run_dir).name)
    history(run_dir)
    storage.append_text(RunFolder(local).events, "".join(f"{json.dumps(e)}\n" for e in read_events(run_dir)))
    assert read_events(run_dir) == read_events(local) and len(surviving(read_events(local))) < len(read_events(local))

    assert require_run(run_dir.rsplit("/", 1)[0], RunFolder(run_dir).name) == run_dir
    found = run_status(run_dir)
    assert (found.state, found.step, found.attempts, found.restarts) == ("finished", 30, 2, 1)
    assert replace(found, run_dir=local) == run_status(local)
    assert run_dir in [s.run_dir for s in list_runs(run_dir.rsplit("/", 1)[0])]

    assert storage.read_bytes(write_report(run_dir)) == storage.read_bytes(write_report(local))
    curves, of_local = ([point_of(e) for e in EventTail(uri).new()] for uri in (run_dir, local))
    assert curves == of_local and sum(point is not None for point in curves) > 30


def test_attempts_are_in_order_when_a_worker_of_an_older_one_still_writes(run_dir):
    old = EventLog(run_dir, flush_seconds=0.0)
    old.write("start", workers=1)
    old.write("step", **a_step(1))
    new = EventLog(run_dir, flush_seconds=0.0)
    new.write("start", workers=1)
    new.write("resume", step=1, position=(0, 16))
    for number in range(2, 20):
        old.write("step", **a_step(number))
        new.write("step", **a_step(number) | {"loss": -1.0})
    new.flush()
    old.flush()
    kept = [e for e in surviving(read_events(run_dir)) if e["event"] == "step"]
    assert [e["step"] for e in kept] == list(range(1, 20))
    assert {e["loss"] for e in kept[1:]} == {-1.0}, "what the old worker wrote after the resume is discarded"


def test_a_run_that_began_with_one_file_goes_on_in_parts(run_dir, tmp_path):
    history(str(tmp_path))
    before = (tmp_path / EVENTS).read_bytes()
    storage.write_bytes(RunFolder(run_dir).events, before)
    tail = EventTail(run_dir)
    assert len(tail.new()) == len(read_events(run_dir)) == len(before.splitlines())

    log = EventLog(run_dir, flush_seconds=0.0)
    assert log.attempt == 3
    log.write("start", workers=1, total_steps=30)
    log.write("end", status="stopped", step=30)
    assert [e["event"] for e in tail.new()] == ["start", "end"] and tail.new() == []
    assert without_times(read_events(run_dir))[:-2] == without_times(map(json.loads, before.splitlines()))
    assert storage.read_bytes(RunFolder(run_dir).events) == before, "and is never written again"
    assert run_status(run_dir).state == "stopped" and run_status(run_dir).attempts == 3
    assert wait_for_end(run_dir, len(before.splitlines()), 1.0)["status"] == "stopped"
