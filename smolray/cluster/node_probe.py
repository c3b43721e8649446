"""Runs on one node and gathers the facts that the doctor's checks read.

In: nothing but the node. Out: facts (node_checks.py names them) and measurements towards other nodes.
"""

import hashlib
import importlib.metadata
import json
import os
import platform
import shutil
import socket
import subprocess
import sys
import sysconfig
import threading
import time
import uuid
from datetime import timedelta
from pathlib import Path
from typing import Any

import psutil
import ray

from smolray import storage
from smolray.cluster.gpu_pairs import PairOutcome, try_pairs
from smolray.cluster.network_checks import ALL_REDUCE_BYTES
from smolray.cluster.nvml import driver_version, gpu_facts, kernel_faults
from smolray.cluster.token import open_token, token_file

ANSWER_SECONDS = 120.0  # how long a node waits for the other one's connection
SEND_SECONDS = 0.4
CHUNK = 256 * 1024


class NodeProbe:
    """A Ray actor that is pinned to one node."""

    def clock(self) -> float:
        """Seconds since 1970."""
        return time.time()

    def facts(self, storage_uri: str, paths: tuple[str, ...]) -> dict[str, Any]:
        """What node_checks.py and checks.py read, without what only the head knows."""
        import torch

        node: Any = ray._private.worker.global_worker.node
        session = node.get_session_dir_path()
        gpus = gpu_facts()
        disk, shm = shutil.disk_usage(session), shutil.disk_usage("/dev/shm")  # noqa: S108
        host = socket.gethostname()
        addresses = psutil.net_if_addrs()
        return {
            "python": platform.python_version(),
            "ray": ray.__version__,
            "torch": torch.__version__,
            "cuda": torch.version.cuda,
            "driver": driver_version(),
            "packages": _packages(),
            "gpus": gpus,
            "xid": kernel_faults() if gpus else [],
            "torch_gpus": _torch_gpus(),
            "host": host,
            "host_address": _resolve(host),
            "interfaces": {
                name: [a.address for a in found if a.family == socket.AF_INET] for name, found in addresses.items()
            },
            "interface_of": {
                library: os.environ.get(f"{library.upper()}_SOCKET_IFNAME") for library in ("gloo", "nccl")
            },
            "listening": [
                (c.laddr.ip, c.laddr.port) for c in psutil.net_connections("tcp") if c.status == psutil.CONN_LISTEN
            ],
            "shm": (shm.free, shm.total),
            "disk": (session, disk.free, disk.total),
            "builds": _builds(),
            "token": _token(),
            "storage": _try_storage(storage_uri) if storage_uri else None,
            "paths": {path: _digest(Path(path)) for path in paths},
        }

    def gpu_pairs(self, gpus: tuple[int, ...]) -> list[PairOutcome]:
        """Whether each of these GPUs of the node and the next one can add up."""
        return try_pairs(gpus)

    def free_port(self) -> int:
        """A port on which nobody listens."""
        with socket.socket() as probe:
            probe.bind(("", 0))
            return probe.getsockname()[1]

    def listen(self, address: str) -> int:
        """Answer one `send` on a port of the node; returns the port."""
        server = socket.create_server((address, 0))
        server.settimeout(ANSWER_SECONDS)
        threading.Thread(target=_answer, args=(server,), daemon=True).start()
        return server.getsockname()[1]

    def send(self, address: str, port: int) -> tuple[float, float]:
        """Latency in seconds (half the fastest echo) and bandwidth in bytes per second."""
        with socket.create_connection((address, port), timeout=10) as sock:
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)

            echoes = []
            for _ in range(20):
                began = time.perf_counter()
                sock.sendall(b"p")
                sock.recv(1)
                echoes.append(time.perf_counter() - began)

            sock.settimeout(60)
            payload, sent, began = bytes(CHUNK), 0, time.perf_counter()
            while time.perf_counter() - began < SEND_SECONDS:
                sock.sendall(payload)
                sent += CHUNK
            sock.shutdown(socket.SHUT_WR)
            sock.recv(1)  # all of it has arrived
            return min(echoes) / 2, sent / (time.perf_counter() - began)

    def closed(self, address: str, ports: tuple[int, ...]) -> list[int]:
        """Those of `ports` at `address` that do not answer."""
        found = []
        for port in ports:
            try:
                socket.create_connection((address, port), timeout=3).close()
            except OSError:
                found.append(port)
        return found


