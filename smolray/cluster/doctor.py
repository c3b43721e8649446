"""Looks at every box of a cluster and says what is wrong and what to do: in goes a running Ray, out come Findings as a
table, JSON and an exit code.

A probe pinned to each node tells the facts; pairs of probes measure the links; diagnosis.py judges.
"""

import hashlib
import importlib.metadata
import json
import logging
import os
import platform
import shutil
import socket
import subprocess
import sysconfig
import threading
import time
import urllib.error
import urllib.request
import uuid
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from datetime import timedelta
from itertools import permutations
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

import psutil
import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from smolray import storage
from smolray.cluster.checks import ALL_REDUCE_BYTES, Finding, Link, diagnose, public_dashboard, token_check

if TYPE_CHECKING:
    from rich.table import Table


PROBE_SECONDS = 120.0  # for a node to start a worker process and answer
SEND_SECONDS = 0.4
CHUNK = 256 * 1024


class DoctorError(ValueError):
    """There is no cluster to look at, or it does not let us in; the message says where to run the doctor."""


def connect(address: str | None = None) -> None:
    """Join the running cluster of this machine, or the one at `address`.

    Raises DoctorError where there is none or the token is wrong.
    """
    if ray.is_initialized():
        return
    address = address or os.environ.get("RAY_ADDRESS") or "auto"
    try:
        host, colon, port = address.rpartition(":")
        if colon and port.isdigit():  # Ray itself would try a head that is not there for ten minutes
            socket.create_connection((host, int(port)), timeout=10).close()
        ray.init(address=address, log_to_driver=False, logging_level=logging.ERROR)
    except (OSError, ray.exceptions.AuthenticationError, RuntimeError, ValueError) as error:
        raise DoctorError(
            f"no cluster to look at: {str(error).strip().splitlines()[0]}; run it on a box of the cluster with its token, "
            "or from elsewhere: ray job submit --address http://HEAD:8265 -- smolray doctor"
        ) from None


def examine(storage_uri: str = "", paths: Sequence[str] = ()) -> list[Finding]:
    """All findings about the connected cluster, the worst first.

    `storage_uri`: written to and read from every node; `paths`: local, to be the same.
    """
    nodes = _named_nodes()
    probes = {name: _start(Probe, node) for name, node in nodes.items()}
    facts: dict[str, dict[str, Any]] = {}
    others: list[Finding] = []
    for name, probe in probes.items():
        try:
            ray.get(probe.clock.remote(), timeout=PROBE_SECONDS)  # the first call waits for the process
            facts[name] = ray.get(probe.facts.remote(storage_uri, tuple(paths)), timeout=PROBE_SECONDS)
            known = {"address": nodes[name]["NodeManagerAddress"], "ray_gpus": nodes[name]["Resources"].get("GPU", 0)}
            facts[name] |= known | {"clock_offset": _clock_offset(probe)}
        except (ray.exceptions.RayError, TimeoutError) as error:
            remedy = f"see Ray's logs on {name}; free memory and CPU for one process"
            others.append(Finding("probe", name, "fail", f"no answer: {_told(error)}", "facts", remedy))
    if facts:
        head = next(iter(facts))
        base = facts[head]["clock_offset"]
        for told in facts.values():
            told["clock_offset"] -= base
    links = [_measure(a, b, nodes, probes, facts) for a, b in permutations(facts, 2)]
    for probe in probes.values():
        ray.kill(probe)
    return diagnose(facts, links, [*others, *_job_server(facts)])


def findings_table(findings: Sequence[Finding]) -> "Table":
    """One line a finding; what is well is dim."""
    from rich.markup import escape
    from rich.table import Table

    table, colours = Table(box=None, pad_edge=False, header_style="dim"), {"ok": "dim", "warn": "yellow", "fail": "red"}
    for column in ("", "check", "node", "found", "expected", "remedy"):
        table.add_column(column, overflow="fold")
    for f in findings:
        table.add_row(
            *(
                f"[{colours[f.level]}]{escape(text)}[/]"
                for text in (f.level, f.name, f.node, f.found, f.expected, f.remedy)
            )
        )
    return table


def findings_json(findings: Sequence[Finding]) -> str:
    """A list of objects with name, node, level, found, expected and remedy."""
    return json.dumps([asdict(f) for f in findings], indent=1)


