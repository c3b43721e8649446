"""SmolVLM for vLLM with the tiles and tokens of training; vLLM loads this module, as smolray.serve.vllm tells it.

vLLM's own processor scales all images to one edge and fails on an image of one tile
(https://github.com/vllm-project/vllm/issues/48667); its tokenizer is transformers' AutoTokenizer, whose tokens differ
(smolray.data.tokenizer). In: `mm_processor_kwargs` that are the settings of ImageConfig.
"""

import functools
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from transformers import BatchFeature, Idefics3Processor
from vllm.model_executor.models.idefics3 import (
    Idefics3DummyInputsBuilder,
    Idefics3ForConditionalGeneration,
    Idefics3MultiModalProcessor,
    Idefics3ProcessingInfo,
)
from vllm.multimodal import MULTIMODAL_REGISTRY
from vllm.tokenizers.hf import get_cached_tokenizer

from smolray.config import ImageConfig, ModelConfig
from smolray.data.processor import load_processor
from smolray.data.tiles import Tiler


@functools.cache
def processor_of(path: str, revision: str | None) -> Idefics3Processor:
    """The processor as training takes it, once in a process."""
    return load_processor(ModelConfig(path=path, revision=revision))


class TrainedTokenizer:
    """The tokenizer that tokenizer.json describes, with the model's chat template."""

    @classmethod
    def from_pretrained(cls, path: str, *_: Any, revision: str | None = None, **__: Any) -> Any:
        processor = processor_of(path, revision)
        processor.tokenizer.chat_template = processor.chat_template
        return get_cached_tokenizer(processor.tokenizer)


class TrainedImages(Idefics3ProcessingInfo):
    """Into how many tiles an image of a size is cut."""

    def get_hf_processor(self, **_: object) -> Idefics3Processor:
        return processor_of(self.ctx.model_config.model, self.ctx.model_config.revision)

    def tiler(self, settings: Mapping[str, object]) -> Tiler:
        """The Tiler of training; `settings` of a request go before those of the service."""
        image = ImageConfig(**self.ctx.get_merged_mm_kwargs(settings))
        return Tiler(self.get_hf_processor().image_processor, image)

    def _get_image_feature_grid_size(
        self, *, image_width: int, image_height: int, processor: Idefics3Processor, mm_kwargs: Mapping[str, object]
    ) -> tuple[int, int, int]:
        grid = self.tiler(mm_kwargs).grid(image_width, image_height)
        return grid.tiles, grid.rows, grid.columns


class LargestImages(Idefics3DummyInputsBuilder):
    """Images of the most tiles that there can be: from them vLLM knows the memory that it needs."""

    def get_dummy_mm_data(self, seq_len: int, mm_counts: Mapping[str, int], mm_options: Mapping[str, Any]) -> Any:
        tiler = self.info.tiler({})
        heights = range(tiler.side, max(tiler.side, tiler.longest_edge) + 1, tiler.side)
        height = max(heights, key=lambda height: tiler.grid(heights[-1], height).tiles)
        images = self._get_dummy_images(width=heights[-1], height=height, num_images=mm_counts.get("image", 0))
        return {"image": images}


class TrainedProcessor(Idefics3MultiModalProcessor):
    """Images -> normalised tiles."""

    def _apply_hf_processor_main(self, mm_items: Any, hf_processor_mm_kwargs: Mapping[str, object]) -> BatchFeature:
        given = mm_items.select({kind for kind, count in mm_items.get_all_counts().items() if count})
        data, passed = self._get_hf_mm_data(given)
        if not data:
            return BatchFeature(dict(passed))

        tiler = self.info.tiler(hf_processor_mm_kwargs)
        tiles = [tiler.cut(image) for image in data["images"]]
        pixels = (torch.from_numpy(np.concatenate(tiles)).float() / 255 - 0.5) / 0.5
        mask = torch.ones(len(pixels), *pixels.shape[-2:], dtype=torch.bool)
        counts = torch.tensor([len(some) for some in tiles])
        return BatchFeature({"pixel_values": pixels, "pixel_attention_mask": mask, "num_patches": counts, **passed})


@MULTIMODAL_REGISTRY.register_processor(TrainedProcessor, info=TrainedImages, dummy_inputs=LargestImages)
class SmolrayForConditionalGeneration(Idefics3ForConditionalGeneration):
    """vLLM's Idefics3, which SmolVLM is, behind our processor."""
