"""Nodes that join and leave a cluster.

In: a job server's address and a node. Out: the command that adds it; or the node empty, its runs saved, stopped and
submitted again, so that they continue on the other nodes.
"""

import shlex
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.parse import urlsplit

from smolray import __version__, storage
from smolray.cluster.deploy import deploy_folder, is_installed
from smolray.cluster.jobs import RUN_KEY, STORAGE_KEY, JobsError, check_submission, stop_jobs, submit
from smolray.config import RunConfig, load_config
from smolray.run import status
from smolray.run.events import read_events
from smolray.run.folder import RunFolder
from smolray.run.progress import duration

if TYPE_CHECKING:
    from ray.job_submission import JobDetails, JobSubmissionClient


NODE_LABEL, GPU_LABEL = "smolray.io/node", "smolray.io/gpu"
# As in cluster/roles/smolray/defaults/main.yml, so that a firewall lets a node in however it joins.
PORTS = {
    "node-manager-port": 10100,
    "object-manager-port": 10101,
    "runtime-env-agent-port": 10102,
    "dashboard-agent-listen-port": 10103,
    "dashboard-agent-grpc-port": 10104,
    "metrics-export-port": 10105,
    "min-worker-port": 10200,
    "max-worker-port": 10999,
}
GCS_PORT = 6379


class ClusterError(ValueError):
    """The cluster has no such node, or the node cannot leave; the message says what there is and what to do."""


@dataclass(frozen=True)
class Node:
    """A living Ray node. `name`: the label of its unit, else its address."""

    id: str
    address: str
    name: str
    head: bool


def nodes(address: str) -> list[Node]:
    """The living nodes of the cluster whose job server is `address`, the head first.

    Raises ClusterError where it does not answer.
    """
    from ray.util.state import list_nodes
    from ray.util.state.exception import RayStateApiException

    try:
        living = [n for n in list_nodes(address, timeout=10) if n.state == "ALIVE"]
    except (RayStateApiException, ConnectionError, OSError, RuntimeError) as error:
        raise ClusterError(f"{address} does not list its nodes: {str(error).strip().splitlines()[0]}") from None
    made = [
        Node(n.node_id, n.node_ip, (n.labels or {}).get(NODE_LABEL) or n.node_ip, bool(n.is_head_node)) for n in living
    ]
    return sorted(made, key=lambda n: (not n.head, n.name))


def find_node(address: str, name: str) -> Node:
    """The living node called `name`: its label, address or id. Raises ClusterError, which lists what there is."""
    there = nodes(address)
    chosen = [n for n in there if name in (n.name, n.address, n.id)]
    if len(chosen) != 1:
        listed = ", ".join(f"{n.name} ({n.address}{', the head' if n.head else ''})" for n in there)
        raise ClusterError(
            f"{len(chosen)} nodes are called {name!r}; there: {listed or 'none'}. Name one by its address"
        )
    return chosen[0]


def join_command(name: str, head: str, interface: str, user: str = "", gpu: str = "", once: bool = False) -> str:
    """The one command that adds a node to a cluster.

    `name`: host name or address of the node; `head`: address, host or job server.

    The command is run on this machine, which has the token. With `once` it is run on the node itself, and the node
    stays until it is switched off. `gpu`: a label for resources.label_selector.
    """
    host = urlsplit(head).hostname if "://" in head else head.partition(":")[0]
    if not host:
        raise ClusterError(f"{head!r} names no host: expected an address such as 192.168.1.10 or http://head:8265")
    if once:
        labels = f"{NODE_LABEL}={name}" + (f",{GPU_LABEL}={gpu}" if gpu else "")
        ports = [f"--{option}={port}" for option, port in PORTS.items()]
        network = [f"GLOO_SOCKET_IFNAME={interface}", f"NCCL_SOCKET_IFNAME={interface}"]
        start = ["ray", "start", "--block", f"--address={host}:{GCS_PORT}", f"--labels={labels}", *ports]
        return shlex.join(["env", "RAY_AUTH_MODE=token", *network, *start])

    settings = {"smolray_head_address": host, "smolray_interface": interface}
    settings |= {"smolray_gpu_label": gpu} if gpu else {}
    if is_installed():  # there is no checkout to copy to the node
        settings["smolray_package"] = f"smolray[s3,web]=={__version__}"
    account = ["-u", user] if user else []
    extra = [word for key, value in settings.items() for word in ("-e", f"{key}={value}")]
    playbook = _short(deploy_folder("cluster") / "site.yml")
    return shlex.join(["ansible-playbook", playbook, "-i", f"{name},", *account, *extra])


def _short(path: Path) -> str:
    """A path as seen from the current folder, where it is below it."""
    return str(path.relative_to(Path.cwd())) if path.is_relative_to(Path.cwd()) else str(path)


