"""Combinations of settings that cannot work.

Each is refused before anything starts, in one line that names the key, the value, the reason and the nearest choice
that works.

In: a RunConfig whose single values are valid. Out: the lines.
"""

from collections.abc import Iterator

from smolray.config.lora import LoraConfig
from smolray.config.schema import RunConfig

# What transformers.get_scheduler takes besides warmup and length.
SCHEDULER_KWARGS = {
    "cosine": {"num_cycles"},
    "cosine_with_restarts": {"num_cycles"},
    "polynomial": {"lr_end", "power"},
    "inverse_sqrt": {"timescale"},
    "cosine_with_min_lr": {"num_cycles", "min_lr", "min_lr_rate"},
    "warmup_stable_decay": {
        "num_decay_steps",
        "num_stable_steps",
        "warmup_type",
        "decay_type",
        "min_lr_ratio",
        "num_cycles",
    },
}


def faults(config: RunConfig) -> list[str]:
    """One line for each combination that cannot work; empty: the run may start."""
    return [
        *_model(config),
        *_kernels(config),
        *_data(config),
        *_optimizer(config),
        *_evaluation(config),
        *_scheduler(config),
        *config.traits.rules(config),
        *_zero(config),
        *_engine(config),
        *_trl(config),
        *_workers(config),
        *_batch(config),
    ]


def _model(config: RunConfig) -> Iterator[str]:
    model, lora = config.model, config.lora
    quantised = model.load_in_4bit or model.load_in_8bit
    if model.load_in_4bit and model.load_in_8bit:
        yield "model.load_in_4bit and model.load_in_8bit are both true: choose one"
    if quantised and lora is None:
        yield (
            "model.load_in_*bit = true with lora = null: quantised weights are not trained; set lora "
            "(nearest: lora={r: 8})"
        )
    if quantised and lora is not None and model.train:
        yield f"model.train = {list(model.train)} with quantised weights: they stay frozen; nearest: model.train=[]"

    if not model.train and lora is None:
        yield (
            "model.train = [] with lora = null: nothing would be trained; name a part of vision, connector, text, "
            "or set lora"
        )
    if lora is not None and (stray := set(lora.ranks) - set(lora.groups)):
        yield (
            f"lora.ranks names {sorted(stray)}, lora.groups = {list(lora.groups)} has no adapters there; "
            "name the groups in both"
        )

    if lora is not None:
        yield from _adapters(config, lora)
    if model.vision_features == "precompute" and "vision" in config.trained_groups:
        others = ",".join(group for group in model.train if group != "vision")
        yield (
            "model.vision_features = precompute with a trained vision tower: its features change every step; "
            f"nearest: model.train=[{others}]"
        )


def _kernels(config: RunConfig) -> Iterator[str]:
    model, engine = config.model, config.engine
    for name in ("compile", "use_liger_kernel"):
        if not getattr(model, name):
            continue
        if engine.name == "trl":
            yield f"model.{name} = true with engine = trl: its trainers run their own layers; nearest: engine=zero"
        if engine.name == "zero" and config.zero_stage == 3:
            yield (
                f"model.{name} = true with engine.stage = 3: ZeRO-3 gathers the weights in hooks of the modules that "
                "it replaces; nearest: engine.stage=2"
            )
    if model.compile and model.load_in_8bit:
        yield (
            "model.compile = true with model.load_in_8bit = true: which inputs an 8-bit layer multiplies in 16 bit is "
            "known only as it runs; nearest: model.load_in_4bit=true, or model.compile=false"
        )
    if model.use_liger_kernel and config.resources.use_gpu == "no":
        yield (
            "model.use_liger_kernel = true with resources.use_gpu = no: its kernels are Triton's, for a GPU; "
            "nearest: model.use_liger_kernel=false"
        )


