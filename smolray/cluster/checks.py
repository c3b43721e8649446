"""From what the boxes of a cluster said of themselves to findings with a remedy each: pure, so that every fault can be
tried without having it.

In: facts of each node and measurements of each pair (doctor.py gathers them). Out: Findings, the worst first.
"""

import ipaddress
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from smolray.run.progress import duration, size

Level = Literal["ok", "warn", "fail"]
Facts = Mapping[str, Any]  # of one node, as doctor.collect gives them
ORDER = {"fail": 0, "warn": 1, "ok": 2}

CLOCK_WARN, CLOCK_FAIL = 1.0, 60.0  # seconds; S3 refuses signatures of another quarter of an hour
SHM_FAIL, SHM_WARN = 100e6, 1e9  # Docker gives 64 MB unless told
DISK_WARN, DISK_FAIL_SHARE = 10e9, 0.95  # Ray makes no more objects on a disk that is 95 % full
LOCK_SECONDS = 600.0
# 400 Mbit/s: the gradients of LoRA pass, those of a whole 256M model take ten seconds a step
SLOW_BYTES_PER_SECOND = 50e6
LATENCY_WARN = 0.01
ALL_REDUCE_BYTES = 16 * 2**20


@dataclass(frozen=True)
class Finding:
    name: str
    node: str
    level: Level
    found: str
    expected: str = ""
    remedy: str = ""


@dataclass(frozen=True)
class Link:
    """What one node measured towards another. Seconds and bytes per second; `error` where it did not come through."""

    source: str
    target: str
    latency: float = 0.0
    bandwidth: float = 0.0
    closed: tuple[int, ...] = ()  # ports of Ray that did not answer
    all_reduce: Mapping[str, float] | None = None  # backend -> seconds for ALL_REDUCE_BYTES
    error: str = ""


def diagnose(nodes: Mapping[str, Facts], links: Sequence[Link] = (), others: Iterable[Finding] = ()) -> list[Finding]:
    """All findings about `nodes` (name -> facts, the head first) and the links between them, the worst first."""
    found = [*others, *same_everywhere(nodes)]
    several = len(nodes) > 1
    for name, facts in nodes.items():
        found += [
            host_name(name, facts, several),
            clock(name, facts),
            shared_memory(name, facts),
            disk(name, facts),
            locks(name, facts),
            compiler(name, facts),
        ]
        found += [*interfaces(name, facts, several), *gpus(name, facts), *storage_access(name, facts)]
    for link in links:
        found += link_findings(link)
    return sorted(found, key=lambda f: ORDER[f.level])


def same_everywhere(nodes: Mapping[str, Facts]) -> list[Finding]:
    """Versions that must agree, each compared with what most nodes have; ties go to the first, the head."""
    findings = []
    for what in ("python", "ray", "torch", "cuda", "driver"):
        values = {
            name: facts.get(what)
            for name, facts in nodes.items()
            if what not in ("cuda", "driver") or facts.get("gpus")
        }
        if not values:
            continue
        usual = _most(values.values())
        odd = {name: value for name, value in values.items() if value != usual}
        level: Level = "warn" if what == "driver" else "fail"
        remedy = (
            "install the same driver on all boxes"
            if what == "driver"
            else "install with the same constraints.txt on all boxes"
        )
        findings += [Finding(what, name, level, str(value), str(usual), remedy) for name, value in odd.items()]
        if not odd:
            findings.append(Finding(what, "all", "ok", str(usual)))
    names = sorted({p for facts in nodes.values() for p in facts.get("packages", {})})
    different = 0
    for package in names:
        versions = {name: facts.get("packages", {}).get(package) for name, facts in nodes.items()}
        usual = _most(versions.values())
        for name, version in versions.items():
            if version != usual:
                different += 1
                remedy = f"on {name}: pip " + (
                    f"install -c constraints.txt {package}" if usual else f"uninstall {package}"
                )
                findings.append(
                    Finding(
                        "package",
                        name,
                        "fail",
                        f"{package} {version or 'missing'}",
                        f"{package} {usual or 'not there'}",
                        remedy,
                    )
                )
    if not different:
        findings.append(Finding("packages", "all", "ok", f"{len(names)} packages, the same everywhere"))
    for path in sorted({p for facts in nodes.values() for p in facts.get("paths", {})}):
        digests = {name: facts.get("paths", {}).get(path) for name, facts in nodes.items()}
        usual = _most(d for d in digests.values() if d) if any(digests.values()) else None
        bad = [name for name, digest in digests.items() if digest != usual or digest is None]
        findings += [
            Finding(
                "files",
                name,
                "fail",
                f"{path} {'differs' if digests[name] else 'is missing'}",
                "the same on every box",
                "copy it, or put it on S3",
            )
            for name in bad
        ]
        findings += [] if bad else [Finding("files", "all", "ok", f"{path}, the same everywhere")]
    return findings


