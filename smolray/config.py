"""One run as frozen models: a YAML file plus dotted overrides in, one validated RunConfig out.

Every wrong key, value or combination is named in a single ConfigError. Settings carry the names of TRL / transformers where they have one.
"""

import difflib
import hashlib
import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError

Group = Literal["vision", "connector", "text"]
DType = Literal["float32", "bfloat16", "float16"]


class ConfigError(ValueError):
    """The run as written cannot work. One line per fault: key, value, what is allowed, the nearest valid choice."""


class Section(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", validate_default=True)


class ModelConfig(Section):
    path: str = Field("HuggingFaceTB/SmolVLM-256M-Instruct", description="hub id, folder, or tiny | random-256m | random-500m | random-2.2b")
    revision: str | None = Field(None, description="branch, tag or commit of a hub id")
    dtype: DType = Field("bfloat16", description="compute type; optimizer states and master weights stay fp32")
    attn_implementation: Literal["sdpa", "eager"] = "sdpa"
    gradient_checkpointing: bool = False
    load_in_4bit: bool = Field(False, description="nf4 with double quantisation (bitsandbytes)")
    load_in_8bit: bool = Field(False, description="int8 (bitsandbytes)")
    train: tuple[Group, ...] = Field(("vision", "connector", "text"), description="groups trained in full; with lora: in addition to it")


class LoraConfig(Section):
    """Names as in peft.LoraConfig; `groups` limits `target_modules` to the part of the model that is meant."""

    r: int = Field(8, ge=1)
    lora_alpha: float = Field(8, gt=0)
    lora_dropout: float = Field(0.0, ge=0, lt=1)
    groups: tuple[Group, ...] = Field(("text",), min_length=1)
    target_modules: tuple[str, ...] = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj", "out_proj", "fc1", "fc2", "proj")
    init_lora_weights: Literal["default", "gaussian"] = "default"


class ColumnsConfig(Section):
    """Column names of the source; empty means: recognise the usual ones."""

    image: str = ""
    question: str = ""
    answer: str = ""
    type: str = Field("", description="column with the question type, for tables by type")
    id: str = ""


class DataConfig(Section):
    train: str = Field("", description="raw data or prepared shards: a path, URI or hub data set id")
    validation: str = ""
    shards: str = Field("", description="where prepared shards are kept; default: <storage>/shards")
    format: Literal["auto", "parquet", "webdataset", "jsonl", "hub"] = "auto"
    columns: ColumnsConfig = ColumnsConfig()
    prompt: str = Field("", description="instruction put before a question, or the whole question for caption data")
    split: str = Field("", description="split of a hub data set")
    revision: str | None = None
    max_bad_fraction: float = Field(0.01, ge=0, le=1, description="share of quarantined rows above which prepare stops")
    max_image_pixels: int = Field(50_000_000, ge=1, description="larger images are refused as decompression bombs")
    shard_bytes: int = Field(64 * 2**20, ge=2**16)
    max_length: int = Field(2048, ge=8, description="longest packed sequence in tokens")
    overlong: Literal["drop", "truncate_text", "error"] = "drop"
    packing: Literal["none", "image"] = Field("image", description="image: all questions about one image share its tokens, exactly")
    max_questions_per_image: int = Field(16, ge=1)
    num_cpus_per_task: float = Field(0.25, gt=0)
    prefetch_batches: int = Field(4, ge=0)


class ImageConfig(Section):
    longest_edge: int | None = Field(None, ge=1, description="default: the processor's")
    max_tiles: int | None = Field(None, ge=1, description="upper limit of tiles an image, the global one included")
    upscale: bool = Field(False, description="true: enlarge small images to longest_edge first, as the stock processor does")


class OptimizerConfig(Section):
    name: Literal["adamw"] = "adamw"
    learning_rate: float = Field(1e-4, ge=0)
    weight_decay: float = Field(0.0, ge=0)
    adam_beta1: float = Field(0.9, ge=0, lt=1)
    adam_beta2: float = Field(0.999, ge=0, lt=1)
    adam_epsilon: float = Field(1e-8, gt=0)
    max_grad_norm: float = Field(1.0, ge=0, description="0: no clipping")
    lr_scheduler_type: Literal["linear", "cosine", "constant", "constant_with_warmup"] = "cosine"
    warmup_ratio: float = Field(0.03, ge=0, le=1)
    warmup_steps: int = Field(0, ge=0, description="above 0: takes the place of warmup_ratio")


class TrainConfig(Section):
    num_train_epochs: int = Field(1, ge=1)
    max_steps: int = Field(-1, ge=-1, description="-1: as many as the epochs have")
    per_device_train_batch_size: int = Field(8, ge=1, description="conversations in a micro-batch, at most")
    micro_batch_tokens: int | None = Field(None, ge=8, description="padded tokens in a micro-batch, at most; default: no limit but the count")
    gradient_accumulation_steps: int = Field(1, ge=1, description="with a fixed number of workers: global_batch / workers")
    global_batch: int | None = Field(None, ge=1, description="micro-batches in an optimizer step, over all workers")
    logging_steps: int = Field(10, ge=1)
    audit: bool = Field(False, description="write the ids of the consumed samples per step")


class EngineConfig(Section):
    name: Literal["zero"] = "zero"
    stage: Literal[0, 1, 2, 3] = 2
    offload_optimizer: Literal["none", "cpu"] = "none"
    offload_param: Literal["none", "cpu"] = "none"


class CheckpointConfig(Section):
    save_steps: int = Field(500, ge=0, description="0: only at the end and on stop")
    save_total_limit: int = Field(2, ge=1, description="newest checkpoints kept")
    keep_best: bool = Field(True, description="keep the checkpoint of the best evaluation as well")


class EvalConfig(Section):
    eval_epochs: int = Field(1, ge=0, description="evaluate after every so many epochs; 0: at the end only")
    max_samples: int | None = Field(None, ge=1)
    max_new_tokens: int = Field(16, ge=1)
    batch_size: int = Field(64, ge=1, description="questions decoded together")
    samples_in_report: int = Field(24, ge=0)


class ResourcesConfig(Section):
    num_workers: int | Annotated[tuple[int, int], Field(min_length=2, max_length=2)] = Field(1, description="a number, or [min, max] for elastic")
    use_gpu: Literal["auto", "yes", "no"] = "auto"
    cpus_per_worker: float = Field(1.0, ge=0)
    gpus_per_worker: float = Field(1.0, gt=0)
    max_failures: int = Field(3, ge=-1, description="restarts after a lost worker; -1: no limit")
    label_selector: dict[str, str] = Field(default_factory=dict)
    omp_num_threads: int = Field(1, ge=1)

    @property
    def workers(self) -> tuple[int, int]:
        return self.num_workers if isinstance(self.num_workers, tuple) else (self.num_workers, self.num_workers)


def _engine_shorthand(value: Any) -> Any:
    return {"name": value} if isinstance(value, str) else value


class RunConfig(Section):
    """A whole run. `name` identifies it: submitting the same name again resumes it."""

    name: str = Field("run", pattern=r"^[a-z0-9]([a-z0-9._-]{0,60}[a-z0-9])?$")
    storage: str = Field("runs", description="folder or URI under which runs live")
    seed: int = Field(0, ge=0)
    method: Literal["sft"] = "sft"
    model: ModelConfig = ModelConfig()
    lora: LoraConfig | None = None
    data: DataConfig = DataConfig()
    image: ImageConfig = ImageConfig()
    optimizer: OptimizerConfig = OptimizerConfig()
    train: TrainConfig = TrainConfig()
    engine: Annotated[EngineConfig, BeforeValidator(_engine_shorthand)] = EngineConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    evaluate: EvalConfig = EvalConfig()
    resources: ResourcesConfig = ResourcesConfig()

    @property
    def run_dir(self) -> str:
        return f"{self.storage.rstrip('/')}/{self.name}"

    @property
    def shards_dir(self) -> str:
        return self.data.shards or f"{self.storage.rstrip('/')}/shards"

    @property
    def global_batch(self) -> int:
        """Micro-batches in an optimizer step: the truth that does not change with the number of workers."""
        return self.train.global_batch or self.resources.workers[1] * self.train.gradient_accumulation_steps

    def fingerprint(self, *sections: str) -> str:
        """A hash of the named sections: equal means the same data, plan or model."""
        dumped = self.model_dump(mode="json", include=set(sections))
        return hashlib.blake2b(json.dumps(dumped, sort_keys=True).encode(), digest_size=8).hexdigest()


def load_config(path: str | None = None, overrides: Sequence[str] = (), base: dict[str, Any] | None = None) -> RunConfig:
    """Read a YAML file, lay dotted `key=value` overrides over it, and validate the whole.

    Raises ConfigError with one line per fault. Combinations are checked by `check_run`, which is called here.
    """
    record = dict(base or {})
    if path is not None:
        try:
            loaded = yaml.safe_load(Path(path).read_text(encoding="utf-8")) or {}
        except FileNotFoundError as error:
            raise ConfigError(f"config file {path} does not exist") from error
        except yaml.YAMLError as error:
            raise ConfigError(f"config file {path} is not valid YAML: {error}") from error
        if not isinstance(loaded, dict):
            raise ConfigError(f"config file {path} holds a {type(loaded).__name__}, expected keys and values")
        record |= loaded
    for override in overrides:
        _apply_override(record, override)
    try:
        config = RunConfig.model_validate(record)
    except ValidationError as error:
        raise ConfigError("\n".join(_explain(fault) for fault in error.errors())) from None
    check_run(config)
    return config


def check_run(config: RunConfig) -> None:
    """Refuse combinations that cannot work, all of them in one ConfigError."""
    model, engine, resources, faults = config.model, config.engine, config.resources, []
    quantised = model.load_in_4bit or model.load_in_8bit
    if model.load_in_4bit and model.load_in_8bit:
        faults.append("model.load_in_4bit and model.load_in_8bit are both true: choose one")
    if quantised and config.lora is None:
        faults.append("model.load_in_*bit = true with lora = null: quantised weights are not trained; set lora (nearest: lora={r: 8})")
    if quantised and config.lora is not None and model.train:
        faults.append(f"model.train = {list(model.train)} with quantised weights: they stay frozen; nearest: model.train=[]")
    if quantised and engine.stage == 3:
        faults.append("engine.stage = 3 with quantised weights: ZeRO-3 cannot shard them; allowed: 0, 1, 2; nearest: engine.stage=2")
    if engine.stage == 0 and model.dtype != "float32":
        faults.append(f"engine.stage = 0 with model.dtype = {model.dtype}: stage 0 keeps no fp32 masters; nearest: engine.stage=1")
    if engine.stage < 1 and engine.offload_optimizer == "cpu":
        faults.append("engine.offload_optimizer = cpu needs engine.stage 1, 2 or 3; nearest: engine.stage=1")
    if engine.stage < 3 and engine.offload_param == "cpu":
        faults.append(f"engine.offload_param = cpu needs engine.stage = 3, found {engine.stage}")
    if model.dtype == "float16" and resources.use_gpu == "no":
        faults.append("model.dtype = float16 with resources.use_gpu = no: there is no fp16 training on CPU; allowed: float32, bfloat16; nearest: bfloat16")
    if not model.train and config.lora is None:
        faults.append("model.train = [] with lora = null: nothing would be trained; name a group of vision, connector, text, or set lora")
    low, high = resources.workers
    if not 1 <= low <= high:
        faults.append(f"resources.num_workers = [{low}, {high}]: expected 1 <= min <= max")
    if low != high and config.train.global_batch is None:
        faults.append("resources.num_workers is elastic and train.global_batch is not set: say how many micro-batches a step has "
                      f"(nearest: train.global_batch={high * config.train.gradient_accumulation_steps})")  # fmt: skip
    fixed = high * config.train.gradient_accumulation_steps
    if config.train.global_batch is not None and config.train.gradient_accumulation_steps > 1 and config.train.global_batch != fixed:
        faults.append(f"train.global_batch = {config.train.global_batch} is not workers x gradient_accumulation_steps = {fixed}: set only one of the two")
    if config.train.micro_batch_tokens is not None and config.train.micro_batch_tokens < config.data.max_length:
        faults.append(f"train.micro_batch_tokens = {config.train.micro_batch_tokens} is below data.max_length = {config.data.max_length}: "
                      "one sequence must fit; nearest: equal")  # fmt: skip
    if faults:
        raise ConfigError("\n".join(faults))


def _apply_override(record: dict[str, Any], override: str) -> None:
    key, equals, text = override.partition("=")
    if not equals or not re.fullmatch(r"\w+(\.\w+)*", key):
        raise ConfigError(f"{override!r} is not an override: expected dotted.key=value, such as optimizer.learning_rate=1e-4")
    try:
        value = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise ConfigError(f"{key} = {text!r} is not a YAML value: {error}") from error
    *parents, last = key.split(".")
    for parent in parents:
        child = record.get(parent)
        record[parent] = child = dict(child) if isinstance(child, dict) else {}
        record = child
    record[last] = value


def _explain(fault: Any) -> str:
    """One line for a pydantic error: key, value, what is allowed, nearest valid choice."""
    location = [str(part) for part in fault["loc"] if not str(part).startswith(("tuple[", "int", "constrained"))] or ["config"]
    key = ".".join(location)
    if fault["type"] == "extra_forbidden":
        allowed = _fields_at(location[:-1])
        near = difflib.get_close_matches(location[-1], allowed, n=1, cutoff=0.5) or _elsewhere(location[-1])
        hint = f"; did you mean {'.'.join([*location[:-1], near[0]]) if near[0] in allowed else near[0]}?" if near else ""
        return f"{key} is not a setting; allowed here: {', '.join(sorted(allowed))}{hint}"
    value, message = fault.get("input"), fault["msg"]
    context = fault.get("ctx") or {}
    hint = ""
    if fault["type"] == "literal_error":
        choices = re.findall(r"'([^']*)'", context.get("expected", "")) or re.split(r", | or ", context.get("expected", ""))
        near = difflib.get_close_matches(str(value), choices, n=1, cutoff=0.3)
        hint = f"; nearest: {near[0]}" if near else ""
    for bound in ("ge", "le", "gt", "lt"):
        if bound in context:
            hint = f"; nearest: {context[bound]}" if bound in ("ge", "le") else f"; must be {'above' if bound == 'gt' else 'below'} {context[bound]}"
    return f"{key} = {value!r}: {message[0].lower()}{message[1:]}{hint}"


def _fields_at(location: Sequence[str]) -> list[str]:
    section: type[BaseModel] = RunConfig
    for part in location:
        annotation = section.model_fields[part].annotation
        options = [a for a in (annotation, *getattr(annotation, "__args__", ())) if isinstance(a, type) and issubclass(a, BaseModel)]
        if not options:
            return []
        section = options[0]
    return list(section.model_fields)


def _elsewhere(name: str) -> list[str]:
    """Where the setting `name` (or one spelt nearly so) stands, if another section holds it."""
    places = {field: f"{section}.{field}" for section in RunConfig.model_fields for field in _fields_at([section])}
    return [places[n] for n in difflib.get_close_matches(name, places, n=1, cutoff=0.7)]
