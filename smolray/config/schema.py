"""Every setting of a run, with its type, default and meaning, as frozen models.

Settings have the names of TRL and transformers where these have one. `python -m smolray.config.docs` writes the
settings into README.md.
"""

from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field

from smolray.config.data import DataConfig
from smolray.config.lora import LoraConfig
from smolray.config.methods import (
    METHODS,
    DPOConfig,
    MethodName,
    MethodTraits,
    ReferenceModel,
    RetrievalConfig,
    SimPOConfig,
)
from smolray.config.metrics import METRICS, MetricName
from smolray.config.optimizer import ModelGroup, OptimizerConfig
from smolray.config.search import SearchConfig
from smolray.config.section import Section

PIPELINE_ACCUMULATION = 4  # with fewer micro-batches a stage, filling and emptying a pipeline takes most of a step
DType = Literal["float32", "bfloat16", "float16"]


class ModelConfig(Section):
    """The pretrained model, its precision and which of its parts are trained."""

    path: str = "HuggingFaceTB/SmolVLM-256M-Instruct"
    """hub id, folder or URI; `tiny`, `random-256m`, `random-500m` and `random-2.2b` have random weights and need no
    hub"""
    revision: str | None = None
    """branch, tag or commit of a hub id"""
    dtype: DType = "bfloat16"
    """compute type; float16 needs CUDA and scales the loss; optimizer states and master weights stay fp32"""
    # Eager attention adds a boolean mask instead of applying it.
    attn_implementation: Literal["sdpa"] = "sdpa"
    """the only supported implementation"""
    cudnn_attention: bool = False
    """true: torch may take cuDNN's attention in 16 bit, as it would on an H100. It plans each shape anew, and each
    decoded token is another shape; false: its flash and memory-efficient kernels"""
    compile: bool = False
    """true: torch.compile of every layer of the vision tower and of the text model, around attention, while training:
    one compilation for all layers of a kind and all lengths, in the first steps (minutes); on a CPU it needs g++. The
    losses stay the same, but dropout draws other numbers. Not on ZeRO-3, nor with load_in_8bit. Plans are without it.
    Nothing has run on a GPU yet: off until `make gpu` has shown what it saves"""
    use_liger_kernel: bool = False
    """true: Liger's Triton kernels (`pip install 'smolray[liger]'`, a CUDA GPU) for RMSNorm, SwiGLU, rotary embedding
    and the loss of the head, whose logits then never exist together; gradients and losses are ours to 1e-5 in fp32.
    With compile: the loss alone, as Inductor fuses the rest. Not on ZeRO-3. The loss makes the host wait twice in each
    micro-batch, and pays for long answers. Plans are without it: layers keep less than is planned, and a trained head
    takes 6 bytes more of each of its weights. Nothing has run on a GPU yet"""
    gradient_checkpointing: bool | Annotated[int, Field(ge=1)] = False
    """true: recompute the activations of every layer in the backward pass (the text model's last layer, whose MLP runs
    for trained tokens only, keeps the activations that are left); a number: only of that many layers of the vision
    tower and that many of the text model"""
    vision_features: Literal["auto", "compute", "precompute"] = "auto"
    """precompute: write the output of a frozen vision tower to sidecar files of the shards once, and read it in place
    of the images; compute: in every pass; auto: once, where the passes ahead save more than a third of the vision
    tower's work and a local disk has twice the room (in a bucket: only where the files stand already)"""
    load_in_4bit: bool = False
    """QLoRA: nf4 weights with double quantisation (bitsandbytes); merged into 16-bit weights only"""
    load_in_8bit: bool = False
    """QLoRA: int8 weights (bitsandbytes); merged into 16-bit weights only"""
    llm_int8_threshold: float = Field(default=6.0, ge=0)
    """load_in_8bit: inputs beyond it are multiplied in 16 bit; 0: none are, which is faster (in each linear layer the
    GPU is waited for to find them) and less exact"""
    train: tuple[ModelGroup, ...] = ("vision", "connector", "text")
    """parts of the model that are trained in full; with lora: in addition to the adapters"""


