"""The same models answered by vLLM: what Ray Serve LLM's OpenAI app is told of them.

In: ServeSettings and the models' sources. Out: the arguments of `ray.serve.llm.build_openai_app`. vLLM is in an
environment of its own, the extra `vllm`; it calls `register` in each of its processes.
"""

import importlib.util
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from smolray.config import ConfigError, ImageConfig
from smolray.inference.predictor import ModelSource
from smolray.serve.settings import GIB, ServeSettings

MODEL = "SmolrayForConditionalGeneration"  # the name of our model among vLLM's
MODE = "smolray"  # of our tokenizer
NO_HOST = "none.invalid"  # vLLM takes an empty list of hosts for all of them


def register() -> None:
    """Tell vLLM of our model and tokenizer; its own models stay as they are."""
    from vllm import ModelRegistry
    from vllm.renderers.registry import RENDERER_REGISTRY
    from vllm.tokenizers import TokenizerRegistry

    ModelRegistry.register_model(MODEL, "smolray.serve.vllm_model:SmolrayForConditionalGeneration")
    TokenizerRegistry.register(MODE, "smolray.serve.vllm_model", "TrainedTokenizer")
    RENDERER_REGISTRY.register(MODE, "vllm.renderers.hf", "HfRenderer")


def require_vllm() -> None:
    """Raise ConfigError where vLLM is not installed."""
    if importlib.util.find_spec("vllm") is None:
        raise ConfigError(
            "--backend vllm needs vLLM, which is not installed; its packages do not fit those of constraints.txt: "
            "make an environment of its own and run there: pip install 'smolray[vllm]'"
        )


def app_arguments(settings: ServeSettings, sources: Mapping[str, ModelSource], gpu: bool) -> dict[str, Any]:
    """The arguments of Ray Serve LLM's app: one LLMConfig for each model.

    Raises ConfigError for runs, which are not whole models, and for limits that this app does not know.
    """
    for limit in ("request_mib", "seconds"):
        if getattr(settings, limit) != ServeSettings.model_fields[limit].default:
            raise ConfigError(f"--{limit.replace('_', '-')} is no limit of --backend vllm: leave it out")

    return {
        "llm_configs": [_llm_config(settings, name, source, gpu) for name, source in sources.items()],
        # else it waits for a CPU that the models may have taken
        "ingress_deployment_config": {"ray_actor_options": {"num_cpus": 0}},
    }


def _llm_config(settings: ServeSettings, name: str, source: ModelSource, gpu: bool) -> dict[str, Any]:
    config = source.config
    if source.checkpoint is not None:
        raise ConfigError(
            f"{name} is a run, and vLLM loads whole models: run `smolray export {name}` and serve the folder that it "
            f"names, with the image settings of the run: {_image_settings(config.image)}"
        )

    engine: dict[str, Any] = {
        "dtype": config.model.dtype,
        "max_model_len": source.encoder().max_length,
        "max_num_seqs": settings.slots,
        "limit_mm_per_prompt": {"image": settings.images},
        "allowed_media_domains": settings.image_hosts or [NO_HOST],
        "mm_processor_kwargs": config.image.model_dump(),
        "hf_overrides": {"architectures": [MODEL]},
        "tokenizer_mode": MODE,
        "revision": config.model.revision,
        "tokenizer_revision": config.model.revision,
    }
    if settings.kv_gib is not None:
        engine["kv_cache_memory_bytes"] = int(settings.kv_gib * GIB)

    folder = Path(config.model.path)
    return {
        "model_loading_config": {
            "model_id": name,
            "model_source": str(folder.resolve()) if folder.is_dir() else config.model.path,
        },
        "accelerator_config": {"kind": "gpu" if gpu else "cpu"},
        "deployment_config": {"max_ongoing_requests": settings.slots + settings.queue, **settings.scaling},
        "engine_kwargs": engine,
    }


def _image_settings(image: ImageConfig) -> str:
    changed = image.model_dump(exclude_defaults=True)
    return " ".join(f"image.{key}={str(value).lower()}" for key, value in changed.items()) or "it has none of its own"
