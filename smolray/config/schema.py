"""One run as frozen models: a YAML file plus dotted overrides in, one validated RunConfig out.

Every wrong key, value or combination is named in a single ConfigError. Settings carry the names of TRL / transformers
where they have one.
"""

from collections.abc import Mapping
from typing import Annotated, Any, Literal, Self

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    ValidationError,
    ValidationInfo,
    field_validator,
)

from smolray.config.errors import ConfigError, explain


class Section(BaseModel):
    """Base of all settings: frozen, checked, no unknown keys."""

    model_config = ConfigDict(frozen=True, extra="forbid", validate_default=True, allow_inf_nan=False)

    def replace(self, settings: Mapping[str, Any]) -> Self:
        """A copy with other values for some dotted keys, such as `{"engine.stage": 3, "lora": None}`.

        Each value is checked against its type and limits; `check_run` checks how they go together. A section that is
        null, such as `lora`, is created when one of its keys is set. Raises ConfigError.
        """
        record: dict[str, Any] = dict(self)
        for key, value in settings.items():
            *parents, last = key.split(".")
            section = record
            for name in parents:
                below = section.get(name)
                section[name] = dict(below) if isinstance(below, BaseModel | dict) else {}
                section = section[name]
            section[last] = value

        try:
            return self.model_validate(record)
        except ValidationError as error:
            raise ConfigError(explain(type(self), error)) from None

    @field_validator("*", mode="before")
    @classmethod
    def _true_is_no_number(cls, value: Any, info: ValidationInfo) -> Any:
        """Python takes true for 1, YAML takes yes for true: neither is what was meant."""
        annotation = cls.model_fields[info.field_name or ""].annotation
        if not isinstance(value, bool) or annotation is bool or bool in getattr(annotation, "__args__", ()):
            return value
        if {"yes", "no"} <= set(getattr(annotation, "__args__", ())):
            return "yes" if value else "no"
        raise ValueError("true and false are not allowed here")


class SearchConfig(Section):
    space: dict[str, dict[str, Any]] = Field(
        default_factory=dict,
        description="dotted key of the run -> {loguniform | uniform | int: [low, high]} or {choice | grid: [values]}; default: the published recipe's ranges",
    )
    num_samples: int = Field(default=12, ge=1, description="trials; with grid keys: times each combination")
    algorithm: Literal["random", "grid", "optuna"] = Field(
        default="optuna", description="grid: every combination of choice and grid keys"
    )
    scheduler: Literal["none", "asha", "hyperband", "pbt"] = Field(
        default="asha",
        description="asha: stop the worse early; hyperband: asha with several first rungs; pbt: the worse take over the weights of the better",
    )
    metric: Literal["accuracy", "loss"] = Field(
        default="accuracy",
        description="at the checkpoints. accuracy: what the best checkpoint of a run is chosen by; "
        "loss: of the validation answers, without data.validation (and for dpo) of the training steps since the checkpoint before",
    )
    second_objective: Literal["memory", "seconds"] | None = Field(
        default=None, description="optuna: accuracy or loss against peak memory or training time"
    )
    grace_period: int = Field(
        default=1,
        ge=1,
        description="reports (epochs, unless evaluate.eval_epochs says otherwise) before a trial may be stopped",
    )
    reduction_factor: float = Field(
        default=3.0, gt=1, description="asha, hyperband: one of so many goes on from each rung"
    )
    perturbation_interval: int = Field(default=1, ge=1, description="pbt: reports between two looks at who is better")
    max_concurrent: int | None = Field(
        default=None, ge=1, description="trials at a time; default: as many as the cluster holds"
    )
    train_best: bool = Field(default=False, description="train with best.yaml when the search is over")


Group = Literal["vision", "connector", "text"]
PIPELINE_ACCUMULATION = 4  # with fewer micro-batches a stage, filling and emptying a pipeline takes most of a step
DType = Literal["float32", "bfloat16", "float16"]


