"""A whole run through Ray on the card of cuda.c, of which Ray is told; what became of it, as JSON.

`python -m tests.proofs.null_run FOLDER SETTINGS...`: the folder is new, the settings are those of `smolray train`.
"""

import json
import sys
import tempfile
from pathlib import Path

import ray

from jobs.gpu.curves import config_of, make_data
from smolray.launch.driver import launch_run
from smolray.run.events import read_events

BASE = (
    "train.num_train_epochs=2",
    "train.audit=true",
    "checkpoint.save_steps=5",
    "evaluate.max_samples=8",
    "evaluate.max_new_tokens=3",
    "resources.num_workers=1",
    "resources.cpus_per_worker=0.5",
    "resources.max_failures=0",
)


def main(folder: Path, settings: list[str]) -> None:
    """Train, evaluate and write the result."""
    folder.mkdir(exist_ok=True)
    make_data(folder)
    shards = folder / "shards"
    places = [f"storage={folder}", f"data.train={shards}", f"data.validation={shards}"]
    config = config_of(folder, [*BASE, "name=whole", *places, *settings])
    with tempfile.TemporaryDirectory(prefix="sr") as temp:
        ray.init(address="local", num_cpus=4, num_gpus=1, include_dashboard=False, log_to_driver=False, _temp_dir=temp)
        result = launch_run(config)
        ray.shutdown()
    print(json.dumps({"result": result, "events": read_events(config.run_dir)}), flush=True)


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2:])