def host_name(node: str, facts: Facts, several: bool) -> Finding:
    """Gloo takes the address of the host's name unless it is told an interface; 127.* reaches nobody."""
    address, told = facts["host_address"], facts["interface_of"].get("gloo")
    found = f"{facts['host']} is {address or 'unknown'}"
    if several and not told and (not address or address.startswith("127.")):
        return Finding(
            "host name",
            node,
            "fail",
            found,
            "an address that the other boxes reach",
            f"set GLOO_SOCKET_IFNAME and NCCL_SOCKET_IFNAME for the node, or mend the line of {facts['host']} in /etc/hosts",
        )
    return Finding(
        "host name",
        node,
        "ok",
        found + (f"; {told} is used instead" if told and (address or "127.").startswith("127.") else ""),
    )


def interfaces(node: str, facts: Facts, several: bool) -> list[Finding]:
    """The interfaces that NCCL and Gloo are told must be there and carry the node's address."""
    findings = []
    there = {name: addresses for name, addresses in facts["interfaces"].items() if addresses}
    listed = ", ".join(f"{name} {' '.join(addresses)}" for name, addresses in there.items())
    right = next((name for name, addresses in there.items() if facts["address"] in addresses), None)
    for library in ("gloo", "nccl"):
        told, variable = facts["interface_of"].get(library), f"{library.upper()}_SOCKET_IFNAME"
        if not told:
            if several:
                remedy = f"set {variable}={right or 'NAME'} in the node's environment"
                findings.append(
                    Finding(
                        "interface", node, "warn", f"{variable} is not set", f"{right or 'one of ' + listed}", remedy
                    )
                )
            continue
        # NCCL takes prefixes, lists, =name and ^name; what it excludes cannot be missing.
        wanted = [] if told.startswith("^") else [w.lstrip("=") for w in told.split(",")]
        matching = [name for name in there for w in wanted if name == w or (library == "nccl" and name.startswith(w))]
        if wanted and not matching:
            findings.append(
                Finding(
                    "interface",
                    node,
                    "fail",
                    f"{variable}={told} is not there",
                    listed,
                    f"set {variable}={right or 'NAME'}",
                )
            )
        elif wanted and right and right not in matching:
            found = f"{variable}={told} has not the node's address {facts['address']}"
            findings.append(Finding("interface", node, "warn", found, right, f"set {variable}={right}"))
        else:
            findings.append(Finding("interface", node, "ok", f"{variable}={told}"))
    return findings


def clock(node: str, facts: Facts) -> Finding:
    """The node's clock against the head's; `clock_offset` in seconds, positive is ahead."""
    offset = facts["clock_offset"]
    level: Level = "fail" if abs(offset) > CLOCK_FAIL else "warn" if abs(offset) > CLOCK_WARN else "ok"
    found = f"{abs(offset):.3g} s {'ahead of' if offset > 0 else 'behind'} the head"
    return Finding(
        "clock",
        node,
        level,
        found,
        *(() if level == "ok" else (f"within {CLOCK_WARN:g} s", f"on {node}: timedatectl set-ntp true")),
    )


