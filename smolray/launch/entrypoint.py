"""The function that each Ray Train worker runs.

In: the launcher's settings. Out: rank 0's record. Ray Train's controller loads this module before it starts the
workers, so what a worker needs is imported inside the function: at the top it would delay every run by five seconds.
"""

import gc
import os
from typing import Any


def train_function(settings: dict[str, Any]) -> dict[str, Any]:
    """Run the task of one worker, inside an initialised process group."""
    import ray
    import ray.train.torch
    import torch

    from smolray.config import RunConfig
    from smolray.data.reader import Folders
    from smolray.engine.allocator import expand_segments
    from smolray.launch.gauges import StepGauges
    from smolray.planner.probe import probe_hardware
    from smolray.run.state import StateMismatchError
    from smolray.train.collective import SETUP_ERRORS
    from smolray.train.refusal import NonFiniteStepError
    from smolray.train.task import WorkerTask
    from smolray.train.worker import evaluate_worker, measure_worker, run_worker

    gc.freeze()  # no collection looks through what was imported: not in the middle of a step, and not at the end

    config, folders = RunConfig.model_validate(settings["config"]), Folders.from_plain(settings["folders"])
    device = ray.train.torch.get_device()
    # Set here and not in a runtime_env: the data tasks of this worker would inherit it.
    torch.set_num_threads(config.resources.omp_num_threads)
    os.environ["TOKENIZERS_PARALLELISM"] = "false"

    if device.type == "cpu":
        os.environ["DS_ACCELERATOR"] = "cpu"
    else:
        # DeepSpeed takes its GPU from it. Ray's own number is another one where a worker has two GPUs.
        os.environ["LOCAL_RANK"] = str(device.index)
        expand_segments(os.environ)

    node = (ray.util.get_node_ip_address(), ray.get_runtime_context().get_node_id())
    match WorkerTask(settings["task"]):
        case WorkerTask.PROBE:
            return probe_hardware(device, config.model.dtype, node).to_json()
        case WorkerTask.MEASURE:
            return measure_worker(config, folders, device, node)
        case WorkerTask.EVALUATE:
            return evaluate_worker(config, folders, device, settings["checkpoint"], settings["owner"])

    try:
        gauges = StepGauges(config.name) if torch.distributed.get_rank() == 0 else None
        return run_worker(config, folders, device, node, settings["owner"], gauges)
    except (*SETUP_ERRORS, StateMismatchError, NonFiniteStepError) as error:
        return {"error": str(error)}  # all workers have it: raised, Ray would restart them into the same error
    except torch.OutOfMemoryError as error:
        if torch.distributed.get_world_size() > 1:
            raise  # the others wait in a collective: Ray must end them
        return {"error": f"out of memory: {error}"}
