"""The hardware to plan for: GPUs, nodes, and the links between them.

In: text such as `2x rtx4090 @ 10GbE, 1x rtx3060`, YAML, or what workers report at launch. Out: Inventory.
"""

import difflib
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from smolray.config.parse import YamlError, parse_yaml
from smolray.planner.gpus import ALIASES, GPU, KNOWN_GPUS

GIB = 2**30
MOST_GPUS = 1024  # in a node
MOST = 1e15  # of any number in an inventory


class InventoryError(ValueError):
    """The inventory cannot be read. The message names what was found, what was expected and the nearest."""


@dataclass(frozen=True)
class Interconnect:
    """A link between two GPUs, in one direction.

    `bandwidth`: bytes/s. `latency`: seconds until the first byte.
    """

    bandwidth: float
    latency: float

    def slower(self, other: "Interconnect") -> "Interconnect":
        """The smaller bandwidth and the larger latency of both."""
        return Interconnect(min(self.bandwidth, other.bandwidth), max(self.latency, other.latency))


PCIE = Interconnect(10e9, 20e-6)  # GPUs of one node without NVLink, through the host: an estimate
ETHERNET_LATENCY = 100e-6  # a TCP round trip through two kernels: an estimate
DEFAULT_NETWORK = "1GbE"


@dataclass(frozen=True)
class InventoryNode:
    """A machine.

    `network`: its link to other nodes. `internal`: the link between its GPUs. `cpus`: cores that decode images.
    `memory`: bytes of main memory, for what is offloaded; None: not known, and not limited.
    """

    name: str
    gpus: tuple[GPU, ...]
    network: Interconnect
    internal: Interconnect = PCIE
    cpus: int = 8
    memory: float | None = None


@dataclass(frozen=True)
class Inventory:
    """All nodes.

    `links`: measured links by (node number, node number). Two nodes without a measured link have the slower of their
    networks.
    """

    nodes: tuple[InventoryNode, ...]
    links: Mapping[tuple[int, int], Interconnect] = field(default_factory=dict)

    @property
    def gpus(self) -> tuple[GPU, ...]:
        return tuple(gpu for node in self.nodes for gpu in node.gpus)

    def between(self, a: int, b: int) -> Interconnect:
        """The link between a GPU of node `a` and another one of node `b`."""
        if a == b:
            return self.nodes[a].internal
        measured = self.links.get((a, b)) or self.links.get((b, a))
        return measured or self.nodes[a].network.slower(self.nodes[b].network)

    def describe(self) -> str:
        """One line; `parse` reads it where all GPUs are known ones."""
        return ", ".join(
            f"{counted([gpu.name for gpu in node.gpus], ' + ')} @ {_rate(node.network.bandwidth)}"
            for node in self.nodes
        )

    def to_json(self) -> dict[str, Any]:
        nodes = [{**asdict(node), "gpus": [_plain(gpu) for gpu in node.gpus]} for node in self.nodes]
        return {"nodes": nodes, "links": [[*pair, asdict(link)] for pair, link in self.links.items()]}


def parse(text: str) -> Inventory:
    """The inventory of a text such as `2x rtx4090 + 1x rtx3060 @ 10GbE, 1x rtx3060`.

    Each part is a node, with `+` between different GPUs, and its network after `@` (default 1GbE).

    Raises:
        InventoryError: the text is not of that form, or a GPU is not known.
    """
    nodes = []
    for number, part in enumerate(p.strip() for p in text.split(",")):
        gpus_text, at, network = (piece.strip() for piece in part.partition("@"))
        if not gpus_text or (at and not network):
            raise InventoryError(
                f"inventory part {number + 1} is {part!r}; expected a node such as '2x rtx4090 @ 10GbE'"
            )
        nodes.append(
            InventoryNode(f"node{number}", _gpus(gpus_text.split("+")), find_network(network or DEFAULT_NETWORK))
        )
    return Inventory(tuple(nodes))


def load(source: str) -> Inventory:
    """The inventory of a YAML file, of YAML text that begins with `nodes:`, or of the one-line text of `parse`.

    Raises:
        InventoryError: the file does not exist, or the inventory cannot be read.
    """
    is_file = source.endswith((".yaml", ".yml"))
    if is_file and not Path(source).is_file():
        raise InventoryError(
            f"inventory file {source} does not exist; expected a YAML file, or text such as "
            "'2x rtx4090 @ 10GbE, 1x rtx3060'"
        )
    if not is_file and not source.lstrip().startswith(("nodes:", "boxes:")):
        return parse(source)
    try:
        record = parse_yaml(Path(source).read_text(encoding="utf-8") if is_file else source)
    except (YamlError, UnicodeDecodeError) as error:
        raise InventoryError(f"the inventory is not valid YAML: {error}") from error
    return from_record(record)


