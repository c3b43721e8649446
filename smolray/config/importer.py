"""Settings files of other trainers as settings of a run: TRL's, LLaMA-Factory's and Axolotl's YAML.

In: the YAML of one of them. Out: our settings by dotted key, and what has no counterpart here, each with the reason.
"""

import re
from collections.abc import Callable
from typing import Any, get_args

from smolray.config.errors import ConfigError
from smolray.config.load import read_settings
from smolray.config.optimizer import OptimizerConfig
from smolray.config.schema import ALIASES, RunConfig

Settings = dict[str, Any]

# Their name -> ours, where the value is the same.
SAME = {
    **ALIASES,
    "base_model": "model.path",
    "model_revision": "model.revision",
    **dict.fromkeys(("lora_r", "lora_rank"), "lora.r"),
    "lora_alpha": "lora.lora_alpha",
    "lora_dropout": "lora.lora_dropout",
    "lora_target_modules": "lora.target_modules",
    **dict.fromkeys(("use_rslora", "peft_use_rslora"), "lora.use_rslora"),
    **dict.fromkeys(("use_dora", "peft_use_dora"), "lora.use_dora"),
    "loraplus_lr_ratio": "optimizer.loraplus_lr_ratio",
    "lora_modules_to_save": "lora.modules_to_save",
    "neftune_alpha": "train.neftune_noise_alpha",
    "torch_compile": "model.compile",
    "enable_liger_kernel": "model.use_liger_kernel",
    **dict.fromkeys(("cutoff_len", "sequence_len"), "data.max_length"),
    "dataset_revision": "data.revision",
    "max_samples": "data.max_samples",
    "micro_batch_size": "train.per_device_train_batch_size",
    "num_epochs": "train.num_train_epochs",
    "lr_scheduler": "optimizer.lr_scheduler_type",
    **dict.fromkeys(("pref_beta", "beta"), "dpo.beta"),
    "loss_type": "dpo.loss_type",
    "simpo_gamma": "simpo.simpo_gamma",
    "load_best_model_at_end": "checkpoint.keep_best",
    **dict.fromkeys(("per_device_eval_batch_size", "eval_batch_size"), "evaluate.batch_size"),
}
SHARES = ("interleave_probs", "interleave_prob")  # of the data sets, in the order of their list
# What smolray decides by itself, or what changes nothing that is learned.
NOT_NEEDED = {
    **dict.fromkeys(("do_train", "do_eval", "overwrite_cache", "overwrite_output_dir"), "always so here"),
    **dict.fromkeys(("plot_loss", "include_tokens_per_second"), "the report has it"),
    **dict.fromkeys(("dataloader_num_workers", "preprocessing_num_workers", "ddp_timeout", "tf32"), "Ray does it"),
    **dict.fromkeys(("flash_attention", "attn_implementation", "flash_attn"), "attention is chosen here"),
    **dict.fromkeys(("template", "chat_template", "processor_type", "model_type"), "the model's own is taken"),
    **dict.fromkeys(("remove_unused_columns", "dataset_kwargs", "trust_remote_code"), "not needed here"),
    "resume_from_checkpoint": "the same name resumes",
    "mix_strategy": "no conversation is left out, as with interleave_over",
}


def import_settings(path: str) -> tuple[Settings, dict[str, str]]:
    """Our settings by dotted key, and why each of the others has no counterpart. Raises ConfigError."""
    given = read_settings(path)
    found: Settings = {}
    missing: dict[str, str] = {}
    for name, value in given.items():
        if value is None or name in SHARES:
            continue
        try:
            for key, ours in _counterpart(str(name), value).items():
                found.setdefault(key, _checked(key, ours))
        except ConfigError as error:
            missing[str(name)] = str(error).splitlines()[0]
    for name in SHARES:
        if given.get(name) is not None:
            _add_shares(found, missing, name, given[name])
    if not _has_adapters(given):
        for key in [key for key in found if key.startswith("lora.")]:
            missing[key] = f"{found.pop(key)}: the file says nothing of training adapters, so that all is trained"
    elif not any(key.startswith("lora.") for key in found):
        found["lora.r"] = 8
    if _has_adapters(given):
        found.setdefault("model.train", [])
    return found, missing


