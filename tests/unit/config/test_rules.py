"""Methods, optimizers and precisions that do not go together are refused before anything starts, with the reason and
the nearest that does.
"""

import pytest
import torch

from smolray.config import ConfigError, load_config
from smolray.train.setup import check_device

LORA = ["lora.r=8", "model.train=[]"]


@pytest.mark.parametrize(
    ("overrides", "told"),
    [
        (["model.load_in_4bit=true"], ["quantised weights are not trained", "nearest: lora={r: 8}"]),
        ([*LORA, "model.load_in_4bit=true", "model.load_in_8bit=true"], ["choose one"]),
        (["lora.r=8", "model.load_in_8bit=true"], ["they stay frozen", "nearest: model.train=[]"]),
        ([*LORA, "model.load_in_4bit=true", "engine.stage=3"], ["ZeRO-3 cannot shard them", "nearest: engine.stage=2"]),
        ([*LORA, "lora.ranks={vision: 4}"], ["lora.ranks names ['vision']"]),
        (["model.compile=true", "engine.stage=3"], ["hooks of the modules", "nearest: engine.stage=2"]),
        (["model.use_liger_kernel=true", "engine.stage=3"], ["hooks of the modules", "nearest: engine.stage=2"]),
        (["model.compile=true", "engine=trl"], ["run their own layers", "nearest: engine=zero"]),
        (["model.use_liger_kernel=true", "engine=trl"], ["run their own layers", "nearest: engine=zero"]),
        ([*LORA, "model.compile=true", "model.load_in_8bit=true"], ["known only as it runs", "or model.compile=false"]),
        (
            ["model.use_liger_kernel=true", "resources.use_gpu=no"],
            ["Triton's, for a GPU", "nearest: model.use_liger_kernel=false"],
        ),
        (
            ["optimizer.name=adamw_8bit", "engine.stage=2"],
            ["could not be saved by name", "nearest: optimizer.name=adamw"],
        ),
        (
            ["optimizer.name=paged_adamw_8bit", "engine.stage=2", "engine.offload_optimizer=cpu"],
            ["could not be saved by name"],
        ),
        (
            ["optimizer.name=adamw_8bit", "engine.stage=0", "engine.offload_optimizer=cpu"],
            ["offload_optimizer = cpu needs engine.stage 1"],
        ),
        ([*LORA, "engine.stage=0", "model.dtype=float16"], ["loss scaling", "nearest: engine.stage=1"]),
        (["model.dtype=float16", "resources.use_gpu=no"], ["no fp16 training on CPU", "nearest: bfloat16"]),
        (["model.dtype=float16", "engine=pipeline"], ["nearest: model.dtype=bfloat16"]),
        (
            ["model.train=[text]", "optimizer.learning_rates={vision: 1e-4}"],
            ["['vision'], which are frozen", "trained are ['text']"],
        ),
        (["optimizer.learning_rate=0", "optimizer.learning_rates={text: 1e-4}"], ["expected above 0"]),
        (["optimizer.lr_scheduler_type=warmup_stable_decay"], ["num_decay_steps: N"]),
        (
            ["optimizer.lr_scheduler_type=cosine_with_min_lr"],
            ["nearest: optimizer.lr_scheduler_kwargs={min_lr_rate: 0.1}"],
        ),
        (["optimizer.lr_scheduler_kwargs={num_cycle: 2}"], ["['num_cycle']", "cosine takes ['num_cycles']"]),
        (["optimizer.lr_scheduler_type=linear", "optimizer.lr_scheduler_kwargs={power: 2}"], ["linear takes none"]),
        (["optimizer.lr_scheduler_kwargs={num_cycles: two}"], ["num_cycles: expected a number"]),
        (
            ["optimizer.lr_scheduler_type=polynomial", "optimizer.lr_scheduler_kwargs={lr_end: 1e-3}"],
            ["lr_end = 0.001", "not below"],
        ),
        (
            ["method=dpo", *LORA, "model.load_in_8bit=true", "dpo.reference=copy"],
            ["they cannot be copied", "nearest: dpo.reference=adapter"],
        ),
        (
            ["method=retrieval", "lora.target_modules=[q_proj,lm_head]"],
            ["names lm_head", "would learn nothing", "nearest: lora.target_modules=[q_proj]"],
        ),
        (
            ["lora.init_lora_weights=loftq", "model.train=[]"],
            ["makes up for 4-bit", "nearest: model.load_in_4bit=true"],
        ),
        (
            [*LORA, "lora.init_lora_weights=pissa", "model.load_in_4bit=true"],
            ["rounded a second time", "nearest: lora.init_lora_weights=loftq"],
        ),
        (
            [*LORA, "lora.init_lora_weights=olora", "model.load_in_8bit=true"],
            ["rounded a second time", "nearest: lora.init_lora_weights=default"],
        ),
        ([*LORA, "lora.init_lora_weights=pissa_niter_4", "lora.use_dora=true"], ["nearest: lora.use_dora=false"]),
        (["lora.init_lora_weights=pissa_4"], ["init_lora_weights"]),
        ([*LORA, "lora.modules_to_save=[norm]"], ["modules_to_save", "lm_head"]),
        (["lora={modules_to_save: [connector], groups: [text, connector]}"], ["both name ['connector']"]),
        (["lora={modules_to_save: [lm_head], target_modules: [q_proj, lm_head]}"], ["both name lm_head"]),
        (
            ["method=retrieval", "lora.modules_to_save=[lm_head, connector]"],
            ["would learn nothing", "nearest: lora.modules_to_save=[connector]"],
        ),
        (
            ["method=dpo", *LORA, "dpo.reference=adapter", "lora.init_lora_weights=pissa"],
            ["must be the one that training began with", "nearest: dpo.reference=copy"],
        ),
        (
            ["method=dpo", *LORA, "dpo.reference=adapter", "lora.modules_to_save=[embed_tokens]"],
            ["must be the one that training began with"],
        ),
        (
            ["method=dpo", *LORA, "lora.modules_to_save=[embed_tokens]", "model.load_in_4bit=true"],
            ["cannot be copied", "nearest: dpo.reference=precompute"],
        ),
        (
            ["method=dpo", *LORA, "lora.init_lora_weights=loftq", "model.load_in_4bit=true"],
            ["which are the reference", "nearest: lora.init_lora_weights=default"],
        ),
        (["method=dpo", "train.neftune_noise_alpha=5"], ["noise would disturb", "train.neftune_noise_alpha=null"]),
    ],
)
def test_settings_that_exclude_each_other_are_refused(overrides, told):
    with pytest.raises(ConfigError) as refused:
        load_config(None, overrides)
    for part in told:
        assert part in str(refused.value)


