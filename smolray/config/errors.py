"""Turns pydantic's errors about a setting into one line: the key, its value, what is allowed, the nearest valid choice.

In: the root model and its ValidationError. Out: text.
"""

import difflib
import re
import types
from collections.abc import Iterable, Sequence
from typing import Any, Literal, Union, get_args, get_origin

from pydantic import BaseModel, ValidationError

Model = type[BaseModel]
MOST_SHOWN = 200  # characters of a value in a message
# What other trainers call a setting -> its key here.
ELSEWHERE = {
    **dict.fromkeys(("rank", "lora_r", "lora_rank", "lora_dim"), "lora.r"),
    **dict.fromkeys(("alpha", "scaling"), "lora.lora_alpha"),
    "dropout": "lora.lora_dropout",
    **dict.fromkeys(("init", "init_lora"), "lora.init_lora_weights"),
    "additional_target": "lora.modules_to_save",
    "neftune_alpha": "train.neftune_noise_alpha",
    **dict.fromkeys(("targets", "lora_target", "modules"), "lora.target_modules"),
    **dict.fromkeys(("lr", "base_lr"), "optimizer.learning_rate"),
    **dict.fromkeys(("scheduler", "lr_scheduler"), "optimizer.lr_scheduler_type"),
    "optim": "optimizer.name",
    "wd": "optimizer.weight_decay",
    **dict.fromkeys(
        ("clip", "max_norm", "grad_clip", "gradient_clip", "gradient_clipping", "gradient_clip_val", "clip_grad_norm"),
        "optimizer.max_grad_norm",
    ),
    **dict.fromkeys(
        ("batch", "batch_size", "train_batch_size", "micro_batch_size", "per_device_batch_size", "bs"),
        "train.per_device_train_batch_size",
    ),
    **dict.fromkeys(("epoch", "epochs", "num_epochs", "max_epochs", "n_epochs"), "train.num_train_epochs"),
    **dict.fromkeys(("steps", "num_steps", "train_steps", "max_train_steps", "total_steps"), "train.max_steps"),
    **dict.fromkeys(
        ("grad_accum", "accumulation_steps", "accumulate_grad_batches"), "train.gradient_accumulation_steps"
    ),
    **dict.fromkeys(("log_steps", "log_every", "logging"), "train.logging_steps"),
    **dict.fromkeys(("workers", "gpus", "num_gpus", "n_gpus", "nproc_per_node", "world_size"), "resources.num_workers"),
    **dict.fromkeys(("max_seq_length", "max_seq_len", "seq_len", "cutoff_len", "model_max_length"), "data.max_length"),
    **dict.fromkeys(("dataset", "dataset_name", "data_path", "train_file", "train_data"), "data.train"),
    **dict.fromkeys(
        ("eval_data", "eval_dataset", "validation_file", "val", "valid", "eval", "test"), "data.validation"
    ),
    **dict.fromkeys(("model_name_or_path", "model_name", "model_id", "pretrained", "checkpoint_path"), "model.path"),
    **dict.fromkeys(("bf16", "fp16", "torch_dtype", "precision", "mixed_precision"), "model.dtype"),
    "zero_stage": "engine.stage",
    "output_dir": "storage",
    "run_name": "name",
    **dict.fromkeys(("every", "interval", "save_every", "save_freq"), "checkpoint.save_steps"),
}
ELSEWHERE_IN = {"model.name": "model.path", "model.id": "model.path", "checkpoint.steps": "checkpoint.save_steps"}


class ConfigError(ValueError):
    """The run as written cannot work. One line per fault: key, value, what is allowed, the nearest valid choice."""


def explain(root: Model, error: ValidationError) -> str:
    """One line for each key at fault, however many faults pydantic finds in it."""
    faults: dict[str, list[Any]] = {}
    for fault in error.errors():
        faults.setdefault(_key_of(root, fault), []).append(fault)
    # a fault inside an item of a list says more than that the list is no text
    faults = {key: of for key, of in faults.items() if not any(other.startswith(f"{key}.") for other in faults)}
    return "\n".join(_explain(root, key, of_key) for key, of_key in faults.items())


def _key_of(root: Model, fault: Any) -> str:
    """The dotted key at fault, without the branch of a union (`int`, `tuple[…]`, `literal[…]`) that pydantic adds."""
    parts: list[str] = []
    for number, part in enumerate(fault["loc"]):
        if str(part).startswith("tuple[") and _section_at(root, [*parts, "0"]) is not None:
            continue
        branch = number == len(fault["loc"]) - 1 and part in ("int", "float", "str")
        branch = branch or part == "int" or str(part).startswith(("tuple[", "literal["))
        if branch and _section_at(root, parts) is None:
            break
        parts.append(str(part))
    return one_line(".".join(parts), quoted=False) or "config"


def one_line(value: Any, quoted: bool = True) -> str:
    """A value from outside in a message: on one line, and not longer than is read."""
    text = repr(value) if quoted else str(value)
    text = text if text.isprintable() else repr(text)
    return text if len(text) <= MOST_SHOWN else f"{text[:MOST_SHOWN]}…"


def _explain(root: Model, key: str, faults: list[Any]) -> str:
    """One line for all that pydantic says about one key: the value, what is allowed, the nearest valid choice."""
    fault, location = faults[0], key.split(".")
    kind, value, context = fault["type"], fault.get("input"), fault.get("ctx") or {}
    shown = one_line(value)
    if kind == "extra_forbidden":
        allowed = ", ".join(sorted(_fields_at(root, location[:-1])))
        return f"{key} = {shown}: not a setting; allowed here: {allowed}{_did_you_mean(root, location)}"
    if len(faults) > 1:  # every branch of a union refused it: the description of the setting says what is meant
        return f"{key} = {shown}: expected {_describe(root, location)}"
    if kind in ("model_type", "dict_type"):
        keys = ", ".join(_fields_at(root, location)) or "of your choice"
        return f"{key} = {shown}: expected a section with the keys {keys}"
    message = fault["msg"].removeprefix("Value error, ")
    if kind == "tuple_type":
        return f"{key} = {shown}: expected a list{_nearest_list(value, _items_at(root, location))}"
    return f"{key} = {shown}: {message[0].lower()}{message[1:]}{_nearest(kind, value, context)}"