def nested(settings: Settings) -> dict[str, Any]:
    """Settings by dotted key as sections, as a YAML file has them."""
    record: dict[str, Any] = {}
    for key, value in settings.items():
        *parents, last = key.split(".")
        section = record
        for name in parents:
            section = section.setdefault(name, {})
        section[last] = value
    return record


def _checked(key: str, value: Any) -> Any:
    """The value as this setting holds it. Raises ConfigError where it is not valid here."""
    held: Any = RunConfig().replace({key: value}).model_dump(mode="json")
    for name in key.split("."):
        held = held[name]
    if isinstance(held, list):
        return [{k: v for k, v in one.items() if v is not None} if isinstance(one, dict) else one for one in held]
    return held


def _counterpart(name: str, value: Any) -> Settings:
    """Our settings for one of theirs. Raises ConfigError, with the reason, where there is none."""
    if name in CONVERTED:
        return CONVERTED[name](value)
    if key := SAME.get(name) or _own_name(name):
        return {key: value}
    reason = NOT_NEEDED.get(name, "no counterpart")
    raise ConfigError(reason)


def _own_name(name: str) -> str:
    """The dotted key of a setting that is called so here, in whatever section; empty where there is none."""
    for section in ("model", "optimizer", "train", "checkpoint", "evaluate"):
        if name in RunConfig.model_fields[section].annotation.model_fields:  # type: ignore[union-attr]
            return f"{section}.{name}"
    return name if name in ("seed", "report_to") else ""


def _has_adapters(given: Settings) -> bool:
    """Whether the other trainer would train adapters, whatever else it says of them."""
    return bool(
        given.get("use_peft") or given.get("finetuning_type") == "lora" or given.get("adapter") in ("lora", "qlora")
    )


def _nothing(value: Any) -> Settings:
    return {}


def _dtype(name: str) -> Callable[[Any], Settings]:
    return lambda value: {"model.dtype": name} if value in (True, "true", "auto") else {}


def _optimizer(value: Any) -> Settings:
    """AdamW under whatever name; the others under theirs, with bitsandbytes' in transformers' spelling too."""
    name = str(value).replace("_bnb", "").removesuffix("_32bit")
    if name in get_args(OptimizerConfig.model_fields["name"].annotation) and name != "adamw":
        return {"optimizer.name": name}
    if str(value) in ("adamw", "adamw_torch", "adamw_torch_fused", "adamw_hf", "adamw_apex_fused"):
        return {"optimizer.name": "adamw"}
    raise ConfigError("no counterpart; nearest: optimizer.name=adamw")


def _targets(value: Any) -> Settings:
    if value in ("all", "all-linear", True):
        return {"lora.target_modules": ["all-linear"]}
    return {"lora.target_modules": [part.strip() for part in str(value).split(",")]} if value else {}


def _init(value: Any) -> Settings:
    return {"lora.init_lora_weights": "default" if value is True else value}


def _data(value: Any) -> Settings:
    """One or several data sets by their paths or ids."""
    named = value if isinstance(value, list) else str(value).split(",")
    sources = [_source(one) for one in named]
    return {"data.train": sources[0] if len(sources) == 1 else sources}


def _source(value: Any) -> Any:
    """A data set as a source: its path, with what is said of it. ms-swift writes the number of its samples behind #."""
    if isinstance(value, dict):
        files = value.get("data_files")
        path = files if isinstance(files, str) else value.get("path")
        found = {"path": path, "split": value.get("split"), "revision": value.get("revision")}
        found = {key: one for key, one in found.items() if one is not None}
        return path if [*found] == ["path"] else found
    path, _, number = str(value).strip().partition("#")
    return {"path": path, "max_samples": int(number)} if number.isdigit() else str(value).strip()


