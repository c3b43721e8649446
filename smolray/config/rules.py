"""Combinations of settings that cannot work, each said in one line before anything starts: key, value, why, the nearest
that works.

In: a RunConfig whose single values are valid. Out: the lines.
"""

from typing import Any

Run = Any  # config.RunConfig, which asks this module


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


def faults(config: Run) -> list[str]:
    """One line for each combination that cannot work; empty: the run may start."""
    return [
        *_model(config),
        *_optimizer(config),
        *_method(config),
        *_engine(config),
        *_trl(config),
        *_resources(config),
    ]


def _model(config: Run) -> list[str]:
    model, found = config.model, []
    quantised = model.load_in_4bit or model.load_in_8bit
    if model.load_in_4bit and model.load_in_8bit:
        found.append("model.load_in_4bit and model.load_in_8bit are both true: choose one")
    if quantised and config.lora is None:
        found.append(
            "model.load_in_*bit = true with lora = null: quantised weights are not trained; set lora (nearest: lora={r: 8})"
        )
    if quantised and config.lora is not None and model.train:
        found.append(
            f"model.train = {list(model.train)} with quantised weights: they stay frozen; nearest: model.train=[]"
        )
    if not model.train and config.lora is None:
        found.append(
            "model.train = [] with lora = null: nothing would be trained; name a group of vision, connector, text, or set lora"
        )
    if config.lora is not None and (stray := set(config.lora.ranks) - set(config.lora.groups)):
        found.append(
            f"lora.ranks names {sorted(stray)}, lora.groups = {list(config.lora.groups)} has no adapters there; name the groups in both"
        )
    if model.vision_features == "precompute" and "vision" in _trained(config):
        found.append(
            "model.vision_features = precompute with a trained vision tower: its features change every step; "
            f"nearest: model.train=[{','.join(g for g in model.train if g != 'vision')}]"
        )
    return found


def _trained(config: Run) -> set[str]:
    return {*config.model.train, *(config.lora.groups if config.lora else ())}


def _optimizer(config: Run) -> list[str]:
    optimizer, kind, found = config.optimizer, config.optimizer.lr_scheduler_type, []
    if stray := set(optimizer.learning_rates) - _trained(config):
        found.append(
            f"optimizer.learning_rates names {sorted(stray)}, which are frozen; trained are {sorted(_trained(config))}: "
            "see model.train and lora.groups"
        )
    if optimizer.learning_rates and not optimizer.learning_rate:
        found.append(
            "optimizer.learning_rate = 0 with optimizer.learning_rates: those follow its schedule in proportion; expected above 0"
        )
    given, known = set(optimizer.lr_scheduler_kwargs), SCHEDULER_KWARGS.get(kind, set())
    if stray := given - known:
        found.append(f"optimizer.lr_scheduler_kwargs names {sorted(stray)}; {kind} takes {sorted(known) or 'none'}")
    if kind == "warmup_stable_decay" and "num_decay_steps" not in given:
        found.append(
            "optimizer.lr_scheduler_type = warmup_stable_decay needs the steps of its decay; set optimizer.lr_scheduler_kwargs={num_decay_steps: N}"
        )
    if kind == "cosine_with_min_lr" and len(given & {"min_lr", "min_lr_rate"}) != 1:
        found.append(
            "optimizer.lr_scheduler_type = cosine_with_min_lr needs one of min_lr and min_lr_rate; "
            "nearest: optimizer.lr_scheduler_kwargs={min_lr_rate: 0.1}"
        )
    if wrong := [k for k, v in optimizer.lr_scheduler_kwargs.items() if isinstance(v, str) != k.endswith("_type")]:
        found.append(
            f"optimizer.lr_scheduler_kwargs: {', '.join(sorted(wrong))}: expected a number (a word for warmup_type and decay_type)"
        )
    elif kind == "polynomial" and optimizer.learning_rate <= (end := optimizer.lr_scheduler_kwargs.get("lr_end", 1e-7)):
        found.append(
            f"optimizer.lr_scheduler_type = polynomial ends at lr_end = {end}, which is not below optimizer.learning_rate = {optimizer.learning_rate}"
        )
    return found