def exit_code(findings: Sequence[Finding]) -> int:
    """1 where something fails, else 0."""
    return int(any(f.level == "fail" for f in findings))


def _named_nodes() -> dict[str, dict[str, Any]]:
    """Living nodes by the label of their box, else by address; the head first."""
    living = sorted(
        (n for n in ray.nodes() if n["Alive"]), key=lambda n: "node:__internal_head__" not in n["Resources"]
    )
    names = [n["Labels"].get("smolray.io/box") or n["NodeManagerAddress"] for n in living]
    return {
        name if names.count(name) == 1 else f"{name}/{node['NodeID'][:6]}": node
        for name, node in zip(names, living, strict=True)
    }


def _pinned(node: dict[str, Any]) -> Any:
    return NodeAffinitySchedulingStrategy(node_id=node["NodeID"], soft=False)


def _start(cls: type, node: dict[str, Any]) -> Any:
    return ray.remote(cls).options(num_cpus=0, scheduling_strategy=_pinned(node), max_concurrency=4).remote()


def _clock_offset(probe: Any) -> float:
    """Seconds the node is ahead of this process: its time against the middle of the fastest of a few calls (Cristian's
    algorithm).
    """
    calls = []
    for _ in range(8):
        sent = time.time()
        there = ray.get(probe.clock.remote(), timeout=PROBE_SECONDS)
        calls.append((time.time() - sent, there - (sent + time.time()) / 2))
    return min(calls)[1]


def _measure(source: str, target: str, nodes: dict[str, Any], probes: dict[str, Any], facts: dict[str, Any]) -> Link:
    """Ports, latency and speed from one node to another; the collectives once a pair."""
    address, node = nodes[target]["NodeManagerAddress"], nodes[target]
    ports = tuple(int(node[key]) for key in ("NodeManagerPort", "ObjectManagerPort") if node.get(key))
    try:
        port = ray.get(probes[target].listen.remote(address), timeout=PROBE_SECONDS)
        latency, bandwidth = ray.get(probes[source].send.remote(address, port), timeout=PROBE_SECONDS)
        closed = ray.get(probes[source].closed.remote(address, ports), timeout=PROBE_SECONDS)
        times = (
            _all_reduces(source, target, nodes, probes, facts)
            if list(facts).index(source) < list(facts).index(target)
            else {}
        )
    except (ray.exceptions.RayError, TimeoutError) as error:
        return Link(source, target, error=_told(error))
    return Link(source, target, latency, bandwidth, tuple(closed), times)


def _all_reduces(
    source: str, target: str, nodes: dict[str, Any], probes: dict[str, Any], facts: dict[str, Any]
) -> dict[str, float]:
    """Seconds of a 2-rank all-reduce by gloo and, where both have cards that are free, by NCCL."""
    times = {}
    for backend in ("gloo", *(["nccl"] if facts[source]["gpus"] and facts[target]["gpus"] else [])):
        port = ray.get(probes[source].free_port.remote(), timeout=PROBE_SECONDS)
        address = nodes[source]["NodeManagerAddress"]
        task = ray.remote(num_cpus=0, num_gpus=0.01 if backend == "nccl" else 0, max_retries=0, max_calls=1)(
            _all_reduce
        )
        ranks = [
            task.options(scheduling_strategy=_pinned(nodes[name])).remote(rank, address, port, backend)
            for rank, name in enumerate((source, target))
        ]
        try:
            times[backend] = max(ray.get(ranks, timeout=PROBE_SECONDS))
        except ray.exceptions.GetTimeoutError:
            for rank in ranks:
                ray.cancel(rank, force=True)
            if backend == "gloo":
                raise
    return times


def _all_reduce(rank: int, address: str, port: int, backend: str) -> float:
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


def _told(error: BaseException) -> str:
    cause = getattr(error, "cause", None) or error
    return f"{type(cause).__name__}: {(str(cause).strip().splitlines() or ['no answer'])[0][:200]}"


