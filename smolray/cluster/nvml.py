"""The GPUs of this machine by NVIDIA's management library: what they are, what runs on them, and what ails them.

In: the driver. Out: facts that node_checks.py and gpu_checks.py read; none where there is no driver.
"""

import contextlib
import re
import subprocess
from collections.abc import Callable, Iterator
from typing import Any

import psutil
import pynvml

# What lowers the clocks, among the library's reasons. A power limit that the owner set is none of them.
SLOWED = {
    pynvml.nvmlClocksEventReasonHwThermalSlowdown: "too hot (hardware)",
    pynvml.nvmlClocksEventReasonSwThermalSlowdown: "too hot",
    pynvml.nvmlClocksEventReasonHwPowerBrakeSlowdown: "the power supply asks for less",
}
XID = re.compile(r"NVRM: Xid \((?:PCI:)?([^)]+)\): (\d+), ?(.*)")


@contextlib.contextmanager
def library() -> Iterator[bool]:
    """The library while it is used; False where there is no driver."""
    try:
        pynvml.nvmlInit()
    except pynvml.NVMLError:
        yield False
        return
    try:
        yield True
    finally:
        pynvml.nvmlShutdown()


def driver_version() -> str | None:
    """The version of the driver; None: there is none."""
    with library() as there:
        return str(pynvml.nvmlSystemGetDriverVersion()) if there else None


def gpu_facts() -> list[dict[str, Any]]:
    """A dict for each GPU; a value that the GPU or its driver does not tell is None."""
    with library() as there:
        if not there:
            return []
        return [_facts(pynvml.nvmlDeviceGetHandleByIndex(n)) for n in range(pynvml.nvmlDeviceGetCount())]


def _facts(gpu: Any) -> dict[str, Any]:
    memory = pynvml.nvmlDeviceGetMemoryInfo(gpu)
    running = _told(pynvml.nvmlDeviceGetComputeRunningProcesses, gpu) or []
    reasons = _told(pynvml.nvmlDeviceGetCurrentClocksEventReasons, gpu) or 0
    rows = _told(pynvml.nvmlDeviceGetRemappedRows, gpu)
    uncorrected = (pynvml.NVML_MEMORY_ERROR_TYPE_UNCORRECTED, pynvml.NVML_VOLATILE_ECC)
    return {
        "name": _told(pynvml.nvmlDeviceGetName, gpu),
        "bus": _told(lambda each: pynvml.nvmlDeviceGetPciInfo(each).busId, gpu),
        "used": float(memory.used),
        "total": float(memory.total),
        "capability": _told(pynvml.nvmlDeviceGetCudaComputeCapability, gpu),
        "busy": bool(running),
        "processes": [_process(each) for each in running if not _is_rays(each.pid)],
        "slowed": [words for reason, words in SLOWED.items() if reasons & reason],
        "lanes": (
            _told(pynvml.nvmlDeviceGetCurrPcieLinkWidth, gpu),
            _told(pynvml.nvmlDeviceGetMaxPcieLinkWidth, gpu),
        ),
        "memory_errors": _told(pynvml.nvmlDeviceGetTotalEccErrors, gpu, *uncorrected),
        "rows_to_replace": bool(rows and rows[2]),
        "rows_broken": bool(rows and rows[3]),
    }


def kernel_faults() -> list[tuple[str, int, str]] | None:
    """(GPU's bus, number, text) of the Xid errors since the machine was started, as the kernel's log has them.

    None: this user may not read it.
    """
    try:
        done = subprocess.run(["dmesg"], capture_output=True, text=True, errors="replace", timeout=20)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return xid_errors(done.stdout) if done.returncode == 0 else None


def xid_errors(log: str) -> list[tuple[str, int, str]]:
    """The Xid errors of a kernel's log."""
    return [(bus, int(number), text.strip()) for bus, number, text in XID.findall(log)]


def _told(function: Callable[..., Any], *arguments: Any) -> Any:
    """What the library says; None where the GPU or the driver does not know the question."""
    try:
        return function(*arguments)
    except pynvml.NVMLError:
        return None


def _process(running: Any) -> dict[str, Any]:
    name = _told(pynvml.nvmlSystemGetProcessName, running.pid) or "a process"
    return {"pid": running.pid, "name": name, "memory": float(running.usedGpuMemory or 0)}


def _is_rays(pid: int) -> bool:
    try:
        return " ".join(psutil.Process(pid).cmdline()).startswith("ray::")
    except psutil.Error:
        return False
