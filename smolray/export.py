"""Writes a trained run as a folder that plain transformers loads, or its adapters alone as one that plain PEFT loads.

In: a run folder and one of its checkpoints. Out: a folder with weights (16-bit, or fp32 for an fp32 run; LoRA merged),
processor and model card. Its logits are compared with the trained model's before it is published.
"""

import json
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import asdict, replace
from pathlib import Path

import torch
from torch import nn
from transformers import AutoModelForImageTextToText, PreTrainedModel

from smolray import storage
from smolray.config import RunConfig, load_config
from smolray.data.batch import Batch
from smolray.data.collate import Group, collate_training
from smolray.data.encode import cached_encoder
from smolray.data.export_files import StockImages, image_note, stock_images, token_note, write_processor
from smolray.data.processor import load_processor
from smolray.data.reader import ShardReader
from smolray.data.tiles import image_size
from smolray.evaluate.measure import shown
from smolray.evaluate.stock import StockAnswers, stock_answers
from smolray.model.forward import hidden_states
from smolray.model.load import base_model, load_model
from smolray.model.trained import merged_model, trained_model, unquantised
from smolray.model_card import CARD_MARK, NO_DETAILS, CardDetails, model_card
from smolray.pretrained import DTYPES
from smolray.run.checkpoint import Checkpoint, chosen_checkpoint
from smolray.run.folder import RunFolder
from smolray.run.lease import LeaseError, owning
from smolray.run.result import read_result

TOLERANCE = {"float32": 1e-4, "bfloat16": 5e-2, "float16": 2e-2}  # of the largest logit: rounding of merged weights
DIVERGENCE = {"4-bit": 0.5, "8-bit": 0.05}  # nats a trained token: adapters of quantised weights on the 16-bit ones
COMPARED_ROWS = COMPARED_QUESTIONS = 4


class ExportError(ValueError):
    """The exported model differs from the trained one, or the target cannot be replaced. The target is unchanged."""


def export_run(run_dir: str, out: str | None = None, name: str | None = None, details: CardDetails = NO_DETAILS) -> str:
    """Write the trained model as a folder that transformers loads.

    Args:
        run_dir: the run's folder.
        out: where to write; by default the run's `export` folder.
        name: the checkpoint; by default the best, else the newest.
        details: what the model card says beside what the run knows.

    Returns:
        The URI of the folder.

    Raises:
        CheckpointError: there is no such checkpoint, or it is damaged.
        ExportError: the written model differs from the trained one, or `out` holds other files. No folder is left.
        LeaseError: `out` lies in the run's folder, and another process trains or evaluates the run.
    """
    target = out or RunFolder(run_dir).export
    with writing_into(run_dir, target):
        stock, answers = _export_run(run_dir, target, name, details)
    if storage.exists(RunFolder(run_dir).result):
        with suppress(LeaseError), owning(run_dir, "export"):  # a run that is trained writes its result anew
            record_stock(run_dir, stock, answers)
    return target


@contextmanager
def writing_into(run_dir: str, target: str) -> Iterator[None]:
    """A block that owns the run where its `target` lies inside the run's folder.

    Raises LeaseError where a process that trains or evaluates owns it.
    """
    inside = storage.absolute(target).startswith(storage.join(storage.absolute(run_dir), ""))
    with owning(run_dir, "export") if inside else nullcontext():
        yield


def _export_run(
    run_dir: str, target: str, name: str | None, details: CardDetails
) -> tuple[StockImages, StockAnswers | None]:
    """Write the folder; returns what a stock call of it does."""
    config = load_config(RunFolder(run_dir).config)
    chosen = chosen_checkpoint(run_dir, name)
    require_replaceable(target)

    merged = merged_model(config, chosen)
    with tempfile.TemporaryDirectory() as folder:
        merged.config.use_cache = True
        merged.save_pretrained(folder)
        tied = merged.lm_head.weight is merged.get_input_embeddings().weight
        write_config_for_others(Path(folder, "config.json"), tied)

        stock = stock_images(config)
        write_processor(config, stock, Path(folder))
        load_processor(config.model.replace({"path": folder, "revision": None}))

        loaded = AutoModelForImageTextToText.from_pretrained(folder, dtype=DTYPES[config.model.dtype])
        note = compare(loaded, config, chosen)
        answers = compare_stock(merged, config, stock)
        images = " ".join(filter(None, (image_note(config, stock), answer_note(answers))))
        use = f"## Images\n\n{images}\n\n{patch_note(loaded)}\n\n## Tokens\n\n{token_note(Path(folder))}\n\n"
        Path(folder, "README.md").write_text(model_card(config, run_dir, chosen, details, note, use), encoding="utf-8")
        publish(folder, target, last="config.json")
    return stock, answers