class ModelConfig(Section):
    path: str = Field(
        default="HuggingFaceTB/SmolVLM-256M-Instruct",
        description="hub id, folder, or tiny | random-256m | random-500m | random-2.2b",
    )
    revision: str | None = Field(default=None, description="branch, tag or commit of a hub id")
    dtype: DType = Field(default="bfloat16", description="compute type; optimizer states and master weights stay fp32")
    attn_implementation: Literal["sdpa"] = "sdpa"  # eager attention adds a boolean mask instead of applying it
    gradient_checkpointing: bool | Annotated[int, Field(ge=1)] = Field(
        default=False,
        description="true: every layer (the text model's last, whose MLP runs for trained tokens only, keeps what is left of it); "
        "a number: so many layers of the vision tower and of the text model each",
    )
    vision_features: Literal["compute", "precompute"] = Field(
        default="compute",
        description="precompute: the output of a frozen vision tower is written beside the shards once and read in place of images",
    )
    load_in_4bit: bool = Field(default=False, description="nf4 with double quantisation (bitsandbytes)")
    load_in_8bit: bool = Field(default=False, description="int8 (bitsandbytes)")
    train: tuple[Group, ...] = Field(
        default=("vision", "connector", "text"), description="groups trained in full; with lora: in addition to it"
    )


class LoraConfig(Section):
    """Names as in peft.LoraConfig; `groups` limits `target_modules` to the part of the model that is meant."""

    r: int = Field(default=8, ge=1)
    ranks: dict[Group, Annotated[int, Field(ge=1)]] = Field(
        default_factory=dict, description="rank of a group, where it is not `r`"
    )
    use_dora: bool = False
    use_rslora: bool = False
    lora_alpha: float = Field(default=8, gt=0)
    lora_dropout: float = Field(default=0.0, ge=0, lt=1)
    groups: tuple[Group, ...] = Field(default=("text",), min_length=1)
    target_modules: tuple[str, ...] = (
        "q_proj",
        "k_proj",
        "v_proj",
        "o_proj",
        "gate_proj",
        "up_proj",
        "down_proj",
        "out_proj",
        "fc1",
        "fc2",
        "proj",
    )
    init_lora_weights: Literal["default", "gaussian"] = "default"


class ColumnsConfig(Section):
    """Column names of the source; empty means: recognise the usual ones."""

    image: str = ""
    question: str = ""
    answer: str = ""
    type: str = Field(default="", description="column with the question type, for tables by type")
    id: str = ""


class DataConfig(Section):
    train: str = Field(default="", description="raw data or prepared shards: a path, URI or hub data set id")
    validation: str = ""
    shards: str = Field(default="", description="where prepared shards are kept; default: <storage>/shards")
    format: Literal["auto", "parquet", "webdataset", "jsonl", "hub"] = "auto"
    columns: ColumnsConfig = ColumnsConfig()
    prompt: str = Field(
        default="", description="instruction put before a question, or the whole question for caption data"
    )
    split: str = Field(default="", description="split of a hub data set")
    revision: str | None = None
    max_bad_fraction: float = Field(
        default=0.01, ge=0, le=1, description="share of quarantined rows above which prepare stops"
    )
    max_image_pixels: int = Field(
        default=50_000_000, ge=1, description="larger images are refused as decompression bombs"
    )
    shard_bytes: int = Field(default=64 * 2**20, ge=2**16)
    max_length: int = Field(default=2048, ge=8, description="longest packed sequence in tokens")
    overlong: Literal["drop", "truncate_text", "error"] = "drop"
    packing: Literal["none", "image", "full"] = Field(
        default="full",
        description="image: all questions about one image share its tokens, exactly; full: and sequences lie end to end, without padding",
    )
    max_questions_per_image: int = Field(default=16, ge=1)
    num_cpus_per_task: float = Field(default=0.25, gt=0)
    prefetch_batches: int = Field(default=4, ge=0)


class ImageConfig(Section):
    longest_edge: int | None = Field(default=None, ge=1, description="default: the processor's")
    max_tiles: int | None = Field(
        default=None, ge=1, description="upper limit of tiles an image, the global one included"
    )
    upscale: bool = Field(
        default=False, description="true: enlarge small images to longest_edge first, as the stock processor does"
    )


