"""The command `smolray env`: the software and hardware of this machine, to paste into a bug report."""

import json
import os
import platform
import re
import shutil
import subprocess
from importlib import metadata
from pathlib import Path
from typing import Annotated, Any

import typer

import smolray
from smolray.run.progress import size

DEVELOPMENT = re.compile(r"extra == .(dev|demo)")


def env(as_json: Annotated[bool, typer.Option("--json", help="as JSON, for programs")] = False) -> None:
    """Show versions, GPUs and drivers, to paste into a bug report."""
    found = environment()
    if as_json:
        typer.echo(json.dumps(found, indent=1))
        return

    packages = found.pop("packages")
    for gpu in found.pop("gpus") or ["none"]:
        found[f"GPU {gpu['index']}" if isinstance(gpu, dict) else "GPUs"] = _gpu_line(gpu)
    width = max(len(name) for name in [*found, *packages])
    for name, value in [*found.items(), *packages.items()]:
        typer.echo(f"{name:{width}}  {value or 'none'}")


def environment() -> dict[str, Any]:
    """The facts by name. `gpus` is a list of objects, `packages` maps names to versions, everything else is text."""
    import torch

    from smolray.cluster.nvml import driver_version

    return {
        "smolray": smolray.__version__,
        "installed in": str(Path(smolray.__file__).parent),
        "python": platform.python_version(),
        "platform": platform.platform(),
        "CPUs": str(os.cpu_count()),
        "memory": size(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")),
        "C++ compiler": _first_line(["c++", "--version"]),
        "CUDA of torch": torch.version.cuda or "",
        "NVIDIA driver": driver_version() or "",
        "CUDA_VISIBLE_DEVICES": os.environ.get("CUDA_VISIBLE_DEVICES", "not set"),
        "gpus": _gpus(torch),
        "packages": {name: _version(name) for name in _requirements()},
    }


def _gpus(torch: Any) -> list[dict[str, Any]]:
    if not torch.cuda.is_available():
        return []
    found = [torch.cuda.get_device_properties(index) for index in range(torch.cuda.device_count())]
    return [
        {
            "index": index,
            "name": gpu.name,
            "memory_bytes": gpu.total_memory,
            "compute_capability": f"{gpu.major}.{gpu.minor}",
        }
        for index, gpu in enumerate(found)
    ]


def _gpu_line(gpu: dict[str, Any] | str) -> str:
    if isinstance(gpu, str):
        return gpu
    return f"{gpu['name']}, {size(gpu['memory_bytes'])}, compute capability {gpu['compute_capability']}"


def _requirements() -> list[str]:
    """Names of the packages that smolray needs, and of the optional ones that users install."""
    try:
        required = metadata.requires("smolray") or []
    except metadata.PackageNotFoundError:  # run from a folder without being installed
        required = ["ray", "torch", "transformers", "trl", "peft", "deepspeed", "bitsandbytes", "pyarrow"]
    used = [requirement for requirement in required if not DEVELOPMENT.search(requirement)]
    names = (re.split(r"[^\w.-]", requirement, maxsplit=1)[0] for requirement in used)
    return list(dict.fromkeys(names))


def _version(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return "not installed"


def _first_line(command: list[str]) -> str:
    """The first line that a program prints; empty where it is not there or fails."""
    if shutil.which(command[0]) is None:
        return ""
    done = subprocess.run(command, capture_output=True, text=True, timeout=30, check=False)
    return done.stdout.partition("\n")[0].strip() if done.returncode == 0 else ""