def _method(config: Run) -> list[str]:
    dpo, found = config.dpo, []
    if config.method == "retrieval" and config.engine.name != "zero":
        found.append(
            f"method = retrieval with engine = {config.engine.name}: it compares all pairs of a step; nearest: engine=zero"
        )
    if config.method == "retrieval" and config.lora is not None and "lm_head" in config.lora.target_modules:
        allowed = ",".join(name for name in config.lora.target_modules if name != "lm_head")
        found.append(
            "lora.target_modules names lm_head with method = retrieval: embeddings are taken before it, so that it would learn nothing; "
            f"allowed: modules of the layers; nearest: lora.target_modules=[{allowed or 'q_proj,v_proj'}]"
        )
    if config.method != "dpo":
        return found
    if dpo.loss_weights is not None and len(dpo.loss_weights) != len(dpo.loss_type):
        found.append(
            f"dpo.loss_weights has {len(dpo.loss_weights)} weights, dpo.loss_type {len(dpo.loss_type)} losses: expected one for each"
        )
    if config.data.overlong == "truncate_text":
        found.append(
            "data.overlong = truncate_text with method = dpo: a pair cut short compares other texts; allowed: drop, error; nearest: drop"
        )
    if config.lora is not None and config.lora.lora_dropout:
        found.append(
            f"lora.lora_dropout = {config.lora.lora_dropout:g} with method = dpo: the model would be compared with its reference through noise "
            "(TRL switches it off); nearest: lora.lora_dropout=0"
        )
    if dpo.reference == "adapter" and (config.lora is None or config.model.train):
        found.append(
            "dpo.reference = adapter needs lora and model.train = []: without the adapters the model must be the one training began with; "
            "nearest: dpo.reference=copy"
        )
    if dpo.reference == "copy" and (config.model.load_in_4bit or config.model.load_in_8bit):
        found.append(
            "dpo.reference = copy with quantised weights: they cannot be copied; nearest: dpo.reference=adapter"
        )
    copied = dpo.reference == "copy" or (dpo.reference == "auto" and (config.lora is None or bool(config.model.train)))
    if copied and config.engine.name == "zero" and config.engine.stage == 3:
        found.append(
            f"dpo.reference = {dpo.reference}, a frozen copy, with engine.stage = 3: the copy would not be sharded; "
            "nearest: dpo.reference=precompute"
        )
    if (
        config.engine.name == "pipeline"
        and dpo.reference != "precompute"
        and (dpo.reference == "copy" or config.lora is None or config.model.train)
    ):
        found.append(
            f"dpo.reference = {dpo.reference} with engine = pipeline: a frozen copy would need a second pipeline; nearest: dpo.reference=precompute"
        )
    return found


def _engine(config: Run) -> list[str]:
    model, engine, found = config.model, config.engine, []
    quantised = model.load_in_4bit or model.load_in_8bit
    if engine.name in ("zero", "trl"):
        if quantised and engine.stage == 3:
            found.append(
                "engine.stage = 3 with quantised weights: ZeRO-3 cannot shard them; allowed: 0, 1, 2; nearest: engine.stage=2"
            )
        if engine.stage == 0 and model.dtype == "float16":
            found.append(
                "engine.stage = 0 with model.dtype = float16: its loss scaling is that of ZeRO; nearest: engine.stage=1"
            )
        if engine.stage > 0 and config.optimizer.name != "adamw":
            found.append(
                f"optimizer.name = {config.optimizer.name} with engine.stage = {engine.stage}: ZeRO flattens and cuts the parameters, so "
                "8-bit states could not be saved by name; nearest: optimizer.name=adamw, or engine.stage=0"
            )
        if engine.stage < 1 and engine.offload_optimizer == "cpu":
            found.append("engine.offload_optimizer = cpu needs engine.stage 1, 2 or 3; nearest: engine.stage=1")
        if engine.stage < 3 and engine.offload_param == "cpu":
            found.append(f"engine.offload_param = cpu needs engine.stage = 3, found {engine.stage}")
    if config.train.load_balancing == "speed" and (
        engine.name in ("pipeline", "trl") or (engine.name == "zero" and engine.stage == 3)
    ):
        why = (
            "on stage 3 every pass is collective, so that the slowest card rules"
            if engine.name == "zero"
            else f"not with engine = {engine.name}"
        )
        found.append(
            f"train.load_balancing = speed deals micro-batches on ZeRO 0 to 2: {why}; nearest: train.load_balancing=equal, or engine.stage=2"
        )
    if engine.gpus is not None and engine.name != "pipeline":
        found.append(
            f"engine.gpus says where the stages of a pipeline lie, found engine = {engine.name}; nearest: engine=pipeline, or leave it out"
        )
    if engine.name == "pipeline" and model.dtype == "float16":
        found.append(
            "model.dtype = float16 with engine = pipeline: one loss scale for all stages does not exist; nearest: model.dtype=bfloat16"
        )
    if model.dtype == "float16" and config.resources.use_gpu == "no":
        found.append(
            "model.dtype = float16 with resources.use_gpu = no: there is no fp16 training on CPU; "
            "allowed: float32, bfloat16; nearest: bfloat16"
        )
    return found