class OptimizerConfig(Section):
    name: Literal["adamw", "adamw_8bit", "paged_adamw_8bit"] = Field(
        default="adamw", description="*_8bit: bitsandbytes"
    )
    learning_rate: float = Field(default=1e-4, ge=0)
    learning_rates: dict[Group, Annotated[float, Field(gt=0)]] = Field(
        default_factory=dict, description="learning rate of a group, where it is not `learning_rate`"
    )
    weight_decay: float = Field(default=0.0, ge=0)
    adam_beta1: float = Field(default=0.9, ge=0, lt=1)
    adam_beta2: float = Field(default=0.999, ge=0, lt=1)
    adam_epsilon: float = Field(default=1e-8, gt=0)
    max_grad_norm: float = Field(default=1.0, ge=0, description="0: no clipping")
    lr_scheduler_type: Literal[
        "linear",
        "cosine",
        "cosine_with_restarts",
        "polynomial",
        "constant",
        "constant_with_warmup",
        "inverse_sqrt",
        "cosine_with_min_lr",
        "warmup_stable_decay",
    ] = "cosine"
    lr_scheduler_kwargs: dict[str, Annotated[int | float | str, Field(union_mode="left_to_right")]] = Field(
        default_factory=dict, description="as transformers.get_scheduler takes them"
    )
    warmup_ratio: float = Field(default=0.03, ge=0, le=1)
    warmup_steps: int = Field(default=0, ge=0, description="above 0: takes the place of warmup_ratio")


class TrainConfig(Section):
    num_train_epochs: int = Field(default=1, ge=1)
    max_steps: int = Field(default=-1, ge=-1, description="-1: as many as the epochs have")
    per_device_train_batch_size: int = Field(default=8, ge=1, description="conversations in a micro-batch, at most")
    micro_batch_tokens: int | None = Field(
        default=None, ge=8, description="padded tokens in a micro-batch, at most; default: no limit but the count"
    )
    gradient_accumulation_steps: int = Field(
        default=1, ge=1, description="with a fixed number of workers: global_batch / workers"
    )
    global_batch: int | None = Field(
        default=None,
        ge=1,
        description="micro-batches in an optimizer step, over all workers; default: workers x accumulation, 4 a worker for a pipeline",
    )
    load_balancing: Literal["auto", "speed", "equal"] = Field(
        default="auto",
        description="ZeRO 0-2: speed: micro-batches are dealt by the speed that workers have in the first steps; auto: where their cards differ",
    )
    logging_steps: int = Field(default=10, ge=1)
    audit: bool = Field(default=False, description="write the ids of the consumed samples per step")


class DPOConfig(Section):
    """Names and defaults as in trl.DPOConfig; `reference` says where the reference model's log-probabilities come from."""

    beta: float = Field(default=0.1, gt=0)
    loss_type: tuple[Literal["sigmoid", "ipo", "hinge", "robust", "sft"], ...] = Field(
        default=("sigmoid",), min_length=1
    )
    loss_weights: tuple[float, ...] | None = Field(default=None, description="one for each loss_type; default: 1 each")
    label_smoothing: float = Field(
        default=0.0, ge=0, lt=0.5, description="robust: probability that a pair is the wrong way round"
    )
    reference: Literal["auto", "adapter", "copy", "precompute"] = Field(
        default="auto",
        description="adapter: LoRA switched off; copy: a frozen copy; precompute: once, beside the shards; auto: adapter, else copy",
    )


class RetrievalConfig(Section):
    """Contrastive training of image search by text."""

    temperature: float = Field(
        default=0.05, gt=0, description="divides the cosine similarities; smaller: the hardest negatives count for more"
    )


class EngineConfig(Section):
    name: Literal["zero", "pipeline", "trl", "auto"] = Field(
        default="zero",
        description="trl: TRL's own trainers over the same shards; not elastic, no packing, an interrupted run begins again; "
        "auto: the planner chooses, on at most resources.num_workers",
    )
    stage: Literal[0, 1, 2, 3] = Field(default=2, description="of ZeRO")
    pipeline_stages: int | None = Field(
        default=None, ge=1, description="pipeline: stages; default: one for each worker"
    )
    partition: tuple[Annotated[int, Field(ge=1)], ...] | None = Field(
        default=None, description="pipeline: units in each stage; default: even by cost"
    )
    gpus: tuple[str, ...] | None = Field(
        default=None,
        description="pipeline: node address and card of each stage, pipeline after pipeline, as the log's inventory names them; auto sets it",
    )
    schedule: Literal["interleaved_1f1b", "gpipe"] = Field(
        default="interleaved_1f1b",
        description="zero-bubble schedules are not offered: they lose the gradients of a stage whose input needs none",
    )
    offload_optimizer: Literal["none", "cpu"] = "none"
    offload_param: Literal["none", "cpu"] = "none"


