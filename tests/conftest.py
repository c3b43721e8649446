"""One Ray cluster for all cluster tests, in a temp dir of its own, and the real data set as Parquet files."""

import os
import tempfile
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("DS_ACCELERATOR", "cpu")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("RAY_DEDUP_LOGS", "0")
os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
os.environ.setdefault("RAY_idle_worker_killing_time_threshold_ms", "600000")  # as smolray's own Ray
# at nice 15 workers starve on a machine that others use, and tests time out
os.environ.setdefault("RAY_worker_niceness", "0")

import pytest


@pytest.fixture(scope="session")
def ray_cluster():
    """A local Ray with 2 CPUs (4 to schedule), shared by the whole session."""
    import ray

    with tempfile.TemporaryDirectory(prefix="sr") as folder:  # short: socket paths have a limit of 107 bytes
        ray.init(
            address="local",
            num_cpus=4,
            object_store_memory=512 * 2**20,
            include_dashboard=False,
            log_to_driver=os.environ.get("SMOLRAY_TEST_LOGS") == "1",
            logging_level="warning",
            _temp_dir=folder,
        )
        yield ray
        ray.shutdown()


@pytest.fixture(scope="session")
def easy_vqa(tmp_path_factory) -> Path:
    """Folder with train.parquet and test.parquet of easy-vqa in the Hugging Face layout."""
    from jobs.easyvqa import export_easy_vqa

    folder = tmp_path_factory.mktemp("easy_vqa")
    export_easy_vqa(folder)
    return folder


@pytest.fixture(scope="session")
def tiny_path(tmp_path_factory) -> str:
    """Folder of a tiny model with its processor."""
    from smolray.model.tiny import build_model
    from tests.offline import TEXTS

    return str(build_model("tiny", TEXTS, tmp_path_factory.mktemp("tiny")))


@pytest.fixture(scope="session")
def published_path(tmp_path_factory) -> str:
    """Folder of SmolVLM-256M's published files with thin random weights, whose answers vary."""
    from tests.real import real_model

    return str(real_model("smolvlm-256m", tmp_path_factory.mktemp("published"), scale=6))


@pytest.fixture(scope="session")
def processor(tiny_path):
    """The processor of the tiny model."""
    from smolray.config import ModelConfig
    from smolray.data.processor import load_processor

    return load_processor(ModelConfig(path=tiny_path))