def _data(config: RunConfig) -> Iterator[str]:
    data, sources = config.data, config.data.sources
    weighted = [source.path for source in sources if source.weight is not None]
    if weighted and len(weighted) < len(sources):
        without = next(source.path for source in sources if source.weight is None)
        yield f"data.train: {weighted[0]} has a weight and {without} has none; give all sources a weight, or none"
    if both := [source.path for source in sources if source.weight is not None and source.repeats is not None]:
        yield f"data.train: {both[0]} has a weight and repeats: each says how often it is trained; keep one of them"
    if data.repeats and len(sources) > 1:
        yield "data.repeats is for prepared shards; in a list of sources each says its own: [{path: …, repeats: 2}]"

    mixed = data.repeats or weighted or any(source.repeats is not None for source in sources)
    if mixed and config.engine.name == "trl":
        yield (
            "data.train with weights or repeats and engine = trl: its trainers take each conversation once an epoch; "
            "nearest: engine=zero"
        )
    if data.augment:
        yield from _augmentation(config)
    if data.validation and data.validation_fraction:
        yield (
            f"data.validation_fraction = {data.validation_fraction} and data.validation are both given: the one holds "
            "training data out, the other names validation data; keep one of them"
        )


def _augmentation(config: RunConfig) -> Iterator[str]:
    given = f"data.augment = {list(config.data.augment)}"
    if config.model.vision_features == "precompute":
        yield (
            f"{given} with model.vision_features = precompute: features that are written once are of the images as "
            "they are; nearest: model.vision_features=compute"
        )
    if config.reference_model == "precompute":
        yield (
            f"{given} with dpo.reference = precompute: its log-probabilities are of the images as they are; "
            "nearest: dpo.reference=copy"
        )
    if config.engine.name == "trl":
        yield f"{given} with engine = trl: its trainers read the images as they are; nearest: engine=zero"


def _adapters(config: RunConfig, lora: LoraConfig) -> Iterator[str]:
    model, init = config.model, lora.init_lora_weights
    given = f"lora.init_lora_weights = {init}"
    if init == "loftq" and not model.load_in_4bit:
        yield f"{given} without model.load_in_4bit: it makes up for 4-bit rounding; nearest: model.load_in_4bit=true"
    if lora.changes_weights and (model.load_in_4bit or model.load_in_8bit):
        nearest = "loftq" if model.load_in_4bit else "default"
        yield (
            f"{given} with model.load_in_*bit: it takes a part out of the weights, which would be rounded a second "
            f"time; nearest: lora.init_lora_weights={nearest}"
        )
    if lora.use_dora and not lora.starts_at_zero:
        yield (
            f"{given} with lora.use_dora = true: DoRA's magnitudes are those of whole weights; "
            "nearest: lora.use_dora=false"
        )

    if both := sorted({"connector"} & {*lora.modules_to_save} & {*lora.groups}):
        yield f"lora.modules_to_save and lora.groups both name {both}: train it whole, or with adapters"
    if "lm_head" in lora.modules_to_save and lora.adapts("lm_head"):
        yield "lora.modules_to_save and lora.target_modules both name lm_head: train it whole, or with adapters"


def _optimizer(config: RunConfig) -> Iterator[str]:
    optimizer, trained = config.optimizer, config.trained_groups
    if stray := {*optimizer.learning_rates} - trained:
        yield (
            f"optimizer.learning_rates names {sorted(stray)}, which are frozen; trained are {sorted(trained)}: "
            "see model.train and lora.groups"
        )
    if optimizer.loraplus_lr_ratio != 1 and config.lora is None:
        yield (
            f"optimizer.loraplus_lr_ratio = {optimizer.loraplus_lr_ratio:g} with lora = null: there are no adapters; "
            "set lora, or leave it out"
        )
    if (optimizer.learning_rates or optimizer.loraplus_lr_ratio != 1) and not optimizer.learning_rate:
        yield (
            "optimizer.learning_rate = 0 with other rates beside it: those follow its schedule in proportion; "
            "expected above 0"
        )


