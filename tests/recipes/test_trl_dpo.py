"""TRL's DPOTrainer as the oracle: the same pairs, the same optimizer, the same losses and metrics, for each loss type
and both references.
"""

import io

import pytest
import torch
from PIL import Image

from smolray.config import load_config
from smolray.data.local import local_plan
from smolray.data.processor import load_processor
from smolray.data.reader import ShardReader
from smolray.model.adapters import lora_config
from smolray.model.load import load_model
from smolray.objectives.base import PREFERENCE_METRICS
from tests.gloo import run_workers
from tests.recipes.curves import step_metrics

STEPS, BATCH = 20, 6
LOSSES = {
    "sigmoid": [],
    "ipo": ["dpo.loss_type=[ipo]", "dpo.beta=0.2"],
    "hinge": ["dpo.loss_type=[hinge]"],
    "robust": ["dpo.loss_type=[robust]", "dpo.label_smoothing=0.1"],
    "sigmoid and sft": ["dpo.loss_type=[sigmoid,sft]", "dpo.loss_weights=[0.7,0.3]"],
}
LORA = ["lora={r: 4, groups: [text, vision]}", "model.train=[]", "optimizer.learning_rate=1e-2"]
RUNS = {f"full, {name}": loss for name, loss in LOSSES.items()} | {"lora, sigmoid": LORA}
MORE = {f"lora, {name}": [*LORA, *loss] for name, loss in LOSSES.items() if name != "sigmoid"} | {
    "full, padded rows": ["data.packing=image"]
}
# TRL wants as many pairs in each batch: one pair a sequence.
ALIKE = ["data.max_questions_per_image=1", "train.global_batch=1", "optimizer.weight_decay=0"]


def examples(shards, config):
    """The pairs of the first STEPS micro-batches as TRL takes them."""
    plan, rows = local_plan(shards, config), []
    reader = ShardReader.open(shards)
    for number in range(STEPS):
        pairs = [(g.row.images[0], c) for g in reader.groups([plan.micro_batch(number)])[0] for c in g.selected]
        assert len(pairs) == BATCH
        for image, pair in pairs:
            rows.append(
                {
                    "images": [Image.open(io.BytesIO(image)).convert("RGB")],
                    "prompt": [
                        {
                            "role": "user",
                            "content": [{"type": "image"}, {"type": "text", "text": pair.messages[0].text}],
                        }
                    ],
                    "chosen": [{"role": "assistant", "content": [{"type": "text", "text": pair.chosen[0].text}]}],
                    "rejected": [{"role": "assistant", "content": [{"type": "text", "text": pair.rejected[0].text}]}],
                }
            )
    return rows


def trl_metrics(shards, overrides, folder):
    """What DPOTrainer logs at each step.

    Its reference is the adapter switched off, or a frozen copy that it loads itself.
    """
    from datasets import Dataset
    from trl import DPOConfig, DPOTrainer

    class InOrder(DPOTrainer):
        def _get_train_sampler(self, dataset=None):
            return torch.utils.data.SequentialSampler(self.train_dataset)

    config = load_config(None, overrides)
    dpo = config.dpo
    arguments = DPOConfig(
        output_dir=str(folder),
        per_device_train_batch_size=BATCH,
        max_steps=STEPS,
        learning_rate=config.optimizer.learning_rate,
        seed=config.seed,
        lr_scheduler_type="constant",
        weight_decay=0.0,
        max_grad_norm=1.0,
        bf16=False,
        gradient_checkpointing=False,
        max_length=None,
        beta=dpo.beta,
        loss_type=list(dpo.loss_type),
        loss_weights=list(dpo.loss_weights) if dpo.loss_weights else None,
        label_smoothing=dpo.label_smoothing,
        report_to=[],
        save_strategy="no",
        use_cpu=True,
        logging_steps=1,
        disable_tqdm=True,
    )
    model = load_model(config.model)
    peft_config = lora_config(model, config.lora) if config.lora else None
    data = Dataset.from_list(examples(shards, config))
    trainer = InOrder(
        model=model,
        args=arguments,
        train_dataset=data,
        processing_class=load_processor(config.model),
        peft_config=peft_config,
    )
    trainer.train()
    return trainer.state.log_history[:STEPS]


def our_metrics(pairs, runs):
    """What our engine logs, run by run, in one worker: starting it costs more than a run."""
    shards, overrides = pairs
    return run_workers(
        step_metrics, 1, shards, {name: [*overrides, *ALIKE, *settings] for name, settings in runs.items()}, STEPS
    )


@pytest.fixture(scope="module")
def ours(pairs):
    return our_metrics(pairs, RUNS)


@pytest.fixture(scope="module")
def more_of_ours(pairs):
    return our_metrics(pairs, MORE)


def assert_those_of_trl(got, pairs, settings, folder):
    shards, overrides = pairs
    want = trl_metrics(shards, [*overrides, *ALIKE, *settings], folder)
    for metric in ("loss", *PREFERENCE_METRICS):
        assert [step[metric] for step in got] == pytest.approx([step[metric] for step in want], abs=1e-4), metric
    assert got[-1]["rewards/margins"] > got[0]["rewards/margins"] == 0.0


@pytest.mark.parametrize("name", RUNS)
def test_losses_rewards_and_log_probabilities_are_those_of_trl(ours, pairs, tmp_path, name):
    assert_those_of_trl(ours[name], pairs, RUNS[name], tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("name", MORE)
def test_the_rest_is_that_of_trl_as_well(more_of_ours, pairs, tmp_path, name):
    assert_those_of_trl(more_of_ours[name], pairs, MORE[name], tmp_path)
