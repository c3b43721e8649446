"""The page Cluster: the nodes and links as `smolray doctor` finds them, with remedies; a node is given back here.

In: the output of `smolray doctor --json` and of `smolray cluster drain`, which buttons start. Out: the page, live.
"""

import json
import time
from typing import NamedTuple

from fastapi.responses import RedirectResponse, Response

from smolray.cluster.findings import ORDER, Finding
from smolray.config import ConfigError
from smolray.web.live import Part, stream
from smolray.web.processes import Started
from smolray.web.site import Ask, Site, fragment, page

JOB = "the cluster"  # the name of the commands among those that were started
MOST_DRAINS = 5  # shown


class NodeRow(NamedTuple):
    """A node, a pair of nodes, or all of them, with what was found there; the worst first."""

    name: str
    level: str
    findings: list[Finding]


def show(ask: Ask) -> Response:
    """GET /cluster."""
    parts = {part.id: part for part in read_parts(ask.site)}
    may_operate = ask.session.may("operate")
    return page(ask, "cluster.html", "Cluster", parts=parts, may_operate=may_operate, address=ask.site.address)


def live(ask: Ask) -> Response:
    """GET /cluster/live."""
    return stream(ask, lambda: read_parts(ask.site))


def examine(ask: Ask) -> Response:
    """POST /cluster/examine."""
    ask.site.processes.start(JOB, ["doctor", "--json", "--storage", ask.site.root], what="smolray doctor")
    return RedirectResponse("/cluster", 303)


def drain(ask: Ask) -> Response:
    """POST /cluster/drain: give the node of the form back to its owner."""
    node, site = ask.form.get("node", "").strip(), ask.site
    if not site.address:
        raise ConfigError("these pages know no cluster; start them with its job server: smolray web --address URL")
    if not node:
        raise ConfigError("no node was named; expected its name, address or node id")
    site.processes.start(
        JOB,
        ["cluster", "drain", "--address", site.address, "--storage", site.root, "--", node],
        what=f"smolray cluster drain {node}",
    )
    return RedirectResponse("/cluster", 303)


def read_parts(site: Site) -> list[Part]:
    """What the newest examination has found, and the nodes that were drained."""
    commands = site.processes.of(JOB)
    started = next((one for one in commands if one.command == "doctor"), None)
    nodes = nodes_of(started) if started and started.state != "running" else []
    when = time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime(started.since)) if started else ""
    drained = [one for one in commands if one.command == "cluster"][:MOST_DRAINS]
    return [
        Part("drained", fragment("cluster_drained.html", drained=drained)),
        Part("nodes", fragment("cluster_nodes.html", started=started, nodes=nodes, when=when)),
    ]


def nodes_of(started: Started) -> list[NodeRow]:
    """The findings by node; none where the doctor could not look."""
    findings = found_in(started.output.read_text(errors="replace"))
    names = dict.fromkeys(finding.node for finding in findings)
    rows = []
    for name in names:
        of_node = sorted((f for f in findings if f.node == name), key=lambda f: ORDER[f.level])
        rows.append(NodeRow(name, of_node[0].level, of_node))
    return sorted(rows, key=lambda row: ORDER[row.level])


def found_in(printed: str) -> list[Finding]:
    """The findings in what the doctor has printed: JSON, which warnings of others may precede."""
    start = 0 if printed.startswith("[") else printed.find("\n[\n") + 1
    try:
        return [Finding(**record) for record in json.loads(printed[start:])]
    except (ValueError, TypeError):
        return []
