"""The first signal stops politely, the second at once; the exit codes are the shell's."""

import signal
import subprocess
import sys
import time

import pytest

POLITE = """
import sys, time
from smolray.cluster.signals import Stopped, stop_signals
with stop_signals() as signals:
    signals.notice, signals.last_words = b"saving\\n", lambda: print("last words", flush=True)
    signals.patient = sys.argv[1] == "patient"
    try:
        print("ready", flush=True)
        while not signals.number:
            time.sleep(0.1)
        print("saved", flush=True)
        time.sleep(30 if sys.argv[2] == "slow" else 0)
    except Stopped as stopped:
        print("raised", flush=True)
        sys.exit(stopped.code)
    sys.exit(signals.code)
"""


def start(*arguments):
    process = subprocess.Popen(
        [sys.executable, "-c", POLITE, *arguments], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    assert process.stdout.readline() == "ready\n"
    return process


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
@pytest.mark.parametrize(("manner", "said"), [("patient", "saved\n"), ("impatient", "raised\n")])
def test_the_first_signal_stops_politely(number, code, manner, said):
    process = start(manner, "quick")
    process.send_signal(number)
    out, errors = process.communicate(timeout=60)
    assert (process.returncode, out, errors) == (code, said, "saving\n")


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_the_second_signal_ends_at_once(number, code):
    process = start("patient", "slow")
    process.send_signal(signal.SIGINT)
    assert process.stdout.readline() == "saved\n"
    began = time.monotonic()
    process.send_signal(number)
    out, errors = process.communicate(timeout=60)
    assert time.monotonic() - began < 10
    assert (process.returncode, out, errors) == (code, "last words\n", "saving\nended at once\n")


def test_a_signal_while_python_ends_does_not_change_the_exit_code():
    leaving = """
import os, time
class Leaving:
    def __del__(self, write=os.write, sleep=time.sleep):
        write(1, b"leaving\\n")
        sleep(1)
kept = Leaving()
"""
    process = subprocess.Popen(
        [sys.executable, "-c", leaving + POLITE, "patient", "quick"],
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    )
    lines = []
    for line in process.stdout:
        lines.append(line)
        if line in ("ready\n", "leaving\n"):
            process.send_signal(signal.SIGTERM)
    assert lines == ["ready\n", "saved\n", "leaving\n"]
    assert process.wait(60) == 143