class ImageConfig(Section):
    """How images are scaled and cut into tiles."""

    longest_edge: int | None = Field(default=None, ge=1, le=2**16)
    """images are scaled so that their longest edge has this many pixels; default: the processor's"""
    max_tiles: int | None = Field(default=None, ge=1)
    """most tiles of an image, its global view included; default: the processor's"""
    upscale: bool = False
    """true: enlarge small images to longest_edge first, as the stock processor does; without max_tiles, stock calls of
    an export then make the tiles of training"""


class TrainConfig(Section):
    """How long a run is and how large its steps are."""

    num_train_epochs: int = Field(default=1, ge=1)
    """passes over the training data; max_steps overrides it"""
    max_steps: int = Field(default=-1, ge=-1)
    """above 0: train this many optimizer steps, however many passes that takes"""
    per_device_train_batch_size: int = Field(default=8, ge=1)
    """most conversations in a micro-batch"""
    micro_batch_tokens: int | None = Field(default=None, ge=8)
    """most tokens in a micro-batch, padding included; default: only the count limits it"""
    gradient_accumulation_steps: int = Field(default=1, ge=1)
    """micro-batches in an optimizer step per worker; with a fixed number of workers: global_batch / workers. In 16 bit
    the gradients of several are added in fp32: 2 bytes more for each trained parameter, 4 on ZeRO-3"""
    global_batch: int | None = Field(default=None, ge=1)
    """micro-batches in an optimizer step over all workers; a run keeps it when the number of workers changes; default:
    workers x accumulation, and 4 per worker for a pipeline"""
    load_balancing: Literal["auto", "speed", "equal"] = "auto"
    """ZeRO 0-2: how micro-batches are assigned; speed: by the speed of each worker in the first steps; equal: the same
    number each; auto: speed where the GPUs differ"""
    neftune_noise_alpha: float | None = Field(default=None, gt=0)
    """NEFTune, as in transformers: uniform noise up to alpha / sqrt(tokens of the sequence x hidden size) on the
    embeddings of the text, in training alone; its paper suggests 5 to 15. Padding does not count as tokens"""
    logging_steps: int = Field(default=10, ge=1)
    """steps between two lines of progress"""
    logging_first_step: bool = False
    """a line of progress of the first step as well"""
    audit: bool = False
    """write the ids of the samples of each step"""


class EngineConfig(Section):
    """How the workers share the model."""

    name: Literal["zero", "pipeline", "trl", "auto"] = "zero"
    """zero: DeepSpeed ZeRO; pipeline: the model's layers over the workers; auto: the planner chooses, with at most
    resources.num_workers GPUs; trl: TRL's own trainers over the same shards (not elastic, no packing, no exactly-once,
    an interrupted run begins again)"""
    stage: Literal["auto", 0, 1, 2, 3] = "auto"
    """DeepSpeed ZeRO stage; 0: replicated with fp32 master weights, not with float16; auto: 0 on one worker, where
    there is nothing to shard, otherwise 2 (also with float16, offload_optimizer or engine=trl)"""
    pipeline_stages: int | None = Field(default=None, ge=1)
    """pipeline: number of stages; default: one for each worker"""
    partition: tuple[Annotated[int, Field(ge=1)], ...] | None = None
    """pipeline: number of layers in each stage; default: even by cost"""
    gpus: tuple[str, ...] | None = None
    """pipeline: node address and GPU of each stage, one pipeline after the other, as the inventory in the log names
    them; set by auto"""
    schedule: Literal["interleaved_1f1b", "gpipe"] = "interleaved_1f1b"
    """pipeline: order of forward and backward passes. Zero-bubble schedules are not offered: they lose the gradients of
    a stage whose input needs none"""
    offload_optimizer: Literal["none", "cpu"] = "none"
    """cpu: keep optimizer states in CPU memory (ZeRO 1-3)"""
    offload_param: Literal["none", "cpu"] = "none"
    """cpu: keep parameters in CPU memory (ZeRO 3)"""


class CheckpointConfig(Section):
    """When a run is saved, and which checkpoints are kept."""

    save_steps: int = Field(default=500, ge=0)
    """steps between two checkpoints; also saved at the end of an epoch, at the end and on stop; 0: only at the end and
    on stop"""
    save_total_limit: int = Field(default=2, ge=1)
    """newest checkpoints kept"""
    keep_best: bool = True
    """keep the checkpoint of the best evaluation as well"""