def export_adapter(
    run_dir: str, out: str | None = None, name: str | None = None, details: CardDetails = NO_DETAILS
) -> str:
    """Write the adapters alone, as PEFT loads them onto the run's base model. Arguments as for `export_run`.

    Returns:
        The URI of a folder with adapter_config.json, adapter_model.safetensors and a model card.

    Raises:
        CheckpointError: there is no such checkpoint, or it is damaged.
        ExportError: more than adapters was trained, or as for `export_run`.
    """
    config = load_config(RunFolder(run_dir).config)
    if config.lora is None or config.model.train:
        found = f"model.train = {list(config.model.train)}"
        raise ExportError(
            f"{run_dir} trained more than adapters ({found}): they alone are not the trained model; export it merged"
        )

    target = out or RunFolder(run_dir).adapter
    with writing_into(run_dir, target):
        _export_adapter(config, run_dir, target, name, details)
    return target


def _export_adapter(config: RunConfig, run_dir: str, target: str, name: str | None, details: CardDetails) -> None:
    chosen = chosen_checkpoint(run_dir, name)
    require_replaceable(target)

    trained = trained_model(config, chosen)

    from peft import PeftModel

    from smolray.model.adapter_files import write_adapter

    with tempfile.TemporaryDirectory() as folder:
        write_adapter(trained, config, folder)
        batch = few_samples(config)
        loaded = PeftModel.from_pretrained(load_model(config.model), folder).eval()
        require_close(
            got=logits(loaded, batch),
            want=logits(trained, batch),
            allowed=TOLERANCE[config.model.dtype],
            what=f"adapters on the {config.model.dtype} base",
        )

        card = model_card(config, run_dir, chosen, replace(details, adapter=True), "Adapters alone, for PEFT.")
        Path(folder, "README.md").write_text(card, encoding="utf-8")
        publish(folder, target, last="adapter_config.json")


