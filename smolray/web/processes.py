"""Commands that a page starts, each in a process and a session of its own: it lives on when the pages end.

In: the words of a `smolray` command. Out: a process, its output in a file of its owner alone.
"""

import os
import re
import subprocess
import sys
import threading
import time
from dataclasses import dataclass
from pathlib import Path

from markupsafe import Markup

from smolray.config import ConfigError
from smolray.web.terminal import terminal_html

SHOWN_BYTES = 40_000
MOST_KEPT = 200  # commands whose result is kept
MOST_OUTPUTS = 500  # files in the folder, also those of earlier pages
COLOURED = ["env", "FORCE_COLOR=1", "COLUMNS=100"]


@dataclass(frozen=True)
class Started:
    """One command, such as `resume`, for one run."""

    run: str
    command: str
    what: str  # in words
    since: float
    output: Path
    process: subprocess.Popen[bytes]

    @property
    def state(self) -> str:
        """running, finished or failed."""
        code = self.process.poll()
        return "running" if code is None else "failed" if code else "finished"

    @property
    def last_lines(self) -> Markup:
        """The end of what it has printed, with its colours."""
        try:
            file = self.output.open("rb")
        except FileNotFoundError:
            return Markup("its output is no longer kept")
        with file:
            size = file.seek(0, os.SEEK_END)
            file.seek(max(0, size - SHOWN_BYTES))
            text = file.read().decode(errors="replace")
        return terminal_html(text.replace("\r", "\n").strip())


class Processes:
    """The commands that were started by these pages, the newest last."""

    def __init__(self, folder: Path):
        self.folder = folder
        self._lock = threading.Lock()
        self._started: list[Started] = []

    def start(self, run: str, words: list[str], shown: bool = False, what: str = "") -> Started:
        """Start `smolray WORDS`. `shown`: it only prints, in colour. `what`: it in words, else its command and run.

        Raises ConfigError while another command for this run goes on.
        """
        with self._lock:
            if not shown and (going := [s for s in self._started if s.run == run and s.state == "running"]):
                raise ConfigError(f"`{going[0].what}` goes on, started from here; wait until it ends")
            self.folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            self._forget()
            output = self.folder / f"{time.strftime('%Y%m%d-%H%M%S')}-{words[0]}-{re.sub('[^a-z0-9._-]', '_', run)}.txt"
            descriptor = os.open(output, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
            try:
                process = subprocess.Popen(
                    [*(COLOURED if shown else []), sys.executable, "-m", "smolray", *words],
                    stdin=subprocess.DEVNULL,
                    stdout=descriptor,
                    stderr=descriptor,
                    start_new_session=True,
                )
            finally:
                os.close(descriptor)
            started = Started(run, words[0], what or f"smolray {words[0]} {run}", time.time(), output, process)
            self._started = [*self._started[-MOST_KEPT:], started]
            return started

    def _forget(self) -> None:
        """Delete the oldest outputs but for the newest MOST_OUTPUTS - 1; those of commands that go on stay."""
        going = {one.output for one in self._started if one.state == "running"}
        written = sorted(self.folder.glob("*.txt"), key=lambda file: file.stat().st_mtime)
        for file in written[: -MOST_OUTPUTS + 1]:
            if file not in going:
                file.unlink(missing_ok=True)

    def of(self, run: str) -> list[Started]:
        """The commands for one run, the newest first."""
        return [started for started in reversed(self._started) if started.run == run]
