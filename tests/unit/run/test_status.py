"""Status, stop and export read a run's folder alone: what they say follows from the events that its workers wrote."""

import json
import threading
import time

import pytest

from smolray.run import status
from smolray.run.folder import EVENTS
from smolray.run.progress import count, duration, event_line, percent, progress_line, size

NOW = 1_800_000_000.0


def step(number, time, attempt=1, **fields):
    record = {
        "event": "step",
        "time": time,
        "attempt": attempt,
        "step": number,
        "epoch": 0.5,
        "loss": 1 / number,
        "samples": 80,
    }
    return (
        record
        | {"tokens": 4000, "seconds": 2.0, "data_wait_seconds": 0.1, "memory_bytes": 2**30 + number, "eta_seconds": 30}
        | fields
    )


def start(time, attempt=1, **fields):
    return {"event": "start", "time": time, "attempt": attempt, "workers": 2, "total_steps": 100} | fields


def write(folder, *events):
    folder.mkdir(parents=True, exist_ok=True)
    (folder / EVENTS).write_text("".join(json.dumps(e) + "\n" for e in events))
    return str(folder)


def end(time, kind="finished", step=100, attempt=1):
    return {"event": "end", "time": time, "attempt": attempt, "status": kind, "step": step, "seconds": 9}


@pytest.mark.parametrize(
    ("events", "age", "state"),
    [
        ([start(0), step(10, 5)], 10, "running"),
        ([start(0), step(10, 5)], 500, "stalled"),
        ([start(0), step(10, 200), step(20, 400)], 1000, "running"),  # its steps take long
        ([start(0), step(10, 5), end(6)], 9000, "finished"),
        ([start(0), step(10, 5), end(6, "failed") | {"error": "out of memory"}], 9, "failed"),
        ([start(0), step(10, 5), end(6, "stopped"), start(7, 2)], 9, "running"),
        (
            [
                start(0),
                step(10, 5),
                end(6, "stopped", 10),
                start(7, 2),
                {"event": "resume", "time": 7, "step": 10},
                end(9, "stopped", 12),
            ],
            10,
            "stopped",
        ),
        ([], 0, "waiting"),
    ],
)
def test_the_state_follows_from_the_last_events(tmp_path, events, age, state):
    run = write(tmp_path / "r", *[e | {"time": NOW + e["time"]} for e in events])
    found = status.run_status(run, now=NOW + age)
    assert found.state == state
    assert (found.stalled_seconds is not None) == (state == "stalled")
    assert found.error == ("out of memory" if state == "failed" else None)


def test_numbers_are_those_of_the_surviving_history(tmp_path):
    events = [start(NOW), step(10, NOW + 1), step(20, NOW + 2), step(30, NOW + 3, memory_bytes=2**40)]
    events += [{"event": "checkpoint", "time": NOW + 3, "step": 20, "path": "checkpoints/step-00000020"}]
    events += [
        start(NOW + 4, 2),
        {"event": "resume", "time": NOW + 4, "attempt": 2, "step": 20},
        step(25, NOW + 5, 2, loss=0.125),
    ]
    events += [
        {
            "event": "evaluate",
            "time": NOW + 6,
            "attempt": 2,
            "step": 25,
            "accuracy": {"overall": 0.5, "color": 1.0},
            "samples": 4,
        }
    ]
    found = status.run_status(write(tmp_path / "r", *events), now=NOW + 7)
    assert (found.step, found.total_steps, found.loss, found.epoch) == (25, 100, 0.125, 0.5)
    assert (found.samples_per_second, found.tokens_per_second, found.data_wait_share) == (40, 2000, pytest.approx(0.05))
    assert found.eta_seconds == (100 - 25) * 2.0, "one step of this attempt, and it took 2 s"
    assert found.memory_bytes == 2**30 + 25
    assert (found.attempts, found.restarts, found.workers) == (2, 1, 2)
    assert (found.last_checkpoint, found.accuracy, found.accuracy_step) == (
        "checkpoints/step-00000020",
        {"overall": 0.5, "color": 1.0},
        25,
    )


def test_runs_are_listed_newest_first_and_other_folders_are_not_runs(tmp_path):
    write(tmp_path / "old", start(NOW))
    write(tmp_path / "new", start(NOW + 50))
    (tmp_path / "shards").mkdir()
    assert [r.name for r in status.list_runs(str(tmp_path))] == ["new", "old"]
    assert status.list_runs(str(tmp_path / "absent")) == []
    with pytest.raises(status.RunNotFoundError, match=r"no run 'ne' .* there: new, old"):
        status.require_run(str(tmp_path), "ne")


