"""A command that a page starts is a process of its own, and lives on when the pages end."""

import os
import signal
import subprocess
import sys
import time

import pytest

from smolray.config import ConfigError
from smolray.web.processes import MOST_OUTPUTS, Processes


def wait_until(true, seconds=120):
    deadline = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < deadline
        time.sleep(0.1)


def test_its_output_and_its_end_are_told(tmp_path):
    processes = Processes(tmp_path / "commands")
    started = processes.start("none", ["status", "none", "--storage", str(tmp_path)])
    with pytest.raises(ConfigError, match="goes on"):
        processes.start("none", ["status"])
    wait_until(lambda: started.state != "running")
    assert started.state == "failed" and "no run &#39;none&#39;" in started.last_lines
    assert started.output.stat().st_mode & 0o777 == 0o600 and processes.of("none") == [started]
    assert processes.of("other") == []


def test_old_outputs_are_deleted_and_those_of_commands_that_go_on_stay(tmp_path):
    processes = Processes(tmp_path / "commands")
    going = processes.start("long", ["logs", "long", "--follow", "--storage", str(tmp_path)])
    going.process.send_signal(signal.SIGSTOP)  # it goes on for ever
    try:
        for number in range(MOST_OUTPUTS + 5):
            file = processes.folder / f"{number:03d}.txt"
            file.touch()
            os.utime(file, (number, number))
        os.utime(going.output, (0, 0))
        ended = processes.start("other", ["--version"])
        left = {file.name for file in processes.folder.iterdir()}
        assert len(left) == MOST_OUTPUTS + 1 and {going.output.name, ended.output.name, "504.txt", "006.txt"} <= left
        assert "005.txt" not in left
        ended.process.kill()
        ended.output.unlink()
        assert "no longer kept" in ended.last_lines
    finally:
        going.process.kill()


def test_it_outlives_the_process_that_started_it(tmp_path):
    """A killed web process leaves its runs alone."""
    code = (
        "import sys, os, signal; from pathlib import Path; from smolray.web.processes import Processes\n"
        "one = Processes(Path(sys.argv[1])).start('demo', ['logs', 'demo', '--follow', '--storage', sys.argv[2]])\n"
        "print(one.process.pid, os.getsid(one.process.pid), flush=True); os.kill(os.getpid(), signal.SIGKILL)"
    )
    from tests.commands import write_run

    write_run(tmp_path)
    done = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path / "out"), str(tmp_path)], capture_output=True, text=True, timeout=300
    )
    pid, session = map(int, done.stdout.split())
    try:
        assert done.returncode == -signal.SIGKILL and pid == session
        output = next((tmp_path / "out").glob("*.txt"))
        wait_until(lambda: "step 20/100" in output.read_text())
        os.kill(pid, 0)
    finally:
        os.kill(pid, signal.SIGKILL)
