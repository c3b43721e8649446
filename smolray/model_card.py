"""The model card of an export: README.md, whose head the hub reads.

In: a run, its result and one of its checkpoints. Out: Markdown with base_model, datasets, tags and model-index above.
Cards are made to be published: of a path or a bucket they show the last name alone.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from smolray.config import RunConfig
from smolray.data.shards import prepared_account, read_manifest
from smolray.model.load import UNQUANTISED
from smolray.model.tiny import SHAPES
from smolray.run.checkpoint import Checkpoint
from smolray.run.result import read_result

CARD_MARK = "trained with smolray"
ASKING = """\
image = Image.new("RGB", (512, 512), "red")  # or Image.open("photo.jpg")
question = {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "What colour is it?"}]}
text = processor.apply_chat_template([question], add_generation_prompt=True)
inputs = processor(text=[text], images=[[image]], return_tensors="pt").to(model.device, model.dtype)
answer = model.generate(**inputs, max_new_tokens=32)[:, inputs["input_ids"].shape[1] :]
print(processor.batch_decode(answer, skip_special_tokens=True)[0])"""
TASK = "image-text-to-text"


@dataclass(frozen=True)
class CardDetails:
    """What a run does not know of its model. Empty: the card leaves it out."""

    license: str = ""
    language: str = ""
    adapter: bool = False  # the adapters alone
    repo: str = ""  # where the folder is pushed; empty: the snippet is for who stands in the folder


NO_DETAILS = CardDetails()


def model_card(
    config: RunConfig, run_dir: str, chosen: Checkpoint, details: CardDetails, note: str, use: str = ""
) -> str:
    """README.md of the folder: what the model is, its data and settings, its accuracy, and sections about its use."""
    source = ", ".join(map(_public, _sources(config)))
    settings = yaml.safe_dump(_public(config.model_dump(mode="json")), sort_keys=False, allow_unicode=True)
    return (
        f"---\n{_metadata(config, run_dir, details)}---\n"
        f"# {config.name}\n\n"
        f"{_public(config.model.path)}, {_training_method(config)}, {CARD_MARK} to step {chosen.step} "
        f"({chosen.progress.samples} samples) on `{source}`. {note}\n"
        f"{_score_table(config, run_dir)}\n"
        f"{_quick_start(config, details)}{use}## Settings\n\n```yaml\n{settings}```\n"
    )


def _public(value: Any) -> Any:
    """The value without the folders of this machine and the names of its buckets."""
    if isinstance(value, dict):
        return {key: _public(one) for key, one in value.items()}
    if isinstance(value, list):
        return [_public(one) for one in value]
    if isinstance(value, str) and not value.startswith("hf://") and (value.startswith(("/", "~")) or "://" in value):
        return f"…/{value.rstrip('/').rpartition('/')[2]}"
    return value


def _training_method(config: RunConfig) -> str:
    lora = config.lora
    if lora is None:
        return f"full fine-tuning of {', '.join(config.model.train)}"
    return f"{'DoRA' if lora.use_dora else 'LoRA'} r={lora.r} on {', '.join(lora.groups)}, merged"


def _quick_start(config: RunConfig, details: CardDetails) -> str:
    """A section with code that asks the model about an image; empty where it answers no questions."""
    if config.traits.embeds:
        return ""
    name, base = details.repo or ".", _public(config.model.path)
    dtype = f"dtype={config.model.dtype!r}"
    bits = "".join(_quantised(config)) if details.adapter else ""
    loads = [
        f'processor = AutoProcessor.from_pretrained("{base if details.adapter else name}")',
        f'model = AutoModelForImageTextToText.from_pretrained("{base if details.adapter else name}", {dtype}{bits})',
        *([f'model = PeftModel.from_pretrained(model, "{name}")'] if details.adapter else []),
    ]
    imported = "AutoModelForImageTextToText, AutoProcessor" + (", BitsAndBytesConfig" if bits else "")
    first = ["from peft import PeftModel"] if details.adapter else []
    code = "\n".join([*first, "from PIL import Image", f"from transformers import {imported}", "", *loads, ASKING])
    return f"## Quick start\n\n```python\n{code}\n```\n\n"


def _quantised(config: RunConfig) -> Iterator[str]:
    """The argument that loads the base as it was trained on: the text model alone in 4 or 8 bit."""
    if config.model.load_in_4bit or config.model.load_in_8bit:
        yield ", quantization_config=BitsAndBytesConfig("
        if config.model.load_in_4bit:
            yield 'load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True, '
            yield f'bnb_4bit_compute_dtype="{config.model.dtype}", '
        else:
            yield f"load_in_8bit=True, llm_int8_threshold={config.model.llm_int8_threshold}, "
        yield f"llm_int8_skip_modules={list(UNQUANTISED)})"


def _score_table(config: RunConfig, run_dir: str) -> str:
    """The scores of the run by type as a section of the model card; empty where it has none."""
    result = read_result(run_dir)
    if not result.get("accuracy"):
        return ""

    if config.traits.evaluation == "search":
        title, score, unit = "Search (texts whose image is found first)", "found first", "texts"
    else:
        title, score, unit = "Accuracy (exact match, greedy decoding)", "accuracy", "samples"
    counts = result.get("accuracy_counts", {})
    lines = [f"| {name} | {value:.4f} | {counts[name]} |" for name, value in result["accuracy"].items()]
    return "\n".join([f"\n## {title}\n", f"| type | {score} | {unit} |", "|---|---|---|", *lines, ""])


def _metadata(config: RunConfig, run_dir: str, details: CardDetails) -> str:
    """The head of the card as YAML, by the hub's names."""
    relation = "adapter" if details.adapter else "finetune"
    base = {"base_model": config.model.path, "base_model_relation": relation} if _on_hub(config.model.path) else {}
    tags = ["smolray", config.method, *(["lora"] if config.lora else [])]
    head: dict[str, Any] = {
        "library_name": "peft" if details.adapter else "transformers",
        "pipeline_tag": TASK,
        **({"license": details.license} if details.license else {}),
        **({"language": details.language} if details.language else {}),
        **base,
        **({"datasets": found} if (found := _datasets(config)) else {}),
        "tags": tags,
    }
    if metrics := _index_metrics(read_result(run_dir)):
        data = {"name": config.data.validation.rsplit("/", 1)[-1] or "validation", "type": "validation"}
        results = [{"task": {"type": TASK}, "dataset": data, "metrics": metrics}]
        head["model-index"] = [{"name": config.name, "results": results}]
    return yaml.safe_dump(head, sort_keys=False, allow_unicode=True)


def _index_metrics(result: dict[str, Any]) -> list[dict[str, Any]]:
    """The metrics of the run over all questions, each with its 95 % interval."""
    overall = {name: found["overall"] for name, found in (result.get("metrics") or {}).items() if "overall" in found}
    return [
        {"type": name, "name": name, "value": one["value"], "args": {k: one[k] for k in ("low", "high", "samples")}}
        for name, one in overall.items()
    ]


def _datasets(config: RunConfig) -> list[str]:
    """The hub ids among the sources of the run's shards."""
    names = [source.removeprefix("hf://datasets/").partition("#")[0] for source in _sources(config)]
    return [*dict.fromkeys(name for name in names if _on_hub(name))]


def _sources(config: RunConfig) -> tuple[str, ...]:
    """What the run's shards were made of."""
    return prepared_account(read_manifest(config.data.train_folder)).paths or (config.data.train_folder,)


def _on_hub(name: str) -> bool:
    """Whether a name looks like `owner/name`, and is no offline model or path of this machine."""
    owner, _, rest = name.partition("/")
    return (
        bool(owner and rest) and "/" not in rest and ":" not in name and name not in SHAPES and not Path(name).exists()
    )
