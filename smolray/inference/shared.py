"""Several runs on one base model, which is loaded once: each run is its adapters.

In: ModelSources by name. Out: which of them share a base, and a model in which the adapters of one run work at a time.
"""

from collections.abc import Mapping
from typing import Any

import torch

from smolray.inference.predictor import ModelSource
from smolray.model.adapters import lora_config
from smolray.model.load import load_model
from smolray.run.checkpoint import read_weights
from smolray.run.state import canonical_name, load_weights

Sources = Mapping[str, ModelSource]


def groups(sources: Sources) -> list[dict[str, ModelSource]]:
    """The sources that share a base, in the order of their first.

    These are runs that trained plain LoRA and nothing else, and the base itself. Every other source is alone.
    """
    found: dict[str, dict[str, ModelSource]] = {}
    for name, source in sources.items():
        base = source.config.model.replace({"train": (), "vision_features": "compute"}).model_dump_json()
        found.setdefault(base if _is_shareable(source) else name, {})[name] = source
    return list(found.values())


class SharedModel:
    """The model of one source, or of several of a group of `groups`, in evaluation mode on a device.

    It answers as the first until `use` says otherwise.
    """

    def __init__(self, sources: Sources, device: torch.device):
        first = next(iter(sources.values()))
        self._adapter_of: dict[str, str] = {}
        self._layers: list[Any] = []
        if len(sources) == 1:
            self.model: Any = first.load(device)
        else:
            self.model = self._with_adapters(sources).eval()
            if not first.quantised:
                self.model.to(device)
        self._used = ""
        self.use(next(iter(sources)))

    def use(self, name: str) -> None:
        """Let the adapters of one source work, and no others."""
        if not self._adapter_of or name == self._used:
            return
        self._used, adapter = name, self._adapter_of[name]
        for layer in self._layers:
            layer.set_adapter([adapter] if adapter else [], inference_mode=True)

    def _with_adapters(self, sources: Sources) -> Any:
        from peft import PeftModel, get_peft_model
        from peft.tuners.lora import LoraLayer

        model: Any = load_model(next(iter(sources.values())).config.model)
        tuned = {name: source for name, source in sources.items() if source.checkpoint}
        self._adapter_of = dict.fromkeys(sources, "") | {name: f"run{number}" for number, name in enumerate(tuned)}
        # of the base, before it has any adapter: PEFT is told the names of its layers
        configs = {name: lora_config(model, source.config.lora) for name, source in tuned.items() if source.config.lora}

        for name, config in configs.items():
            adapter = self._adapter_of[name]
            if isinstance(model, PeftModel):
                model.add_adapter(adapter, config)
            else:
                model = get_peft_model(model, config, adapter_name=adapter)
            trained = {canonical_name(n, adapter): p for n, p in model.named_parameters() if f".{adapter}." in n}
            checkpoint = tuned[name].checkpoint
            assert checkpoint is not None
            load_weights(trained, read_weights(checkpoint))
        self._layers = [layer for layer in model.modules() if isinstance(layer, LoraLayer)]
        return model


def sees_as(name: str, source: ModelSource) -> str:
    """What decides the features of an image, of two sources with one base: empty for what the base sees."""
    lora = source.config.lora if source.checkpoint else None
    return name if lora is not None and {*lora.groups} != {"text"} else ""


def _is_shareable(source: ModelSource) -> bool:
    if source.config.traits.embeds:
        return False
    if source.checkpoint is None:
        return True
    lora = source.config.lora
    if lora is None or lora.use_dora or not source.config.adapters_alone:
        return False
    return lora.starts_at_zero  # the others may lie on other weights than the base
