"""How long a run is: max_steps overrides num_train_epochs, as in transformers. It is known before the first step."""

import numpy as np
import pyarrow as pa
import pytest
import torch

from smolray.config import ConfigError, load_config
from smolray.data.index import INDEX_SCHEMA
from smolray.data.plan import build_epoch, epoch_plans
from smolray.train.setup import check_device, count_steps
from tests.gloo import run_workers

SIX_ROWS = {
    **{name: [0] * 6 for name in ("shard", "row_group", "conversation", "chosen_tokens")},
    **{name: [9] * 6 for name in ("tokens", "prefix", "label_tokens", "tiles")},
    "row": list(range(6)),
}
BATCH = ["train.per_device_train_batch_size=2", "train.global_batch=1", "image.upscale=true"]


@pytest.mark.parametrize("engine", ["zero", "trl"])
@pytest.mark.parametrize(
    ("settings", "steps"),
    [
        (["train.num_train_epochs=3"], 9),
        (["train.num_train_epochs=100000"], 300_000),
        (["train.max_steps=1"], 1),
        (["train.max_steps=12"], 12),
        (["train.max_steps=12", "train.num_train_epochs=2"], 12),
        (["train.max_steps=3", "train.num_train_epochs=9"], 3),
    ],
)
def test_a_run_has_max_steps_or_the_steps_of_its_epochs(settings, steps, engine):
    config = load_config(None, [*BATCH, f"engine={engine}", *settings])
    plans = epoch_plans(pa.table(SIX_ROWS, schema=INDEX_SCHEMA), config)
    assert count_steps(plans, config) == steps and plans._newest is None, "no plan is built for it"
    assert len(plans) * 3 >= steps, "there are as many epochs as the steps take"


def counted():
    config, index = uneven()
    return count_steps(epoch_plans(index, config), config)


def uneven():
    """Rows of one to five conversations: how many micro-batches they fill depends on their order."""
    rng = np.random.default_rng(0)
    row = np.repeat(np.arange(200), rng.integers(1, 6, 200))
    columns = {name: np.full(len(row), 9) for name in INDEX_SCHEMA.names} | {"row": row, "chosen_tokens": row * 0}
    columns |= dict.fromkeys(("shard", "row_group"), row * 0)
    table = pa.table({name: columns[name] for name in INDEX_SCHEMA.names}).cast(INDEX_SCHEMA)
    return load_config(None, [*BATCH, "train.per_device_train_batch_size=6", "train.num_train_epochs=7"]), table


def test_where_epochs_differ_the_workers_count_their_steps_together():
    config, index = uneven()
    plans = epoch_plans(index, config)
    steps = [build_epoch(index, plans.limits, config.seed, epoch).steps(config.global_batch) for epoch in range(7)]
    assert plans.micro_batches is None and len(set(steps)) > 1
    assert run_workers(counted, 2) == sum(steps)


@pytest.mark.parametrize(
    ("settings", "refused"), [(["model.load_in_8bit=true"], True), (["model.load_in_4bit=true"], False)]
)
def test_dora_on_int8_weights_is_refused_on_a_cpu(settings, refused):
    config = load_config(None, [*settings, "lora={r: 4, use_dora: true}", "model.train=[]"])
    if not refused:
        return check_device(config, torch.device("cpu"))
    with pytest.raises(ConfigError, match=r"lora.use_dora = true on a CPU.*nearest: model.load_in_4bit=true"):
        check_device(config, torch.device("cpu"))
    check_device(load_config(None, [*settings, "lora={r: 4}", "model.train=[]"]), torch.device("cpu"))
