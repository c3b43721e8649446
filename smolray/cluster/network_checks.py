"""Checks of the network: the links between nodes, and who may reach the head's job server.

In: measurements of each pair of nodes, and the job server's answers. Out: Findings.
"""

import ipaddress
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from smolray.cluster.findings import Finding, Level, graded, ok

# 400 Mbit/s: enough for the gradients of LoRA; those of a whole 256M model take ten seconds a step
SLOW_BYTES_PER_SECOND = 50e6
LATENCY_WARN = 0.01
ALL_REDUCE_BYTES = 16 * 2**20


@dataclass(frozen=True)
class Link:
    """What one node measured towards another. Seconds and bytes per second; `error` where it did not get through."""

    source: str
    target: str
    latency: float = 0.0
    bandwidth: float = 0.0
    closed: tuple[int, ...] = ()  # ports of Ray that did not answer
    all_reduce: Mapping[str, float] | None = None  # backend -> seconds for ALL_REDUCE_BYTES
    error: str = ""


def link_findings(link: Link) -> list[Finding]:
    """Ports, speed and collectives of one pair, as its source measured them."""
    pair = f"{link.source} > {link.target}"
    if link.error:
        remedy = f"let {link.source} reach {link.target}: cable, route, firewall (cluster/README.md lists the ports)"
        return [Finding("link", pair, "fail", link.error, "a connection", remedy)]
    collectives = [
        ok(f"{backend} all-reduce", pair, f"16 MiB over 2 ranks in {1000 * seconds:,.0f} ms")
        for backend, seconds in (link.all_reduce or {}).items()
    ]
    return [_ports(pair, link), _speed(pair, link), *collectives]


def _ports(pair: str, link: Link) -> Finding:
    if not link.closed:
        return ok("ports", pair, "Ray's ports answer")
    found = f"closed: {', '.join(map(str, link.closed))}"
    remedy = f"open them on {link.target} for {link.source}: cluster/roles/smolray/templates/smolray.nft.j2"
    return Finding("ports", pair, "fail", found, "open between the nodes", remedy)


def _speed(pair: str, link: Link) -> Finding:
    predicted = ring_all_reduce_seconds(2, ALL_REDUCE_BYTES, link.bandwidth, link.latency)
    found = (
        f"{8 * link.bandwidth / 1e6:,.0f} Mbit/s, {1000 * link.latency:.2g} ms; "
        f"all-reduce of 16 MiB predicted {1000 * predicted:,.0f} ms"
    )
    slow = link.bandwidth < SLOW_BYTES_PER_SECOND or link.latency > LATENCY_WARN
    remedy = "a cable instead of Wi-Fi, a gigabit port, the right interface; or LoRA, whose gradients are small"
    expected = f"{8 * SLOW_BYTES_PER_SECOND / 1e6:,.0f} Mbit/s"
    return graded("link", pair, "warn" if slow else "ok", found, expected, remedy)


def ring_all_reduce_seconds(ranks: int, size_bytes: float, bandwidth: float, latency: float) -> float:
    """Time of a ring all-reduce over links of `bandwidth` bytes/s and `latency` s (Patarasuk & Yuan 2009).

    It sends 2 (n - 1) messages of size / n.
    """
    return 2 * (ranks - 1) * (size_bytes / ranks / bandwidth + latency)


def public_dashboard(addresses: Iterable[str]) -> Finding:
    """Whether the job server listens on a public address. `addresses`: 0.0.0.0 resolved into the head's own."""
    listed = sorted(set(addresses))
    public = [a for a in listed if ipaddress.ip_address(a).is_global]
    if not public:
        return ok("dashboard", "head", f"listens on {', '.join(listed) or 'nothing'}")
    found = f"listens on the public address {', '.join(public)}"
    remedy = "ray start --dashboard-host=ADDRESS of the nodes' network, and a firewall"
    return Finding("dashboard", "head", "fail", found, "private addresses only", remedy)


def token_check(answers: Mapping[str, int], reachable: bool) -> list[Finding]:
    """Whether the job server refuses requests without the right token.

    `answers`: the HTTP status for a request `without` a token and for one with a `wrong` one. `reachable`: whether
    other machines reach the server.
    """
    remedy = (
        "RAY_AUTH_MODE=token on every node, and ~/.ray/auth_token from `ray get-auth-token --generate`; "
        "then restart Ray"
    )
    findings = []
    for kind, status in answers.items():
        request = f"a request {'without a' if kind == 'without' else 'with a wrong'} token is"
        if status in (401, 403):
            findings.append(ok("token", "head", f"{request} refused ({status})"))
            continue
        level: Level = "fail" if reachable else "warn"
        findings.append(Finding("token", "head", level, f"{request} answered ({status})", "401 or 403", remedy))
    return findings
