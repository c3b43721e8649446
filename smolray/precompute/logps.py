"""The reference model's log-probability of every chosen and rejected answer, kept as a sidecar.

In: preference shards, their index and the model before training. Out: for each row group a table of LOGPS_SCHEMA. The
micro-batches are packed as in training; the values do not depend on that.
"""

from collections.abc import Iterator
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import torch

from smolray.config import RunConfig
from smolray.data.collate import collate_training
from smolray.data.encode import cached_encoder
from smolray.data.index import fingerprint
from smolray.data.plan import PlanLimits, build_epoch
from smolray.data.reader import ShardReader, Sidecars
from smolray.data.shards import read_manifest
from smolray.data.sidecar import Sidecar, identity_of, write_table
from smolray.model.forward import target_states
from smolray.model.load import load_model
from smolray.model.parts import drop_submodules, frozen_prefix, weights_digest
from smolray.objectives.base import completion_logps

NEIGHBOURS = 4  # micro-batches read together: they share row groups
LOGPS_SCHEMA = pa.schema(
    [
        ("key", pa.string()),  # of the shard's row
        # of each conversation: chosen, rejected; nan where it was left out as too long
        ("logps", pa.list_(pa.list_(pa.float32()))),
    ]
)


def logps_sidecar(folder: str, config: RunConfig) -> Sidecar:
    """The sidecar of the shards in `folder` for the model that training begins with. It may not exist yet.

    A new adapter changes no output, so it does not count here.
    """
    model = config.model
    about = {"dtype": model.dtype, "load_in_4bit": model.load_in_4bit, "load_in_8bit": model.load_in_8bit}
    weights = weights_digest(model, ("vision", "connector", "text"))
    encoder = cached_encoder(model, config.data, config.image)
    return Sidecar(
        folder, "logps", identity_of(weights, about, read_manifest(folder).fingerprint, fingerprint(encoder)), about
    )


class LogpsWriter:
    """Holds the reference model on one device and writes the tables of shards.

    `features`: URI of the features to read in place of images.
    """

    def __init__(self, sidecar: Sidecar, config: RunConfig, device: torch.device, index: pa.Table, features: str = ""):
        model: Any = load_model(config.model)
        if features:
            drop_submodules(model, frozen_prefix(config))
        self.model = model.to(device).eval()
        self.sidecar, self.config, self.device, self.index = sidecar, config, device, index
        self.encoder = cached_encoder(config.model, config.data, config.image)
        self.reader = ShardReader.open(sidecar.folder, Sidecars(features=features))

    def write(self, name: str) -> None:
        """The table of one shard file, and its note."""
        write_table(self.sidecar, name, LOGPS_SCHEMA, self._tables(self.reader.files.index(name)))

    def _tables(self, shard: int) -> Iterator[pa.Table]:
        values = self._logps(shard)
        for row_group in range(self.reader.row_groups(shard)):
            rows = self.reader.row_group(shard, row_group, images=False)
            logps = [
                [values.get((row_group, r, c), (np.nan, np.nan)) for c in range(len(row.conversations))]
                for r, row in enumerate(rows)
            ]
            yield pa.table({"key": [row.key for row in rows], "logps": logps}, schema=LOGPS_SCHEMA)

    @torch.inference_mode()
    def _logps(self, shard: int) -> dict[tuple[int, int, int], tuple[float, float]]:
        """The log-probabilities of the chosen and of the rejected answer, for those that are trained on.

        Their keys: (row group, row, conversation).
        """
        index_rows = self.index.filter((pc.field("shard") == shard) & (pc.field("tokens") > 0))
        if not len(index_rows):
            return {}

        plan = build_epoch(index_rows, PlanLimits.of(self.config), 0, 0, shuffle=False)
        found: dict[tuple[int, int, int], tuple[float, float]] = {}
        for first in range(0, len(plan), NEIGHBOURS):
            specs = [plan.micro_batch(n) for n in range(first, min(first + NEIGHBOURS, len(plan)))]
            for spec, groups in zip(specs, self.reader.groups(specs), strict=True):
                batch = collate_training(groups, self.encoder).to(self.device)
                logps = (
                    completion_logps(self.model.lm_head, target_states(self.model, batch), batch)
                    .cpu()
                    .view(-1, 2)
                    .tolist()
                )

                places = [(g.row_group, g.row, c) for g in spec.groups for c in g.conversations]
                found |= {place: (chosen, rejected) for place, (chosen, rejected) in zip(places, logps, strict=True)}
        return found