class CheckpointConfig(Section):
    save_steps: int = Field(default=500, ge=0, description="0: only at the end and on stop")
    save_total_limit: int = Field(default=2, ge=1, description="newest checkpoints kept")
    keep_best: bool = Field(default=True, description="keep the checkpoint of the best evaluation as well")


Metric = Literal["exact_match", "vqa_accuracy", "anls", "relaxed_accuracy", "bleu", "rouge_l", "cider"]


class EvalConfig(Section):
    eval_epochs: int = Field(default=1, ge=0, description="evaluate after every so many epochs; 0: at the end only")
    max_samples: int | None = Field(default=None, ge=1)
    metrics: tuple[Metric, ...] = Field(
        default=("exact_match",), description="figures to compute, each with its interval"
    )
    loss: bool = Field(
        default=False, description="sft: also the mean loss of the validation answers, at each evaluated checkpoint"
    )
    max_new_tokens: int = Field(default=16, ge=1)
    batch_size: int = Field(default=64, ge=1, description="questions decoded together")
    samples_in_report: int = Field(default=24, ge=0)


class ResourcesConfig(Section):
    num_workers: int | Annotated[tuple[int, int], Field(min_length=2, max_length=2)] = Field(
        default=1, description="a number, or [min, max] for elastic"
    )
    use_gpu: Literal["auto", "yes", "no"] = "auto"
    cpus_per_worker: float = Field(default=1.0, ge=0)
    gpus_per_worker: float = Field(default=1.0, gt=0)
    max_failures: int = Field(default=3, ge=-1, description="restarts after a lost worker; -1: no limit")
    label_selector: dict[str, str] = Field(default_factory=dict)
    omp_num_threads: int = Field(default=1, ge=1)

    @property
    def workers(self) -> tuple[int, int]:
        return self.num_workers if isinstance(self.num_workers, tuple) else (self.num_workers, self.num_workers)


# Earlier names of keys, which old files and habits still write.
RENAMED = {"train.deal": "train.load_balancing", "engine.cut": "engine.partition", "engine.cards": "engine.gpus"}
# Sections that may be written as one word, and the key that the word stands for: `engine: zero` is `engine: {name:
# zero}`.
SHORTHANDS = {"engine": "name"}


def _engine_shorthand(value: Any) -> Any:
    return {SHORTHANDS["engine"]: value} if isinstance(value, str) else value


class RunConfig(Section):
    """A whole run. `name` identifies it: submitting the same name again resumes it."""

    name: str = Field(default="run", pattern=r"^[a-z0-9]([a-z0-9._-]{0,60}[a-z0-9])?$")
    storage: str = Field(default="runs", description="folder or URI under which runs live")
    seed: int = Field(default=0, ge=0)
    method: Literal["sft", "dpo", "retrieval"] = Field(
        default="sft", description="retrieval: images beside their captions, for `smolray search`"
    )
    model: ModelConfig = ModelConfig()
    lora: LoraConfig | None = None
    data: DataConfig = DataConfig()
    image: ImageConfig = ImageConfig()
    optimizer: OptimizerConfig = OptimizerConfig()
    train: TrainConfig = TrainConfig()
    dpo: DPOConfig = DPOConfig()
    retrieval: RetrievalConfig = RetrievalConfig()
    engine: Annotated[EngineConfig, BeforeValidator(_engine_shorthand)] = EngineConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    evaluate: EvalConfig = EvalConfig()
    resources: ResourcesConfig = ResourcesConfig()
    search: SearchConfig | None = Field(
        default=None, description="hyperparameters to search for with `smolray tune`; left aside by `smolray train`"
    )

    @property
    def run_dir(self) -> str:
        return f"{self.storage.rstrip('/')}/{self.name}"

    @property
    def shards_dir(self) -> str:
        return self.data.shards or f"{self.storage.rstrip('/')}/shards"

    @property
    def global_batch(self) -> int:
        """Micro-batches in an optimizer step: the truth that does not change with the number of workers."""
        accumulation = self.train.gradient_accumulation_steps
        if self.engine.name == "pipeline" and accumulation == 1:
            accumulation = PIPELINE_ACCUMULATION
        return self.train.global_batch or self.resources.workers[1] * accumulation