def from_record(record: Any) -> Inventory:
    """From a parsed YAML file.

    Its form: `nodes: [{name, gpus: ["2x rtx4090", {name, memory_gb, ...}], network: 10GbE, internal, cpus,
    memory_gb}]`.

    Raises:
        InventoryError: the record is not of that form, or a GPU is not known.
    """
    record = _current_keys(record)
    if not isinstance(record, dict) or not isinstance(record.get("nodes"), list) or not record["nodes"]:
        raise InventoryError(f"the inventory holds {_found(record)}; expected nodes: [{{name, gpus, network}}, ...]")
    return Inventory(tuple(_node(number, entry) for number, entry in enumerate(record["nodes"])))


def find_gpu(name: str) -> GPU:
    """A known GPU by name, as people, Ray (`GeForce-RTX-3090`) or torch (`NVIDIA GeForce RTX 4090`) spell it.

    Raises:
        InventoryError: the GPU is not known; the message names the nearest.
    """
    plain = re.sub(r"[^a-z0-9]|nvidia|tesla|quadro|geforce", "", name.lower())
    known = {re.sub(r"[^a-z0-9]", "", key): gpu for key, gpu in KNOWN_GPUS.items()} | {
        alias: KNOWN_GPUS[key] for alias, key in ALIASES.items()
    }
    for spelling in (plain, re.sub(r"\d\dgb$", "", plain)):
        for prefix in ("", "rtx"):
            if gpu := known.get(prefix + spelling):
                return gpu
    nearest = known[difflib.get_close_matches(plain, known, n=1, cutoff=0.0)[0]].name
    raise InventoryError(
        f"GPU {name!r} is not known; known are {', '.join(KNOWN_GPUS)}; nearest: {nearest}; "
        "describe another GPU in YAML as {name, memory_gb, tflops_16, tflops_32, bandwidth_gb, bf16}"
    )


def find_network(text: str) -> Interconnect:
    """The link of a network given as `10GbE`, `2.5 Gbit/s` or `100Mbit`.

    Raises:
        InventoryError: the text is not a speed.
    """
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([gm])(?:be|bit|bit/s|bits|bps)?", text.strip().lower())
    if not match or not float(match[1]):
        raise InventoryError(
            f"network {text!r} is not a speed; expected one such as 1GbE, 2.5GbE, 10GbE, 100Mbit/s; nearest: 10GbE"
        )
    return Interconnect(float(match[1]) * {"g": 1e9, "m": 1e6}[match[2]] / 8, ETHERNET_LATENCY)


def measured_gpu(
    name: str,
    memory: int,
    tflops_16: float,
    tflops_32: float,
    bandwidth: float | None = None,
    bf16: bool = True,
    host: bool = False,
) -> GPU:
    """A GPU as a worker reports it.

    Args:
        name: as torch names it.
        memory: usable bytes.
        tflops_16: measured with a short matmul.
        tflops_32: measured with a short matmul.
        bandwidth: bytes/s of its memory; default: of the known GPU, or 1 byte for every 25 operations.
        bf16: whether it has bf16 units.
        host: whether it is a CPU.
    """
    try:
        bandwidth = bandwidth or find_gpu(name).bandwidth
    except InventoryError:
        bandwidth = tflops_32 * 1e12 / 25
    return GPU(name, memory, tflops_16, tflops_32, bandwidth, bf16, measured=True, host=host)


def _current_keys(record: Any) -> Any:
    """The record with today's keys: `boxes` and `cards` are earlier names of `nodes` and `gpus`."""
    if not isinstance(record, dict):
        return record
    return {{"boxes": "nodes", "cards": "gpus"}.get(key, key): value for key, value in record.items()}


