"""Checkpoints free of world size and engine: tensors by Hugging Face name in safetensors, and the position in training.

In: an EngineState and Progress. Out: the folder `<run>/checkpoints/step-00000100/`. Its manifest with sizes and hashes
is written last. Only a folder that agrees with its manifest is loaded; others are skipped with a message. No pickle.
"""

import hashlib
import json
import re
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from typing import Any

import pyarrow.fs as pafs
import safetensors
import safetensors.torch
import torch

from smolray import storage
from smolray.run.folder import RunFolder
from smolray.run.manifest import CheckpointError as CheckpointError
from smolray.run.manifest import Manifest, parse_manifest, parse_state
from smolray.run.manifest import Progress as Progress
from smolray.run.state import EngineState, Moments

MANIFEST = "manifest.json"
TENSORS = ("weights", "exp_avg", "exp_avg_sq")
STATE = "state.json"
FILES = (*(f"{name}.safetensors" for name in TENSORS), STATE)
CODES = "codes.safetensors"  # 8-bit moments, where there are any: `<parameter>/<key>`


@dataclass(frozen=True)
class Checkpoint:
    """A whole checkpoint: its folder, the position in training and its metrics."""

    uri: str
    progress: Progress
    metrics: dict[str, float] = field(default_factory=dict)

    @property
    def step(self) -> int:
        return self.progress.step


def save(
    run_dir: str, state: EngineState, progress: Progress, metrics: dict[str, float], about: dict[str, Any]
) -> Checkpoint:
    """Write a checkpoint; an older one of the same step is replaced. `about` (config, versions) is kept with it.

    Raises StorageFullError, and then leaves nothing behind; and CheckpointError where a value is nan or infinite, and
    then writes nothing.
    """
    uri = RunFolder(run_dir).checkpoint(progress.step)
    for name, tensors in _tensor_files(state):
        require_finite(f"{uri}/{name}", tensors)
    storage.delete(storage.join(uri, MANIFEST))  # first: a half-deleted folder must not carry the old manifest
    storage.delete(uri)
    extra = {
        "optimizer_step": state.optimizer_step,
        "loss_scale": state.loss_scale,
        "codes": bool(state.codes),
        "progress": asdict(progress),
        "about": about,
    }

    files: dict[str, dict[str, Any]] = {}
    try:
        for name, tensors in _tensor_files(state):
            files[name] = _write(uri, name, safetensors.torch.save(tensors))
        files[STATE] = _write(uri, STATE, json.dumps(extra, indent=1).encode())
        record = {"progress": asdict(progress), "metrics": metrics, "files": files}
        _write(uri, MANIFEST, json.dumps(record, indent=1).encode())
    except storage.StorageFullError:
        storage.delete(uri)  # half of it is of no use, and takes room
        raise
    return Checkpoint(uri, progress, metrics)


def _tensor_files(state: EngineState) -> Iterator[tuple[str, dict[str, torch.Tensor]]]:
    """The files of tensors, one after another."""
    for name in TENSORS:
        yield f"{name}.safetensors", {key: value.contiguous() for key, value in getattr(state, name).items()}
    if state.codes:
        yield CODES, {f"{name}/{key}": v.contiguous() for name, kept in state.codes.items() for key, v in kept.items()}


def require_finite(where: str, tensors: dict[str, torch.Tensor]) -> None:
    """Raise CheckpointError where a value of the tensors of a file is nan or infinite."""
    for name, tensor in tensors.items():
        if not tensor.is_floating_point() or not tensor.numel():
            continue
        low, high = torch.aminmax(tensor)  # nan where any value is
        if not (torch.isfinite(low) and torch.isfinite(high)):
            raise CheckpointError(f"{where}: {name} holds nan or infinite values; nothing can be trained from them")


def _write(uri: str, name: str, data: bytes) -> dict[str, Any]:
    """Write one file, and hash it meanwhile; returns its entry in the manifest."""
    with ThreadPoolExecutor(1) as pool:
        digest = pool.submit(_hash, data)
        storage.write_bytes(storage.join(uri, name), data)
        return {"bytes": len(data), "blake2b": digest.result()}


def annotate(saved: Checkpoint, metrics: dict[str, float]) -> Checkpoint:
    """Replace the metrics of a checkpoint: an evaluation comes after the save."""
    path = storage.join(saved.uri, MANIFEST)
    record = json.loads(storage.read_bytes(path)) | {"metrics": metrics}
    storage.write_bytes(path, json.dumps(record, indent=1).encode())
    return Checkpoint(saved.uri, saved.progress, metrics)


