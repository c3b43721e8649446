"""What a search finds under its name, and what it leaves there: runs of others are not taken for its trials, and best.yaml repeats its trial."""

import pytest

from smolray import storage
from smolray.config import ConfigError, load_config
from smolray.search.ledger import Ledger, search_folder
from smolray.tune import refuse_strays

RATE = "optimizer.learning_rate"


@pytest.fixture
def make_config(tmp_path):
    def make(*overrides, **search):
        base = {"name": "find", "storage": str(tmp_path), "data": {"train": "a", "validation": "b"}}
        return load_config(None, overrides, {**base, "search": {"space": {RATE: {"uniform": [0, 1]}}, **search}})

    return make


def write_run(config, name, file="events.jsonl", text="\n"):
    storage.write_bytes(storage.join(config.storage, name, file), text.encode())


def test_a_run_that_is_called_like_a_trial_is_not_taken_for_it(make_config):
    config = make_config()
    folder = search_folder(config.storage, config.name)
    for name in ("find-3-g2", "find-13", "find-x", "find-2b", "find-best-1", "found-1"):
        write_run(config, name)
    write_run(config, "find-2", "config.yaml")
    write_run(config, "find-4", "control/stop")
    with pytest.raises(ConfigError, match=r"find-2, find-3-g2; choose another name .* or move them away"):
        refuse_strays(config, folder, 12)
    ledger = Ledger(folder)
    for number in (2, 3):
        ledger.write("trial", number=number, run=f"find-{number}", settings={RATE: 0.1})
    refuse_strays(config, folder, 12)
    with pytest.raises(ConfigError, match="find-13"):
        refuse_strays(config, folder, 13)