def _evaluation(config: RunConfig) -> Iterator[str]:
    settings = config.evaluate
    for name in ("eval_steps", "early_stopping_patience"):
        if getattr(settings, name) and not config.data.evaluates:
            yield (
                f"evaluate.{name} = {getattr(settings, name)} without data.validation: there is nothing to evaluate "
                "on; set data.validation or data.validation_fraction, or leave it out"
            )
    if settings.early_stopping_patience and not settings.eval_steps and not settings.eval_epochs:
        yield (
            f"evaluate.early_stopping_patience = {settings.early_stopping_patience} with evaluate.eval_epochs = 0: "
            "the only one is at the end; nearest: evaluate.eval_epochs=1"
        )
    if config.search is not None and settings.eval_steps:
        yield (
            f"evaluate.eval_steps = {settings.eval_steps} with search: its schedulers count reports of whole epochs; "
            "nearest: evaluate.eval_epochs=1"
        )


def _scheduler(config: RunConfig) -> Iterator[str]:
    kind, given = config.optimizer.lr_scheduler_type, config.optimizer.lr_scheduler_kwargs
    known = SCHEDULER_KWARGS.get(kind, set())
    if stray := given.keys() - known:
        yield f"optimizer.lr_scheduler_kwargs names {sorted(stray)}; {kind} takes {sorted(known) or 'none'}"
    if kind == "warmup_stable_decay" and "num_decay_steps" not in given:
        yield (
            "optimizer.lr_scheduler_type = warmup_stable_decay needs the number of its decay steps; "
            "set optimizer.lr_scheduler_kwargs={num_decay_steps: N}"
        )
    if kind == "cosine_with_min_lr" and len(given.keys() & {"min_lr", "min_lr_rate"}) != 1:
        yield (
            "optimizer.lr_scheduler_type = cosine_with_min_lr needs one of min_lr and min_lr_rate; "
            "nearest: optimizer.lr_scheduler_kwargs={min_lr_rate: 0.1}"
        )

    if wrong := sorted(name for name, value in given.items() if isinstance(value, str) != name.endswith("_type")):
        yield (
            f"optimizer.lr_scheduler_kwargs: {', '.join(wrong)}: expected a number "
            "(a word for warmup_type and decay_type)"
        )
        return
    end, start = given.get("lr_end", 1e-7), config.optimizer.learning_rate
    if kind == "polynomial" and isinstance(end, int | float) and start <= end:
        yield (
            f"optimizer.lr_scheduler_type = polynomial ends at lr_end = {end}, which is not below "
            f"optimizer.learning_rate = {start}"
        )


def _zero(config: RunConfig) -> Iterator[str]:
    model, engine = config.model, config.engine
    if engine.name not in ("zero", "trl"):
        return

    if (model.load_in_4bit or model.load_in_8bit) and config.zero_stage == 3:
        yield (
            "engine.stage = 3 with quantised weights: ZeRO-3 cannot shard them; allowed: 0, 1, 2; "
            "nearest: engine.stage=2"
        )

    if config.zero_stage == 0 and model.dtype == "float16":
        yield ("engine.stage = 0 with model.dtype = float16: the loss scaling is done by ZeRO; nearest: engine.stage=1")

    if config.zero_stage > 0 and config.optimizer.name != "adamw":
        yield (
            f"optimizer.name = {config.optimizer.name} with engine.stage = {config.zero_stage}: ZeRO flattens and "
            "splits the parameters, so other states than AdamW's could not be saved by name; "
            "nearest: optimizer.name=adamw, or engine.stage=0"
        )

    if config.zero_stage < 1 and engine.offload_optimizer == "cpu":
        yield "engine.offload_optimizer = cpu needs engine.stage 1, 2 or 3; nearest: engine.stage=1"
    if config.zero_stage < 3 and engine.offload_param == "cpu":
        yield f"engine.offload_param = cpu needs engine.stage = 3, found {config.zero_stage}"