def verify(uri: str, contents: bool = True) -> Checkpoint:
    """Check a checkpoint folder by its manifest: sizes always, hashes with `contents`. Raises CheckpointError."""
    found, manifest = _manifest(uri)
    if not contents:
        for name, (size, _) in manifest.files.items():
            _require_size(f"{uri}/{name}", size)
        return found

    _state(found, manifest)
    shapes = {
        name: {key: value.shape for key, value in _tensors(uri, name, *entry).items()}
        for name, entry in manifest.files.items()
        if name != STATE
    }
    _check_moments(uri, shapes)
    return found


def load_state(checkpoint: Checkpoint) -> EngineState:
    """The tensors of a checkpoint, each file read once and verified by its hash. Raises CheckpointError."""
    uri = checkpoint.uri
    found, manifest = _manifest(uri)
    record = _state(found, manifest)
    tensors = {name: _tensors(uri, name, *entry) for name, entry in manifest.files.items() if name != STATE}
    _check_moments(uri, {name: {key: value.shape for key, value in file.items()} for name, file in tensors.items()})

    codes: dict[str, Moments] = {}
    for key, value in tensors.pop(CODES, {}).items():
        name, _, part = key.rpartition("/")
        codes.setdefault(name, {})[part] = value
    kept = {name.removesuffix(".safetensors"): file for name, file in tensors.items()}
    return EngineState(**kept, codes=codes, optimizer_step=record["optimizer_step"], loss_scale=record["loss_scale"])


def read_weights(checkpoint: Checkpoint) -> dict[str, torch.Tensor]:
    """The trained weights of a checkpoint by canonical name, without its optimizer state: fp32, on the CPU.

    Raises:
        CheckpointError: the file of weights is missing or does not have the hash in the manifest.
    """
    name = f"{TENSORS[0]}.safetensors"
    return _tensors(checkpoint.uri, name, *_manifest(checkpoint.uri)[1].files[name])


def _manifest(uri: str) -> tuple[Checkpoint, Manifest]:
    """The checkpoint, and what its manifest says. Raises CheckpointError."""
    path = f"{uri}/{MANIFEST}"
    if _info(path).type == pafs.FileType.NotFound:
        raise CheckpointError(f"{uri} has no {MANIFEST}: it was not written to the end")
    manifest = parse_manifest(path, _read(path), {*FILES}, {*FILES, CODES})
    return Checkpoint(uri, manifest.progress, manifest.metrics), manifest


def _state(found: Checkpoint, manifest: Manifest) -> dict[str, Any]:
    """The content of STATE. Raises CheckpointError where it does not go with the manifest."""
    path = f"{found.uri}/{STATE}"
    record = parse_state(path, _checked(path, *manifest.files[STATE]))
    if record["progress"] != found.progress:
        raise CheckpointError(f"{found.uri}/{MANIFEST} is damaged: its progress is not that of {STATE}")
    if record["codes"] != (CODES in manifest.files):
        raise CheckpointError(f"{found.uri}/{MANIFEST} is damaged: {STATE} and its list of files differ in {CODES}")
    return record


def _tensors(uri: str, name: str, size: int, digest: str) -> dict[str, torch.Tensor]:
    """The tensors of a file, all of them finite. Raises CheckpointError."""
    path = f"{uri}/{name}"
    data = _checked(path, size, digest)
    try:
        tensors = safetensors.torch.load(data)
    except (safetensors.SafetensorError, ValueError, KeyError) as error:
        raise CheckpointError(f"{path} is not a safetensors file: {error}") from None
    require_finite(path, tensors)
    return tensors


def _check_moments(uri: str, shapes: dict[str, dict[str, torch.Size]]) -> None:
    """Raise CheckpointError where the tensors of the files, by their shapes, are not of one model.

    There may be no moments at all: TRL's are not kept.
    """
    weights, *moments = (shapes[f"{name}.safetensors"] for name in TENSORS)
    in_codes = {key.rpartition("/")[0] for key in shapes.get(CODES, {})}
    wanted = {key: shape for key, shape in weights.items() if key not in in_codes}
    for name, kept in zip(TENSORS[1:], moments, strict=True):
        differing = sorted({key for key, _ in kept.items() ^ wanted.items()} | (in_codes - weights.keys()))
        if differing and (in_codes or any(moments)):
            raise CheckpointError(f"{uri}/{name}.safetensors is not of these weights: it differs in {differing[0]}")


def _checked(path: str, size: int, digest: str) -> bytes:
    """The bytes of a file, which has the size and the hash. Raises CheckpointError."""
    _require_size(path, size)
    data = _read(path)
    if len(data) != size or _hash(data) != digest:
        raise CheckpointError(f"{path} does not have the hash in its manifest")
    return data


