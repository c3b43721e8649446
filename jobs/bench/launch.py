"""Benchmark of the launcher: the same optimizer steps in workers of Ray Train and in workers of torchrun.

In: a tiny model, so that the launcher's own work shows. Out: a Result for an optimizer step over all workers. The start
takes seconds either way and is left out.
"""

import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from jobs.bench.timing import Cost, Result, in_turns

WORKERS, STEPS, WARM_UP = 2, 200, 10


def launch_case(scale: float, repetitions: int) -> list[Result]:
    """Seconds of a step under Ray Train against torchrun, two workers on this machine."""
    from jobs.easyvqa import vqa_rows
    from smolray.data.shards import write_shards
    from smolray.model.tiny import build_model

    steps = max(4, int(STEPS * scale))
    with tempfile.TemporaryDirectory(prefix="bench") as folder:
        rows = vqa_rows("train", 150)
        shards = write_shards(f"{folder}/shards", rows)
        build_model("tiny", [m.text for row in rows for c in row.conversations for m in c.messages], f"{folder}/model")
        task = {"shards": shards, "model": f"{folder}/model", "steps": steps}

        def ray_train() -> Cost:
            return Cost(**_under_ray(task, folder))

        def torchrun() -> Cost:
            return Cost(**_under_torchrun(task, folder))

        costs = in_turns({"ours": ray_train, "torchrun": torchrun}, repetitions)
    what = f"{steps} steps of the tiny model with ZeRO-2 on {WORKERS} workers, a step"
    return [Result("launch", what, WORKERS, "worker", "torchrun", costs["ours"], costs["torchrun"], "cpu")]


def train(task: dict[str, Any]) -> dict[str, float]:
    """Run the steps in an initialised process group. Returns CPU-seconds of all workers and wall seconds of a step."""
    import torch
    import torch.distributed as dist

    from smolray.config import load_config
    from smolray.data.local import LocalStream, local_plan
    from smolray.engine.zero import ZeroEngine
    from smolray.model.adapters import prepare_for_training
    from smolray.model.load import load_model
    from smolray.objectives.registry import objective_of
    from smolray.run.checkpoint import Progress
    from smolray.train.loop import TrainLoop
    from smolray.train.step import StepInfo

    torch.set_num_threads(1)
    config = load_config(
        None,
        [
            f"model.path={task['model']}",
            "model.dtype=float32",
            f"train.max_steps={task['steps'] + WARM_UP}",
            f"train.global_batch={2 * WORKERS}",
            "train.num_train_epochs=20",
            "train.per_device_train_batch_size=8",
        ],
    )
    engine = ZeroEngine(
        prepare_for_training(load_model(config.model), config), objective_of(config), config, torch.device("cpu")
    )
    began = [0.0, 0.0]

    def clock(step_info: StepInfo) -> None:
        if step_info.metrics.step == WARM_UP:
            began[:] = time.perf_counter(), time.process_time()

    plans = [local_plan(task["shards"], config, epoch) for epoch in range(config.train.num_train_epochs)]
    TrainLoop(
        config,
        engine,
        plans,
        lambda plan, numbers: LocalStream(task["shards"], plan, numbers, config),
        Progress(),
        [clock],
    ).run()
    spent = torch.tensor([time.perf_counter() - began[0], time.process_time() - began[1]], dtype=torch.float64)
    dist.all_reduce(spent)
    return {"wall_s": float(spent[0]) / WORKERS / task["steps"], "cpu_s": float(spent[1]) / task["steps"]}


def _under_ray(task: dict[str, Any], folder: str) -> dict[str, float]:
    from ray.train import RunConfig, ScalingConfig
    from ray.train.torch import TorchConfig, TorchTrainer

    function: Any = train
    trainer = TorchTrainer(
        function,
        train_loop_config=task,
        torch_config=TorchConfig(backend="gloo"),
        run_config=RunConfig(storage_path=f"{folder}/ray"),
        scaling_config=ScalingConfig(num_workers=WORKERS, resources_per_worker={"CPU": 0.5}),
    )
    found: Any = trainer.fit()
    return dict(found.return_value)


def _under_torchrun(task: dict[str, Any], folder: str) -> dict[str, float]:
    out = Path(folder) / "torchrun.json"
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        f"--nproc_per_node={WORKERS}",
        __file__,
        json.dumps(task),
        str(out),
    ]
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
    if done.returncode:
        raise RuntimeError(f"torchrun failed: {done.stderr[-2000:]}")
    return dict(json.loads(out.read_text()))


if __name__ == "__main__":
    import torch.distributed

    os.environ.setdefault("DS_ACCELERATOR", "cpu")
    torch.distributed.init_process_group("gloo")
    spent = train(json.loads(sys.argv[1]))
    if torch.distributed.get_rank() == 0:
        Path(sys.argv[2]).write_text(json.dumps(spent))
    torch.distributed.destroy_process_group()
