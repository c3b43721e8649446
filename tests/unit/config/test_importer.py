"""Settings files of other trainers: what has a counterpart is a valid run, what has none is listed with the reason."""

import pytest
import yaml

from smolray.config import ConfigError, load_config
from smolray.config.importer import import_settings
from tests.commands import smolray

# From TRL's scripts, LLaMA-Factory's examples/train_lora and Axolotl's examples, shortened.
TRL = """
model_name_or_path: HuggingFaceTB/SmolVLM-Instruct
dataset_name: HuggingFaceH4/llava-instruct-mix-vsft
dataset_train_split: train
output_dir: out
run_name: My Run
learning_rate: 2.0e-5
per_device_train_batch_size: 4
gradient_accumulation_steps: 8
num_train_epochs: 2
bf16: true
gradient_checkpointing: true
use_peft: true
lora_r: 16
lora_alpha: 32
lora_target_modules: all-linear
eval_strategy: steps
eval_steps: 100
save_steps: 100
load_best_model_at_end: true
optim: adamw_torch_fused
torch_compile: true
report_to: [wandb, trackio]
push_to_hub: true
"""
FACTORY = """
model_name_or_path: HuggingFaceTB/SmolVLM-256M-Instruct
stage: dpo
do_train: true
finetuning_type: lora
lora_rank: 8
lora_target: all
pref_beta: 0.2
dataset: rlhf_v
template: smolvlm
cutoff_len: 2048
learning_rate: 5e-6
lr_scheduler_type: cosine
warmup_ratio: 0.1
deepspeed: examples/deepspeed/ds_z2_config.json
quantization_bit: 4
loraplus_lr_ratio: 16
enable_liger_kernel: true
"""
AXOLOTL = """
base_model: HuggingFaceTB/SmolVLM-500M-Instruct
adapter: qlora
load_in_4bit: true
lora_r: 32
lora_target_linear: true
datasets:
  - path: HuggingFaceH4/llava-instruct-mix-vsft
    type: chat_template
sequence_len: 8192
sample_packing: true
micro_batch_size: 1
num_epochs: 1
optimizer: lion_8bit
lr_scheduler: cosine
learning_rate: 0.00001
saves_per_epoch: 1
neftune_noise_alpha: 5
lora_modules_to_save: [embed_tokens, lm_head]
peft_init_lora_weights: loftq
"""


def imported(tmp_path, text):
    """(the run of the imported file, what has no counterpart), by the command and back through a file"""
    (tmp_path / "theirs.yaml").write_text(text)
    done = smolray("config", "import", str(tmp_path / "theirs.yaml"))
    assert done.exit_code == 0, done.output
    (tmp_path / "ours.yaml").write_text(done.output)
    return load_config(str(tmp_path / "ours.yaml"), ["data.validation=x"]), import_settings(
        str(tmp_path / "theirs.yaml")
    )[1]


def test_a_yaml_of_trl(tmp_path):
    run, missing = imported(tmp_path, TRL)
    assert (run.model.path, run.data.train, run.data.split) == (
        "HuggingFaceTB/SmolVLM-Instruct",
        "HuggingFaceH4/llava-instruct-mix-vsft",
        "train",
    )
    assert (run.name, run.storage, run.report_to) == ("my-run", "out", ("wandb", "trackio"))
    assert (run.optimizer.name, run.optimizer.learning_rate, run.model.dtype) == ("adamw", 2e-5, "bfloat16")
    assert run.lora is not None and (run.lora.r, run.lora.target_modules) == (16, ("all-linear",))
    assert (run.train.gradient_accumulation_steps, run.evaluate.eval_steps, run.evaluate.eval_epochs) == (8, 100, 0)
    assert run.model.train == () and run.model.compile and run.checkpoint.keep_best
    assert missing == {"push_to_hub": "no counterpart"}
    done = smolray("config", "import", str(tmp_path / "theirs.yaml"))
    assert "# to mend: evaluate.eval_steps = 100 without data.validation" in done.output


def test_a_yaml_of_llama_factory(tmp_path):
    run, missing = imported(tmp_path, FACTORY)
    assert (run.method, run.dpo.beta, run.engine.stage, run.model.load_in_4bit) == ("dpo", 0.2, 2, True)
    assert (run.data.train, run.data.max_length, run.model.use_liger_kernel) == ("rlhf_v", 2048, True)
    assert (run.optimizer.learning_rate, run.optimizer.loraplus_lr_ratio) == (5e-6, 16)
    assert missing.keys() == {"do_train", "template"} and missing["do_train"] == "always so here"


