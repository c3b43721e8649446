"""What `make gpu` measured of a GPU, in place of the planner's estimates.

In: its JSON file, and an Inventory. Out: the Inventory with what was measured. A GPU of planner/gpus.py may hold the
same fields for good.
"""

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

from smolray.planner.assumptions import FRAGMENTATION
from smolray.planner.gpus import GPU
from smolray.planner.inventory import Inventory, InventoryError, find_gpu

MIB = 2**20


def calibrated(inventory: Inventory, path: str | Path) -> Inventory:
    """The inventory with the GPUs of the kind that was measured as the file says.

    Raises:
        InventoryError: the file holds no figures of a GPU, or the inventory none of that kind.
    """
    report = _report(path)
    name, kind = report["machine"]["name"], _kind(report["machine"]["name"])
    kinds = {gpu.name: _kind(gpu.name) for gpu in inventory.gpus}
    if kind not in kinds.values():
        raise InventoryError(
            f"{path} was measured on {name}; the inventory has {', '.join(kinds)}: measure on one of them"
        )

    figures = _figures(path, report)
    nodes = (
        replace(node, gpus=tuple(_measured(gpu, figures) if kinds[gpu.name] == kind else gpu for gpu in node.gpus))
        for node in inventory.nodes
    )
    return replace(inventory, nodes=tuple(nodes))


def _measured(gpu: GPU, figures: dict[str, Any]) -> GPU:
    return replace(gpu, measured=True, **figures)


def _kind(name: str) -> str:
    """A GPU's name in planner/gpus.py, or as it is where it is not there."""
    try:
        return find_gpu(name).name
    except InventoryError:
        return name


def _report(path: str | Path) -> dict[str, Any]:
    """The file, with a machine that has a name and a list of checks."""
    try:
        report: dict[str, Any] = json.loads(Path(path).read_text(encoding="utf-8"))
        readable = isinstance(report["machine"]["name"], str) and isinstance(report["checks"], list)
    except OSError as error:
        raise InventoryError(f"{path} cannot be read: {error.strerror}; expected the gpu.json of `make gpu`") from error
    except (ValueError, KeyError, TypeError):
        readable = False
    if not readable:
        raise InventoryError(f"{path} is another kind of file; expected the gpu.json of `make gpu`")
    return report


def _figures(path: str | Path, report: dict[str, Any]) -> dict[str, Any]:
    """The fields of GPU that were measured.

    Speeds and the context must be there. Steps that did not run leave the estimates of what the allocator reserves and
    of seconds as they are.
    """
    ran = [check["figures"] for check in report["checks"] if check["verdict"] != "skipped"]
    known = {name: value for figures in ran for name, value in figures.items()}
    needed = ("tflops_float16", "tflops_float32", "copy_gb_a_second", "context_mib")
    if lacking := [name for name in needed if name not in known]:
        raise InventoryError(
            f"{path} holds no {', '.join(lacking)}: its checks of the machine did not run; run `make gpu` on the GPU"
        )

    steps = [figures for figures in ran if "seconds_a_step" in figures and not figures["offloaded"]]
    over = [each["reserved_mib"] / each["allocated_mib"] - 1 for each in steps]
    slower = [math.log(each["seconds_a_step"] / each["planned_seconds"]) for each in steps]
    return {
        "tflops_16": known.get("tflops_bfloat16", known["tflops_float16"]),
        "tflops_32": known["tflops_float32"],
        "bandwidth": known["copy_gb_a_second"] * 1e9,
        "context": known["context_mib"] * MIB,
        "fragmentation": max(over, default=FRAGMENTATION),
        "slowdown": math.exp(sum(slower) / len(slower)) if slower else 1.0,
    }
