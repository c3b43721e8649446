"""The recipes train published models, with thin random weights, through Ray: the loss falls, and plain transformers
answer with the export as the run predicted.
"""

import io
import json
import math

import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image
from transformers import AutoModelForImageTextToText, Idefics3Processor, PreTrainedTokenizerFast
from transformers.models.idefics3.image_processing_pil_idefics3 import Idefics3ImageProcessorPil

from jobs.easyvqa import export_easy_vqa
from smolray import storage
from smolray.config import RunConfig, load_config
from smolray.config.recipes import recipes
from smolray.data.reader import ShardReader
from smolray.export import export_run
from smolray.launch.driver import launch_run
from smolray.run import checkpoint
from smolray.run.events import read_events, surviving
from tests.cluster.test_dpo_run import preference_data as preference_data
from tests.real import real_model

pytestmark = pytest.mark.slow
# what random weights of 64 channels need to learn in a minute; everything else is the recipe's
QUICK = [
    "optimizer.learning_rate=5e-3",
    "optimizer.warmup_steps=2",
    "train.max_steps=24",
    "train.global_batch=1",
    "train.logging_steps=1",
    "evaluate.max_samples=24",
    "evaluate.max_new_tokens=3",
    "resources.num_workers=1",
    "resources.use_gpu=no",
    "resources.cpus_per_worker=0.5",
]
RUNS = {
    "vqa_full": ("vqa_full", "smolvlm-256m", []),
    "vqa_lora": ("vqa_lora", "smolvlm-256m", []),
    "vqa_lora, SmolVLM2": ("vqa_lora", "smolvlm2-256m", []),
    "vqav2_qlora": ("vqav2_qlora", "smolvlm-2.2b", []),
    "vqav2_qlora, 4 bit": ("vqav2_qlora", "smolvlm-2.2b", ["model.load_in_8bit=false", "model.load_in_4bit=true"]),
    "dpo_lora": ("dpo_lora", "smolvlm-256m", []),
}


def test_every_recipe_but_those_of_the_demo_and_the_search_is_here():
    assert {recipe for recipe, *_ in RUNS.values()} | {"tune_vqa", "demo"} == set(recipes())


@pytest.fixture(scope="module")
def vqa(tmp_path_factory):
    folder = tmp_path_factory.mktemp("recipes_vqa")
    export_easy_vqa(folder, limit=300)
    return folder


def recipe_run(name: str, recipe: str, model: str, data, folder, *overrides: str) -> RunConfig:
    files = [f"data.train={data}/train.parquet", f"data.validation={data}/test.parquet"]
    base = real_model(model, folder / "base")
    named = [f"name={name}", f"storage={folder}", f"model.path={base}"]
    return load_config(recipe, [*named, *files, *QUICK, *overrides])


def assert_loss_falls(config: RunConfig) -> None:
    losses = [e["loss"] for e in surviving(read_events(config.run_dir)) if e["event"] == "step"]
    assert all(math.isfinite(loss) for loss in losses)
    first, last = sum(losses[:4]) / 4, sum(losses[-4:]) / 4
    assert last < 0.95 * first, f"{first:.4f} -> {last:.4f}"  # a random, frozen head of 64 channels is never sure


def stock_processor(folder: str) -> Idefics3Processor:
    """AutoProcessor without the video part of SmolVLM2, which needs torchvision."""
    settings, template = (
        json.loads(storage.read_bytes(f"{folder}/{name}.json")) for name in ("processor_config", "chat_template")
    )
    return Idefics3Processor(
        Idefics3ImageProcessorPil.from_pretrained(folder),
        PreTrainedTokenizerFast.from_pretrained(folder),
        image_seq_len=settings["image_seq_len"],
        chat_template=template["chat_template"],
    )


def assert_transformers_answer_as_predicted(config: RunConfig) -> None:
    folder = export_run(config.run_dir, name="latest")
    model, processor = AutoModelForImageTextToText.from_pretrained(folder).eval(), stock_processor(folder)
    stored = load_config(storage.join(config.run_dir, "config.yaml"))
    step = checkpoint.latest(config.run_dir).step
    file = f"{config.run_dir}/predictions/step-{step:08d}.parquet"
    images = {row.key: row.images[0] for row in ShardReader.open(stored.data.validation).rows()}
    for record in pq.read_table(file).to_pylist():
        messages = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": record["question"]}]}]
        prompt = processor.apply_chat_template(messages, add_generation_prompt=True)
        inputs = processor(text=prompt, images=[Image.open(io.BytesIO(images[record["key"]]))], return_tensors="pt")
        with torch.no_grad():
            tokens = model.generate(**inputs, max_new_tokens=3, do_sample=False)[0, inputs.input_ids.shape[1] :]
        assert processor.decode(tokens, skip_special_tokens=True).strip() == record["prediction"]


@pytest.mark.parametrize("run", RUNS)
def test_a_recipe_trains_a_published_model_and_its_export_answers_as_predicted(
    ray_cluster, vqa, preference_data, tmp_path, run
):
    recipe, model, overrides = RUNS[run]
    data = preference_data if recipe == "dpo_lora" else vqa
    config = recipe_run("recipe", recipe, model, data, tmp_path, *overrides)
    assert launch_run(config)["status"] == "finished"
    assert_loss_falls(config)
    if config.traits.pairs:
        assert storage.exists(f"{export_run(config.run_dir)}/model.safetensors")
    else:
        assert_transformers_answer_as_predicted(config)
