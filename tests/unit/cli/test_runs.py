"""Runs are shown, followed and stopped by what is in their folder."""

import os
import subprocess
import sys
import threading
import time

from smolray.run.account import DataAccount, RowAccount
from tests.commands import append, smolray


def test_status_shows_all_runs_or_one(run):
    (run.parent / "shards").mkdir()
    everything = smolray("status", "--storage", str(run.parent)).stdout
    assert [line.split()[:3] for line in everything.splitlines()[1:]] == [["demo", "running", "20/100"]]
    one = smolray("status", "demo", env={"SMOLRAY_STORAGE": str(run.parent)}).stdout
    for part in ("0.2500", "64 samples/s", "900 tokens/s", "10 %", "8s"):
        assert part in one
    assert "no runs under" in smolray("status", "--storage", str(run / "empty")).stdout


def test_status_and_logs_tell_what_became_of_the_data(run):
    account = DataAccount(
        "s", 20, RowAccount(with_images=21, quarantined={"empty_answer": 1}), too_long=2, max_length=9
    )
    append(run, event="data", train=account.to_json())
    for command in ("status", "logs"):
        said = " ".join(smolray(command, "demo", "--storage", str(run.parent)).stdout.split())  # tables break lines
        for words in (
            "1 quarantined (empty_answer 1)",
            "18 of 20 conversations kept",
            "longer than data.max_length = 9",
        ):
            assert words in said


def test_a_terminal_of_ascii_shows_what_it_can(run):
    append(run, event="start", workers=1)  # without a loss: the cell is a dash
    command = [sys.executable, "-m", "smolray", "status", "--storage", str(run.parent)]
    done = subprocess.run(command, capture_output=True, env={**os.environ, "PYTHONIOENCODING": "ascii"}, timeout=120)
    assert done.returncode == 0 and b"demo" in done.stdout and not done.stderr, done.stderr.decode()
    assert b"?" in done.stdout


def test_logs_render_events_and_follow_to_the_end(run):
    plain = smolray("logs", "demo", "--storage", str(run.parent)).stdout.splitlines()
    assert [line.split("  ")[0] for line in plain] == ["start", "step 10/100", "step 20/100"]

    def finish():
        time.sleep(0.7)
        append(run, event="end", status="finished", step=100, seconds=3)

    writer = threading.Thread(target=finish)
    writer.start()
    followed = smolray("logs", "demo", "--follow", "--storage", str(run.parent)).stdout.splitlines()
    writer.join()
    assert followed[:3] == plain
    assert followed[3].startswith("end     finished at step 100")


def loop_that_answers(run, seen):
    """What the training loop does: looks for the flag, saves, says so."""
    for _ in range(200):
        if (run / "control" / "stop").exists():
            seen.append(True)
            append(run, event="checkpoint", step=23, path="checkpoints/step-00000023")
            append(run, event="end", status="stopped", step=23, seconds=9)
            return
        time.sleep(0.05)


def test_stop_asks_waits_and_says_what_was_saved(run):
    seen = []
    loop = threading.Thread(target=loop_that_answers, args=(run, seen))
    loop.start()
    done = smolray("stop", "demo", "--wait", "20", "--storage", str(run.parent))
    loop.join()
    assert seen == [True]
    assert done.exit_code == 0
    assert "demo stopped at step 23, saved as checkpoints/step-00000023" in done.stdout
    assert not (run / "control" / "stop").exists(), "an answered request must not stop the next launch"
    again = smolray("stop", "demo", "--storage", str(run.parent))
    assert (again.exit_code, again.stdout) == (0, "demo has stopped already, at step 23\n")
    assert not (run / "control" / "stop").exists()


def test_a_stop_without_an_answer_fails_and_stays_asked(run):
    done = smolray("stop", "demo", "--wait", "0.3", "--storage", str(run.parent))
    assert done.exit_code == 1
    assert "has not stopped" in done.stderr
    assert (run / "control" / "stop").exists()
    assert "stop asked" in smolray("status", "--storage", str(run.parent)).stdout
