"""Only a whole checkpoint is ever used; whatever is wrong with another is said, with the file's name."""

import errno
import json
import os
import pickletools
import shutil
import threading
from hashlib import blake2b
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save

from smolray import storage
from smolray.run import checkpoint
from smolray.run.checkpoint import Checkpoint, CheckpointError, Progress
from smolray.run.folder import RunFolder
from smolray.run.state import EngineState
from tests.offline import files_under


def state_of(step: int) -> EngineState:
    generator = torch.Generator().manual_seed(step)
    names = {"model.text_model.layers.0.weight": (6, 4), "model.connector.proj.weight": (3, 5), "scalar": ()}
    tensors = [{name: torch.randn(shape, generator=generator) for name, shape in names.items()} for _ in range(3)]
    return EngineState(*tensors, optimizer_step=step, loss_scale=None if step % 2 else 1024.0)


def saved(run: str, step: int, **metrics: float) -> Path:
    progress = Progress(step=step, epoch=1, consumed=step * 3, samples=step * 10, tokens=step * 100, data="abc")
    return Path(
        checkpoint.save(
            run, state_of(step), progress, metrics, {"config": {"name": "run"}, "versions": {"torch": "2"}}
        ).uri
    )


@pytest.fixture
def run(tmp_path) -> str:
    return str(tmp_path / "run")


def latest(run):
    """(step of the newest whole checkpoint, what was said of the skipped ones)."""
    said: list[str] = []
    found = checkpoint.latest(run, said.append)
    return found and found.step, said


def test_a_file_is_hashed_while_it_is_written(run, monkeypatch):
    hashing, hashed, written = threading.Event(), checkpoint._hash, storage.write_bytes

    def hash_(data):
        hashing.set()
        return hashed(data)

    def write(uri, data):
        assert hashing.wait(10), f"{uri} was written before its hash was begun"
        hashing.clear()
        written(uri, data)

    monkeypatch.setattr(checkpoint, "_hash", hash_)
    monkeypatch.setattr(storage, "write_bytes", write)
    saved(run, 7)
    assert latest(run) == (7, [])


def test_what_is_saved_comes_back_to_the_bit(run):
    saved(run, 7, accuracy=0.5)
    found = checkpoint.latest(run)
    assert found.progress == Progress(7, 1, 21, 70, 700, "abc") and found.metrics == {"accuracy": 0.5}
    back, want = checkpoint.load_state(found), state_of(7)
    for name in ("weights", "exp_avg", "exp_avg_sq"):
        there, expected = getattr(back, name), getattr(want, name)
        assert there.keys() == expected.keys() and all(torch.equal(there[k], expected[k]) for k in expected)
    assert (back.optimizer_step, back.loss_scale) == (want.optimizer_step, want.loss_scale)
    assert json.loads((Path(found.uri) / "state.json").read_text())["about"]["versions"] == {"torch": "2"}


def test_weights_are_read_without_the_optimizer_state_and_verified(run):
    saved(run, 7)
    found, folder = checkpoint.latest(run), Path(run) / "checkpoints" / "step-00000007"
    for moment in ("exp_avg", "exp_avg_sq"):
        (folder / f"{moment}.safetensors").unlink()
    weights, want = checkpoint.read_weights(found), state_of(7).weights
    assert weights.keys() == want.keys() and all(torch.equal(weights[name], want[name]) for name in want)

    file = folder / "weights.safetensors"
    data = file.read_bytes()
    file.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
    with pytest.raises(CheckpointError, match="hash"):
        checkpoint.read_weights(found)


def test_tensors_that_are_views_are_saved_by_value_and_none_is_none(run):
    state = EngineState({"w": torch.arange(12.0).reshape(3, 4).T, "half": torch.ones(2, dtype=torch.bfloat16)})
    found = checkpoint.save(run, state, Progress(step=1), {}, {})
    back = checkpoint.load_state(found)
    assert torch.equal(back.weights["w"], state.weights["w"]) and back.weights["half"].dtype == torch.bfloat16
    assert back.exp_avg == back.exp_avg_sq == {}


def test_no_run_and_no_checkpoint_is_nothing(run):
    assert latest(run) == (None, []) and checkpoint.best(run) is None and checkpoint.list_steps(run) == []
    assert checkpoint.prune(run, 2, True) == []
    with pytest.raises(CheckpointError, match=r"manifest\.json"):
        checkpoint.verify(run)


