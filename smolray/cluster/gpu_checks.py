"""Checks of a node's GPUs: heat, power, lanes, memory, errors that the driver logged, and transfers between them.

In: the facts of one node (nvml.py, gpu_pairs.py). Out: Findings.
"""

from collections.abc import Mapping
from typing import Any

from smolray.cluster.findings import Finding, Level, ok

Facts = Mapping[str, Any]

FEW_LANES = 8  # of PCIe: a riser for mining has one
# Of NVIDIA's list of Xid errors: those after which the GPU does not work, and those of a program that ran on it.
BROKEN = {
    48: "memory error that could not be corrected",
    62: "its controller stopped",
    64: "a broken row of memory could not be replaced",
    74: "NVLink error",
    79: "fallen off the bus",
    95: "memory error that could not be contained",
    119: "its system processor does not answer",
    120: "its system processor failed",
}
OF_A_PROGRAM = {13, 31, 43, 45}


def gpu_health(node: str, facts: Facts) -> list[Finding]:
    """What ails the node's GPUs, or that nothing does."""
    if not facts["gpus"]:
        return []
    findings = [finding for number, gpu in enumerate(facts["gpus"]) for finding in _ailments(node, number, gpu)]
    findings += _xid_errors(node, facts)
    return [*(findings or [ok("GPU health", node, "clocks, lanes, memory and log are well")]), *pairs(node, facts)]


def _ailments(node: str, number: int, gpu: Facts) -> list[Finding]:
    name, findings = f"GPU {number}", []

    def add(level: Level, found: str, expected: str, remedy: str) -> None:
        findings.append(Finding(name, node, level, f"{gpu['name']}: {found}", expected, remedy))

    for reason in gpu["slowed"]:
        remedy = "more air, less dust, a stronger power supply, or a lower limit: nvidia-smi -pl WATTS"
        add("warn", f"slowed down, {reason}", "full clocks", remedy)

    lanes, most = gpu["lanes"]
    if lanes and most and lanes < FEW_LANES <= most:
        remedy = "a slot with more lanes in place of a riser: gradients and what is offloaded go over them"
        add("warn", f"{lanes} of {most} PCIe lanes", f"at least {FEW_LANES}", remedy)
    if gpu["memory_errors"]:
        remedy = "do not train on it; restart the node, and replace the GPU if they come again"
        add("fail", f"{gpu['memory_errors']} memory errors that could not be corrected", "none", remedy)
    if gpu["rows_broken"]:
        add("fail", "a broken row of memory cannot be replaced", "none", "replace the GPU")
    elif gpu["rows_to_replace"]:
        add("warn", "a broken row of memory is replaced at the next start", "none", "restart the node")
    return findings


def _xid_errors(node: str, facts: Facts) -> list[Finding]:
    """One finding for each kind of error that the driver logged about a GPU, with the last of its texts."""
    if facts["xid"] is None:
        remedy = "run the doctor where Ray's user may read the kernel's log (group adm, or kernel.dmesg_restrict=0)"
        return [Finding("Xid errors", node, "ok", "the kernel's log may not be read", "", remedy)]

    findings = []
    for bus, number in dict.fromkeys((bus, number) for bus, number, _ in facts["xid"]):
        texts = [text for *kind, text in facts["xid"] if kind == [bus, number]]
        what = BROKEN.get(number, "of a program" if number in OF_A_PROGRAM else texts[-1][:100])
        found = f"Xid {number} ({what}) of GPU {bus}, {len(texts)} since the start"
        remedy = (
            "see the run's log of that time"
            if number in OF_A_PROGRAM
            else "restart the node; then power cables, riser, slot, and the GPU itself"
        )
        findings.append(
            Finding("Xid errors", node, "fail" if number in BROKEN else "warn", found, "none in dmesg", remedy)
        )
    return findings


def pairs(node: str, facts: Facts) -> list[Finding]:
    """Transfers between the GPUs of the node; `gpu_pairs`: PairOutcomes, None where GPUs are in use."""
    if len(facts["gpus"]) < 2:
        return []
    if facts["gpu_pairs"] is None:
        return [ok("GPU to GPU", node, "not tried: GPUs are in use")]

    findings = []
    for outcome in facts["gpu_pairs"]:
        if not outcome.error:
            continue
        between = f"GPU {outcome.gpus[0]} and GPU {outcome.gpus[1]}: {outcome.error}"
        if outcome.without_p2p == "":
            found = f"{between}; without peer-to-peer they add up"
            remedy = f"set NCCL_P2P_DISABLE=1 in the environment of Ray on {node}, and start it again"
        else:
            found = f"{between}; without peer-to-peer: {outcome.without_p2p}"
            remedy = "see NCCL_DEBUG=INFO, the Xid errors in dmesg, /dev/shm and the driver"
        findings.append(Finding("GPU to GPU", node, "fail", found, "a sum over both", remedy))
    return findings or [ok("GPU to GPU", node, f"{len(facts['gpu_pairs'])} pairs add up")]
