"""The published SmolVLM files in a folder, with thin random weights: what a user's `model.path` holds, 13 MB of it.

folder = real_model("smolvlm-256m", tmp_path)
"""

import functools
import json
import lzma
import shutil
from pathlib import Path

import torch
from transformers import AutoConfig, AutoModelForImageTextToText

DATA = Path(__file__).parent / "data"
BASE = "smolvlm-256m"  # its files are complete; the other folders hold what differs from them
MODELS = (BASE, "smolvlm-2.2b", "smolvlm2-256m")


@functools.cache
def tokenizer_json(name: str) -> str:
    """The text of tokenizer.json. The 2.2B of 2024 has the same vocabulary and merges with fewer added tokens."""
    text = lzma.decompress((DATA / BASE / "tokenizer.json.xz").read_bytes()).decode("utf-8")
    if name != "smolvlm-2.2b":
        return text

    record = json.loads(text)
    plain = [token for token in record["added_tokens"] if token["id"] < 49152]
    template = record["added_tokens"][-1]
    added = json.loads((DATA / name / "added_tokens.json").read_text(encoding="utf-8"))
    own = [
        template | {"id": number, "content": token} for token, number in sorted(added.items(), key=lambda item: item[1])
    ]
    return json.dumps(record | {"added_tokens": plain + own}, indent=2, ensure_ascii=False)


def real_processor(name: str, folder: Path) -> Path:
    """Write the processor files and config.json (thin) of a published model to `folder`."""
    folder.mkdir(parents=True, exist_ok=True)
    for source in (DATA / BASE, DATA / name):
        for file in source.glob("*.json"):
            shutil.copy(file, folder / file.name)
    (folder / "tokenizer.json").write_text(tokenizer_json(name), encoding="utf-8")
    (folder / "config.thin.json").replace(folder / "config.json")
    return folder


def real_model(name: str, folder: Path, scale: float = 1.0) -> Path:
    """The same with random weights of seed 0 in bfloat16 (6.5 M parameters, built in a second).

    With the published spread of weights so thin a model gives one answer to everything: `scale` makes them larger.
    """
    real_processor(name, folder)
    torch.manual_seed(0)
    model = AutoModelForImageTextToText.from_config(AutoConfig.from_pretrained(folder), dtype=torch.bfloat16)
    with torch.no_grad():
        for weight in model.parameters():
            weight.mul_(scale if weight.dim() > 1 else 1)
    published = {name: (folder / name).read_bytes() for name in ("config.json", "generation_config.json")}
    model.save_pretrained(folder)
    for name, content in published.items():  # not as transformers writes it anew
        (folder / name).write_bytes(content)
    return folder


@functools.cache
def golden_ids(name: str) -> dict:
    """Texts and conversations with the ids that tokenizer.json of this model gives."""
    golden = json.loads((DATA / "golden_ids.json").read_text(encoding="utf-8"))
    return golden.get(name) or golden[BASE]
