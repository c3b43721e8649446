"""A small run for the cluster tests: 60 images of easy-vqa as raw Parquet, the tiny model, two workers, two epochs,
every step audited.
"""

import pytest

from jobs.easyvqa import export_easy_vqa
from smolray.config import load_config
from tests.s3 import s3_server as s3_server  # one server for all modules


@pytest.fixture(scope="session")
def small_vqa(tmp_path_factory):
    folder = tmp_path_factory.mktemp("small_vqa")
    export_easy_vqa(folder, limit=600)
    return folder


@pytest.fixture
def make_run(ray_cluster, small_vqa, tmp_path_factory):
    """make_run(name, *overrides) -> RunConfig; runs of a test share a storage folder with all others, as a person's
    runs do.
    """
    storage = tmp_path_factory.getbasetemp() / "cluster-runs"

    def make(name, *overrides):
        return load_config(
            None,
            [
                f"name={name}",
                f"storage={storage}",
                f"data.train={small_vqa}/train.parquet",
                f"data.validation={small_vqa}/test.parquet",
                "model.path=tiny",
                "model.dtype=float32",
                "engine.stage=2",
                "optimizer.learning_rate=1e-3",
                "data.max_length=1024",
                "train.per_device_train_batch_size=8",
                "train.global_batch=3",
                "train.num_train_epochs=2",
                "train.audit=true",
                "checkpoint.save_steps=10",
                "evaluate.eval_epochs=0",
                "evaluate.max_samples=64",
                "evaluate.max_new_tokens=3",
                "resources.num_workers=2",
                "resources.use_gpu=no",
                "resources.cpus_per_worker=0.5",
                "resources.max_failures=2",
                *overrides,
            ],
        )

    return make
