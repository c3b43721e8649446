"""Two GPUs: data parallel and as a pipeline, with the losses of one; and a worker that is killed."""

import json
import os
import signal
import tempfile
import threading
import time
from functools import partial
from pathlib import Path

import psutil  # type: ignore[import-untyped]
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from jobs.gpu.check import Check, Figures, Needs, expect
from jobs.gpu.curves import STEPS, config_of, data_folder, losses, process_group
from jobs.gpu.training import FP32, reference
from smolray.run.events import read_events, surviving

LONG = 40  # steps of a run in which a worker is killed
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


def spread(settings: tuple[str, ...], kind: str, steps: int = STEPS) -> list[float]:
    """The losses of a run on two workers, each with a device of its own."""
    with tempfile.TemporaryDirectory() as folder:
        arguments = (kind, str(data_folder()), settings, folder, steps)
        mp.start_processes(_worker, arguments, nprocs=2, start_method="spawn")
        return [float(loss) for loss in json.loads((Path(folder) / "losses.json").read_text())]


def _worker(rank: int, kind: str, data: str, settings: tuple[str, ...], folder: str, steps: int) -> None:
    torch.backends.cudnn.allow_tf32 = False
    device = torch.device(kind, rank) if kind == "cuda" else torch.device(kind)
    if kind == "cuda":
        torch.cuda.set_device(device)
    process_group(device, rank, 2, f"{folder}/init")
    found = losses(Path(data), settings, device, steps)
    if rank == 0:
        (Path(folder) / "losses.json").write_text(json.dumps(found))
    dist.destroy_process_group()


def killed_worker(device: torch.device) -> Figures:
    """A run on Ray goes on by itself when a worker is killed, with the losses of one that nobody touched."""
    from jobs.benchmark import start_ray
    from smolray.launch.driver import launch_run

    settings = (FP32, "engine.stage=2", "train.num_train_epochs=10")
    expected = spread(settings, device.type, LONG)
    start_ray()
    with tempfile.TemporaryDirectory() as folder:
        run = ("name=killed", f"storage={folder}", f"data.train={data_folder() / 'shards'}")
        saved = (f"train.max_steps={LONG}", "checkpoint.save_steps=5")
        workers = ("resources.num_workers=2", "resources.cpus_per_worker=0.5")
        config = config_of(data_folder(), [*settings, *run, *saved, *workers])
        killed: list[int] = []
        threading.Thread(target=_kill_one, args=(config.run_dir, killed), daemon=True).start()
        launch_run(config)
        kept = [event for event in surviving(read_events(config.run_dir)) if event["event"] == "step"]

    worst = max(abs(each["loss"] - loss) / loss for each, loss in zip(kept, expected, strict=True))
    figures = {"killed_at_step": killed, "steps": len(kept), "largest_difference": worst}
    expect(bool(killed), "the run ended before a worker was killed", figures)
    return expect(worst < 1e-2, f"the losses differ by {worst:.1e}", figures)


def _kill_one(run_dir: str, killed: list[int]) -> None:
    """Kill a worker of this process's Ray once the run has made 10 steps; `killed`: the step it had reached."""
    while True:
        steps = [event["step"] for event in read_events(run_dir) if event["event"] == "step"]
        if steps and max(steps) >= 10:
            break
        time.sleep(0.02)
    mine = psutil.Process().children(recursive=True)
    victim = next(process for process in mine if "RayTrainWorker" in " ".join(process.cmdline()))
    os.kill(victim.pid, signal.SIGKILL)
    killed.append(max(steps))


CHECKS = (
    *(
        Check(name, f"Do two GPUs train as one does ({' '.join(settings)})?", partial(on_two, settings), Needs(gpus=2))
        for name, settings in CASES.items()
    ),
    Check("killed worker", "Does a run go on with the same losses when a worker is killed?", killed_worker, Needs(2)),
)
