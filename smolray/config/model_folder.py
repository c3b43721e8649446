"""Whether a local model folder is whole, looked at before anything is loaded from it. It needs neither torch nor Ray.

In: the path of a folder. Out: nothing, or a ConfigError with the folder, the file at fault, what was found and what was
expected. Tensors are not read: a safetensors file says in its header how long it must be.
"""

import json
import re
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from typing import Any

from jinja2 import TemplateError
from jinja2.sandbox import ImmutableSandboxedEnvironment

from smolray.config.errors import ConfigError
from smolray.config.family import require_family

CONFIG, WEIGHTS, WEIGHTS_INDEX, TOKENIZER = (
    "config.json",
    "model.safetensors",
    "model.safetensors.index.json",
    "tokenizer.json",
)
OPTIONAL = (
    "processor_config.json",
    "preprocessor_config.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "generation_config.json",
    "chat_template.json",
)
SIZES = {
    "text_config": (
        "hidden_size",
        "num_hidden_layers",
        "num_attention_heads",
        "num_key_value_heads",
        "intermediate_size",
        "vocab_size",
        "max_position_embeddings",
    ),
    "vision_config": (
        "hidden_size",
        "num_hidden_layers",
        "num_attention_heads",
        "intermediate_size",
        "image_size",
        "patch_size",
    ),
}
MAX_HEADER_BYTES = 100_000_000  # safetensors' own limit
REMEDY = "download or export the folder again"
HUB_ID = re.compile(r"[\w.-]+(/[\w.-]+)?")
GENERATION_TAGS = re.compile(r"{%-?\s*(end)?generation\s*-?%}")  # transformers' own addition to Jinja


class ModelFolderError(ConfigError):
    """A model folder that is not whole. One line: the folder, the file, what was found, what was expected."""

    def __init__(self, folder: str, file: str, found: str, expected: str):
        super().__init__(f"model.path = {folder}: {file}: {found}; expected {expected}; {REMEDY}")


def check_model_folder(path: str, needs: Collection[str] = (TOKENIZER, WEIGHTS)) -> None:
    """Check the files of a model in a local folder; a hub id is left to the hub's client.

    `needs`: the files besides config.json that must be there; those that are there are checked in any case.

    Raises ModelFolderError where a file is missing, damaged or of another kind, ConfigError where `path` is neither a
    folder nor a hub id.
    """
    folder = Path(path).expanduser()
    if not folder.is_dir():
        if folder.exists() or not HUB_ID.fullmatch(path):
            found = "is a file" if folder.exists() else "is not there"
            raise ConfigError(f"model.path = {path}: {found}; expected a model folder, a hub id owner/name or a URI")
        return

    files = ((file.name, file.stat()) for file in folder.iterdir() if file.is_file())
    state = (str(folder), *sorted((name, found.st_size, found.st_mtime_ns) for name, found in files))
    if not {CONFIG, *needs} <= _WHOLE.get(state, set()):
        _check_files(folder, needs)
        _WHOLE.setdefault(state, set()).update((CONFIG, *needs))


# What the files of a folder have been found to hold, by their names, sizes and times: a process that loads processor,
# weights and settings one after the other reads them once.
_WHOLE: dict[tuple[Any, ...], set[str]] = {}


def _check_files(folder: Path, needs: Collection[str]) -> None:
    records = {CONFIG: _json(folder, CONFIG)}
    _check_config(folder, records[CONFIG])  # first: other families have other files
    names = (name for name in (TOKENIZER, *OPTIONAL) if name in needs or (folder / name).exists())
    records |= {name: _json(folder, name) for name in names}
    _check_processor(folder, records)
    for text, file in _templates(folder, records):
        _check_template(folder, file, text)
    for file in _weight_files(folder, WEIGHTS in needs):
        _check_safetensors(folder, file)


def check_model_config(folder: str, config: Mapping[str, Any]) -> None:
    """Check the record of a config.json, wherever it was read. Raises ModelFolderError."""
    _check_config(folder, config)


def _json(folder: Path, name: str) -> dict[str, Any]:
    try:
        record = json.loads((folder / name).read_bytes())
    except FileNotFoundError:
        there = ", ".join(sorted(p.name for p in folder.iterdir())[:8]) or "no files"
        raise ModelFolderError(str(folder), name, f"is not there (found {there})", "a SmolVLM model") from None
    except (ValueError, RecursionError) as error:
        raise ModelFolderError(str(folder), name, f"is not JSON ({error})"[:200], "a JSON object") from None
    if not isinstance(record, dict):
        raise ModelFolderError(str(folder), name, f"holds {type(record).__name__}", "a JSON object")
    return record


