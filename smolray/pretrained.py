"""The files of a pretrained model: where they are, and which file holds which tensor.

In: a hub id, a folder or a URI. Out: a local folder with weights and configuration; the file of each tensor.
"""

import hashlib
import json
import tempfile
from pathlib import Path

import torch
from safetensors import safe_open
from transformers.utils import cached_file

from smolray import storage
from smolray.config.errors import ConfigError

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def resolve(path: str) -> str:
    """The local folder or hub id for `path`. A folder in object storage is copied to this node once.

    Raises:
        ConfigError: `path` is a URI under which there are no files.
    """
    if storage.is_local(path) or "://" not in path:
        return storage.absolute(path) if Path(path).expanduser().is_dir() else path

    files = storage.list_files(path)
    if not files:
        raise ConfigError(f"model.path = {path}: no files there")

    identity = repr([path, *((f.base_name, f.size, f.mtime_ns) for f in files)])
    target = (
        Path(tempfile.gettempdir()) / "smolray-models" / hashlib.blake2b(identity.encode(), digest_size=8).hexdigest()
    )
    for info in files:
        if not (copy := target / info.base_name).exists() or copy.stat().st_size != info.size:
            storage.write_bytes(str(copy), storage.read_bytes(storage.join(path, info.base_name)))
    return str(target)


INDEX, SINGLE = "model.safetensors.index.json", "model.safetensors"


def tensor_files(path: str, revision: str | None = None) -> dict[str, str]:
    """The local safetensors file of each tensor of a model.

    Args:
        path: model.path: a folder, a hub id or a URI.
        revision: of a hub id; default: main.

    Returns:
        Tensor name -> file; empty where the model has no safetensors files.
    """
    folder, revision = resolve(path), revision or "main"

    def find(name: str) -> str | None:
        return cached_file(folder, name, revision=revision, _raise_exceptions_for_missing_entries=False)

    if index := find(INDEX):
        file_of = json.loads(Path(index).read_text(encoding="utf-8"))["weight_map"]
        local = {name: str(cached_file(folder, name, revision=revision)) for name in set(file_of.values())}
        return {tensor: local[name] for tensor, name in file_of.items()}

    if not (single := find(SINGLE)):
        return {}
    with safe_open(single, framework="pt") as tensors:
        return dict.fromkeys(tensors.keys(), single)