class EvalConfig(Section):
    """When and how the validation questions are answered and scored."""

    eval_epochs: int = Field(default=1, ge=0)
    """epochs between two evaluations; 0: only at the end"""
    eval_steps: int = Field(default=0, ge=0)
    """above 0: also evaluated every so many steps, and saved there, so that the best checkpoint is one that was
    evaluated (transformers: eval_strategy=steps, load_best_model_at_end; see checkpoint.keep_best)"""
    early_stopping_patience: int | None = Field(default=None, ge=1)
    """the run finishes after this many evaluations in a row that are not better than the best before them, by what
    chooses the best checkpoint: the method's own metric, else the first of metrics"""
    early_stopping_threshold: float = Field(default=0.0, ge=0)
    """by how much an evaluation must be better to count as better"""
    max_samples: int | None = Field(default=None, ge=1)
    """evaluate only the first of the validation questions; default: all"""
    metrics: tuple[MetricName, ...] = Field(
        default=("exact_match",),
        description="computed from the answers, each with a bootstrap 95 % interval. "
        + "; ".join(f"{name}: {traits.summary}" for name, traits in METRICS.items())
        + ". `pip install 'smolray[eval]'` for anls, bleu, rouge_l and cider",
    )
    loss: bool = False
    """sft: also the mean loss of the validation answers, at each evaluated checkpoint"""
    max_new_tokens: int = Field(default=16, ge=1)
    """longest generated answer in tokens"""
    batch_size: int = Field(default=64, ge=1)
    """questions decoded together, at most: on a GPU as many as its free memory holds"""
    samples_in_report: int = Field(default=24, ge=0)
    """validation questions shown in report.html"""


class ResourcesConfig(Section):
    """Workers, and what each takes from the cluster. A run that cannot start is refused at once."""

    num_workers: Literal["auto"] | int | Annotated[tuple[int, int], Field(min_length=2, max_length=2)] = "auto"
    """a number, or [min, max] for elastic; auto: all GPUs that are there, one worker where there is none"""
    use_gpu: Literal["auto", "yes", "no"] = "auto"
    """auto: where the cluster has GPUs"""
    cpus_per_worker: float = Field(default=1.0, ge=0)
    """CPUs that Ray reserves for each worker; leave some for the data tasks (data.num_cpus_per_task each)"""
    gpus_per_worker: float = Field(default=1.0, gt=0)
    """GPUs that Ray reserves for each worker"""
    max_failures: int = Field(default=3, ge=-1)
    """restarts after a lost worker; -1: no limit"""
    label_selector: dict[str, str] = Field(default_factory=dict)
    """Ray node labels that a worker's node must have"""
    omp_num_threads: int = Field(default=1, ge=1, le=1024)
    """threads of each worker on the CPU"""
    queue: bool = False
    """whether the run stands in line before its workers start: the queue of `storage`, which `smolray queue` shows"""
    priority: int = 0
    """in the queue: higher ones first; among equal ones users take turns"""
    user: str = ""
    """in the queue: whose run it is; `smolray submit` fills in who calls it, else it is who starts the driver"""
    uv: bool = False
    """whether Ray installs smolray's packages for a submitted run, with uv: for nodes that have Ray alone"""

    @property
    def workers(self) -> tuple[int, int]:
        """(min, max). `auto` is one worker until the launch has counted the GPUs (launch/resolve.py)."""
        if isinstance(self.num_workers, tuple):
            return self.num_workers
        number = 1 if self.num_workers == "auto" else self.num_workers
        return number, number


# Earlier names of keys. Files that use them still work.
RENAMED = {"train.deal": "train.load_balancing", "engine.cut": "engine.partition", "engine.cards": "engine.gpus"}
# Names of TRL's settings that are taken in their place, at the top of a file and on the command line.
ALIASES = {
    "model_name_or_path": "model.path",
    "dataset_name": "data.train",
    "output_dir": "storage",
    "run_name": "name",
    "max_length": "data.max_length",
    "max_seq_length": "data.max_length",
}
# Sections that may be written as one word, and the key of that word: `engine: zero` is `engine: {name: zero}`.
SHORTHANDS = {"engine": "name"}