def _require_size(path: str, size: int) -> None:
    found = _file_size(path)
    if found != size:
        raise CheckpointError(f"{path} has {found} bytes, its manifest says {size}")


def _file_size(path: str) -> int:
    """Bytes of a file. Raises CheckpointError where there is none, or what is there is no file."""
    info = _info(path)
    if info.type == pafs.FileType.NotFound:
        raise CheckpointError(f"{path} is missing")
    if info.type != pafs.FileType.File:  # a read of a pipe or a device may never end
        raise CheckpointError(f"{path} is not a file; expected a file of the checkpoint")
    return int(info.size)


def _info(path: str) -> pafs.FileInfo:
    with _readable(path):
        fs, inner = storage.filesystem(path)
        return fs.get_file_info(inner)


def _read(path: str) -> bytes:
    """The bytes of a file. Raises CheckpointError where the disk does not give them."""
    _file_size(path)
    with _readable(path):
        return storage.read_bytes(path)


@contextmanager
def _readable(path: str) -> Iterator[None]:
    """Turn the errors of a local disk into CheckpointError.

    Other storage may be away for a moment: its errors are no damage, for which training would go back to an older
    checkpoint.
    """
    try:
        yield
    except FileNotFoundError:
        raise CheckpointError(f"{path} is missing") from None
    except OSError as error:
        if not storage.is_local(path):
            raise
        raise CheckpointError(f"{path} cannot be read: {error}") from None


def list_steps(run_dir: str) -> list[int]:
    """Steps of the checkpoint folders, whole or not, ascending."""
    names = storage.list_dirs(RunFolder(run_dir).checkpoints)
    return sorted(int(name.removeprefix("step-")) for name in names if re.fullmatch(r"step-\d{8,}", name))


def latest(run_dir: str, skipped: Callable[[str], None] = lambda _: None) -> Checkpoint | None:
    """The newest checkpoint whose files all have their hashes; the others are reported through `skipped`."""
    for step in reversed(list_steps(run_dir)):
        try:
            return verify(RunFolder(run_dir).checkpoint(step))
        except CheckpointError as error:
            skipped(str(error))
    return None


def look(run_dir: str, contents: bool = False) -> dict[int, Checkpoint | CheckpointError]:
    """Every checkpoint folder by its step, ascending: what is in it, or what is wrong with it."""
    found: dict[int, Checkpoint | CheckpointError] = {}
    for step in list_steps(run_dir):
        try:
            found[step] = verify(RunFolder(run_dir).checkpoint(step), contents)
        except CheckpointError as error:
            found[step] = error
    return found


def best(run_dir: str, metric: str = "accuracy") -> Checkpoint | None:
    """The whole checkpoint with the highest `metric`; None where none was evaluated."""
    whole = [one for one in look(run_dir).values() if isinstance(one, Checkpoint)]
    return max((c for c in whole if metric in c.metrics), key=lambda c: c.metrics[metric], default=None)


def chosen_checkpoint(run_dir: str, name: str | None = None) -> Checkpoint:
    """The checkpoint called `name` ("step-00000100", "latest", a URI).

    Without a name the best evaluated one, else the newest whole one.

    Raises CheckpointError where it is damaged, or where there is none.
    """
    if name and name != "latest":
        return verify(name if "/" in name else storage.join(RunFolder(run_dir).checkpoints, name))

    found = None if name else best(run_dir)
    try:
        found = verify(found.uri) if found else latest(run_dir)
    except CheckpointError:
        found = latest(run_dir)
    if found is None:
        raise CheckpointError(f"{run_dir} has no whole checkpoint to take")
    return found


def prune(run_dir: str, keep_last: int, keep_best: bool, saved: int | None = None) -> list[int]:
    """Delete all but the newest `keep_last` whole checkpoints and the best one, and torn ones older than the newest.

    `saved`: the step that was just saved, which stays in any case. Returns the steps deleted.
    """
    steps = list_steps(run_dir)
    whole = [s for s in steps if _is_whole(run_dir, s)]
    kept = {*whole[-keep_last:], saved}  # a newer one may be damaged inside
    if keep_best and (top := best(run_dir)) is not None:
        kept.add(top.step)

    gone = [s for s in steps if s not in kept and whole and s < whole[-1]]
    for step in gone:
        uri = RunFolder(run_dir).checkpoint(step)
        storage.delete(storage.join(uri, MANIFEST))  # first: an interrupted delete leaves nothing that looks whole
        storage.delete(uri)
    return gone


def _is_whole(run_dir: str, step: int) -> bool:
    try:
        verify(RunFolder(run_dir).checkpoint(step), contents=False)
    except CheckpointError:
        return False
    return True


def _hash(data: bytes) -> str:
    return hashlib.blake2b(data, digest_size=16).hexdigest()
