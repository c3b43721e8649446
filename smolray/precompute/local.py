"""Sidecars written in this process, without Ray: for tests and benchmarks."""

from collections.abc import Callable

import torch

from smolray.config import RunConfig
from smolray.data.local import local_index
from smolray.data.reader import Sidecars
from smolray.data.shards import read_manifest
from smolray.data.sidecar import Sidecar, complete
from smolray.precompute.features import FeatureWriter, features_sidecar
from smolray.precompute.logps import LogpsWriter, logps_sidecar


def local_sidecars(folder: str, config: RunConfig, device: str = "cpu") -> Sidecars:
    """The sidecars that the run needs for its training shards.

    Missing ones are made here (jobs.py does it over a cluster).
    """
    shards = read_manifest(folder)

    def made(sidecar: Sidecar, writer: Callable[[], FeatureWriter | LogpsWriter]) -> str:
        def make(todo: list[int]) -> None:
            one = writer()
            for number in todo:
                one.write(shards.files[number].name)

        return complete(sidecar, shards, make)

    features = logps = ""
    if config.model.vision_features == "precompute":
        frozen = features_sidecar(folder, config)
        features = made(frozen, lambda: FeatureWriter(frozen, config, torch.device(device)))
    if config.reference_model == "precompute":
        kept = logps_sidecar(folder, config)
        logps = made(
            kept, lambda: LogpsWriter(kept, config, torch.device(device), local_index(folder, config), features)
        )
    return Sidecars(features, logps)
