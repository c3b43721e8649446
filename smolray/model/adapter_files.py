"""The files of trained adapters, as plain PEFT reads them onto the base model that the run began with.

In: a PeftModel and its run. Out: adapter_config.json and adapter_model.safetensors. Adapters that began as a part of
the weights are written as what has been learned since, in twice the rank (PEFT's docs: convert PiSSA to LoRA).
"""

import json
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel, get_peft_model_state_dict
from peft.tuners.lora import LoraLayer
from peft.utils import CONFIG_NAME, SAFETENSORS_WEIGHTS_NAME
from safetensors.torch import load_file, save_file

from smolray.config import RunConfig
from smolray.model.adapters import prepare_for_training, whole_modules
from smolray.model.load import base_model, load_model

PREFIX = "base_model.model."


def write_adapter(trained: PeftModel, config: RunConfig, folder: str) -> None:
    """Write the adapters of a model and the modules that were trained whole beside them."""
    settings = trained.peft_config["default"]
    settings.base_model_name_or_path = config.model.path
    settings.revision = config.model.revision
    settings.inference_mode = True
    trained.save_pretrained(folder, save_embedding_layers=False)

    weights_file, settings_file = Path(folder, SAFETENSORS_WEIGHTS_NAME), Path(folder, CONFIG_NAME)
    weights, written = load_file(weights_file), json.loads(settings_file.read_text(encoding="utf-8"))
    assert config.lora is not None
    if config.lora.changes_weights:
        weights = _since_the_start(weights, trained, config)
        written |= _doubled(written)

    modules = whole_modules(trained, config.lora)
    if "embed_tokens" in config.lora.modules_to_save and base_model(trained).config.tie_word_embeddings:
        modules["lm_head"] = base_model(trained).lm_head  # PEFT loads a copy of each
    for name, module in modules.items():
        weights |= {f"{PREFIX}{name}.{key}": value.detach().cpu() for key, value in module.state_dict().items()}
    written["modules_to_save"] = [*modules] or None
    # tensors that share memory, as a tied head does, are written twice
    save_file({name: value.clone().contiguous() for name, value in weights.items()}, weights_file, {"format": "pt"})
    settings_file.write_text(json.dumps(written, indent=2, sort_keys=True), encoding="utf-8")


def _since_the_start(
    weights: dict[str, torch.Tensor], trained: PeftModel, config: RunConfig
) -> dict[str, torch.Tensor]:
    """A and B of what was added to the weights: B A - B0 A0 = [B, -B0] [A; A0], the scale in B."""
    fresh = get_peft_model_state_dict(prepare_for_training(load_model(config.model), config))
    layers = {name: module for name, module in trained.named_modules() if isinstance(module, LoraLayer)}
    found = {}
    for name, value in weights.items():
        layer, _, kind = name.removesuffix(".weight").rpartition(".")
        start = fresh[name].to(value)
        if kind == "lora_A":
            found[name] = torch.cat([value, start])
        else:
            found[name] = torch.cat([value, -start], dim=1) * layers[layer].scaling["default"]
    return found


def _doubled(written: dict[str, Any]) -> dict[str, Any]:
    """PEFT's settings of adapters of twice the rank and scale 1."""
    ranks = {pattern: 2 * rank for pattern, rank in written["rank_pattern"].items()}
    rank = 2 * written["r"]
    return {
        "r": rank,
        "lora_alpha": rank,
        "rank_pattern": ranks,
        "alpha_pattern": dict(ranks),
        "use_rslora": False,
        "init_lora_weights": True,
    }