def _add_shares(found: Settings, missing: dict[str, str], name: str, value: Any) -> None:
    """Give the sources their shares of an epoch: a list of numbers, one for each of them."""
    numbers = value if isinstance(value, list) else str(value).split(",")
    sources = found.get("data.train")
    if not isinstance(sources, list) or len(numbers) != len(sources):
        missing[name] = f"{len(numbers)} numbers, which are not one for each data set"
        return
    try:
        for source, number in zip(sources, numbers, strict=True):
            source["weight"] = float(number)
        found["data.train"] = _checked("data.train", sources)
    except ValueError as error:
        missing[name] = str(error).splitlines()[0]


def _fraction(value: Any) -> Settings:
    """The share that is held out; others take a whole number for a number of rows."""
    if isinstance(value, int | float) and value >= 1:
        raise ConfigError(f"{value:g} rows; expected a share, such as data.validation_fraction=0.05")
    return {"data.validation_fraction": value}


def _validation(value: Any) -> Settings:
    source = _data(value)["data.train"]
    if not isinstance(source, str):
        raise ConfigError("data.validation is one path or id, without settings of its own")
    return {"data.validation": source}


def _method(value: Any) -> Settings:
    if value not in ("sft", "dpo", "simpo"):
        raise ConfigError("no counterpart; methods here: sft, dpo, simpo, retrieval")
    return {"method": value}


def _packing(value: Any) -> Settings:
    return {"data.packing": "full" if value else "image"}


def _stage(value: Any) -> Settings:
    """The ZeRO stage that the name of a DeepSpeed config says, such as ds_z2_config.json or zero3_bf16.json."""
    if stage := re.search(r"z(?:ero)?_?-?([0-3])", str(value).rsplit("/", 1)[-1]):
        return {"engine.stage": int(stage[1])}
    raise ConfigError("DeepSpeed's own config is written by smolray; choose engine.stage")


def _eval_strategy(value: Any) -> Settings:
    return {"evaluate.eval_epochs": 1 if value == "epoch" else 0}


def _save_strategy(value: Any) -> Settings:
    if value == "epoch":
        raise ConfigError("saved at the end of each epoch in any case; checkpoint.save_steps adds others")
    return {"checkpoint.save_steps": 0} if value == "no" else {}


def _name(value: Any) -> Settings:
    cleaned = re.sub(r"[^a-z0-9._-]+", "-", str(value).lower()).strip("-._")[:62]
    return {"name": cleaned or "run"}


def _report_to(value: Any) -> Settings:
    if value == "all":
        raise ConfigError("name the trackers: report_to=[tensorboard, wandb]")
    return {"report_to": value}


CONVERTED: dict[str, Callable[[Any], Settings]] = {
    "run_name": _name,
    "report_to": _report_to,
    "bf16": _dtype("bfloat16"),
    "fp16": _dtype("float16"),
    **dict.fromkeys(("torch_dtype", "dtype"), lambda value: {} if value == "auto" else {"model.dtype": value}),
    **dict.fromkeys(("optim", "optimizer"), _optimizer),
    "pissa_init": lambda value: {"lora.init_lora_weights": "pissa_niter_16"} if value else {},
    **dict.fromkeys(("init_lora_weights", "peft_init_lora_weights"), _init),
    "additional_target": lambda value: {"lora.modules_to_save": [part.strip() for part in str(value).split(",")]},
    "lora_target": _targets,
    "lora_target_linear": _targets,
    **dict.fromkeys(("dataset", "datasets"), _data),
    **dict.fromkeys(("test_datasets", "eval_dataset"), _validation),
    **dict.fromkeys(("stage", "rl"), _method),
    **dict.fromkeys(("use_peft", "finetuning_type", "adapter", "lora_model_dir"), _nothing),
    **dict.fromkeys(("packing", "sample_packing"), _packing),
    "deepspeed": _stage,
    **dict.fromkeys(("eval_strategy", "evaluation_strategy"), _eval_strategy),
    **dict.fromkeys(("val_size", "val_set_size", "split_dataset_ratio", "test_split_size"), _fraction),
    "save_strategy": _save_strategy,
    "dataset_train_split": lambda value: {"data.split": value},
    "quantization_bit": lambda value: {f"model.load_in_{value}bit": True},
}
