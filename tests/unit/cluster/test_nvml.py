"""The driver's facts about GPUs. The library of the driver is replaced: there is no GPU here."""

from types import SimpleNamespace

import pynvml
import pytest

from smolray.cluster import nvml

LOG = """[    0.000000] Linux version 6.8.0
[ 1200.1] NVRM: Xid (PCI:0000:02:00): 79, pid='<unknown>', name=<unknown>, GPU has fallen off the bus.
[ 1300.2] NVRM: Xid (PCI:0000:02:00): 31, pid=4711, name=python, Ch 00000008, intr 00000000. MMU Fault
[ 1300.3] NVRM: GPU 0000:02:00.0: RmInitAdapter failed!
"""


def refuse(*_):
    raise pynvml.NVMLError(pynvml.NVML_ERROR_NOT_SUPPORTED)


@pytest.fixture
def driver(monkeypatch):
    """Two GPUs: a hot one on a riser with memory errors, and one of which the driver tells little."""
    running = [SimpleNamespace(pid=1, usedGpuMemory=6 * 10**9), SimpleNamespace(pid=1, usedGpuMemory=None)]

    def of(first, second=refuse):
        return lambda gpu, *more: first if gpu == 0 else second(gpu)

    told = {
        "nvmlInit": lambda: None,
        "nvmlShutdown": lambda: None,
        "nvmlSystemGetDriverVersion": lambda: "580.65.06",
        "nvmlSystemGetProcessName": lambda pid: "blender",
        "nvmlDeviceGetCount": lambda: 2,
        "nvmlDeviceGetHandleByIndex": lambda number: number,
        "nvmlDeviceGetName": lambda gpu: f"card {gpu}",
        "nvmlDeviceGetPciInfo": lambda gpu: SimpleNamespace(busId=f"00000000:0{gpu}:00.0"),
        "nvmlDeviceGetMemoryInfo": lambda gpu: SimpleNamespace(used=10**9, total=24 * 10**9),
        "nvmlDeviceGetCudaComputeCapability": lambda gpu: (8, 9),
        "nvmlDeviceGetComputeRunningProcesses": of(running),
        "nvmlDeviceGetCurrentClocksEventReasons": of(
            pynvml.nvmlClocksEventReasonSwThermalSlowdown | pynvml.nvmlClocksEventReasonSwPowerCap
        ),
        "nvmlDeviceGetRemappedRows": of((1, 1, 1, 0)),
        "nvmlDeviceGetCurrPcieLinkWidth": of(1),
        "nvmlDeviceGetMaxPcieLinkWidth": of(16),
        "nvmlDeviceGetTotalEccErrors": of(4),
    }
    for name, function in told.items():
        assert callable(getattr(pynvml, name)), "the library has it"
        monkeypatch.setattr(pynvml, name, function)


def test_what_ails_a_gpu_is_read_from_the_driver(driver):
    hot, silent = nvml.gpu_facts()
    assert (hot["slowed"], hot["lanes"], hot["memory_errors"]) == (["too hot"], (1, 16), 4)
    assert (hot["rows_to_replace"], hot["rows_broken"]) == (True, False)
    assert hot["busy"] and hot["processes"][0] == {"pid": 1, "name": "blender", "memory": 6e9}
    assert (silent["name"], silent["capability"], silent["total"]) == ("card 1", (8, 9), 24e9)
    assert (silent["slowed"], silent["lanes"], silent["memory_errors"], silent["busy"]) == (
        [],
        (None, None),
        None,
        False,
    )
    assert nvml.driver_version() == "580.65.06"


def test_without_a_driver_there_are_no_gpus(monkeypatch):
    monkeypatch.setattr(pynvml, "nvmlInit", refuse)
    assert nvml.gpu_facts() == [] and nvml.driver_version() is None


def test_xid_errors_are_read_from_the_kernels_log():
    assert [(bus, number) for bus, number, _ in nvml.xid_errors(LOG)] == [("0000:02:00", 79), ("0000:02:00", 31)]
    assert "fallen off" in nvml.xid_errors(LOG)[0][2]
    assert nvml.xid_errors("") == []
