"""Seconds on a device."""

import statistics
import time
from collections.abc import Callable

import torch


def timed(work: Callable[[], object], device: torch.device, repetitions: int = 5) -> float:
    """Median seconds of `work` on the device, after one run to warm up."""

    def once() -> float:
        began = time.perf_counter()
        work()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        return time.perf_counter() - began

    once()
    return statistics.median(once() for _ in range(repetitions))
