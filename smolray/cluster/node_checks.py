"""Checks of one node: its name and network, clock, memory, disk, compiler, GPUs and access to the storage.

In: the facts of one node (node_probe.py gathers them). Out: Findings.
"""

from collections.abc import Mapping
from typing import Any

from smolray.cluster.findings import Finding, Level, graded, ok
from smolray.cluster.gpu_checks import gpu_health
from smolray.config.devices import no_kernels
from smolray.run.progress import duration, size

Facts = Mapping[str, Any]

CLOCK_WARN, CLOCK_FAIL = 1.0, 60.0  # seconds; S3 refuses signatures of another quarter of an hour
SHM_FAIL, SHM_WARN = 100e6, 1e9  # bytes; Docker gives 64 MB by default
DISK_WARN, DISK_FAIL_SHARE = 10e9, 0.95  # Ray makes no more objects on a disk that is 95 % full
LEAST_DRIVER = {12: 525, 13: 580}  # by CUDA's major version, from the CUDA release notes


def node_findings(name: str, facts: Facts, several: bool) -> list[Finding]:
    """All findings about one node. `several`: the cluster has other nodes, which must reach it."""
    return [
        host_name(name, facts, several),
        clock(name, facts),
        shared_memory(name, facts),
        disk(name, facts),
        compiler(name, facts),
        token_file(name, facts),
        *interfaces(name, facts, several),
        *gpus(name, facts),
        *gpu_health(name, facts),
        *torch_cuda(name, facts),
        *storage_access(name, facts),
    ]


def host_name(node: str, facts: Facts, several: bool) -> Finding:
    """Gloo takes the address of the host's name where no interface is set; 127.* reaches nobody."""
    address, interface = facts["host_address"], facts["interface_of"].get("gloo")
    found = f"{facts['host']} is {address or 'unknown'}"
    loopback = not address or address.startswith("127.")
    if several and loopback and not interface:
        remedy = (
            "set GLOO_SOCKET_IFNAME and NCCL_SOCKET_IFNAME for the node, "
            f"or correct the line of {facts['host']} in /etc/hosts"
        )
        return Finding("host name", node, "fail", found, "an address that the other nodes reach", remedy)
    return ok("host name", node, f"{found}; {interface} is used instead" if loopback and interface else found)


def token_file(node: str, facts: Facts) -> Finding:
    """Who reads the token may run code on every node."""
    path, readers = facts["token"]
    if not readers:
        return ok("token file", node, path or "in the environment")
    return Finding("token file", node, "fail", f"{path} has {readers}", "mode 0600", f"chmod 600 {path}")


def interfaces(node: str, facts: Facts, several: bool) -> list[Finding]:
    """The interfaces set for NCCL and Gloo must exist and carry the node's address."""
    there = {name: addresses for name, addresses in facts["interfaces"].items() if addresses}
    listed = ", ".join(f"{name} {' '.join(addresses)}" for name, addresses in there.items())
    right = next((name for name, addresses in there.items() if facts["address"] in addresses), None)
    findings = []
    for library in ("gloo", "nccl"):
        chosen, variable = facts["interface_of"].get(library), f"{library.upper()}_SOCKET_IFNAME"
        remedy = f"set {variable}={right or 'NAME'}"
        if not chosen:
            if several:
                expected = right or f"one of {listed}"
                remedy += " in the node's environment"
                findings.append(Finding("interface", node, "warn", f"{variable} is not set", expected, remedy))
            continue

        # NCCL takes prefixes, lists, =name and ^name; what it excludes cannot be missing.
        wanted = [] if chosen.startswith("^") else [w.lstrip("=") for w in chosen.split(",")]
        matching = [name for name in there for w in wanted if name == w or (library == "nccl" and name.startswith(w))]
        if wanted and not matching:
            found = f"{variable}={chosen} is not there"
            findings.append(Finding("interface", node, "fail", found, listed, remedy))
        elif wanted and right and right not in matching:
            found = f"{variable}={chosen} has not the node's address {facts['address']}"
            findings.append(Finding("interface", node, "warn", found, right, remedy))
        else:
            findings.append(ok("interface", node, f"{variable}={chosen}"))
    return findings


def clock(node: str, facts: Facts) -> Finding:
    """The node's clock compared with the head's; `clock_offset` in seconds, positive is ahead."""
    offset = facts["clock_offset"]
    level: Level = "fail" if abs(offset) > CLOCK_FAIL else "warn" if abs(offset) > CLOCK_WARN else "ok"
    found = f"{abs(offset):.3g} s {'ahead of' if offset > 0 else 'behind'} the head"
    return graded("clock", node, level, found, f"within {CLOCK_WARN:g} s", f"on {node}: timedatectl set-ntp true")


def shared_memory(node: str, facts: Facts) -> Finding:
    """The memory of Ray's objects and NCCL's buffers."""
    free, total = facts["shm"]
    level: Level = "fail" if free < SHM_FAIL else "warn" if free < SHM_WARN else "ok"
    remedy = (
        "mount a larger one: mount -o remount,size=30% /dev/shm; "
        "in a container --shm-size or an emptyDir of medium Memory"
    )
    return graded("shared memory", node, level, f"{size(free)} of {size(total)} free", size(SHM_WARN), remedy)