def _trl(config: Run) -> list[str]:
    """TRL's trainers know neither our plan nor our pictures: what they would do otherwise than the run says is refused."""
    (low, high), found = config.resources.workers, []
    if config.engine.name != "trl":
        return []
    if low != high:
        found.append(
            f"resources.num_workers = [{low}, {high}] with engine = trl: TRL's trainers are not elastic; nearest: resources.num_workers={high}"
        )
    if config.global_batch % high:
        nearest = config.global_batch // high * high or high
        found.append(
            f"train.global_batch = {config.global_batch} with engine = trl does not divide by its {high} workers; "
            f"nearest: train.global_batch={nearest}"
        )
    if config.train.audit:
        found.append(
            "train.audit = true with engine = trl: exactly-once does not hold there; nearest: train.audit=false, or engine=zero"
        )
    if not config.image.upscale:
        found.append(
            "image.upscale = false with engine = trl: the stock processor enlarges small images; nearest: image.upscale=true, or engine=zero"
        )
    if config.image.max_tiles not in (None, 1):
        found.append(
            f"image.max_tiles = {config.image.max_tiles} with engine = trl: the stock processor has no such limit; nearest: image.max_tiles=null"
        )
    if config.model.vision_features == "precompute":
        found.append(
            "model.vision_features = precompute with engine = trl: its trainers read images; nearest: model.vision_features=compute"
        )
    if config.method == "dpo" and config.dpo.reference == "precompute":
        found.append(
            "dpo.reference = precompute with engine = trl: TRL has that not for images; nearest: dpo.reference=auto"
        )
    if config.method == "dpo" and config.lora is not None and (config.model.train or config.dpo.reference == "copy"):
        found.append(
            "method = dpo with lora and engine = trl takes the model without its adapters for the reference; "
            "nearest: model.train=[] dpo.reference=auto"
        )
    return found


def _resources(config: Run) -> list[str]:
    resources, found = config.resources, []
    low, high = resources.workers
    if resources.gpus_per_worker < 1 < high:
        found.append(
            f"resources.gpus_per_worker = {resources.gpus_per_worker:g} with {high} workers: NCCL refuses two workers on one card; "
            "nearest: resources.gpus_per_worker=1"
        )
    if not 1 <= low <= high:
        found.append(f"resources.num_workers = [{low}, {high}]: expected 1 <= min <= max")
    if low != high and config.train.global_batch is None and config.engine.name != "auto":
        found.append(
            "resources.num_workers is elastic and train.global_batch is not set: say how many micro-batches a step has "
            f"(nearest: train.global_batch={high * config.train.gradient_accumulation_steps})"
        )
    fixed = high * config.train.gradient_accumulation_steps
    if (
        config.train.global_batch is not None
        and config.train.gradient_accumulation_steps > 1
        and config.train.global_batch != fixed
    ):
        found.append(
            f"train.global_batch = {config.train.global_batch} is not workers x gradient_accumulation_steps = {fixed}: "
            "set only one of the two"
        )
    if config.global_batch < high and config.engine.name not in ("pipeline", "auto"):
        found.append(
            f"train.global_batch = {config.global_batch} is below the {high} workers of resources.num_workers: "
            f"some would never have a micro-batch; nearest: train.global_batch={high}"
        )
    if config.train.micro_batch_tokens is not None and config.train.micro_batch_tokens < config.data.max_length:
        found.append(
            f"train.micro_batch_tokens = {config.train.micro_batch_tokens} is below data.max_length = {config.data.max_length}: "
            "one sequence must fit; nearest: equal"
        )
    return found
