"""Damaged checkpoints and settings, 500 of them, each from a seed: no traceback, and never a state that was not saved.

A failure names its seed: `make fuzz ARGS="-k checkpoint"` with SEEDS below set to it repeats it.
"""

import json
import os
import random
import shutil
from pathlib import Path

import pytest
import torch
import yaml

from smolray.config import ConfigError, RunConfig, load_config, to_yaml
from smolray.run import checkpoint
from smolray.run.checkpoint import CheckpointError, Progress
from smolray.run.state import EngineState

SEEDS = range(250)  # of each kind
pytestmark = pytest.mark.fuzz


def state_of(step):
    generator = torch.Generator().manual_seed(step)
    tensors = [
        {name: torch.randn(shape, generator=generator) for name, shape in {"a.weight": (5, 3), "b": (4,)}.items()}
        for _ in range(3)
    ]
    return EngineState(*tensors, optimizer_step=step, loss_scale=1024.0)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run with checkpoints of steps 1 and 2."""
    folder = tmp_path_factory.mktemp("run")
    for step in (1, 2):
        progress = Progress(step, 0, step * 3, step * 10, step * 100, "abc")
        checkpoint.save(
            str(folder), state_of(step), progress, {"loss": 1 / step, "accuracy": step / 10}, {"config": {}}
        )
    return folder


def damage_bytes(rng, data):
    """Bits flipped, a part cut out, repeated, zeroed, or replaced by chance."""
    if not data:
        return b"x"
    data, at = bytearray(data), rng.randrange(len(data))
    size = rng.choice([1, 1, 4, 64, len(data)])
    match rng.randrange(6):
        case 0:
            for _ in range(rng.choice([1, 1, 3, 50])):
                data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
        case 1:
            del data[at:]
        case 2:
            del data[at : at + size]
        case 3:
            data[at:at] = data[at : at + size]
        case 4:
            data[at : at + size] = bytes(len(data[at : at + size]))
        case 5:
            data[at : at + size] = rng.randbytes(size)
    return bytes(data)


def damage_record(rng, record):
    """One value of a JSON record, anywhere in it, becomes another or goes."""
    places = []

    def walk(node):
        for key in list(node) if isinstance(node, dict) else range(len(node)):
            places.append((node, key))
            if isinstance(node[key], dict | list):
                walk(node[key])

    walk(record)
    node, key = rng.choice(places)
    values = [None, {}, [], "", "x", "../../x", -1, 0, 1, 2, 3.5, 1e308, 10**30, True, float("nan"), float("inf")]
    if rng.random() < 0.2:
        del node[key]
    else:
        node[key] = rng.choice(values)
    return record


def record_in(path):
    """The JSON of a file, as long as it is some."""
    try:
        return json.loads(path.read_bytes())
    except (ValueError, RecursionError):
        return None


def damage_checkpoint(rng, folder):
    path = folder / rng.choice(sorted(p.name for p in folder.iterdir()))
    kind = rng.randrange(10)
    if kind < 4 and (record := record_in(path)):
        path.write_text(json.dumps(damage_record(rng, record)))
    elif kind < 7:
        path.write_bytes(damage_bytes(rng, path.read_bytes()))
    else:
        other = path.with_name(rng.choice(sorted(p.name for p in folder.iterdir()))).read_bytes()
        path.unlink()
        match rng.randrange(5):
            case 0:
                path.mkdir()
            case 1:
                os.mkfifo(path)
            case 2:
                path.symlink_to(rng.choice(["nowhere", path.name, "/dev/zero", "/etc/hostname"]))
            case 3:
                path.write_bytes(other)


@pytest.mark.parametrize("seed", SEEDS)
def test_a_damaged_checkpoint_gives_what_was_saved_or_the_one_before(run, tmp_path, seed):
    rng, folder = random.Random(f"checkpoint {seed}"), tmp_path / "run"
    shutil.copytree(run, folder)
    for _ in range(rng.choice([1, 1, 2, 4])):
        newest = folder / "checkpoints" / "step-00000002"
        if all(p.is_file() and not p.is_symlink() for p in newest.iterdir()):
            damage_checkpoint(rng, newest)

    said = []
    found = checkpoint.latest(str(folder), said.append)
    assert found is not None and found.step in (1, 2)
    assert found.step == 2 or (len(said) == 1 and "step-00000002" in said[0] and "\n" not in said[0])
    back, want = checkpoint.load_state(found), state_of(found.step)
    for name in ("weights", "exp_avg", "exp_avg_sq"):
        there, expected = getattr(back, name), getattr(want, name)
        assert there.keys() == expected.keys() and all(torch.equal(there[key], expected[key]) for key in expected)
    assert (back.optimizer_step, back.loss_scale) == (found.step, 1024.0)
    assert found.progress == Progress(found.step, 0, found.step * 3, found.step * 10, found.step * 100, "abc")

    checkpoint.best(str(folder))
    try:
        checkpoint.chosen_checkpoint(str(folder), "step-00000002")
    except CheckpointError as error:
        assert len(str(error).splitlines()) == 1
    checkpoint.prune(str(folder), 2, True)


@pytest.mark.parametrize("seed", SEEDS)
def test_damaged_settings_are_refused_in_short_lines_or_mean_what_they_say(tmp_path, seed):
    rng, path = random.Random(f"settings {seed}"), Path(tmp_path / "run.yaml")
    settings = RunConfig(lora={"r": 4}, search={"space": {"seed": {"choice": [1, 2]}}})
    if rng.random() < 0.5:
        path.write_bytes(damage_bytes(rng, to_yaml(settings).encode()))
    else:
        path.write_text(yaml.safe_dump(damage_record(rng, settings.model_dump(mode="json"))))
    try:
        config = load_config(str(path))
    except ConfigError as error:
        lines = str(error).splitlines()
        assert lines and all(len(line) < 1200 and line.isprintable() for line in lines)
        return
    assert load_config(None, base=yaml.safe_load(to_yaml(config))) == config
