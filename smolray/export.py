"""A trained run -> a folder that plain transformers loads (or its adapters alone, for plain PEFT), checked before it is
called finished.

In: a run folder and one of its checkpoints. Out: 16-bit (or, of an fp32 run, fp32) weights with LoRA merged, processor
and model card; its logits have been compared with the trained model's.
"""

import json
import tempfile
from pathlib import Path

import torch
import yaml
from peft import PeftModel
from torch import nn
from transformers import AutoModelForImageTextToText, AutoProcessor

from smolray import storage
from smolray.config import RunConfig
from smolray.data.batch import Batch
from smolray.data.collate import Group, collate_training
from smolray.data.encode import cached_encoder
from smolray.data.processor import run_processor
from smolray.data.reader import ShardReader
from smolray.data.shards import read_manifest
from smolray.data.tiles import image_size
from smolray.model.forward import hidden_states
from smolray.model.load import base_model, load_model
from smolray.model.trained import merged_model, trained_model, unquantised
from smolray.pretrained import DTYPES
from smolray.run.checkpoint import Checkpoint, chosen_checkpoint
from smolray.run.folder import RunFolder

TOLERANCE = {"float32": 1e-4, "bfloat16": 5e-2, "float16": 2e-2}  # of the largest logit: rounding of merged weights
DIVERGENCE = {"4-bit": 0.5, "8-bit": 0.05}  # nats a trained token: adapters of quantised weights on the 16-bit ones
CARD_MARK = "trained with smolray"
COMPARED_ROWS = COMPARED_QUESTIONS = 4


class ExportError(ValueError):
    """The exported folder does not say what the trained model says; nothing was left at the target."""


def export_run(run_dir: str, out: str | None = None, name: str | None = None) -> str:
    """Write the folder and return its URI. Raises CheckpointError and ExportError; a failed export leaves no folder."""
    config = RunConfig.model_validate(yaml.safe_load(storage.read_bytes(RunFolder(run_dir).config)))
    chosen, target = chosen_checkpoint(run_dir, name), out or RunFolder(run_dir).export
    require_replaceable(target)
    merged = merged_model(config, chosen)
    with tempfile.TemporaryDirectory() as folder:
        merged.config.use_cache = True
        merged.save_pretrained(folder)
        run_processor(config).save_pretrained(folder)
        AutoProcessor.from_pretrained(folder)
        loaded = AutoModelForImageTextToText.from_pretrained(folder, dtype=DTYPES[config.model.dtype])
        note = compare(loaded, config, chosen)
        Path(folder, "README.md").write_text(model_card(config, run_dir, chosen, note), encoding="utf-8")
        publish(folder, target, last="config.json")
    return target


def export_adapter(run_dir: str, out: str | None = None, name: str | None = None) -> str:
    """Write adapter_config.json and adapter_model.safetensors, as PEFT loads them onto the run's base model; returns
    the folder's URI.

    Raises CheckpointError, and ExportError where more than adapters was trained.
    """
    config = RunConfig.model_validate(yaml.safe_load(storage.read_bytes(RunFolder(run_dir).config)))
    if config.lora is None or config.model.train:
        found = f"model.train = {list(config.model.train)}"
        raise ExportError(
            f"{run_dir} trained more than adapters ({found}): they alone are not the trained model; export it merged"
        )
    chosen, target = chosen_checkpoint(run_dir, name), out or RunFolder(run_dir).adapter
    require_replaceable(target)
    trained = trained_model(config, chosen)
    settings = trained.peft_config["default"]
    settings.base_model_name_or_path, settings.revision, settings.inference_mode = (
        config.model.path,
        config.model.revision,
        True,
    )
    with tempfile.TemporaryDirectory() as folder:
        trained.save_pretrained(folder, save_embedding_layers=False)
        batch = few_samples(config)
        want, got = (
            logits(trained, batch),
            logits(PeftModel.from_pretrained(load_model(config.model), folder).eval(), batch),
        )
        require_close(got, want, TOLERANCE[config.model.dtype], f"the adapter's on the {config.model.dtype} base")
        Path(folder, "README.md").write_text(
            model_card(config, run_dir, chosen, "Adapters alone, for PEFT."), encoding="utf-8"
        )
        publish(folder, target, last="adapter_config.json")
    return target


def publish(folder: str, target: str, last: str) -> None:
    """Put the files of `folder` in the place of what `target` held; `last` is the file that makes it look like a model."""
    storage.delete(target)
    for file in sorted(Path(folder).iterdir(), key=lambda f: f.name == last):
        storage.write_bytes(storage.join(target, file.name), file.read_bytes())


def require_replaceable(target: str) -> None:
    """Raise ExportError unless `target` is absent, empty, or an earlier export: what is not ours is not deleted."""
    if not storage.list_dirs(target) and not storage.list_files(target):
        return
    card = storage.join(target, "README.md")
    if not storage.exists(card) or CARD_MARK not in storage.read_bytes(card).decode("utf-8", errors="replace"):
        raise ExportError(f"{target} holds files that are not an export of smolray; choose an absent or empty folder")