TrackerName = Literal["tensorboard", "wandb", "mlflow", "trackio", "swanlab"]


def _names(value: Any) -> Any:
    """One name in place of a list, and `none`: `report_to: wandb`, as transformers reads it."""
    return () if value in ("none", None) else (value,) if isinstance(value, str) else value


def _engine_shorthand(value: Any) -> Any:
    return {SHORTHANDS["engine"]: value} if isinstance(value, str) else value


class RunConfig(Section):
    """A whole run. `name` identifies it: submitting the same name again resumes it."""

    name: str = Field(default="run", pattern=r"^[a-z0-9]([a-z0-9._-]{0,60}[a-z0-9])?$")
    """identifies the run: submitting the same name again resumes it"""
    storage: str = "runs"
    """folder or URI (s3://, gs://) that holds the runs; on several nodes all of them must reach it"""
    seed: int = Field(default=0, ge=0, le=2**32 - 1)
    """seed of the shuffle, of the initial weights of adapters and of dropout"""
    method: MethodName = Field(
        default="sft", description="; ".join(f"{name}: {traits.summary}" for name, traits in METHODS.items())
    )
    report_to: Annotated[tuple[TrackerName, ...], BeforeValidator(_names)] = ()
    """trackers that follow the run live and are continued by a resume: `pip install 'smolray[wandb]'`. Each reads its
    own environment variables (WANDB_PROJECT, MLFLOW_TRACKING_URI, TRACKIO_PROJECT, SWANLAB_PROJECT,
    TENSORBOARD_LOGGING_DIR, …), in the process that launches the run. A tracker that fails or hangs does not stop it"""
    callbacks: tuple[Annotated[str, Field(pattern=r"^[\w.]+:\w+$")], ...] = ()
    """classes of your own that follow the run, as `my_module:MyCallback`, with any of the methods on_start, on_step,
    on_evaluate, on_checkpoint and on_end; each gets an event of the log (smolray/tracking/callbacks.py)"""
    notify: Annotated[tuple[str, ...], BeforeValidator(_names)] = ()
    """addresses of Apprise (`pip install 'smolray[notify]'`) that are told when the run has finished, failed, stalled
    or lost workers, such as ntfy://$TOPIC or $MAIL; `$NAME` is taken from the environment: secrets belong there"""
    group: str = ""
    """name under which trackers show several runs together; the trials of a search: default its name"""
    model: ModelConfig = ModelConfig()
    lora: LoraConfig | None = None
    data: DataConfig = DataConfig()
    image: ImageConfig = ImageConfig()
    optimizer: OptimizerConfig = OptimizerConfig()
    train: TrainConfig = TrainConfig()
    dpo: DPOConfig = DPOConfig()
    simpo: SimPOConfig = SimPOConfig()
    retrieval: RetrievalConfig = RetrievalConfig()
    engine: Annotated[EngineConfig, BeforeValidator(_engine_shorthand)] = EngineConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    evaluate: EvalConfig = EvalConfig()
    resources: ResourcesConfig = ResourcesConfig()
    search: SearchConfig | None = None

    @property
    def traits(self) -> MethodTraits:
        """What the code must know of the run's method."""
        return METHODS[self.method]

    @property
    def trained_groups(self) -> set[ModelGroup]:
        """The parts of the model in which something is trained, whole or by adapters."""
        return {*self.model.train, *(self.lora.trained if self.lora else ())}

    @property
    def adapters_alone(self) -> bool:
        """Whether nothing is trained but LoRA's adapters."""
        return self.lora is not None and not self.model.train and not self.lora.modules_to_save

    @property
    def zero_stage(self) -> int:
        """`engine.stage`, with `auto` resolved."""
        engine = self.engine
        if engine.stage != "auto":
            return engine.stage
        sharded = engine.name == "trl" or self.model.dtype == "float16" or engine.offload_optimizer == "cpu"
        return 0 if self.resources.workers == (1, 1) and not sharded else 2

    @property
    def reference_model(self) -> ReferenceModel:
        """Where the log-probabilities of the method's reference model come from; none: it has no such model."""
        return self.traits.reference_model(self)

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