def test_the_newest_whole_one_is_found_by_step_and_not_by_name_or_time(run):
    for step in (100, 20, 123_456_789, 3):
        saved(run, step)
    (Path(run) / "checkpoints" / "step-00000100-copy").mkdir()
    (Path(run) / "checkpoints" / "step-best").mkdir()
    assert latest(run) == (123_456_789, []) and checkpoint.list_steps(run) == [3, 20, 100, 123_456_789]


DAMAGES = {
    "no manifest": (lambda f: (f / "manifest.json").unlink(), "manifest.json"),
    "manifest cut": (lambda f: cut(f / "manifest.json"), "manifest.json is damaged"),
    "manifest empty": (lambda f: (f / "manifest.json").write_bytes(b""), "manifest.json is damaged"),
    "manifest of zeros": (lambda f: (f / "manifest.json").write_bytes(b"\0" * 400), "manifest.json is damaged"),
    "manifest no text": (lambda f: (f / "manifest.json").write_bytes(b"\xff\xfe\x80"), "manifest.json is damaged"),
    "manifest a list": (lambda f: (f / "manifest.json").write_text("[]"), "manifest.json is damaged"),
    "manifest without a file": (
        lambda f: edit(f, lambda r: r["files"].pop("exp_avg.safetensors")),
        "manifest.json is damaged",
    ),
    "manifest without sizes": (
        lambda f: edit(f, lambda r: r["files"]["state.json"].pop("bytes")),
        "manifest.json is damaged",
    ),
    "manifest of another position": (
        lambda f: edit(f, lambda r: r["progress"].update(consumed=5)),
        "manifest.json is damaged",
    ),
    "weights missing": (lambda f: (f / "weights.safetensors").unlink(), "weights.safetensors is missing"),
    "moments missing": (lambda f: (f / "exp_avg_sq.safetensors").unlink(), "exp_avg_sq.safetensors is missing"),
    "weights cut": (lambda f: cut(f / "weights.safetensors"), "weights.safetensors has .* bytes, its manifest says"),
    "moments empty": (lambda f: (f / "exp_avg.safetensors").write_bytes(b""), "exp_avg.safetensors has 0 bytes"),
    "state grown": (lambda f: grow(f / "state.json"), "state.json has .* bytes"),
    "one bit of the weights": (lambda f: flip(f / "weights.safetensors"), "weights.safetensors does not have the hash"),
    "one bit of the state": (lambda f: flip(f / "state.json"), "state.json does not have the hash"),
    "a folder for the weights": (lambda f: as_folder(f / "weights.safetensors"), "weights.safetensors is not a file"),
    "a folder for the manifest": (lambda f: as_folder(f / "manifest.json"), "manifest.json is not a file"),
    "a pipe for the state": (lambda f: as_pipe(f / "state.json"), "state.json is not a file"),
    "a pipe for the manifest": (lambda f: as_pipe(f / "manifest.json"), "manifest.json is not a file"),
    "a link to itself": (lambda f: as_loop(f / "exp_avg.safetensors"), "exp_avg.safetensors is missing"),
    "a link to nothing": (lambda f: as_link(f / "exp_avg.safetensors"), "exp_avg.safetensors is missing"),
    "a device": (lambda f: as_link(f / "exp_avg.safetensors", "/dev/zero"), "exp_avg.safetensors is not a file"),
    "a file elsewhere": (lambda f: adopt(f, "../../x"), r"it lists '../../x'"),
    "a file by its whole path": (lambda f: adopt(f, str(f.parents[1] / "x")), "it lists '/"),
    "state an empty object": (lambda f: rewrite(f, "state.json", b"{}"), "state.json is damaged: expected a number"),
    "state a list": (lambda f: rewrite(f, "state.json", b"[]"), "state.json is damaged: expected an object"),
    "state too deep": (lambda f: rewrite(f, "state.json", b"[" * 10**6), "state.json is damaged"),
    "a step in words": (lambda f: edit_state(f, optimizer_step="two"), "optimizer_step, found two"),
    "a step below 0": (lambda f: edit_state(f, optimizer_step=-1), "optimizer_step, found -1"),
    "no progress in the state": (lambda f: edit_state(f, progress=None), "its progress has not the values"),
    "a loss scale of nan": (lambda f: edit_state(f, loss_scale=float("nan")), "loss_scale, found nan"),
    "progress in words": (lambda f: edit(f, lambda r: r["progress"].update(step="2")), "progress.step is 2"),
    "progress true": (lambda f: edit(f, lambda r: r["progress"].update(epoch=True)), "progress.epoch is True"),
    "endless sizes": (lambda f: edit(f, lambda r: r["files"]["state.json"].update(bytes=1e999)), "expected bytes"),
    "metrics in words": (lambda f: edit(f, lambda r: r["metrics"].update(accuracy="good")), "numbers as metrics"),
    "metrics a list": (lambda f: edit(f, lambda r: r.update(metrics=[])), "numbers as metrics"),
    "another step's folder": (lambda f: swap_folders(f), "it is of step 1, its folder is step-00000002"),
    "weights of nan": (lambda f: put_nan(f, "weights"), "weights.safetensors: scalar holds nan"),
    "moments of nan": (lambda f: put_nan(f, "exp_avg_sq"), "exp_avg_sq.safetensors: scalar holds nan"),
    "weights no tensors": (lambda f: rewrite(f, "weights.safetensors", b"x" * 99), "not a safetensors file"),
    "moments of others": (lambda f: rename_tensor(f, "exp_avg"), "exp_avg.safetensors is not of these weights"),
}