def disk(node: str, facts: Facts) -> Finding:
    """The disk of Ray's session, where it spills objects and writes logs."""
    folder, free, total = facts["disk"]
    used = 1 - free / total if total else 1.0
    level: Level = "fail" if used >= DISK_FAIL_SHARE else "warn" if free < DISK_WARN else "ok"
    remedy = f"make room on the disk of {folder}: Ray refuses new objects at {DISK_FAIL_SHARE:.0%}"
    return graded("disk", node, level, f"{size(free)} of {size(total)} free under {folder}", size(DISK_WARN), remedy)


def compiler(node: str, facts: Facts) -> Finding:
    """On a GPU Triton builds the launcher of compiled attention on first use."""
    missing = [what for what, there in facts["builds"].items() if not there]
    needed = ", ".join(facts["builds"])
    if not missing:
        return ok("compiler", node, needed)
    level: Level = "fail" if facts["gpus"] else "warn"
    remedy = f"on {node}: apt install g++ python3-dev"
    return Finding("compiler", node, level, f"no {' and no '.join(missing)}", needed, remedy)


def gpus(node: str, facts: Facts) -> list[Finding]:
    """One finding for each GPU: its memory, and what else runs on it."""
    findings = []
    for number, gpu in enumerate(facts["gpus"]):
        found = f"{gpu['name']}, {size(gpu['used'])} of {size(gpu['total'])} in use"
        who = ", ".join(f"{p['name']} (pid {p['pid']}, {size(p['memory'])})" for p in gpu["processes"])
        level: Level = "warn" if who else "ok"
        remedy = "end it, or keep the GPU from Ray with --num-gpus"
        found += f" by {who}" if who else ""
        findings.append(graded(f"GPU {number}", node, level, found, "no process but Ray's", remedy))

    if facts["ray_gpus"] != len(facts["gpus"]):
        found = f"Ray counts {facts['ray_gpus']:g}, the driver {len(facts['gpus'])}"
        remedy = "start Ray without --num-gpus, or look at nvidia-smi and CUDA_VISIBLE_DEVICES"
        findings.append(Finding("GPUs", node, "warn", found, "the same number", remedy))
    return findings


def torch_cuda(node: str, facts: Facts) -> list[Finding]:
    """Whether the node's torch can run on its GPUs: built for CUDA and for them, with a driver that is new enough."""
    if not facts["gpus"]:
        return []
    cuda, driver = facts["cuda"], facts["driver"] or ""
    install = (
        f"on {node}: install torch with CUDA, as `pip install torch` takes it where --index-url names no CPU build"
    )
    if cuda is None:
        return [
            Finding(
                "CUDA of torch", node, "fail", f"torch {facts['torch']} is built without CUDA", "with CUDA", install
            )
        ]

    findings, needed, major = [], LEAST_DRIVER.get(int(cuda.split(".")[0])), driver.split(".")[0]
    if needed and major.isdigit() and int(major) < needed:
        found = f"driver {driver} with CUDA {cuda} of torch"
        remedy = f"on {node}: a driver of at least {needed}, or torch for an older CUDA"
        findings.append(Finding("CUDA of torch", node, "fail", found, f"a driver of at least {needed}", remedy))

    seen, architectures = facts["torch_gpus"] or (None, [])
    for gpu in facts["gpus"]:
        known = bool(architectures) and gpu["capability"] is not None
        missing = no_kernels(gpu["name"], gpu["capability"], architectures) if known else ""
        if missing:
            findings.append(
                Finding("CUDA of torch", node, "fail", missing, "a GPU that torch is built for", "see there")
            )
    if seen is not None and seen < len(facts["gpus"]):
        found = f"torch sees {seen} of {len(facts['gpus'])} GPUs"
        remedy = f"on {node}: reboot after an update of the driver; look at nvidia-smi and CUDA_VISIBLE_DEVICES"
        findings.append(Finding("CUDA of torch", node, "fail", found, "all", remedy))
    return findings or [ok("CUDA of torch", node, f"torch for CUDA {cuda}, driver {driver}")]


def storage_access(node: str, facts: Facts) -> list[Finding]:
    """Writing, reading back and deleting a small file of the run's storage."""
    if (outcome := facts.get("storage")) is None:
        return []
    uri, error, seconds = outcome
    if error:
        remedy = (
            "credentials and AWS_ENDPOINT_URL in the node's environment; "
            "for a folder: mounted on every node, and writable for Ray's user"
        )
        return [Finding("storage", node, "fail", f"{uri}: {error}", "written, read and deleted", remedy)]
    took = duration(seconds) if seconds >= 1 else f"{1000 * seconds:.0f} ms"
    return [ok("storage", node, f"{uri} written, read and deleted in {took}")]
