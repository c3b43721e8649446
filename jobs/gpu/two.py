"""Two GPUs: data parallel and as a pipeline, with the losses of one."""

import json
import tempfile
from functools import partial
from pathlib import Path

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from jobs.gpu.check import Check, Figures, Needs, expect
from jobs.gpu.curves import data_folder, losses, process_group
from jobs.gpu.training import FP32, reference

CASES = {
    "nccl, zero-2": (FP32, "engine.stage=2"),
    "nccl, zero-3": (FP32, "engine.stage=3"),
    "pipeline of 2": (FP32, "engine.name=pipeline"),
}


def on_two(settings: tuple[str, ...], device: torch.device) -> Figures:
    """The losses of two workers beside those of one on the CPU."""
    expected, found = reference("sft"), spread(settings, device.type)
    worst = max(abs(a - b) / max(abs(b), 1e-6) for a, b in zip(found, expected, strict=True))
    figures = {"losses": found, "cpu_fp32": expected, "largest_difference": worst}
    return expect(worst < 1e-3, f"the losses differ by {worst:.1e}", figures)


def spread(settings: tuple[str, ...], kind: str) -> list[float]:
    """The losses of a run on two workers, each with a device of its own."""
    with tempfile.TemporaryDirectory() as folder:
        mp.start_processes(_worker, (kind, str(data_folder()), settings, folder), nprocs=2, start_method="spawn")
        return [float(loss) for loss in json.loads((Path(folder) / "losses.json").read_text())]


def _worker(rank: int, kind: str, data: str, settings: tuple[str, ...], folder: str) -> None:
    torch.backends.cudnn.allow_tf32 = False
    device = torch.device(kind, rank) if kind == "cuda" else torch.device(kind)
    if kind == "cuda":
        torch.cuda.set_device(device)
    process_group(device, rank, 2, f"{folder}/init")
    found = losses(Path(data), settings, device)
    if rank == 0:
        (Path(folder) / "losses.json").write_text(json.dumps(found))
    dist.destroy_process_group()


CHECKS = tuple(
    Check(name, f"Do two GPUs train as one does ({' '.join(settings)})?", partial(on_two, settings), Needs(gpus=2))
    for name, settings in CASES.items()
)
