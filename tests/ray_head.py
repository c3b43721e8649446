"""A head node with a job server of its own, for tests that submit jobs."""

import os
import signal
import socket
import subprocess
import time
from contextlib import contextmanager
from pathlib import Path

PORTS = ("port", "dashboard-port", "ray-client-server-port", "dashboard-agent-listen-port")


def free_port():
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        return sock.getsockname()[1]


@contextmanager
def ray_head(python, folder, environment):
    """Starts the head with the packages of `python`; gives the address of its job server, which may still be starting.

    Its log is `folder`/head.log. Only its own process group is ended.
    """
    ports = {name: free_port() for name in PORTS}
    flags = [f"--{name}={port}" for name, port in ports.items()]
    flags += [
        "--node-ip-address=127.0.0.1",
        "--num-cpus=2",
        "--object-store-memory=200000000",
        f"--temp-dir={folder}/r",
    ]
    command = [python, "-c", "from ray.scripts.scripts import main; main()", "start", "--head", "--block", *flags]
    with (Path(folder) / "head.log").open("w") as log:
        process = subprocess.Popen(command, cwd=folder, env=environment, stdout=log, stderr=log, start_new_session=True)
    try:
        yield f"http://127.0.0.1:{ports['dashboard-port']}"
    finally:
        # asked politely it takes 30 s; what it started in other groups ends with its raylet
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def wait_for_head(address, folder, seconds=90):
    """Until its job server answers."""
    deadline, port = time.monotonic() + seconds, int(address.rpartition(":")[2])
    while time.monotonic() < deadline:
        with socket.socket() as sock:
            if sock.connect_ex(("127.0.0.1", port)) == 0:
                time.sleep(5)  # the job server answers a little later than its port
                return
        time.sleep(1)
    raise AssertionError((Path(folder) / "head.log").read_text()[-3000:])
