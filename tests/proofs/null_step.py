"""A step of a true shape on the card of cuda.c: its bytes, its launches and where the host waits, as JSON.

`python -m tests.proofs.null_step "256m stage 2"`: a case of jobs/gpu/shapes.py.
"""

import ctypes
import json
import os
import sys
import traceback
from collections import Counter
from pathlib import Path

import torch
from torch._inductor import config as inductor

from jobs.gpu.shapes import Step
from smolray.planner.memory import zero_memory

ROOT = Path(__file__).parents[2]


class Card:
    """What cuda.c counts."""

    def __init__(self):
        self.runtime = ctypes.CDLL("cudart.so")
        self.waits: Counter[str] = Counter()
        self.launched = 0
        self._call = ctypes.CFUNCTYPE(None, ctypes.c_char_p)(self._waits)
        self.runtime.null_on_wait(self._call)

    def _waits(self, kind: bytes) -> None:
        """Note the wait with the innermost line of this repository that led to it."""
        own = [f for f in traceback.extract_stack() if Path(f.filename).is_relative_to(ROOT / "smolray")]
        place = f"{Path(own[-1].filename).relative_to(ROOT)}: {own[-1].line}" if own else "elsewhere"
        self.waits[f"{kind.decode()}, {place}"] += 1

    def counted(self) -> tuple[int, dict[str, int]]:
        """The launches since the last call, and the waits."""
        launches, waits = self.runtime.null_launches() - self.launched, dict(self.waits)
        self.launched += launches
        self.waits.clear()
        return launches, waits


def main(name: str) -> None:
    """Three steps; what the last one takes."""
    torch.backends.cudnn.enabled = False  # it would ask the real driver
    inductor.compile_threads = 1
    card, device = Card(), torch.device("cuda", 0)
    step = Step(name, device)
    for _ in range(3):
        torch.cuda.reset_peak_memory_stats(device)
        card.counted()
        step.accumulate()
        accumulated, waits = card.counted()
        step.update()
        updated, _ = card.counted()

    taken = torch.cuda.max_memory_allocated(device)
    figures = {"allocated": taken, "planned": zero_memory(*step.planned()).tensors, "waits": waits}
    print(json.dumps(figures | {"launches_forward_backward": accumulated, "launches_update": updated}), flush=True)
    os._exit(0)  # what torch ends in order is not there


if __name__ == "__main__":
    main(sys.argv[1])