def _check_config(folder: Path | str, config: Mapping[str, Any]) -> None:
    require_family(str(folder), config)
    for section, keys in SIZES.items():
        sizes = config[section]
        for key in keys:
            if sizes.get(key) is not None:
                _require_size(folder, CONFIG, f"{section}.{key}", sizes[key])
    if config.get("scale_factor") is not None:
        _require_size(folder, CONFIG, "scale_factor", config["scale_factor"])


def _require_size(folder: Path | str, file: str, key: str, value: Any) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or not 0 < value < 2**31:
        raise ModelFolderError(str(folder), file, f"{key} = {value!r:.60}", "a whole number above 0")


def _check_processor(folder: Path, records: Mapping[str, dict[str, Any]]) -> None:
    """A tile has as many tokens as the model makes of it: another number would place its features wrongly."""
    vision, factor = records[CONFIG]["vision_config"], records[CONFIG].get("scale_factor")
    side, patch = vision.get("image_size"), vision.get("patch_size")
    for name in ("processor_config.json", "preprocessor_config.json"):
        if (number := records.get(name, {}).get("image_seq_len")) is None:
            continue
        _require_size(folder, name, "image_seq_len", number)
        if side and patch and factor and number != (made := (side // patch) ** 2 // factor**2):
            raise ModelFolderError(
                str(folder), name, f"image_seq_len = {number}", f"{made}, the tokens that {CONFIG} makes of a tile"
            )


def _templates(folder: Path, records: Mapping[str, dict[str, Any]]) -> Iterator[tuple[Any, str]]:
    """Each chat template in the folder, and its file."""
    for name, record in records.items():
        if record.get("chat_template") is not None:
            yield record["chat_template"], name
    if (file := folder / "chat_template.jinja").exists():
        yield file.read_text(encoding="utf-8", errors="replace"), file.name


def _check_template(folder: Path, file: str, text: Any) -> None:
    if not isinstance(text, str):
        return  # several templates by name, which the processor chooses from
    environment = ImmutableSandboxedEnvironment(extensions=["jinja2.ext.loopcontrols"])
    try:
        environment.parse(GENERATION_TAGS.sub("", text))
    except (TemplateError, RecursionError) as error:
        found = f"the chat template is not Jinja ({error})"
        raise ModelFolderError(str(folder), file, found, "SmolVLM's chat template") from None


def _weight_files(folder: Path, required: bool) -> list[str]:
    """Names of the safetensors files of the model."""
    if (folder / WEIGHTS_INDEX).exists():
        files = _json(folder, WEIGHTS_INDEX).get("weight_map")
        if not isinstance(files, dict) or not all(isinstance(f, str) and Path(f).name == f for f in files.values()):
            found = "weight_map is not a table of tensors and files"
            raise ModelFolderError(str(folder), WEIGHTS_INDEX, found, "file names in this folder")
        return sorted(set(files.values()))

    if not (folder / WEIGHTS).exists():
        if not required:
            return []
        others = [p.name for p in folder.iterdir() if p.suffix in (".bin", ".pt", ".pth", ".h5", ".msgpack", ".gguf")]
        found = f"is not there{f' (found {min(others)})' if others else ''}"
        raise ModelFolderError(str(folder), WEIGHTS, found, "weights as safetensors")
    return [WEIGHTS]


def _check_safetensors(folder: Path, name: str) -> None:
    """Compare the length of a safetensors file with its header."""
    file = folder / name
    if not file.is_file():
        raise ModelFolderError(str(folder), name, "is not there", f"the file that {WEIGHTS_INDEX} names")

    size = file.stat().st_size
    with file.open("rb") as opened:
        length = int.from_bytes(opened.read(8), "little")
        if size < 8 or not 0 < length <= min(MAX_HEADER_BYTES, size - 8):
            found = f"its header cannot be read ({size:,} bytes, a header of {length:,})"
            raise ModelFolderError(str(folder), name, found, "a safetensors file")
        header = opened.read(length)

    try:
        tensors = {key: value for key, value in json.loads(header).items() if key != "__metadata__"}
        end = max((int(tensor["data_offsets"][1]) for tensor in tensors.values()), default=0)
    except (ValueError, TypeError, KeyError, IndexError, AttributeError, RecursionError):
        raise ModelFolderError(str(folder), name, "its header cannot be read", "a safetensors file") from None
    if size != 8 + length + end:
        found = f"{size:,} bytes where its header names {8 + length + end:,}"
        raise ModelFolderError(str(folder), name, found, "the whole file")
