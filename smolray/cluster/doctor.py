"""Examines every node of a cluster, with a remedy for each fault.

In: a running Ray. Out: Findings. A probe on each node gathers facts (node_probe.py), pairs of probes measure the links,
and pure functions judge them (checks.py).
"""

import logging
import os
import socket
import time
import urllib.error
import urllib.request
import uuid
from collections.abc import Iterator, Sequence
from itertools import permutations
from typing import Any
from urllib.parse import urlsplit

import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from smolray.cluster.checks import diagnose
from smolray.cluster.findings import Finding
from smolray.cluster.gpu_pairs import SECONDS, PairOutcome
from smolray.cluster.network_checks import Link, public_dashboard, token_check
from smolray.cluster.node_probe import NodeProbe, all_reduce_seconds
from smolray.cluster.nodes import NODE_LABEL

PROBE_SECONDS = 120.0  # for a node to start a worker process and answer


class DoctorError(ValueError):
    """There is no cluster to look at, or it refuses us; the message says where to run the doctor."""


def join_running(address: str | None = None) -> None:
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
            f"no cluster to look at: {str(error).strip().splitlines()[0]}; "
            "run it on a node of the cluster with its token; "
            "from elsewhere: ray job submit --address http://HEAD:8265 -- smolray doctor; for a single machine, first: "
            "(umask 077; ray get-auth-token --generate); export RAY_AUTH_MODE=token; ray start --head"
        ) from None


def examine(storage_uri: str = "", paths: Sequence[str] = ()) -> list[Finding]:
    """All findings about the connected cluster, the worst first.

    `storage_uri`: every node writes to it and reads from it. `paths`: local ones, to be the same on every node.
    """
    nodes = _named_nodes()
    probes = {name: _start(NodeProbe, node) for name, node in nodes.items()}
    facts, silent = _gather(nodes, probes, storage_uri, tuple(paths))
    links = [_measure(a, b, nodes, probes, facts) for a, b in permutations(facts, 2)]
    for probe in probes.values():
        ray.kill(probe)
    return diagnose(facts, links, [*silent, *_job_server(facts)])


def _named_nodes() -> dict[str, dict[str, Any]]:
    """Living nodes by their label, else by address; the head first."""
    living = [n for n in ray.nodes() if n["Alive"]]
    living.sort(key=lambda n: "node:__internal_head__" not in n["Resources"])
    names = [n["Labels"].get(NODE_LABEL) or n["NodeManagerAddress"] for n in living]
    return {
        name if names.count(name) == 1 else f"{name}/{node['NodeID'][:6]}": node
        for name, node in zip(names, living, strict=True)
    }


def _gather(
    nodes: dict[str, dict[str, Any]], probes: dict[str, Any], storage_uri: str, paths: tuple[str, ...]
) -> tuple[dict[str, dict[str, Any]], list[Finding]]:
    """The facts of each node, and a finding for each that did not answer."""
    facts: dict[str, dict[str, Any]] = {}
    silent = []
    for name, probe in probes.items():
        try:
            ray.get(probe.clock.remote(), timeout=PROBE_SECONDS)  # the first call waits for the process
            facts[name] = ray.get(probe.facts.remote(storage_uri, paths), timeout=PROBE_SECONDS)
            known = {"address": nodes[name]["NodeManagerAddress"], "ray_gpus": nodes[name]["Resources"].get("GPU", 0)}
            facts[name] |= known | {"clock_offset": _clock_offset(probe)}
            facts[name]["gpu_pairs"] = _gpu_pairs(probe, facts[name]["gpus"])
        except (ray.exceptions.RayError, TimeoutError) as error:
            remedy = f"see Ray's logs on {name}; free memory and CPU for one process"
            silent.append(Finding("probe", name, "fail", f"no answer: {_reason(error)}", "facts", remedy))

    head_offset = next(iter(facts.values()))["clock_offset"] if facts else 0.0
    for of_node in facts.values():
        of_node["clock_offset"] -= head_offset
    return facts, silent


def _gpu_pairs(probe: Any, gpus: list[dict[str, Any]]) -> list[PairOutcome] | None:
    """Whether the GPUs of a node can talk to each other; None where they are in use."""
    if any(gpu["busy"] for gpu in gpus):
        return None
    if len(gpus) < 2:
        return []
    found: list[PairOutcome] = ray.get(probe.gpu_pairs.remote(tuple(range(len(gpus)))), timeout=4 * SECONDS * len(gpus))
    return found


def _pinned(node: dict[str, Any]) -> Any:
    return NodeAffinitySchedulingStrategy(node_id=node["NodeID"], soft=False)


def _start(cls: type, node: dict[str, Any]) -> Any:
    return ray.remote(cls).options(num_cpus=0, scheduling_strategy=_pinned(node), max_concurrency=4).remote()


def _clock_offset(probe: Any) -> float:
    """Seconds by which the node is ahead of this process.

    Its time is compared with the middle of the fastest of a few calls (Cristian's algorithm).
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
        order = list(facts)
        first = order.index(source) < order.index(target)
        times = _all_reduces(source, target, nodes, probes, facts) if first else {}
    except (ray.exceptions.RayError, TimeoutError) as error:
        return Link(source, target, error=_reason(error))
    return Link(source, target, latency, bandwidth, tuple(closed), times)


def _all_reduces(
    source: str, target: str, nodes: dict[str, Any], probes: dict[str, Any], facts: dict[str, Any]
) -> dict[str, float]:
    """Seconds of a 2-rank all-reduce by gloo and, where both have GPUs that are free, by NCCL."""
    times = {}
    for backend in ("gloo", *(["nccl"] if facts[source]["gpus"] and facts[target]["gpus"] else [])):
        port = ray.get(probes[source].free_port.remote(), timeout=PROBE_SECONDS)
        address = nodes[source]["NodeManagerAddress"]
        needs: dict[str, Any] = {
            "num_cpus": 0,
            "num_gpus": 0.01 if backend == "nccl" else 0,
            "max_retries": 0,
            "max_calls": 1,
        }

        task = ray.remote(**needs)(all_reduce_seconds)

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


def _reason(error: BaseException) -> str:
    cause = getattr(error, "cause", None) or error
    return f"{type(cause).__name__}: {(str(cause).strip().splitlines() or ['no answer'])[0][:200]}"


def _job_server(facts: dict[str, dict[str, Any]]) -> Iterator[Finding]:
    """Where the head's job server listens, and whether it asks for the token."""
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