def _did_you_mean(root: Model, location: Sequence[str]) -> str:
    """The setting that was probably meant.

    It is what other trainers call so, one of this name in another section, or the nearest here or there.
    """
    *parents, name = location
    known = ELSEWHERE_IN.get(".".join(location)) or ELSEWHERE.get(name)
    if known and (_fields_at(root, known.split(".")[:-1]) and known.split(".")[-1] != name):
        return f"; did you mean {known}?"
    elsewhere = {field: f"{section}.{field}" for section in root.model_fields for field in _fields_at(root, [section])}
    here = {field: ".".join([*parents, field]) for field in _fields_at(root, parents)}
    if name in elsewhere:
        return f"; did you mean {elsewhere[name]}?"
    for places, cutoff in ((here, 0.6), (elsewhere, 0.7)):
        if near := difflib.get_close_matches(name, places, n=1, cutoff=cutoff):
            return f"; did you mean {places[near[0]]}?"
    return ""


def _nearest(kind: str, value: Any, context: dict[str, Any]) -> str:
    if kind == "literal_error":
        choices = [choice.strip("'") for choice in re.split(r", | or ", context["expected"])]
        numbers = [choice for choice in choices if choice.isdigit()]
        if isinstance(value, int | float) and numbers:
            return f"; nearest: {min(numbers, key=lambda c: abs(int(c) - value))}"
        near = difflib.get_close_matches(str(value), choices, n=1, cutoff=0.3)
        return f"; nearest: {near[0]}" if near else ""
    if kind == "string_pattern_mismatch":
        return f"; nearest: {re.sub(r'[^a-z0-9._-]+', '-', str(value).lower()).strip('-._')[:62] or 'run'}"
    if kind == "string_type" and isinstance(value, int | float):
        return f'; nearest: "{value}", in quotes'
    for bound, nearest in (("ge", "{}"), ("le", "{}"), ("gt", "just above {}"), ("lt", "just below {}")):
        if bound in context:
            return f"; nearest: {nearest.format(context[bound])}"
    return ""


def _nearest_list(value: Any, items: Sequence[str]) -> str:
    """The list that one bare word probably stands for. `items`: what it may hold; empty where that is free."""
    if not items:
        return f"; nearest: [{one_line(value, quoted=False)}]"
    if str(value) in ("all", "*", "full"):
        return f"; nearest: [{', '.join(items)}]"
    words = [difflib.get_close_matches(word.strip(), items, n=1, cutoff=0.3) for word in str(value).split(",")]
    near = ", ".join(word[0] for word in words if word)
    return f" of {', '.join(items)}" + (f"; nearest: [{near}]" if near else "")


def _items_at(root: Model, location: Sequence[str]) -> tuple[str, ...]:
    """What the list at `location` may hold, where that is a choice of names."""
    section = _section_at(root, location[:-1])
    field = section.model_fields.get(location[-1]) if section else None
    item = next(iter(get_args(field.annotation)), None) if field else None
    return get_args(item) if get_origin(item) is Literal else ()


def _section_at(root: Model, location: Sequence[str]) -> Model | None:
    """The model of the section at `location`, which may be an item of a list; None where there is no section."""
    section: Model | None = root
    items: Model | None = None  # of the list that the last part names
    for part in location:
        if part.isdigit():
            section, items = items, None
            continue
        field = section.model_fields.get(part) if section else None
        options = (field.annotation, *get_args(field.annotation)) if field else ()
        section, items = _model_in(options), _model_in(a for option in options for a in get_args(option))
    return section


def _model_in(annotations: Iterable[Any]) -> Model | None:
    return next((a for a in annotations if isinstance(a, type) and issubclass(a, BaseModel)), None)


def is_text(root: Model, location: Sequence[str]) -> bool:
    """Whether the setting at `location` takes free text, so that its value needs no quotes. It may take a list too."""
    section = _section_at(root, location[:-1])
    field = section.model_fields.get(location[-1]) if section else None
    return field is not None and str in _options(field.annotation)


def empty_value(root: Model, location: Sequence[str]) -> Any:
    """What `key=` sets: null where the setting may be null, else an empty text, list or dictionary; a number has none.

    Null stands for "none" there, and is refused with the reason.
    """
    section = _section_at(root, location[:-1])
    field = section.model_fields.get(location[-1]) if section else None
    kinds = [get_origin(option) or option for option in _options(field.annotation if field else None)]
    if type(None) in kinds:
        return None
    return next(({str: "", tuple: [], dict: {}}[kind] for kind in kinds if kind in (str, tuple, dict)), None)


def _options(annotation: Any) -> tuple[Any, ...]:
    """The types that a setting may have."""
    return get_args(annotation) if get_origin(annotation) in (Union, types.UnionType) else (annotation,)


def _fields_at(root: Model, location: Sequence[str]) -> list[str]:
    section = _section_at(root, location)
    return list(section.model_fields) if section else []


def _describe(root: Model, location: Sequence[str]) -> str:
    section = _section_at(root, location[:-1])
    field = section.model_fields.get(location[-1]) if section else None
    return " ".join(field.description.split()) if field and field.description else "another type"