def _job_server(facts: dict[str, dict[str, Any]]) -> Iterator[Finding]:
    """What the head's job server lets in, and where it listens."""
    joined: Any = ray.init(ignore_reinit_error=True, logging_level=logging.ERROR)
    url = joined.address_info.get("webui_url")
    if not url or not facts:
        yield Finding("dashboard", "head", "ok", "not started")
        return
    host, _, port = url.rpartition(":")
    head = next(iter(facts.values()))
    listens = {a for a, p in head["listening"] if p == int(port)}
    every = {"0.0.0.0", "::"} & listens  # noqa: S104 - what is looked for, not what is listened on
    addresses = (listens - every) | ({a for list_ in head["interfaces"].values() for a in list_} if every else set())
    yield public_dashboard(addresses)
    reachable = any(not a.startswith("127.") and a != "::1" for a in addresses)
    jobs = f"http://{host}:{port}/api/jobs/"
    yield from token_check({"without": _status(jobs, None), "wrong": _status(jobs, uuid.uuid4().hex * 2)}, reachable)


def _status(url: str, token: str | None) -> int:
    """The HTTP status of a GET; 0 where nothing answers."""
    if urlsplit(url).scheme != "http":
        return 0
    request = urllib.request.Request(url, headers={"Authorization": f"Bearer {token}"} if token else {})  # noqa: S310 - http, see above
    try:
        with urllib.request.urlopen(request, timeout=10) as response:  # noqa: S310
            return response.status
    except urllib.error.HTTPError as error:
        return error.code
    except OSError:
        return 0


class Probe:
    """Lives on one node and tells what it sees there."""

    def clock(self) -> float:
        return time.time()

    def facts(self, storage_uri: str, paths: tuple[str, ...]) -> dict[str, Any]:
        """What diagnosis.py reads, but for what only the head knows."""
        import torch

        node: Any = ray._private.worker.global_worker.node
        session = node.get_session_dir_path()
        disk, shm = shutil.disk_usage(session), shutil.disk_usage("/dev/shm")  # noqa: S108
        host = socket.gethostname()
        addresses = psutil.net_if_addrs()
        return {
            "python": platform.python_version(),
            "ray": ray.__version__,
            "torch": torch.__version__,
            "cuda": torch.version.cuda,
            "driver": _driver(),
            "packages": _packages(),
            "gpus": _gpus(),
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
            "locks": _locks(),
            "builds": _builds(),
            "storage": _try_storage(storage_uri) if storage_uri else None,
            "paths": {path: _digest(Path(path)) for path in paths},
        }

    def free_port(self) -> int:
        with socket.socket() as probe:
            probe.bind(("", 0))
            return probe.getsockname()[1]

    def listen(self, address: str) -> int:
        """Answer one `send` on a port of the node; returns the port."""
        server = socket.create_server((address, 0))
        server.settimeout(PROBE_SECONDS)
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
        """Those of `ports` that do not answer."""
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


def _smi(query: str) -> list[list[str]]:
    """Rows of an nvidia-smi query; none where there is no driver."""
    if shutil.which("nvidia-smi") is None:
        return []
    done = subprocess.run(
        ["nvidia-smi", query, "--format=csv,noheader,nounits"], capture_output=True, text=True, timeout=30
    )
    return (
        [[cell.strip() for cell in line.split(",")] for line in done.stdout.splitlines() if line]
        if done.returncode == 0
        else []
    )


def _driver() -> str | None:
    rows = _smi("--query-gpu=driver_version")
    return rows[0][0] if rows else None


def _gpus() -> list[dict[str, Any]]:
    """The node's cards and the processes on them that are not Ray's."""
    processes: dict[str, list[dict[str, Any]]] = {}
    for uuid_, pid, name, memory in (
        row for row in _smi("--query-compute-apps=gpu_uuid,pid,process_name,used_memory") if len(row) == 4
    ):
        if not _is_rays(int(pid)):
            processes.setdefault(uuid_, []).append({"pid": int(pid), "name": name, "memory": _mib(memory)})
    rows = _smi("--query-gpu=uuid,name,memory.used,memory.total")
    return [
        {"name": n, "used": _mib(used), "total": _mib(total), "processes": processes.get(u, [])}
        for u, n, used, total in rows
    ]


def _mib(text: str) -> float:
    return float(text) * 2**20 if text.isdigit() else 0.0


def _is_rays(pid: int) -> bool:
    try:
        return " ".join(psutil.Process(pid).cmdline()).startswith("ray::")
    except psutil.Error:
        return False


def _locks() -> list[tuple[str, float]]:
    """Lock files of torch's extension builds, each with its age in seconds."""
    root = Path(os.environ.get("TORCH_EXTENSIONS_DIR") or Path.home() / ".cache" / "torch_extensions")
    return [(str(path), time.time() - path.stat().st_mtime) for path in root.glob("**/lock")]


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