def shared_memory(node: str, facts: Facts) -> Finding:
    """The memory that Ray's objects and NCCL's buffers live in."""
    free, total = facts["shm"]
    level: Level = "fail" if free < SHM_FAIL else "warn" if free < SHM_WARN else "ok"
    remedy = "mount a larger one: mount -o remount,size=30% /dev/shm; in a container --shm-size or an emptyDir of medium Memory"
    return Finding(
        "shared memory",
        node,
        level,
        f"{size(free)} of {size(total)} free",
        *(() if level == "ok" else (size(SHM_WARN), remedy)),
    )


def disk(node: str, facts: Facts) -> Finding:
    """The disk of Ray's session, where it spills and logs."""
    folder, free, total = facts["disk"]
    used = 1 - free / total if total else 1.0
    level: Level = "fail" if used >= DISK_FAIL_SHARE else "warn" if free < DISK_WARN else "ok"
    remedy = f"make room on the disk of {folder}: Ray refuses new objects at {DISK_FAIL_SHARE:.0%}"
    return Finding(
        "disk",
        node,
        level,
        f"{size(free)} of {size(total)} free under {folder}",
        *(() if level == "ok" else (size(DISK_WARN), remedy)),
    )


def locks(node: str, facts: Facts) -> Finding:
    """A DeepSpeed build that was killed leaves a lock, on which the next run waits for ever."""
    stale = [path for path, seconds in facts["locks"] if seconds > LOCK_SECONDS]
    if stale:
        oldest = max(seconds for _, seconds in facts["locks"])
        return Finding(
            "build lock",
            node,
            "fail",
            f"{', '.join(stale)}, {duration(oldest)} old",
            "none",
            f"on {node}: rm {' '.join(stale)}",
        )
    return Finding("build lock", node, "ok", "a build is going on" if facts["locks"] else "none")


def compiler(node: str, facts: Facts) -> Finding:
    """On first use Triton builds the launcher of compiled attention and DeepSpeed its collectives."""
    missing = [what for what, there in facts["builds"].items() if not there]
    if missing:
        level: Level = "fail" if facts["gpus"] else "warn"
        return Finding(
            "compiler",
            node,
            level,
            f"no {' and no '.join(missing)}",
            ", ".join(facts["builds"]),
            f"on {node}: apt install g++ python3-dev",
        )
    return Finding("compiler", node, "ok", ", ".join(facts["builds"]))


def gpus(node: str, facts: Facts) -> list[Finding]:
    """One finding a card: its memory, and what else runs on it."""
    findings = []
    for number, gpu in enumerate(facts["gpus"]):
        found = f"{gpu['name']}, {size(gpu['used'])} of {size(gpu['total'])} in use"
        if gpu["processes"]:
            who = ", ".join(f"{p['name']} (pid {p['pid']}, {size(p['memory'])})" for p in gpu["processes"])
            remedy = "end it, or keep the card from Ray with --num-gpus"
            findings.append(
                Finding(f"card {number}", node, "warn", f"{found} by {who}", "no process but Ray's", remedy)
            )
        else:
            findings.append(Finding(f"card {number}", node, "ok", found))
    if facts["ray_gpus"] != len(facts["gpus"]):
        findings.append(
            Finding(
                "gpus",
                node,
                "warn",
                f"Ray was told of {facts['ray_gpus']:g}, the driver knows {len(facts['gpus'])}",
                "the same",
                "start Ray without --num-gpus, or look at nvidia-smi and CUDA_VISIBLE_DEVICES",
            )
        )
    return findings


def storage_access(node: str, facts: Facts) -> list[Finding]:
    """Writing, reading back and deleting a small file of the run's storage."""
    if (outcome := facts.get("storage")) is None:
        return []
    uri, error, seconds = outcome
    if error:
        remedy = "credentials and AWS_ENDPOINT_URL in the node's environment; for a folder: mounted on every box, and writable for Ray's user"
        return [Finding("storage", node, "fail", f"{uri}: {error}", "written, read and deleted", remedy)]
    return [
        Finding(
            "storage",
            node,
            "ok",
            f"{uri} written, read and deleted in {duration(seconds) if seconds >= 1 else f'{1000 * seconds:.0f} ms'}",
        )
    ]


