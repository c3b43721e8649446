"""Several nodes on one LAN out of Linux namespaces: each with its own address, host name, processes, /tmp/ray, /srv and
/dev/shm.

with lan(folder) as nodes: nodes.add("head"); nodes["head"].run(["ray", "start", …]). Needs root; the machine's own
network is left alone.
"""

import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

NET = "10.77.0"
VENV = Path(sys.executable).parent


def reason_not_to() -> str | None:
    """Why nodes cannot be made here, or None."""
    missing = [tool for tool in ("ip", "unshare", "nsenter", "mount") if shutil.which(tool) is None]
    if missing:
        return f"no {', '.join(missing)} on this machine"
    if os.geteuid():
        return "network namespaces need root"
    done = subprocess.run(
        ["unshare", "--net", "--mount", "--pid", "--uts", "--ipc", "--fork", "true"], capture_output=True, text=True
    )
    return None if done.returncode == 0 else f"namespaces are refused here: {done.stderr.strip()}"


@dataclass
class InventoryNode:
    name: str
    ip: str
    namespace: str
    cable: str
    bridge: str
    folder: Path
    environment: dict[str, str] = field(default_factory=dict)
    init: subprocess.Popen | None = None
    pid: int = 0

    def on(self) -> None:
        """Power on: an empty machine but for /srv, its disk."""
        script = f"""
            mount --make-rprivate / && mkdir -p /srv /tmp/ray
            mount --bind {self.folder}/srv /srv && mount --bind {self.folder}/hosts /etc/hosts
            mount -t tmpfs -o size=1g tmpfs /tmp/ray && mount -t tmpfs -o size=1g tmpfs /dev/shm && hostname {self.name}
            exec sleep infinity"""
        command = [
            "ip",
            "netns",
            "exec",
            self.namespace,
            "unshare",
            "--mount",
            "--uts",
            "--pid",
            "--ipc",
            "--fork",
            "--mount-proc",
            "--kill-child",
        ]
        self.init = subprocess.Popen(
            [*command, "bash", "-ec", script],
            stdin=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
        )
        deadline = time.monotonic() + 20
        while not self._find_init():
            if self.init.poll() is not None or time.monotonic() > deadline:
                raise RuntimeError(f"node {self.name} did not start")
            time.sleep(0.05)

    def _find_init(self) -> bool:
        children = Path(f"/proc/{self.init.pid}/task/{self.init.pid}/children").read_text().split()
        for child in children:
            if Path(f"/proc/{child}/comm").read_text().strip() == "sleep":
                self.pid = int(child)
        return bool(self.pid)

    def off(self) -> None:
        """Power cut: every process of the node is gone at once."""
        if self.pid:
            os.kill(self.pid, signal.SIGKILL)
            self.init.wait(20)
            self.pid = 0

    def command(self, arguments: list[str]) -> list[str]:
        entered = ["nsenter", "-t", str(self.pid), "-n", "-m", "-u", "-p", "-i", "--", "env", "-i", "-C", "/srv"]
        own = {
            "HOME": "/srv",
            "PATH": f"{VENV}:/usr/sbin:/usr/bin:/sbin:/bin",
            "RAY_worker_niceness": "0",
            "RAY_USAGE_STATS_ENABLED": "0",
        }
        # every node sees the memory of the machine: it would end workers for what others use
        own["RAY_memory_monitor_refresh_ms"] = "0"
        own |= {k: os.environ[k] for k in ("OMP_NUM_THREADS", "DS_ACCELERATOR", "HF_HUB_OFFLINE") if k in os.environ}
        return [*entered, *(f"{k}={v}" for k, v in (own | self.environment).items()), *arguments]

    def run(self, *arguments: str, timeout: float = 120) -> subprocess.CompletedProcess:
        return subprocess.run(self.command(list(arguments)), capture_output=True, text=True, timeout=timeout)

    def start(self, *arguments: str, log: str) -> subprocess.Popen:
        """Start a process that keeps running on the node; its output is in /srv/LOG."""
        with (self.folder / "srv" / log).open("ab") as file:
            return subprocess.Popen(
                self.command(list(arguments)),
                stdout=file,
                stderr=file,
                stdin=subprocess.DEVNULL,
                start_new_session=True,
            )

    def cable_out(self) -> None:
        _ip("-n", self.bridge, "link", "set", self.cable, "down")

    def cable_in(self) -> None:
        _ip("-n", self.bridge, "link", "set", self.cable, "up")

    def rate(self, limit: str | None) -> None:
        """Shape the cable both ways, such as 100mbit; None: as fast as it goes."""
        for namespace, device in ((self.bridge, self.cable), (self.namespace, "eth0")):
            subprocess.run(["tc", "-n", namespace, "qdisc", "del", "dev", device, "root"], capture_output=True)
            if limit:
                shape = ["tbf", "rate", limit, "burst", "256kb", "latency", "50ms"]
                subprocess.run(
                    ["tc", "-n", namespace, "qdisc", "add", "dev", device, "root", *shape],
                    check=True,
                    capture_output=True,
                )


class Lan(dict[str, InventoryNode]):
    """The nodes by name, on one bridge."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.tag = folder, f"sr{os.getpid()}"
        self.bridge = f"{self.tag}-lan"
        _ip("netns", "add", self.bridge)
        _ip("-n", self.bridge, "link", "add", "br0", "type", "bridge")
        _ip("-n", self.bridge, "link", "set", "br0", "up")

    def add(self, *names: str, **environment: str) -> list[InventoryNode]:
        """Nodes with the next addresses from 10.77.0.11 on, all powered on and known to each other by name."""
        made = []
        for name in names:
            number = 11 + len(self)
            node = InventoryNode(
                name,
                f"{NET}.{number}",
                f"{self.tag}-{name}",
                f"v{self.tag}-{number}"[:15],
                self.bridge,
                self.folder / name,
                environment,
            )
            (node.folder / "srv").mkdir(parents=True)
            _ip("netns", "add", node.namespace)
            _ip(
                "-n",
                self.bridge,
                "link",
                "add",
                node.cable,
                "type",
                "veth",
                "peer",
                "name",
                "eth0",
                "netns",
                node.namespace,
            )
            _ip("-n", self.bridge, "link", "set", node.cable, "master", "br0", "up")
            _ip("-n", node.namespace, "addr", "add", f"{node.ip}/24", "dev", "eth0")
            for device in ("eth0", "lo"):
                _ip("-n", node.namespace, "link", "set", device, "up")
            self[name] = node
            made.append(node)
        hosts = "127.0.0.1 localhost\n" + "".join(f"{b.ip} {b.name}\n" for b in self.values())
        for node in self.values():
            (node.folder / "hosts").write_text(hosts)
        for node in made:
            node.on()
        return made

    def down(self) -> None:
        for node in self.values():
            node.off()
            subprocess.run(["ip", "netns", "del", node.namespace], capture_output=True)
        subprocess.run(["ip", "netns", "del", self.bridge], capture_output=True)


@contextmanager
def lan(folder: Path) -> Iterator[Lan]:
    nodes = Lan(folder)
    try:
        yield nodes
    finally:
        nodes.down()


def _ip(*arguments: str) -> None:
    subprocess.run(["ip", *arguments], check=True, capture_output=True, text=True)
