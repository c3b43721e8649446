"""What DeepSpeed is told before it starts: the config of a run.

In: RunConfig. Out: DeepSpeed's config as a dict.
"""

from typing import Any

import torch

from smolray.config import RunConfig


def deepspeed_config(config: RunConfig, clip: bool, trained: int = 500_000_000) -> dict[str, Any]:
    """The DeepSpeed config of a run that trains `trained` values.

    Batch sizes are 1: the loop counts micro-batches, not DeepSpeed.
    """
    engine = config.engine
    # DeepSpeed allocates its bucket (by default 5e8 values) at every step, also for a few LoRA weights
    bucket = max(1, min(500_000_000, trained))
    zero: dict[str, Any] = {
        "stage": config.zero_stage,
        "overlap_comm": False,
        "contiguous_gradients": True,
        "reduce_bucket_size": bucket,
    }
    if engine.offload_optimizer == "cpu":
        zero["offload_optimizer"] = {"device": "cpu", "pin_memory": torch.cuda.is_available()}
    if engine.offload_param == "cpu":
        zero["offload_param"] = {"device": "cpu", "pin_memory": torch.cuda.is_available()}

    return {
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": 1,
        "zero_optimization": zero,
        "bf16": {
            "enabled": config.model.dtype == "bfloat16" and config.zero_stage > 0
        },  # at stage 0 the masters are ours
        "fp16": {"enabled": config.model.dtype == "float16", "initial_scale_power": 16, "loss_scale_window": 1000},
        "gradient_clipping": config.optimizer.max_grad_norm if clip else 0.0,
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "steps_per_print": 10**9,
        # it waits for the device in every forward pass
        "timers": {"throughput": {"enabled": False}},
    }
