"""From the facts of each node to findings with a remedy. Pure, so that a test can plant every fault.

In: facts of each node and measurements of each pair (doctor.py gathers them). Out: Findings, the worst first.
"""

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from smolray.cluster.findings import ORDER, Finding, Level, ok
from smolray.cluster.network_checks import Link, link_findings
from smolray.cluster.node_checks import Facts, node_findings

Nodes = Mapping[str, Facts]  # by name, the head first


def diagnose(nodes: Nodes, links: Sequence[Link] = (), others: Iterable[Finding] = ()) -> list[Finding]:
    """All findings about the nodes (name -> facts, the head first) and the links between them, the worst first.

    `others`: findings that were made elsewhere and are sorted in.
    """
    found = [*others, *same_everywhere(nodes)]
    for name, facts in nodes.items():
        found += node_findings(name, facts, several=len(nodes) > 1)
    for link in links:
        found += link_findings(link)
    return sorted(found, key=lambda f: ORDER[f.level])


def same_everywhere(nodes: Nodes) -> list[Finding]:
    """Findings for what must be equal on all nodes: each is compared with the majority, or in a tie with the head."""
    return [*same_versions(nodes), *same_packages(nodes), *same_files(nodes)]


def same_versions(nodes: Nodes) -> list[Finding]:
    """Python, Ray, torch, and where there are GPUs CUDA and the driver."""
    findings = []
    for what in ("python", "ray", "torch", "cuda", "driver"):
        only_gpus = what in ("cuda", "driver")
        versions = {name: facts.get(what) for name, facts in nodes.items() if facts.get("gpus") or not only_gpus}
        if not versions:
            continue

        usual = _most_common(versions.values())
        level: Level = "warn" if what == "driver" else "fail"
        how = "the same driver" if what == "driver" else "with the same constraints.txt"
        odd = [name for name, version in versions.items() if version != usual]
        findings += [
            Finding(what, name, level, str(versions[name]), str(usual), f"install {how} on all nodes") for name in odd
        ]
        if not odd:
            findings.append(ok(what, "all", str(usual)))
    return findings


def same_packages(nodes: Nodes) -> list[Finding]:
    """The Python packages of the nodes' environments."""
    names = sorted({package for facts in nodes.values() for package in facts.get("packages", {})})
    findings = []
    for package in names:
        versions = {name: facts.get("packages", {}).get(package) for name, facts in nodes.items()}
        usual = _most_common(versions.values())
        command = f"install -c constraints.txt {package}" if usual else f"uninstall {package}"
        expected = f"{package} {usual or 'not there'}"
        findings += [
            Finding("package", name, "fail", f"{package} {version or 'missing'}", expected, f"on {name}: pip {command}")
            for name, version in versions.items()
            if version != usual
        ]
    return findings or [ok("packages", "all", f"{len(names)} packages, the same everywhere")]


def same_files(nodes: Nodes) -> list[Finding]:
    """The folders that the user named: a model or data that every node has a copy of."""
    findings = []
    for path in sorted({path for facts in nodes.values() for path in facts.get("paths", {})}):
        digests = {name: facts.get("paths", {}).get(path) for name, facts in nodes.items()}
        there = [digest for digest in digests.values() if digest]
        usual = _most_common(there) if there else None
        bad = [name for name, digest in digests.items() if digest is None or digest != usual]
        for name in bad:
            found = f"{path} {'differs' if digests[name] else 'is missing'}"
            findings.append(Finding("files", name, "fail", found, "the same on every node", "copy it, or put it on S3"))
        if not bad:
            findings.append(ok("files", "all", f"{path}, the same everywhere"))
    return findings


def _most_common(values: Iterable[Any]) -> Any:
    return Counter(values).most_common(1)[0][0]