def compare(loaded: nn.Module, config: RunConfig, chosen: Checkpoint) -> str:
    """Hold the exported model against the trained one on a few samples, and say in a sentence how far they are apart.
    Raises ExportError.

    A run over quantised weights is held against both: the same adapters over 16-bit weights, and the model as it was
    trained.
    """
    batch, dtype = few_samples(config), config.model.dtype
    got = logits(loaded, batch)
    rounding = require_close(
        got, logits(trained_model(unquantised(config), chosen), batch), TOLERANCE[dtype], f"a {dtype} run"
    )
    note = f"Its logits differ from the trained model's by at most {rounding:.1e} of the largest (rounding of merged weights)."
    if not (config.model.load_in_4bit or config.model.load_in_8bit):
        return note
    bits = "4-bit" if config.model.load_in_4bit else "8-bit"
    said, trained = (
        x.flatten(0, 1)[batch.target_positions].log_softmax(-1)
        for x in (got, logits(trained_model(config, chosen), batch))
    )
    divergence = float(nn.functional.kl_div(said, trained, log_target=True, reduction="batchmean"))
    if not divergence <= DIVERGENCE[bits]:
        raise ExportError(
            f"the exported model's answers diverge from those of the model trained over {bits} weights by {divergence:.3g} nats a token; "
            f"allowed: {DIVERGENCE[bits]}"
        )
    return f"{note} It was trained over {bits} weights: from the model as it was trained its answers diverge by {divergence:.1e} nats a token."


def require_close(got: torch.Tensor, want: torch.Tensor, allowed: float, what: str) -> float:
    """The largest difference as a share of the largest logit. Raises ExportError above `allowed`, and for nan."""
    difference = float((want - got).abs().max() / want.abs().max())
    if not difference <= allowed:
        raise ExportError(
            f"the exported model's logits differ from the trained model's by {difference:.3g} of the largest; allowed for {what}: {allowed}"
        )
    return difference


@torch.no_grad()
def logits(model: nn.Module, batch: Batch) -> torch.Tensor:
    """(B, L, vocabulary) float32 on the CPU."""
    model.eval()
    batch = batch.to(next(model.parameters()).device)  # bitsandbytes puts quantised weights on a GPU where there is one
    return base_model(model).lm_head(hidden_states(model, batch)).float().cpu()  # type: ignore[no-any-return]


def few_samples(config: RunConfig) -> Batch:
    """The first rows of the prepared training data as one batch, in rows of their own: stock attention knows no
    sequences laid end to end.
    """
    folder = config.data.train
    encoder = cached_encoder(config.model, config.data.replace({"packing": "image"}), config.image)
    reader = ShardReader.open(folder)
    groups: list[Group] = []
    for shard in range(len(reader.files)):
        for row_group in range(reader.row_groups(shard)):
            for row in reader.row_group(shard, row_group):
                grids = [encoder.tiler.grid(*image_size(image)) for image in row.images]
                fitting = [i for i, c in enumerate(row.conversations) if encoder.branches(c, grids) is not None]
                if fitting:
                    groups.append(Group(row, tuple(fitting[:COMPARED_QUESTIONS])))
                if len(groups) == COMPARED_ROWS:
                    return collate_training(groups, encoder)
    return collate_training(groups, encoder)


def image_note(config: RunConfig) -> str:
    """What a user of the folder must know to show images as training did."""
    notes = []
    if not config.image.upscale:
        notes.append(
            "Training did not enlarge small images, the stock processor scales every image to `size.longest_edge`: "
            "pass `size={'longest_edge': N}` with N = the next multiple of the tile's side above the image's longer edge."
        )
    if config.image.max_tiles not in (None, 1):
        notes.append(
            f"Training used at most {config.image.max_tiles} tiles an image; the stock processor has no such limit."
        )
    return " ".join(notes) or "As the processor in this folder does it."


def model_card(config: RunConfig, run_dir: str, chosen: Checkpoint, note: str) -> str:
    """README.md of the folder: what it is, from which data and settings, and how good it is."""
    try:
        result = json.loads(storage.read_bytes(RunFolder(run_dir).result))
    except FileNotFoundError:
        result = {}
    counts = result.get("accuracy_counts", {})
    scores = "\n".join(
        f"| {name} | {value:.4f} | {counts[name]} |" for name, value in result.get("accuracy", {}).items()
    )
    lora, groups = config.lora, ", ".join(config.model.train)
    method = (
        f"{'DoRA' if lora.use_dora else 'LoRA'} r={lora.r} on {', '.join(lora.groups)}, merged"
        if lora
        else f"full fine-tuning of {groups}"
    )
    source = read_manifest(config.data.train).source or config.data.train
    search = config.method == "retrieval"
    title, share = (
        ("Search (texts whose picture is found first)", "found first")
        if search
        else ("Accuracy (exact match, greedy decoding)", "accuracy")
    )
    table = (
        f"\n## {title}\n\n| type | {share} | {'texts' if search else 'samples'} |\n|---|---|---|\n{scores}\n"
        if scores
        else ""
    )
    return (
        f"---\nlibrary_name: transformers\npipeline_tag: image-text-to-text\n---\n# {config.name}\n\n"
        f"{config.model.path}, {method}, {CARD_MARK} to step {chosen.step} ({chosen.progress.samples} samples) on `{source}`. {note}\n"
        f"{table}\n## Images\n\n{image_note(config)}\n\n## Settings\n\n```yaml\n{yaml.safe_dump(config.model_dump(mode='json'), sort_keys=False)}```\n"
    )
