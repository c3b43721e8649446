"""Where a worker's life begins. In: what the launcher sent. Out: rank 0's record.

Ray Train's controller loads this module too, before it starts anybody: what a worker needs is imported by the worker,
or every run would begin some five seconds later.
"""

import gc
import os
from typing import Any


def train_function(settings: dict[str, Any]) -> dict[str, Any]:
    """Runs in each Train worker, its process group ready."""
    gc.disable()  # a third of the CPU time of these imports would be the collector's, that finds nothing to collect
    import ray
    import ray.train.torch
    import torch

    from smolray.config import RunConfig
    from smolray.data.reader import Folders
    from smolray.engine.base import NonFiniteLossError
    from smolray.planner.probe import probe_hardware
    from smolray.run.state import StateMismatchError
    from smolray.train.collective import SETUP_ERRORS
    from smolray.train.task import WorkerTask
    from smolray.train.worker import evaluate_worker, measure_worker, run_worker

    gc.freeze()  # nor does it look through them in the middle of a step
    gc.enable()
    config, folders, device = (
        RunConfig.model_validate(settings["config"]),
        Folders.from_plain(settings["folders"]),
        ray.train.torch.get_device(),
    )
    # Set here and not through a runtime_env: the data tasks then share worker processes with the driver's, and start at
    # once.
    torch.set_num_threads(config.resources.omp_num_threads)
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    if device.type == "cpu":
        os.environ["DS_ACCELERATOR"] = "cpu"
    else:
        # by which DeepSpeed takes its card: Ray's is another number where a worker has two
        os.environ["LOCAL_RANK"] = str(device.index)
    node = (ray.util.get_node_ip_address(), ray.get_runtime_context().get_node_id())
    match WorkerTask(settings["task"]):
        case WorkerTask.PROBE:
            return probe_hardware(device, config.model.dtype, node).to_json()
        case WorkerTask.MEASURE:
            return measure_worker(config, folders, device, node)
        case WorkerTask.EVALUATE:
            return evaluate_worker(config, folders, device, settings["checkpoint"])
    try:
        return run_worker(config, folders, device, node)
    except (*SETUP_ERRORS, StateMismatchError, NonFiniteLossError) as error:
        return {"error": str(error)}  # every worker meets it alike; raised, it would be tried again from the same place
    except torch.OutOfMemoryError as error:
        if torch.distributed.get_world_size() > 1:
            raise  # the others wait in a collective: Ray must end them
        return {"error": f"out of memory: {error}"}