def cut(path):
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def grow(path):
    path.write_bytes(path.read_bytes() + b" ")


def flip(path):
    data = bytearray(path.read_bytes())
    data[-5] ^= 1
    path.write_bytes(bytes(data))


def edit(folder, change):
    record = json.loads((folder / "manifest.json").read_text())
    change(record)
    (folder / "manifest.json").write_text(json.dumps(record))


def as_folder(path):
    path.unlink()
    path.mkdir()


def as_pipe(path):
    path.unlink()
    os.mkfifo(path)


def as_link(path, target="nowhere"):
    path.unlink()
    path.symlink_to(target)


def as_loop(path):
    as_link(path, path.name)


def rewrite(folder, name, data):
    """Write a file and its true hash."""
    path = folder / name
    path.parent.mkdir(exist_ok=True)
    path.write_bytes(data)
    entry = {"bytes": len(data), "blake2b": blake2b(data, digest_size=16).hexdigest()}
    edit(folder, lambda record: record["files"].update({name: entry}))


def adopt(folder, name):
    rewrite(folder, name, b"of somebody else")


def edit_state(folder, **changes):
    record = json.loads((folder / "state.json").read_text()) | changes
    rewrite(folder, "state.json", json.dumps(record).encode())


def change_tensors(folder, name, change):
    tensors = load_file(folder / f"{name}.safetensors")
    rewrite(folder, f"{name}.safetensors", save(change(tensors)))


def put_nan(folder, name):
    change_tensors(folder, name, lambda tensors: tensors | {"scalar": torch.tensor(float("nan"))})


def rename_tensor(folder, name):
    change_tensors(folder, name, lambda tensors: {f"{key}s": value for key, value in tensors.items()})


def swap_folders(folder):
    shutil.rmtree(folder)
    shutil.copytree(folder.with_name("step-00000001"), folder)


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_checkpoint_is_skipped_and_its_file_is_named(run, damage):
    saved(run, 1)
    folder = saved(run, 2)
    hurt, message = DAMAGES[damage]
    hurt(folder)
    step, said = latest(run)
    assert step == 1 and len(said) == 1 and "step-00000002" in said[0]
    with pytest.raises(CheckpointError, match=message):
        checkpoint.load_state(Checkpoint(str(folder), Progress()))
    saved(run, 2)  # the run comes to that step again
    assert latest(run) == (2, [])


@pytest.mark.parametrize("name", ["weights", "exp_avg", "exp_avg_sq"])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_values_that_are_not_finite_are_never_saved(run, name, value):
    saved(run, 1)
    saved(run, 2)
    state = state_of(3)
    getattr(state, name)["model.connector.proj.weight"][2, 1] = value
    with pytest.raises(CheckpointError, match=f"{name}.safetensors: model.connector.proj.weight holds nan or inf"):
        checkpoint.save(run, state, Progress(step=2), {}, {})
    assert latest(run) == (2, []), "the checkpoint that was there stays"


def test_a_disk_that_cannot_read_a_file_makes_an_older_checkpoint_the_newest(run, monkeypatch):
    """EIO, which no file of a test gives: the call that reads is replaced."""
    saved(run, 1)
    saved(run, 2)
    real = storage.read_bytes

    def read(uri):
        if uri.endswith("step-00000002/exp_avg.safetensors"):
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        return real(uri)

    monkeypatch.setattr(storage, "read_bytes", read)
    step, said = latest(run)
    assert step == 1 and "exp_avg.safetensors cannot be read" in said[0] and "Input/output error" in said[0]


