"""Files of a pretrained model: where they are, of which types, and which file holds which tensor.

In: a hub id, a folder or a URI. Out: a local folder with its weights and configuration.
"""

import hashlib
import json
import tempfile
from pathlib import Path

import torch
from safetensors import safe_open
from transformers.utils import cached_file

from smolray import storage
from smolray.config import ConfigError, ModelConfig

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def resolve(path: str) -> str:
    """A local folder or hub id for `path`; a folder in object storage is copied to this node once."""
    if storage.is_local(path) or "://" not in path:
        return storage.absolute(path) if Path(path).expanduser().is_dir() else path
    files = storage.list_files(path)
    identity = repr([path, *((f.base_name, f.size, f.mtime_ns) for f in files)])
    target = (
        Path(tempfile.gettempdir()) / "smolray-models" / hashlib.blake2b(identity.encode(), digest_size=8).hexdigest()
    )
    if not files:
        raise ConfigError(f"model.path = {path}: no files there")
    for info in files:
        if not (copy := target / info.base_name).exists() or copy.stat().st_size != info.size:
            storage.write_bytes(str(copy), storage.read_bytes(storage.join(path, info.base_name)))
    return str(target)


INDEX, SINGLE = "model.safetensors.index.json", "model.safetensors"


def tensor_files(model: ModelConfig) -> dict[str, str]:
    """The safetensors file of each tensor of a model folder or hub id."""
    path, revision = resolve(model.path), model.revision or "main"
    if index := cached_file(path, INDEX, revision=revision, _raise_exceptions_for_missing_entries=False):
        where = json.loads(Path(index).read_text(encoding="utf-8"))["weight_map"]
        local = {name: str(cached_file(path, name, revision=revision)) for name in set(where.values())}
        return {tensor: local[name] for tensor, name in where.items()}
    file = str(cached_file(path, SINGLE, revision=revision))
    with safe_open(file, framework="pt") as tensors:
        return dict.fromkeys(tensors.keys(), file)