def _answer(server: socket.socket) -> None:
    with server, server.accept()[0] as peer:
        peer.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        for _ in range(20):
            peer.sendall(peer.recv(1))
        while peer.recv(CHUNK):
            pass
        peer.sendall(b"k")


def _resolve(host: str) -> str | None:
    try:
        return socket.gethostbyname(host)
    except OSError:
        return None


def _packages() -> dict[str, str]:
    found: dict[str, str] = {}
    for item in importlib.metadata.distributions():  # the first on the path is the one that is imported
        if item.metadata["Name"]:
            found.setdefault(item.metadata["Name"].lower().replace("_", "-"), item.version)
    return found


def _torch_gpus() -> tuple[int, list[str]] | None:
    """How many GPUs torch sees, and the architectures that it is built for; None where it does not start.

    In a process of its own: Ray hides the GPUs from this one, which asked for none.
    """
    if driver_version() is None:
        return None
    code = "import json, torch; print(json.dumps([torch.cuda.device_count(), torch.cuda.get_arch_list()]))"
    environment = {name: value for name, value in os.environ.items() if name != "CUDA_VISIBLE_DEVICES"}
    try:
        done = subprocess.run(
            [sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=120
        )
        seen, architectures = json.loads(done.stdout)
    except (subprocess.TimeoutExpired, ValueError):
        return None
    return seen, architectures


def _token() -> tuple[str, str]:
    """The file of the cluster's token, empty where there is none, and who else may read it."""
    path = token_file()
    return (str(path), open_token(path)) if path is not None else ("", "")


def _builds() -> dict[str, bool]:
    """Whether what a build needs is there."""
    headers = Path(sysconfig.get_path("include")) / "Python.h"
    compilers = (*os.environ.get("CXX", "").split()[:1], "c++", "g++", "clang++")
    return {"C++ compiler": any(map(shutil.which, compilers)), "Python.h": headers.exists()}


def _try_storage(uri: str) -> tuple[str, str, float]:
    """(uri, error or "", seconds) of writing, reading and deleting a small file."""
    began, target, data = time.perf_counter(), storage.join(uri, f".doctor-{uuid.uuid4().hex}"), uuid.uuid4().bytes
    try:
        storage.write_bytes(target, data)
        if storage.read_bytes(target) != data:
            return uri, "read back other bytes than were written", 0.0
        storage.delete(target)
    except OSError as error:
        return uri, (str(error).strip().splitlines() or [type(error).__name__])[0][:300], 0.0
    return uri, "", time.perf_counter() - began


def _digest(path: Path) -> str | None:
    """A hash of the names and sizes under a path; None where there is nothing."""
    if not path.exists():
        return None
    files = sorted(p for p in path.rglob("*") if p.is_file()) if path.is_dir() else [path]
    listed = "".join(f"{p.relative_to(path)} {p.stat().st_size}\n" for p in files)
    return hashlib.blake2b(listed.encode(), digest_size=8).hexdigest()


def all_reduce_seconds(rank: int, address: str, port: int, backend: str) -> float:
    """The fastest of three all-reduces of 16 MiB with another process; `address` and `port` are those of rank 0."""
    import torch
    import torch.distributed as dist

    device = torch.device("cuda", 0) if backend == "nccl" else torch.device("cpu")
    dist.init_process_group(
        backend, init_method=f"tcp://{address}:{port}", rank=rank, world_size=2, timeout=timedelta(seconds=30)
    )
    try:
        values = torch.ones(ALL_REDUCE_BYTES // 4, device=device)
        times = []
        for _ in range(3):
            dist.barrier()
            began = time.perf_counter()
            dist.all_reduce(values)
            values[0].item()
            times.append(time.perf_counter() - began)
        return min(times)
    finally:
        dist.destroy_process_group()