def test_a_checkpoint_damaged_after_it_was_found_is_not_loaded(run):
    folder = saved(run, 2)
    found = checkpoint.latest(run)
    flip(folder / "exp_avg.safetensors")
    with pytest.raises(CheckpointError, match="exp_avg"):
        checkpoint.load_state(found)


@pytest.mark.parametrize("writes", range(6))
def test_a_save_interrupted_at_any_write_never_looks_whole(run, monkeypatch, writes):
    """Over an old checkpoint of the same step as well: it is the old one, or nothing, but never a mixture."""
    saved(run, 1)
    folder, count, real = saved(run, 2), 0, storage.write_bytes

    def write(uri, data):
        nonlocal count
        if count == writes:
            raise KeyboardInterrupt
        count += 1
        real(uri, data)

    monkeypatch.setattr(storage, "write_bytes", write)
    files = 5  # three of tensors, the state, the manifest
    if writes < files:
        with pytest.raises(KeyboardInterrupt):
            checkpoint.save(run, state_of(3), Progress(step=2), {}, {})
        step, said = latest(run)
        assert step == 1 and all("step-00000002 has no manifest.json" in why for why in said)
    else:
        checkpoint.save(run, state_of(3), Progress(step=2), {}, {})
        assert latest(run) == (2, [])
    assert [name for name in files_under(folder) if name.endswith(".tmp")] == []


def test_prune_keeps_the_last_and_the_best(run):
    scores = {1: 0.3, 2: 0.9, 3: 0.5, 4: None, 5: 0.6, 6: None}
    for step, accuracy in scores.items():
        saved(run, step, **({} if accuracy is None else {"accuracy": accuracy}))
    assert checkpoint.best(run).step == 2
    assert checkpoint.prune(run, 2, keep_best=True) == [1, 3, 4] and checkpoint.list_steps(run) == [2, 5, 6]
    assert checkpoint.prune(run, 2, keep_best=True) == []
    assert checkpoint.prune(run, 1, keep_best=False) == [2, 5] and checkpoint.list_steps(run) == [6]
    assert latest(run) == (6, [])


def test_prune_counts_only_whole_ones_and_clears_the_torn(run):
    for step in (1, 2, 3, 4, 5):
        saved(run, step, accuracy=1 / step)
    folder = Path(run) / "checkpoints"
    (folder / "step-00000004" / "manifest.json").unlink()
    cut(folder / "step-00000001" / "weights.safetensors")
    saved(run, 6)
    (folder / "step-00000006" / "manifest.json").unlink()  # perhaps being written at this moment
    assert checkpoint.prune(run, 2, keep_best=True) == [1, 4]
    assert checkpoint.list_steps(run) == [2, 3, 5, 6] and checkpoint.best(run).step == 2 and latest(run)[0] == 5


def test_prune_interrupted_leaves_nothing_that_looks_whole(run, monkeypatch):
    for step in (1, 2, 3):
        saved(run, step)
    real = storage.delete

    def delete(uri):
        if uri.endswith("step-00000001"):
            shutil.rmtree(Path(uri) / "nothing", ignore_errors=True)
            raise KeyboardInterrupt
        real(uri)

    monkeypatch.setattr(storage, "delete", delete)
    with pytest.raises(KeyboardInterrupt):
        checkpoint.prune(run, 2, False)
    with pytest.raises(CheckpointError, match=r"no manifest\.json"):
        checkpoint.verify(RunFolder(run).checkpoint(1))
    assert latest(run) == (3, [])


def test_files_are_safetensors_and_json_and_hold_no_pickle(run):
    folder = saved(run, 1)
    assert files_under(folder) == [
        "exp_avg.safetensors",
        "exp_avg_sq.safetensors",
        "manifest.json",
        "state.json",
        "weights.safetensors",
    ]
    for path in folder.iterdir():
        data = path.read_bytes()
        if path.suffix == ".safetensors":
            header = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])
            assert all({"dtype", "shape", "data_offsets"} <= entry.keys() for entry in header.values())
        else:
            json.loads(data)
        with pytest.raises(Exception):  # whatever a pickle parser says of it
            list(pickletools.genops(data))


def test_metrics_added_after_saving_leave_the_checkpoint_whole(run):
    saved(run, 1, loss=2.0, accuracy=0.5)
    later = checkpoint.verify(str(saved(run, 2, loss=1.0)))
    assert checkpoint.best(run).step == 1
    checkpoint.annotate(later, {"loss": 1.0, "accuracy": 0.75})
    found = checkpoint.best(run)
    assert (found.step, found.metrics) == (2, {"loss": 1.0, "accuracy": 0.75})
    assert checkpoint.verify(found.uri).progress == later.progress