def _engine(config: RunConfig) -> Iterator[str]:
    model, engine = config.model, config.engine
    stage_3 = engine.name == "zero" and config.zero_stage == 3
    if config.train.load_balancing == "speed" and (stage_3 or engine.name in ("pipeline", "trl")):
        reason = (
            "on stage 3 every pass is collective, so all workers wait for the slowest GPU"
            if stage_3
            else f"not with engine = {engine.name}"
        )
        yield (
            f"train.load_balancing = speed assigns micro-batches on ZeRO 0 to 2: {reason}; "
            "nearest: train.load_balancing=equal, or engine.stage=2"
        )

    if engine.gpus is not None and engine.name != "pipeline":
        yield (
            f"engine.gpus places the stages of a pipeline, found engine = {engine.name}; "
            "nearest: engine=pipeline, or leave it out"
        )

    if engine.name == "pipeline" and model.dtype == "float16":
        yield (
            "model.dtype = float16 with engine = pipeline: an overflow in one stage would have to undo the step of "
            "all, and there is no loss scale for all stages; nearest: model.dtype=bfloat16"
        )

    if model.dtype == "float16" and config.resources.use_gpu == "no":
        yield (
            "model.dtype = float16 with resources.use_gpu = no: there is no fp16 training on CPU; "
            "allowed: float32, bfloat16; nearest: bfloat16"
        )


def _trl(config: RunConfig) -> Iterator[str]:
    """TRL's trainers know neither our plan nor our image processing. What they would do differently is refused."""
    if config.engine.name != "trl":
        return
    low, high = config.resources.workers
    if low != high:
        yield (
            f"resources.num_workers = [{low}, {high}] with engine = trl: TRL's trainers are not elastic; "
            f"nearest: resources.num_workers={high}"
        )
    if config.global_batch % high:
        yield (
            f"train.global_batch = {config.global_batch} with engine = trl does not divide by its {high} workers; "
            f"nearest: train.global_batch={config.global_batch // high * high or high}"
        )
    if config.train.audit:
        yield (
            "train.audit = true with engine = trl: exactly-once does not hold there; "
            "nearest: train.audit=false, or engine=zero"
        )

    if not config.image.upscale:
        yield (
            "image.upscale = false with engine = trl: the stock processor enlarges small images; "
            "nearest: image.upscale=true, or engine=zero"
        )
    if config.image.max_tiles not in (None, 1):
        yield (
            f"image.max_tiles = {config.image.max_tiles} with engine = trl: the stock processor has no such limit; "
            "nearest: image.max_tiles=null"
        )
    if config.model.vision_features == "precompute":
        yield (
            "model.vision_features = precompute with engine = trl: its trainers read images; "
            "nearest: model.vision_features=compute"
        )


def _workers(config: RunConfig) -> Iterator[str]:
    resources, (low, high) = config.resources, config.resources.workers
    if resources.gpus_per_worker < 1 < high:
        yield (
            f"resources.gpus_per_worker = {resources.gpus_per_worker:g} with {high} workers: "
            "NCCL refuses two workers on one GPU; nearest: resources.gpus_per_worker=1"
        )
    if not 1 <= low <= high:
        yield f"resources.num_workers = [{low}, {high}]: expected 1 <= min <= max"


def _batch(config: RunConfig) -> Iterator[str]:
    train, (low, high) = config.train, config.resources.workers
    from_accumulation = high * train.gradient_accumulation_steps
    if low != high and train.global_batch is None and config.engine.name != "auto":
        yield (
            "resources.num_workers is elastic and train.global_batch is not set: say how many micro-batches a step has "
            f"(nearest: train.global_batch={from_accumulation})"
        )

    both = train.global_batch is not None and train.gradient_accumulation_steps > 1
    if both and train.global_batch != from_accumulation:
        yield (
            f"train.global_batch = {train.global_batch} is not workers x gradient_accumulation_steps = "
            f"{from_accumulation}: set only one of the two"
        )

    if config.global_batch < high and config.engine.name not in ("pipeline", "auto"):
        yield (
            f"train.global_batch = {config.global_batch} is below the {high} workers of resources.num_workers: "
            f"some would never have a micro-batch; nearest: train.global_batch={high}"
        )

    longest = config.data.max_length
    if train.micro_batch_tokens is not None and longest != "auto" and train.micro_batch_tokens < longest:
        yield (
            f"train.micro_batch_tokens = {train.micro_batch_tokens} is below data.max_length = "
            f"{longest}: one sequence must fit; nearest: train.micro_batch_tokens={longest}"
        )