def _node(number: int, entry: Any) -> InventoryNode:
    entry = _current_keys(entry)
    if not isinstance(entry, dict) or not entry.get("gpus"):
        raise InventoryError(
            f"nodes[{number}] is {_found(entry)}; expected {{name, gpus: [rtx4090, ...], network: 10GbE}}"
        )

    known = ("name", "gpus", "network", "internal", "cpus", "memory_gb")
    if stray := sorted(set(entry) - set(known)):
        near = difflib.get_close_matches(stray[0], known, n=1, cutoff=0.0)[0]
        raise InventoryError(
            f"nodes[{number}].{stray[0]} is not a setting; expected {', '.join(known)}; nearest: {near}"
        )

    listed = entry["gpus"] if isinstance(entry["gpus"], list) else [entry["gpus"]]
    node = InventoryNode(
        str(entry.get("name", f"node{number}")),
        _gpus(listed),
        _link(entry.get("network", DEFAULT_NETWORK), ETHERNET_LATENCY),
    )

    if "memory_gb" in entry:
        node = replace(node, memory=_number(entry["memory_gb"], f"nodes[{number}].memory_gb") * GIB)
    if "internal" in entry:
        node = replace(node, internal=_link(entry["internal"], PCIE.latency))
    return replace(node, cpus=int(_number(entry["cpus"], f"nodes[{number}].cpus"))) if "cpus" in entry else node


def _link(entry: Any, latency: float) -> Interconnect:
    if not isinstance(entry, dict):
        return replace(find_network(str(entry)), latency=latency)
    if "bandwidth_gbit" not in entry or set(entry) - {"bandwidth_gbit", "latency_us"}:
        raise InventoryError(f"link {entry!r}: expected 10GbE or {{bandwidth_gbit: 10, latency_us: 50}}")
    seconds = _number(entry["latency_us"], "latency_us") / 1e6 if "latency_us" in entry else latency
    return Interconnect(_number(entry["bandwidth_gbit"], "bandwidth_gbit") * 1e9 / 8, seconds)


def _gpus(parts: list[Any]) -> tuple[GPU, ...]:
    gpus: list[GPU] = []
    for part in parts:
        if isinstance(part, dict):
            gpus.append(_described_gpu(part))
            continue
        match = re.fullmatch(r"(?:(\d+)\s*[x×]\s*)?(\S.*)", str(part).strip(), re.IGNORECASE)
        if not match or match[1] == "0":
            raise InventoryError(f"gpus {part!r}: expected a count and a GPU, such as 2x rtx4090")
        count = int(match[1] or 1) if len(match[1] or "") < 9 else MOST_GPUS + 1
        if len(gpus) + count > MOST_GPUS:
            raise InventoryError(f"gpus {part!r}: expected at most {MOST_GPUS} GPUs in a node")
        gpus += [find_gpu(match[2])] * count
    return tuple(gpus)


def _described_gpu(entry: dict[str, Any]) -> GPU:
    needed, optional = ("name", "memory_gb", "tflops_16", "tflops_32"), ("bandwidth_gb", "bf16", "measured")
    if (lacking := [k for k in needed if k not in entry]) or (stray := sorted(set(entry) - {*needed, *optional})):
        fault = f"lacks {', '.join(lacking)}" if lacking else f"has {', '.join(stray)}"
        raise InventoryError(
            f"GPU {entry!r} {fault}; expected {', '.join(needed)} and optionally {', '.join(optional)}"
        )
    memory, fast, plain = (_number(entry[k], k) for k in needed[1:])
    bandwidth = _number(entry["bandwidth_gb"], "bandwidth_gb") * 1e9 if "bandwidth_gb" in entry else plain * 1e12 / 25
    return GPU(
        str(entry["name"]),
        int(memory * GIB),
        fast,
        plain,
        bandwidth,
        bool(entry.get("bf16", True)),
        bool(entry.get("measured", False)),
    )


def _number(value: Any, key: str) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < MOST:
        raise InventoryError(f"{key} = {_found(value)}: expected a number above 0")
    return float(value)


def _found(value: Any) -> str:
    return repr(value)[:80] if value is not None else "nothing"


def _plain(gpu: GPU) -> dict[str, Any]:
    """A GPU as JSON writes it."""
    return {**asdict(gpu), "capability": list(gpu.capability) if gpu.capability else None}


def counted(names: Sequence[str], separator: str = ", ") -> str:
    """Equal names as one: `2x rtx4090, 1x rtx3060`."""
    return separator.join(f"{names.count(name)}x {name}" for name in dict.fromkeys(names))


def _rate(bandwidth: float) -> str:
    bits = bandwidth * 8
    return f"{bits / 1e9:g}GbE" if bits >= 1e9 else f"{bits / 1e6:g}Mbit/s"
