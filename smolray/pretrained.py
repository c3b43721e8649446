"""The files of a pretrained model: where they are, and which file holds which tensor.

In: a hub id, a folder or a URI. Out: a local folder with weights and configuration; the file of each tensor.
"""

import hashlib
import json
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import torch
from jinja2 import TemplateError
from safetensors import SafetensorError, safe_open
from transformers import AutoConfig, PreTrainedConfig
from transformers.utils import cached_file

from smolray import storage
from smolray.config import ConfigError, ModelConfig
from smolray.config.model_folder import check_model_config, check_model_folder

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

    Raises:
        ConfigError: the folder is damaged.
    """
    folder, revision = resolve(path), revision or "main"
    check_model_folder(folder, needs=())

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


def stored_shapes(files: Mapping[str, str]) -> dict[str, tuple[int, ...]]:
    """The shape of each tensor, from the headers of its files. `files`: of `tensor_files`."""
    shapes: dict[str, tuple[int, ...]] = {}
    for file in set(files.values()):
        with safe_open(file, framework="pt") as tensors:
            there = [name for name in tensors.keys() if files.get(name) == file]  # noqa: SIM118  (no mapping)
            shapes |= {name: tuple(tensors.get_slice(name).get_shape()) for name in there}
    return shapes


# What transformers, tokenizers, safetensors and Jinja raise for files that are not what they should be.
FILE_ERRORS = (
    ValueError,
    TypeError,
    KeyError,
    IndexError,
    AttributeError,
    RuntimeError,
    ArithmeticError,
    SafetensorError,
    TemplateError,
    RecursionError,
)


@contextmanager
def reported(model: ModelConfig, what: str) -> Iterator[None]:
    """A block that loads `what` of a model: a fault of its files becomes one ConfigError that names them."""
    try:
        yield
    except (ConfigError, torch.OutOfMemoryError, torch.AcceleratorError):
        raise
    except FILE_ERRORS as error:
        words = (str(error).strip().splitlines() or [""])[0][:300]
        raise ConfigError(
            f"model.path = {model.path}: its {what} cannot be read ({type(error).__name__}: {words}); expected the "
            "files of a SmolVLM model: download or export the folder again"
        ) from error


def model_config(model: ModelConfig) -> PreTrainedConfig:
    """The config.json of a model as transformers reads it.

    Raises ConfigError where it is damaged or of another family.
    """
    path = resolve(model.path)
    check_model_folder(path, needs=())
    with reported(model, "config.json"):
        record, _ = PreTrainedConfig.get_config_dict(path, revision=model.revision)
        check_model_config(model.path, record)
        return AutoConfig.from_pretrained(path, revision=model.revision, trust_remote_code=False)