def test_a_stop_waits_for_the_end_that_answers_it(tmp_path):
    run = write(tmp_path / "r", start(NOW), end(NOW, "stopped"), start(NOW, 2), step(10, NOW, 2))
    status.request_stop(run)
    assert status.run_status(run, NOW).stop_requested
    assert status.wait_for_end(run, 4, timeout=0.3, poll=0.05) is None, "the end of an earlier attempt is no answer"

    def answer():
        time.sleep(0.3)
        with (tmp_path / "r" / EVENTS).open("a") as file:
            file.write(json.dumps(end(NOW, "stopped", 12, 2)) + "\n")

    writer = threading.Thread(target=answer)
    writer.start()
    found = status.wait_for_end(run, 4, timeout=20, poll=0.05)
    writer.join()
    assert found is not None and found["step"] == 12
    status.clear_stop(run)
    assert not status.run_status(run, NOW).stop_requested


def test_following_yields_each_event_once_and_ends_with_the_run(tmp_path):
    run = write(tmp_path / "r", start(NOW), step(10, NOW))

    def go_on():
        for event in (step(20, NOW), end(NOW)):
            time.sleep(0.15)
            with (tmp_path / "r" / EVENTS).open("a") as file:
                file.write(json.dumps(event) + "\n")

    writer = threading.Thread(target=go_on)
    writer.start()
    seen = [(e["event"], e.get("step")) for e in status.follow_events(run, poll=0.05)]
    writer.join()
    assert seen == [("start", None), ("step", 10), ("step", 20), ("end", 100)]


def test_a_progress_line_says_what_the_event_holds():
    line = progress_line(step(10, NOW, learning_rate=1e-4), total_steps=100)
    assert (
        line == "step 10/100  epoch 0.5  loss 0.1000  lr 1.0e-04  40 samples/s  2k tokens/s  wait 5%  1.0 GiB  eta 30s"
    )
    assert progress_line({"event": "step", "step": 3}) == "step 3"
    assert (
        progress_line({"event": "step", "step": 3, "loss": float("nan"), "seconds": 0, "samples": 4})
        == "step 3  loss nan"
    )
    assert "step 100" in event_line(end(NOW)) and "finished" in event_line(end(NOW))
    assert event_line({"event": "end", "status": "failed", "error": "E: x"}) == "end     failed: E: x"
    assert event_line({"event": "drain", "time": 1, "node": "a"}) == "drain   node=a"


@pytest.mark.parametrize(
    ("value", "text"),
    [(0, "0"), (0.1234, "0.123"), (999.4, "999"), (999.6, "1k"), (1234, "1.23k"), (34_000, "34k"), (2.5e6, "2.5M")],
)
def test_counts_are_short(value, text):
    assert count(value) == text


@pytest.mark.parametrize(
    ("scheduler", "warmup", "warned"),
    [("cosine", 0, False), ("cosine", 24, False), ("cosine", 25, True), ("cosine", 50, True), ("constant", 50, False)],
)
def test_a_warm_up_that_is_longer_than_the_run_is_reported(scheduler, warmup, warned):
    """The scheduler `constant` has no warm-up."""
    config = {"optimizer": {"lr_scheduler_type": scheduler, "warmup_steps": warmup, "learning_rate": 1e-4}}
    first, *more = event_line({"event": "start", "workers": 2, "total_steps": 25, "config": config}).splitlines()
    assert first == "start   attempt 1, 2 worker(s), 25 steps"
    assert [f"optimizer.warmup_steps = {warmup}, and the run has 25 steps" in line for line in more] == [True] * warned


def test_units():
    assert [duration(s) for s in (0.4, 61, 3725, float("inf"))] == ["0s", "1m01s", "1h02m", "?"]
    assert (percent(0.8806), size(3 * 2**20), size(1.5 * 2**30)) == ("88.1 %", "3 MiB", "1.5 GiB")


def test_a_failed_run_says_where_its_workers_wrote(tmp_path):
    place = {"logs": "/tmp/ray/session_1/logs/worker-*"}
    launch = {"event": "launch", "time": NOW, "attempt": 1} | place
    failed = end(NOW + 6, "failed") | {"error": "ActorDiedError: worker lost"} | place
    run_dir = write(tmp_path, launch, start(NOW + 1), failed)
    assert status.run_status(run_dir).logs == place["logs"]
    assert "the workers' own output: /tmp/ray/session_1/logs/worker-* on each node" in event_line(failed)