def test_a_yaml_of_axolotl(tmp_path):
    run, missing = imported(tmp_path, AXOLOTL)
    assert (run.model.path, run.lora.r, run.data.packing) == ("HuggingFaceTB/SmolVLM-500M-Instruct", 32, "full")
    assert (run.train.per_device_train_batch_size, run.train.num_train_epochs) == (1, 1)
    assert run.train.neftune_noise_alpha == 5 and run.lora.init_lora_weights == "loftq"
    assert run.lora.modules_to_save == ("embed_tokens", "lm_head")
    assert run.optimizer.name == "lion_8bit" and missing == {"saves_per_epoch": "no counterpart"}


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (
            "datasets: [{path: a, split: train}, {path: b, type: x}]",
            [("a", "train", None, None), ("b", None, None, None)],
        ),
        (
            "dataset: a, b\nmix_strategy: interleave_over\ninterleave_probs: 0.7, 0.3",
            [("a", None, None, 0.7), ("b", None, None, 0.3)],
        ),
        ("dataset: [a#500, b]", [("a", None, 500, None), ("b", None, None, None)]),
        ("datasets: [{path: json, data_files: x.jsonl, revision: null}]", "x.jsonl"),
    ],
)
def test_lists_of_data_sets_are_sources(tmp_path, text, expected):
    (tmp_path / "theirs.yaml").write_text(text + "\nval_set_size: 0.05\nmax_samples: 1000\n")
    done = smolray("config", "import", str(tmp_path / "theirs.yaml"))
    (tmp_path / "ours.yaml").write_text(done.output)
    data = load_config(str(tmp_path / "ours.yaml")).data
    found = data.train
    if not isinstance(found, str):
        found = [(one.path, one.split, one.max_samples, one.weight) for one in found]
    assert found == expected and (data.validation_fraction, data.max_samples) == (0.05, 1000)


def test_full_fine_tuning_has_no_adapters(tmp_path):
    full = FACTORY.replace("finetuning_type: lora", "finetuning_type: full")
    run, _ = imported(tmp_path, full.replace("quantization_bit: 4", "").replace("loraplus_lr_ratio: 16", ""))
    assert run.lora is None and run.model.train


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("learning_rate: -1", "learning_rate: optimizer.learning_rate = -1: input should be greater"),
        ("test_datasets: [{path: a}, {path: b}]", "test_datasets: data.validation is one path or id"),
        ("save_strategy: epoch", "save_strategy: saved at the end of each epoch in any case"),
        ("val_size: 500", "val_size: 500 rows; expected a share, such as data.validation_fraction=0.05"),
        ("interleave_probs: 0.5,0.5", "interleave_probs: 2 numbers, which are not one for each data set"),
        ("additional_target: norm", "additional_target: lora.modules_to_save"),
        ("stage: ppo", "stage: no counterpart; methods here: sft, dpo, simpo"),
        ("report_to: all", "report_to: name the trackers"),
    ],
)
def test_a_value_that_is_not_valid_here_is_listed_with_the_reason(tmp_path, text, why):
    (tmp_path / "theirs.yaml").write_text(text)
    done = smolray("config", "import", str(tmp_path / "theirs.yaml"))
    assert done.exit_code == 0 and f"# {why}" in done.output
    assert yaml.safe_load(done.output) in ({}, None)


@pytest.mark.parametrize("text", ["[1]", "a: [", "\x00"])
def test_what_is_no_settings_file_is_refused(tmp_path, text):
    (tmp_path / "theirs.yaml").write_text(text)
    with pytest.raises(ConfigError, match=r"theirs.yaml (holds a|is not valid YAML)"):
        import_settings(str(tmp_path / "theirs.yaml"))


def test_settings_of_adapters_that_the_file_does_not_train_are_listed(tmp_path):
    (tmp_path / "theirs.yaml").write_text("model_name_or_path: a/b\nlora_r: 16\nlora_alpha: 32\n")
    found, missing = import_settings(str(tmp_path / "theirs.yaml"))
    assert found == {"model.path": "a/b"} and list(missing) == ["lora.r", "lora.lora_alpha"]
    assert missing["lora.r"].startswith("16: the file says nothing of training adapters")
