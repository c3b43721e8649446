"""How long a run is: max_steps overrides num_train_epochs, as in transformers."""

import pyarrow as pa
import pytest

from smolray.config import load_config
from smolray.data.index import INDEX_SCHEMA
from smolray.data.plan import PlanLimits, build_epoch
from smolray.train.setup import epoch_steps, lay_plans

SIX_ROWS = {
    **{name: [0] * 6 for name in ("shard", "row_group", "conversation", "chosen_tokens")},
    **{name: [9] * 6 for name in ("tokens", "prefix", "label_tokens", "tiles")},
    "row": list(range(6)),
}


@pytest.mark.parametrize("engine", ["zero", "trl"])
@pytest.mark.parametrize(
    ("settings", "epochs"),
    [
        (["train.num_train_epochs=3"], 3),
        (["train.max_steps=1"], 1),
        (["train.max_steps=12"], 4),
        (["train.max_steps=12", "train.num_train_epochs=2"], 4),
        (["train.max_steps=3", "train.num_train_epochs=9"], 1),
        (["train.max_steps=4", "train.num_train_epochs=9"], 2),
    ],
)
def test_as_many_epochs_are_laid_as_the_steps_take(settings, epochs, engine):
    batch = ["train.per_device_train_batch_size=2", "train.global_batch=1", f"engine={engine}", "image.upscale=true"]
    config = load_config(None, [*batch, *settings])
    index = pa.table(SIX_ROWS, schema=INDEX_SCHEMA)
    plans = lay_plans(config, lambda epoch: build_epoch(index, PlanLimits.of(config), config.seed, epoch))
    assert len(plans) == epochs
    assert {epoch_steps(config, plan) for plan in plans} == {3}