def ring_all_reduce_seconds(ranks: int, size_bytes: float, bandwidth: float, latency: float) -> float:
    """Time of a ring all-reduce over links of `bandwidth` bytes/s and `latency` s (Patarasuk & Yuan 2009): 2 (n-1)
    messages of size/n.
    """
    return 2 * (ranks - 1) * (size_bytes / ranks / bandwidth + latency)


def link_findings(link: Link) -> list[Finding]:
    """Ports, speed and collectives of one pair, as its source saw them."""
    pair = f"{link.source} > {link.target}"
    if link.error:
        remedy = f"let {link.source} reach {link.target}: cable, route, firewall (cluster/ lists the ports)"
        return [Finding("link", pair, "fail", link.error, "a connection", remedy)]
    findings = []
    if link.closed:
        findings.append(
            Finding(
                "ports",
                pair,
                "fail",
                f"closed: {', '.join(map(str, link.closed))}",
                "open between the boxes",
                f"open them on {link.target} for {link.source}: cluster/roles/smolray/templates/smolray.nft.j2",
            )
        )
    else:
        findings.append(Finding("ports", pair, "ok", "Ray's ports answer"))
    predicted = ring_all_reduce_seconds(2, ALL_REDUCE_BYTES, link.bandwidth, link.latency)
    speed = f"{8 * link.bandwidth / 1e6:,.0f} Mbit/s, {1000 * link.latency:.2g} ms; all-reduce of 16 MiB predicted {1000 * predicted:,.0f} ms"
    slow = link.bandwidth < SLOW_BYTES_PER_SECOND or link.latency > LATENCY_WARN
    remedy = "a cable instead of Wi-Fi, a gigabit port, the right interface; or LoRA, whose gradients are small"
    findings.append(
        Finding(
            "link",
            pair,
            "warn" if slow else "ok",
            speed,
            *((f"{8 * SLOW_BYTES_PER_SECOND / 1e6:,.0f} Mbit/s", remedy) if slow else ()),
        )
    )
    for backend, seconds in (link.all_reduce or {}).items():
        findings.append(
            Finding(f"{backend} all-reduce", pair, "ok", f"16 MiB over 2 ranks in {1000 * seconds:,.0f} ms")
        )
    return findings


def public_dashboard(addresses: Iterable[str]) -> Finding:
    """`addresses`: those on which the job server listens, 0.0.0.0 resolved into the head's own."""
    listed = sorted(set(addresses))
    public = [a for a in listed if ipaddress.ip_address(a).is_global]
    if public:
        return Finding(
            "dashboard",
            "head",
            "fail",
            f"listens on the public address {', '.join(public)}",
            "private addresses only",
            "ray start --dashboard-host=ADDRESS of the boxes' network, and a firewall",
        )
    return Finding("dashboard", "head", "ok", f"listens on {', '.join(listed) or 'nothing'}")


def token_check(answers: Mapping[str, int], reachable: bool) -> list[Finding]:
    """`answers`: HTTP status for a request `without` a token and one with a `wrong` one.

    `reachable`: whether other machines reach the server.
    """
    findings = []
    for kind, status in answers.items():
        if status in (401, 403):
            findings.append(
                Finding(
                    "token",
                    "head",
                    "ok",
                    f"a request {'without a' if kind == 'without' else 'with a wrong'} token is refused ({status})",
                )
            )
            continue
        level: Level = "fail" if reachable else "warn"
        found = f"a request {'without a' if kind == 'without' else 'with a wrong'} token is answered ({status})"
        findings.append(
            Finding(
                "token",
                "head",
                level,
                found,
                "401 or 403",
                "RAY_AUTH_MODE=token on every node, and ~/.ray/auth_token from `ray get-auth-token --generate`; then restart Ray",
            )
        )
    return findings


def _most(values: Iterable[Any]) -> Any:
    return Counter(values).most_common(1)[0][0]
