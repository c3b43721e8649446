"""Checkpoints free of world size and engine: tensors by Hugging Face name in safetensors, and the position in training.

In: an EngineState and Progress. Out: the folder `<run>/checkpoints/step-00000100/`. Its manifest with sizes and hashes
is written last. Only a folder that agrees with its manifest is loaded; others are skipped with a message. No pickle.
"""

import hashlib
import json
import re
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from typing import Any

import safetensors.torch
import torch

from smolray import storage
from smolray.run.folder import RunFolder
from smolray.run.state import EngineState, Moments

MANIFEST = "manifest.json"
TENSORS = ("weights", "exp_avg", "exp_avg_sq")
STATE = "state.json"
FILES = (*(f"{name}.safetensors" for name in TENSORS), STATE)
CODES = "codes.safetensors"  # 8-bit moments, where there are any: `<parameter>/<key>`


class CheckpointError(ValueError):
    """A checkpoint is torn, corrupted or of another run; the message names it and what is wrong."""


@dataclass(frozen=True)
class Progress:
    """Where training stands. `consumed`: micro-batches of `epoch` that have been trained."""

    step: int = 0
    epoch: int = 0
    consumed: int = 0
    samples: int = 0
    tokens: int = 0
    data: str = ""  # fingerprint of shards, index and plan: the order that `consumed` counts in


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

    Raises StorageFullError, and then leaves nothing behind.
    """
    uri = RunFolder(run_dir).checkpoint(progress.step)
    storage.delete(storage.join(uri, MANIFEST))  # a half-written folder must not carry the old manifest
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
    """The files of tensors, one after another: each is a copy in memory."""
    for name in TENSORS:
        yield f"{name}.safetensors", {key: value.contiguous() for key, value in getattr(state, name).items()}
    if state.codes:
        yield CODES, {f"{name}/{key}": v.contiguous() for name, kept in state.codes.items() for key, v in kept.items()}


def _write(uri: str, name: str, data: bytes) -> dict[str, Any]:
    """Write one file; returns its entry in the manifest."""
    storage.write_bytes(storage.join(uri, name), data)
    return {"bytes": len(data), "blake2b": _hash(data)}


def annotate(saved: Checkpoint, metrics: dict[str, float]) -> Checkpoint:
    """Replace the metrics of a checkpoint: an evaluation comes after the save."""
    path = storage.join(saved.uri, MANIFEST)
    record = json.loads(storage.read_bytes(path)) | {"metrics": metrics}
    storage.write_bytes(path, json.dumps(record, indent=1).encode())
    return Checkpoint(saved.uri, saved.progress, metrics)


def verify(uri: str, contents: bool = True) -> Checkpoint:
    """Check a checkpoint folder by its manifest: sizes always, hashes with `contents`. Raises CheckpointError."""
    found, files = _manifest(uri)
    for name, (size, digest) in files.items():
        if not contents:
            _check_size(uri, name, _size(uri, name), size)
            continue
        data = _checked(uri, name, size, digest)
        if name == STATE:
            _extra(found, data)
    return found


def load_state(checkpoint: Checkpoint) -> EngineState:
    """The tensors of a checkpoint, each file read once and verified by its hash. Raises CheckpointError."""
    uri = checkpoint.uri
    found, files = _manifest(uri)
    extra = _extra(found, _checked(uri, STATE, *files[STATE]))
    tensors = {
        name: safetensors.torch.load(_checked(uri, f"{name}.safetensors", *files[f"{name}.safetensors"]))
        for name in TENSORS
    }

    codes: dict[str, Moments] = {}
    if extra.get("codes"):
        for key, value in safetensors.torch.load(_checked(uri, CODES, *files[CODES])).items():
            name, _, part = key.rpartition("/")
            codes.setdefault(name, {})[part] = value
    return EngineState(**tensors, codes=codes, optimizer_step=extra["optimizer_step"], loss_scale=extra["loss_scale"])


def read_weights(checkpoint: Checkpoint) -> dict[str, torch.Tensor]:
    """The trained weights of a checkpoint by canonical name, without its optimizer state: fp32, on the CPU.

    Raises:
        CheckpointError: the file of weights is missing or does not have the hash in the manifest.
    """
    name = f"{TENSORS[0]}.safetensors"
    _, files = _manifest(checkpoint.uri)
    return safetensors.torch.load(_checked(checkpoint.uri, name, *files[name]))


def _manifest(uri: str) -> tuple[Checkpoint, dict[str, tuple[int, str]]]:
    """What the manifest says: the checkpoint, and the bytes and hash of each file. Raises CheckpointError."""
    try:
        record = json.loads(storage.read_bytes(storage.join(uri, MANIFEST)))
        found = Checkpoint(uri, Progress(**record["progress"]), dict(record["metrics"]))
        return found, {
            name: (int(record["files"][name]["bytes"]), str(record["files"][name]["blake2b"]))
            for name in {*FILES, *record["files"]}
        }
    except FileNotFoundError:
        raise CheckpointError(f"{uri} has no {MANIFEST}: it was not written to the end") from None
    except (ValueError, KeyError, TypeError) as error:  # ValueError: no JSON, or no text at all
        raise CheckpointError(f"{uri}/{MANIFEST} is damaged: {type(error).__name__}: {error}") from None


def _checked(uri: str, name: str, size: int, digest: str) -> bytes:
    try:
        data = storage.read_bytes(storage.join(uri, name))
    except FileNotFoundError:
        raise CheckpointError(f"{uri}/{name} is missing") from None
    _check_size(uri, name, len(data), size)
    if _hash(data) != digest:
        raise CheckpointError(f"{uri}/{name} does not have the hash in its manifest")
    return data


def _check_size(uri: str, name: str, found: int, size: int) -> None:
    if found != size:
        raise CheckpointError(f"{uri}/{name} has {found} bytes, its manifest says {size}")


def _extra(found: Checkpoint, data: bytes) -> dict[str, Any]:
    """The content of STATE. Raises CheckpointError where its progress is not that of the manifest."""
    extra: dict[str, Any] = json.loads(data)
    if Progress(**extra["progress"]) != found.progress:
        raise CheckpointError(f"{found.uri}/{MANIFEST} is damaged: its progress is not that of {STATE}")
    return extra


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


def best(run_dir: str, metric: str = "accuracy") -> Checkpoint | None:
    """The whole checkpoint with the highest `metric`; None where none was evaluated."""
    found = []
    for step in list_steps(run_dir):
        try:
            found.append(verify(RunFolder(run_dir).checkpoint(step), contents=False))
        except CheckpointError:
            continue
    return max((c for c in found if metric in c.metrics), key=lambda c: c.metrics[metric], default=None)


def chosen_checkpoint(run_dir: str, name: str | None = None) -> Checkpoint:
    """The checkpoint called `name` ("step-00000100", "latest", a URI); without a name the best evaluated, else the
    newest whole one.

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


def _size(uri: str, name: str) -> int:
    fs, path = storage.filesystem(storage.join(uri, name))
    info = fs.get_file_info(path)
    if info.size is None:
        raise CheckpointError(f"{uri}/{name} is missing")
    return int(info.size)


def _hash(data: bytes) -> str:
    return hashlib.blake2b(data, digest_size=16).hexdigest()
