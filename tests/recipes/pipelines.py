"""What the pipeline tests run inside gloo workers: curves with the first step's gradients and a look at the gathered
model, and legs of one run.
"""

from dataclasses import dataclass, field

import torch
import torch.distributed as dist
from safetensors.torch import save_file

from smolray.config import load_config
from smolray.data.local import local_plan
from smolray.run import checkpoint
from smolray.run.checkpoint import Progress
from smolray.train.loop import TrainLoop
from smolray.train.step import StepInfo
from tests.gloo import build_engine
from tests.losses import sft_sum
from tests.recipes.curves import stream_of

Curve = list[tuple[float, float]]


@dataclass
class Record:
    """A hook for (loss, gradient norm) of each step. `gradients` gets those of the first, from Adam's first moment."""

    engine: object
    gradients: str = ""
    curve: Curve = field(default_factory=list)

    def __call__(self, step_info: StepInfo) -> None:
        self.curve.append((step_info.metrics.loss, step_info.metrics.grad_norm))
        if self.gradients and len(self.curve) == 1:
            state = self.engine.state()
            if dist.get_rank() == 0:
                save_file({name: value.contiguous() for name, value in state.exp_avg.items()}, self.gradients)


def measure(jobs: dict[str, tuple[str, list[str], int]], folder: str) -> dict[str, dict[str, object]]:
    """Of each (shards, overrides, steps): its curve, the loss that the gathered model gives on every worker at the end,
    and `folder`/<name>.safetensors.
    """
    out: dict[str, dict[str, object]] = {}
    for name, (shards, overrides, steps) in jobs.items():
        config = load_config(None, [*overrides, f"train.max_steps={steps}"])
        engine, plan, open_stream = build_engine(config), local_plan(shards, config), stream_of(shards, config)
        record = Record(engine, f"{folder}/{name}.safetensors")
        progress = TrainLoop(config, engine, [plan], open_stream, Progress(), [record]).run()
        out[name] = {"curve": record.curve, "samples": progress.samples, "tokens": progress.tokens}
        if config.method == "sft" and config.model.vision_features == "compute":
            with engine.gathered(), torch.no_grad():
                whole = torch.tensor([float(sft_sum(engine.model, next(iter(open_stream(plan, [0])))))])
            everywhere = [torch.zeros(1) for _ in range(dist.get_world_size())]
            dist.all_gather(everywhere, whole)
            out[name]["whole"] = torch.cat(everywhere).tolist()
    return out


def leg(shards: str, overrides: list[str], steps: int, run_dir: str) -> Curve:
    """Train from the newest checkpoint in `run_dir`, if there is one, to step `steps`, and save there."""
    config = load_config(None, [*overrides, f"train.max_steps={steps}"])
    found = checkpoint.latest(run_dir)
    engine = build_engine(config, checkpoint.load_state(found) if found else None)
    record = Record(engine)
    plans = [local_plan(shards, config)]
    progress = TrainLoop(
        config, engine, plans, stream_of(shards, config), found.progress if found else Progress(), [record]
    ).run()
    state = engine.state()
    if dist.get_rank() == 0:
        checkpoint.save(run_dir, state, progress, {}, {})
    dist.barrier()
    return record.curve
