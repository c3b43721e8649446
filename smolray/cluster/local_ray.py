"""Starts a local Ray in a process of its own (ray_process.py), which ends with this one.

Out: the address of the head, and what has died of it since.
"""

import atexit
import json
import os
import subprocess
import sys
import threading
import time
from typing import IO

START_SECONDS = 120.0  # on a loaded machine
TRIES = 3


class RayStartError(ValueError):
    """Ray does not start on this machine; the message says why, and what to do."""


class LocalRay:
    """The local Ray of this process. `died`: the processes of its head that are gone, by Ray's names for them."""

    def __init__(self) -> None:
        self.process: subprocess.Popen[str] | None = None
        self.died: tuple[str, ...] = ()

    def start(self) -> str:
        """Start it; returns its address. Raises RayStartError."""
        reason = ""
        for number in range(1, TRIES + 1):
            if number > 1:
                again = f"Ray did not start ({reason}): try {number} of {TRIES}"
                print(again, file=sys.stderr, flush=True)
            try:
                return self._start()
            except RayStartError as error:
                reason = str(error)
        load = os.getloadavg()[0]
        raise RayStartError(
            f"Ray did not start on this machine in {TRIES} tries: {reason}. The load is {load:.0f} on "
            f"{os.cpu_count()} cores; try again when there is less to do, or see /tmp/ray/session_latest/logs"
        )

    def end(self) -> None:
        """End it and wait until all of its processes are gone."""
        process, self.process = self.process, None
        if process is not None and process.stdin is not None:
            process.stdin.close()
            process.wait()

    def _start(self) -> str:
        self.died = ()
        # The first lines of what goes wrong go into a pipe; Ray's own logs have the rest.
        self.process = subprocess.Popen(
            [sys.executable, "-m", "smolray.cluster.ray_process"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )
        assert self.process.stdout is not None and self.process.stderr is not None
        lines, errors = list[str](), list[str]()
        for stream, kept in ((self.process.stdout, lines), (self.process.stderr, errors)):
            threading.Thread(target=_read, args=(stream, kept), daemon=True).start()

        deadline = time.monotonic() + START_SECONDS
        while not lines and self.process.poll() is None and time.monotonic() < deadline:
            time.sleep(0.05)
        if not lines:
            slow = self.process.poll() is None
            self.end()
            last = next((line.strip() for line in reversed(errors) if line.strip()), "it said nothing")
            raise RayStartError(f"no answer within {START_SECONDS:.0f} s" if slow else last)
        threading.Thread(target=self._watch, args=(lines,), daemon=True).start()
        return str(json.loads(lines[0])["address"])

    def _watch(self, lines: list[str]) -> None:
        """Keep the names of what has died."""
        while self.process is not None and not self.died:
            if len(lines) > 1:
                self.died = tuple(json.loads(lines[1])["died"])
            elif self.process.poll() is not None:
                self.died = ("its process",)
            time.sleep(0.2)


def _read(stream: IO[str], lines: list[str]) -> None:
    for line in stream:
        lines.append(line)


LOCAL_RAY = LocalRay()
atexit.register(LOCAL_RAY.end)


def start_local_ray() -> str:
    """Start the local Ray of this process; returns the address of its head. Raises RayStartError."""
    return LOCAL_RAY.start()
