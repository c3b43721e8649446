"""The process that holds a local Ray, and ends it with the command that started it, however that command ends.

In: a pipe that the command holds open. Out: one JSON line with the address and the processes of the head; later a line
for a process that has died. Ray runs in a session of its own: Ctrl-C in the terminal, and a signal for the command's
group, reach the command alone, which saves first. When the pipe closes (the command has ended, or was killed), all
processes of the session are killed.
"""

import json
import logging
import os
import signal
import sys
import threading
import time
from contextlib import suppress
from pathlib import Path
from typing import Any, TextIO

import ray

LOOK_SECONDS = 1.0
END_SECONDS = 5.0  # for all killed processes to be gone


def main() -> None:
    """Start the head of a Ray, say where it is, and end it when standard input closes or one of its processes dies."""
    if os.getsid(0) != os.getpid():
        os.setsid()  # else the end of this session would be that of others
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # Ray prints what goes wrong, and that is no answer of ours
    closed = threading.Event()
    threading.Thread(target=_wait_for_end_of_input, args=(closed,), daemon=True).start()
    try:
        ray.init(address="local", include_dashboard=False, log_to_driver=False, logging_level=logging.ERROR)
        node: Any = ray._private.worker._global_node
        processes = {name: infos[0].process.pid for name, infos in node.all_processes.items()}
        _say(answers, address=node.gcs_address, processes=processes)
        while not closed.wait(LOOK_SECONDS):
            if dead := [name for name, _ in node.dead_processes()]:
                _say(answers, died=dead)
                closed.wait()
    finally:
        end_session(os.getsid(0))
    os._exit(0)  # at its exit Ray would wait for the processes that were killed


def _say(answers: TextIO, **what: Any) -> None:
    with suppress(BrokenPipeError):
        print(json.dumps(what), file=answers, flush=True)


def _wait_for_end_of_input(closed: threading.Event) -> None:
    while os.read(sys.stdin.fileno(), 1):
        pass
    closed.set()


def session_processes(session: int) -> list[int]:
    """The living processes of a session, this one excepted."""
    found = []
    for entry in Path("/proc").iterdir():
        with suppress(OSError, IndexError):
            fields = (entry / "stat").read_text().rpartition(")")[2].split() if entry.name.isdigit() else []
            if fields and fields[0] not in "ZX" and int(fields[3]) == session and int(entry.name) != os.getpid():
                found.append(int(entry.name))
    return found


def end_session(session: int) -> None:
    """Kill all processes of a session but this one."""
    deadline = time.monotonic() + END_SECONDS
    while (found := session_processes(session)) and time.monotonic() < deadline:
        for pid in found:
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        time.sleep(0.05)


if __name__ == "__main__":
    main()
