"""TRL's SFTTrainer (completion-only) as the oracle: the same batches, the same optimizer, the same losses."""

import io

import pytest
import torch
from PIL import Image

from smolray.config import load_config
from smolray.data.local import local_plan
from smolray.data.processor import load_processor
from smolray.data.reader import ShardReader
from smolray.model.load import load_model
from tests.gloo import run_workers
from tests.recipes.curves import curve

STEPS, BATCH = 20, 6


def trl_losses(shards, overrides, folder):
    """Losses of SFTTrainer over the conversations in the plan's order, BATCH a step."""
    from datasets import Dataset
    from trl import SFTConfig, SFTTrainer

    config = load_config(None, overrides)
    plan, rows = local_plan(shards, config), []
    reader = ShardReader.open(shards)
    for number in range(STEPS):
        groups = reader.groups([plan.micro_batch(number)])[0]
        conversations = [(g.row.images[0], c) for g in groups for c in g.selected]
        assert len(conversations) == BATCH
        for image, conversation in conversations:
            user, assistant = conversation.messages
            rows.append(
                {
                    "images": [Image.open(io.BytesIO(image)).convert("RGB")],
                    "prompt": [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": user.text}]}],
                    "completion": [{"role": "assistant", "content": [{"type": "text", "text": assistant.text}]}],
                }
            )
    losses = []

    class Recorder(SFTTrainer):
        def training_step(self, *args, **kwargs):
            loss = super().training_step(*args, **kwargs)
            losses.append(loss.item())
            return loss

        def _get_train_sampler(self, dataset=None):
            return torch.utils.data.SequentialSampler(self.train_dataset)

    arguments = SFTConfig(
        output_dir=str(folder),
        per_device_train_batch_size=BATCH,
        max_steps=STEPS,
        learning_rate=config.optimizer.learning_rate,
        lr_scheduler_type="constant",
        weight_decay=0.0,
        max_grad_norm=1.0,
        bf16=False,
        gradient_checkpointing=False,
        max_length=None,
        completion_only_loss=True,
        report_to=[],
        save_strategy="no",
        use_cpu=True,
        logging_steps=1000,
        disable_tqdm=True,
    )
    data, processor = Dataset.from_list(rows), load_processor(config.model)
    Recorder(model=load_model(config.model), args=arguments, train_dataset=data, processing_class=processor).train()
    return losses


def test_losses_are_those_of_trl(recipe, tmp_path):
    shards, overrides = recipe
    overrides = [*overrides, "data.packing=none", "train.global_batch=1", "optimizer.weight_decay=0"]
    ours = [loss for loss, _ in run_workers(curve, 1, shards, overrides, STEPS)]
    theirs = trl_losses(shards, overrides, tmp_path)
    assert ours == pytest.approx(theirs, abs=1e-4)
