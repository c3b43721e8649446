"""One of two workers, each on its own node: python -m tests.nodes.slow_link RANK HEAD-ADDRESS OWN-ADDRESS SHARDS OUT
JOBS.

JOBS: JSON, name -> overrides of a run. Rank 0 writes to OUT, for each run, the seconds of its steps and what the
planner said of it, from what the workers found at launch.
"""

import gc
import json
import os
import sys
from dataclasses import asdict
from pathlib import Path

import torch
import torch.distributed as dist

from smolray.config import load_config
from smolray.data.local import local_index, local_plan
from smolray.planner.plan import make_plan
from smolray.planner.probe import HardwareProbe, probe_hardware
from smolray.planner.statistics import DataStatistics
from smolray.run.checkpoint import Progress
from smolray.train.loop import TrainLoop
from tests.gloo import build_engine
from tests.recipes.curves import stream_of


def steps_of(shards: str, overrides: list[str], seen: HardwareProbe) -> dict[str, object]:
    """What was predicted, and the seconds of each step without reading and decoding, which LocalStream does in between.
    A pipeline is cut as planned.
    """
    config = load_config(None, overrides)
    statistics = DataStatistics.from_index(local_index(shards, config))
    planned = make_plan(config, statistics, seen.inventory()).as_written
    if planned.partition:
        config = config.replace({"engine.partition": planned.partition})
    seconds: list[float] = []
    hook = [lambda step_info: seconds.append(step_info.metrics.seconds - step_info.metrics.data_wait_seconds)]
    TrainLoop(
        config, build_engine(config), [local_plan(shards, config)], stream_of(shards, config), Progress(), hook
    ).run()
    gc.collect()
    return {
        "predicted": planned.time.total,
        "parts": asdict(planned.time),
        "cut": planned.partition,
        "seconds": seconds,
    }


def main(rank: int, head: str, own: str, shards: str, out: str, jobs: dict[str, list[str]]) -> None:
    os.environ |= {
        "RANK": str(rank),
        "LOCAL_RANK": "0",
        "WORLD_SIZE": "2",
        "DS_ACCELERATOR": "cpu",
        "GLOO_SOCKET_IFNAME": "eth0",
    }
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"tcp://{head}:29511", rank=rank, world_size=2)
    seen = probe_hardware(torch.device("cpu"), "float32", (own, own))
    found = {"survey": seen.to_json()}
    for name, overrides in jobs.items():
        dist.barrier()
        found[name] = steps_of(shards, overrides, seen)
        if rank == 0:
            Path(out).write_text(json.dumps(found))
            print(name, found[name], flush=True)
    dist.destroy_process_group()


if __name__ == "__main__":
    main(int(sys.argv[1]), *sys.argv[2:6], json.loads(sys.argv[6]))