@pytest.mark.parametrize(
    "overrides", [["dpo.reference=copy"], ["dpo.reference=auto"], ["lora={r: 2}", "dpo.reference=auto"]]
)
def test_dpo_with_a_frozen_copy_is_refused_in_a_pipeline(overrides):
    with pytest.raises(ConfigError, match=r"nearest: dpo\.reference=precompute"):
        load_config(None, ["method=dpo", "engine.name=pipeline", *overrides])


@pytest.mark.parametrize(
    "overrides",
    [
        [*LORA, "model.load_in_4bit=true", "model.compile=true"],
        ["model.compile=true", "model.use_liger_kernel=true", "engine=pipeline"],
        [*LORA, "model.load_in_8bit=true", "engine.stage=0", "optimizer.name=paged_adamw_8bit"],
        [*LORA, "model.load_in_4bit=true", "model.dtype=float16", "engine.stage=1"],
        ["model.dtype=float32", "engine.stage=0", "optimizer.name=adamw_8bit"],
        [
            "lora={use_dora: true, use_rslora: true, groups: [vision, text], ranks: {vision: 2}}",
            "optimizer.learning_rates={vision: 1e-5}",
        ],
        ["model.gradient_checkpointing=4"],
        [
            *LORA,
            "model.load_in_4bit=true",
            "lora.init_lora_weights=loftq",
            "lora.modules_to_save=[embed_tokens,lm_head]",
        ],
        [*LORA, "lora.init_lora_weights=pissa_niter_16", "engine=pipeline", "train.neftune_noise_alpha=5"],
        ["method=dpo", *LORA, "lora.init_lora_weights=olora"],
        ["method=simpo", "train.neftune_noise_alpha=5"],
        ["model.dtype=bfloat16", "engine.stage=0", "optimizer.name=adamw_8bit"],
    ],
)
def test_settings_that_go_together_are_accepted(overrides):
    load_config(None, overrides)


def test_fp16_is_refused_on_a_worker_without_a_gpu():
    with pytest.raises(ConfigError, match="float16 needs a CUDA device"):
        check_device(load_config(None, ["model.dtype=float16"]), torch.device("cpu"))
    for dtype in ("float32", "bfloat16"):
        check_device(load_config(None, [f"model.dtype={dtype}"]), torch.device("cpu"))