def write_config_for_others(file: Path, tied: bool) -> None:
    """Add to config.json what readers look for in other places than those where transformers 5 writes it.

    Without `rope_theta` transformers 4 silently takes 10000, whatever the model was trained with. It and vLLM ask the
    text model whether the head's weights are the token embeddings (`tied`), llama.cpp for the text's architecture.
    """
    config = json.loads(file.read_text(encoding="utf-8"))
    text = config["text_config"]
    text["tie_word_embeddings"] = tied
    text.setdefault("architectures", ["LlamaForCausalLM"])

    rope = text["rope_parameters"]
    text["rope_theta"] = rope["rope_theta"]
    if rope["rope_type"] != "default":
        text["rope_scaling"] = {name: value for name, value in rope.items() if name != "rope_theta"}

    for part in (config, text, config["vision_config"]):
        if "dtype" in part:
            part["torch_dtype"] = part["dtype"]
    file.write_text(json.dumps(config, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def compare_stock(model: nn.Module, config: RunConfig, stock: StockImages) -> StockAnswers | None:
    """Answers with a stock call's tiles beside those of training; None where no validation image has other tiles."""
    if stock.validation_same == stock.validation_images:
        return None
    return stock_answers(model.to("cuda" if torch.cuda.is_available() else "cpu"), config, stock.config)


def answer_note(answers: StockAnswers | None) -> str:
    """What the tiles of a stock call do to the answers; empty where it was not measured."""
    if answers is None:
        return ""
    metric = answers.metric
    return (
        f"On {answers.questions} validation questions, {answers.other_tiles} of them about images that a stock call "
        f"cuts otherwise, {metric} is {shown(metric, answers.as_trained)} with the tiles of training and "
        f"{shown(metric, answers.stock)} with a stock call."
    )


def record_stock(run_dir: str, stock: StockImages, answers: StockAnswers | None) -> None:
    """Add to the run's result.json what a stock call of the export does."""
    found = {"images": asdict(stock), "answers": asdict(answers) if answers else None}
    result = read_result(run_dir) | {"stock_call": found}
    storage.write_bytes(RunFolder(run_dir).result, json.dumps(result, indent=1).encode())


def patch_note(model: PreTrainedModel) -> str:
    """Which versions of transformers give the patches of a tile other positions than training did."""
    patches = model.config.vision_config.image_size // model.config.vision_config.patch_size
    remedy = "use transformers 5"
    if patches & (patches - 1) == 0:  # only then are fractions of the tile's side exact in 16 bits
        remedy += ", or load the model with `dtype=torch.bfloat16`"
    return (
        "transformers 4.55 to 4.57 number the patches of a tile wrongly, in float32 all but the first "
        f"(https://github.com/huggingface/transformers/issues/41190), so that its answers differ: {remedy}."
    )


def publish(folder: str, target: str, last: str) -> None:
    """Replace what `target` holds by the files of `folder`.

    The file `last` makes a folder a model: it is written last.
    """
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
    """Compare the exported model with the trained one on a few samples; returns a sentence with the differences.

    A run over quantised weights is compared twice: with the same adapters over 16-bit weights, and with the model as it
    was trained. Raises ExportError where a difference is too large.
    """
    batch, dtype = few_samples(config), config.model.dtype
    got = logits(loaded, batch)
    want = logits(trained_model(unquantised(config), chosen), batch)
    rounding = require_close(got, want, TOLERANCE[dtype], f"a {dtype} run")
    note = (
        f"Its logits differ from the trained model's by at most {rounding:.1e} of the largest "
        "(rounding of merged weights)."
    )
    if not (config.model.load_in_4bit or config.model.load_in_8bit):
        return note

    bits = "4-bit" if config.model.load_in_4bit else "8-bit"
    divergence = _divergence(got, logits(trained_model(config, chosen), batch), batch)
    if not divergence <= DIVERGENCE[bits]:
        raise ExportError(
            f"the exported model's answers diverge from those of the model trained over {bits} weights "
            f"by {divergence:.3g} nats a token; allowed: {DIVERGENCE[bits]}"
        )
    return (
        f"{note} It was trained over {bits} weights: "
        f"its answers diverge from those of the model as it was trained by {divergence:.1e} nats a token."
    )


def require_close(got: torch.Tensor, want: torch.Tensor, allowed: float, what: str) -> float:
    """The largest difference as a fraction of the largest logit. Raises ExportError above `allowed`, and for nan."""
    difference = float((want - got).abs().max() / want.abs().max())
    if not difference <= allowed:
        raise ExportError(
            f"the exported model's logits differ from the trained model's by {difference:.3g} of the largest; "
            f"allowed for {what}: {allowed}"
        )
    return difference


def _divergence(got: torch.Tensor, want: torch.Tensor, batch: Batch) -> float:
    """KL divergence of the exported model's answers from the trained model's, in nats a trained token."""
    ours, trained = (x.flatten(0, 1)[batch.target_positions].log_softmax(-1) for x in (got, want))
    return float(nn.functional.kl_div(ours, trained, log_target=True, reduction="batchmean"))


@torch.no_grad()
def logits(model: nn.Module, batch: Batch) -> torch.Tensor:
    """(B, L, vocabulary) float32 on the CPU."""
    model.eval()
    batch = batch.to(next(model.parameters()).device)  # bitsandbytes puts quantised weights on a GPU where there is one
    return base_model(model).lm_head(hidden_states(model, batch)).float().cpu()  # type: ignore[no-any-return]


def few_samples(config: RunConfig) -> Batch:
    """The first rows of the prepared training data as one batch.

    Each image has a sequence to itself: stock attention cannot tell packed sequences apart.
    """
    encoder = cached_encoder(config.model, config.data.replace({"packing": "image"}), config.image)
    groups: list[Group] = []
    for row in ShardReader.open(config.data.train_folder).rows():
        grids = [encoder.tiler.grid(*image_size(image)) for image in row.images]
        fitting = [i for i, c in enumerate(row.conversations) if encoder.branches(c, grids) is not None]
        if fitting:
            groups.append(Group(row, tuple(fitting[:COMPARED_QUESTIONS])))
        if len(groups) == COMPARED_ROWS:
            break
    return collate_training(groups, encoder)