def drain(
    client: "JobSubmissionClient", address: str, name: str, storage_uri: str, wait: float = 300.0
) -> Iterator[str]:
    """Empty a node and say each step: nothing new starts there; its runs save, stop, and continue on other nodes.

    Run in a checkout, the runs are submitted with its code. Raises ClusterError and JobsError before a run is
    stopped where it could not be submitted again.
    """
    node = find_node(address, name)
    if node.head:
        raise ClusterError(
            f"{name} is the head: the cluster ends with it; stop the runs, then the unit smolray-ray on it"
        )
    here, unknown = _runs_on(client, address, node, storage_uri)
    for run, arguments in here:
        check_submission(run, arguments)

    _refuse_new_work(client, node, wait)
    yield f"{node.name} takes no new work"
    for run, arguments in here:
        yield from _move(client, run, arguments, wait)
    for job in unknown:
        yield f"job {job} works on {node.name} and is no run under {storage_uri}: stop it yourself"
    yield (
        f"{node.name} is empty. On it: `sudo systemctl stop smolray-ray` to take the GPU, "
        "`sudo systemctl restart smolray-ray` to give it back"
    )


def _runs_on(
    client: "JobSubmissionClient", address: str, node: Node, storage_uri: str
) -> tuple[list[tuple[RunConfig, list[str]]], list[str]]:
    """The runs that have a process on the node, each with the arguments that start it again.

    Beside them the ids of jobs that are not known as runs.
    """
    from ray.util.state import list_actors

    living: list[tuple[str, str, str | bool | int | float]] = [("node_id", "=", node.id), ("state", "=", "ALIVE")]
    busy = {actor.job_id for actor in list_actors(address, filters=living, timeout=10)}
    known, unknown = [], []
    for job in client.list_jobs():
        if job.status.is_terminal() or job.job_id not in busy:
            continue
        name, place = _run_of(job, storage_uri)
        path = RunFolder(storage.join(place, name)).config if name else ""
        if name and storage.exists(path):
            arguments = [f"name={name}", f"storage={storage.absolute(place)}"]
            known.append((load_config(path, arguments), ["--config", path, *arguments]))
        else:
            unknown.append(job.submission_id or job.job_id or "?")
    return known, unknown


def _run_of(job: "JobDetails", storage_uri: str) -> tuple[str, str]:
    """Name and storage of the run that a job trains; an empty name where neither metadata nor command say it."""
    metadata, words = job.metadata or {}, shlex.split(job.entrypoint or "")
    given = dict(word.split("=", 1) for word in words if word.startswith(("name=", "storage=")))
    name = metadata.get(RUN_KEY) or given.get("name", "")
    return name, metadata.get(STORAGE_KEY) or given.get("storage", storage_uri)


def _refuse_new_work(client: "JobSubmissionClient", node: Node, wait: float) -> None:
    """Announce to the head that the node leaves: nothing new is placed there, and its Ray ends when it is empty."""
    reason = ["--reason", "DRAIN_NODE_REASON_PREEMPTION", "--reason-message", "smolray cluster drain"]
    command = ["ray", "drain-node", "--node-id", node.id, *reason, "--deadline-remaining-seconds", str(int(wait) + 60)]
    job_id = client.submit_job(entrypoint=shlex.join(command))  # as a job: only the nodes reach the head's own port
    deadline = time.monotonic() + 60
    while not client.get_job_status(job_id).is_terminal():
        if time.monotonic() > deadline:
            raise ClusterError(f"the head did not answer within 60 s to drain {node.name} (job {job_id})")
        time.sleep(0.3)

    if client.get_job_status(job_id).value != "SUCCEEDED":
        last = client.get_job_logs(job_id).strip().splitlines()[-1:]
        raise ClusterError(f"the head refused to drain {node.name}: {last}")


def _move(client: "JobSubmissionClient", run: RunConfig, arguments: list[str], wait: float) -> Iterator[str]:
    """Let a run save and stop, and submit it again; where it has finished meanwhile, leave it."""
    began, before = time.monotonic(), read_events(run.run_dir)
    if not status.run_status(run.run_dir).ended:
        status.request_stop(run.run_dir)
        end = status.wait_for_end(run.run_dir, len(before), wait)
        if end is None:
            raise ClusterError(
                f"{run.name} has not saved within {duration(wait)}: "
                "its node takes no new work, the run still trains; try again or stop it"
            )
        status.clear_stop(run.run_dir)
        yield f"{run.name} {end.get('status')} at step {end.get('step')}"
        if end.get("status") != "stopped":
            return

    stop_jobs(client, run.name, run.storage)
    seen = len(read_events(run.run_dir))
    try:
        job_id = submit(client, run, arguments)
    except JobsError as error:
        raise JobsError(
            f"{run.name} has saved and stopped, but could not be submitted again: {error}; "
            f"`smolray resume {run.name}` tries again"
        ) from None
    yield f"{run.name} submitted again as {job_id}"
    yield _wait_for_step(client, run, job_id, seen, began, wait)


def _wait_for_step(
    client: "JobSubmissionClient", run: RunConfig, job_id: str, seen: int, began: float, wait: float
) -> str:
    """Wait for the first step after the first `seen` events of the run; returns what there is to say."""
    deadline = time.monotonic() + wait
    while time.monotonic() < deadline and not client.get_job_status(job_id).is_terminal():
        fresh = read_events(run.run_dir)[seen:]
        if any(e["event"] == "step" for e in fresh):
            workers = next((e.get("workers") for e in fresh if e["event"] == "start"), None)
            after = duration(time.monotonic() - began)
            return f"{run.name} trains on with {workers} worker(s), {after} after the request"
        time.sleep(0.5)
    return (
        f"{run.name} does not train yet ({client.get_job_status(job_id).value}): "
        f"`smolray logs {run.name}` and `ray job logs {job_id}` say why"
    )
