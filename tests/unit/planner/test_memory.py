"""The peak that the planner predicts is the one that torch's own memory tracker finds: real widths, few layers, no
memory taken.
"""

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.distributed._tools.mem_tracker import MemTracker
from torch.nn import functional as F
from transformers import Idefics3ForConditionalGeneration

from smolray.config import ModelConfig, RunConfig
from smolray.model.adapters import prepare_for_training
from smolray.planner.memory import Workload, activation_peak
from smolray.planner.shapes import ModelShape, Training
from smolray.planner.statistics import Load
from tests.unit.planner.test_shapes import config_of

TILES, TOKENS, LABELS, DTYPE = 13, 1000, 16, torch.bfloat16


def tracked_peak(model, config) -> int:
    """Bytes at the fullest moment of two steps of AdamW on one sequence, as MemTracker adds them up over storages."""
    inner, side = model.model, config.vision_config.image_size
    optimizer = torch.optim.AdamW(model.parameters(), foreach=False)
    pixels = torch.zeros(TILES, 3, side, side, dtype=torch.uint8)
    ids, places = torch.zeros(1, TOKENS, dtype=torch.long), torch.zeros(1, TOKENS, 1, dtype=torch.bool)
    patches = torch.ones(TILES, *[side // config.vision_config.patch_size] * 2, dtype=torch.bool)
    targets = torch.zeros(LABELS, dtype=torch.long)

    def loss() -> torch.Tensor:
        seen = ((pixels.float() / 255 - 0.5) / 0.5).to(DTYPE)
        hidden = inner.vision_model.encoder(
            inputs_embeds=inner.vision_model.embeddings(seen, patches)
        ).last_hidden_state
        features = inner.connector(inner.vision_model.post_layernorm(hidden))
        embeds = inner.get_input_embeddings()(ids).masked_scatter(places, features.flatten(0, 1))
        hidden = inner.text_model(
            inputs_embeds=embeds, position_ids=torch.arange(TOKENS)[None], use_cache=False
        ).last_hidden_state
        return F.cross_entropy(model.lm_head(hidden[0, targets]).float(), targets, reduction="sum")

    tracker = MemTracker()
    tracker.track_external(model, optimizer)
    with tracker:
        for _ in range(2):
            tracker.reset_mod_stats()
            loss().backward()
            optimizer.step()
            optimizer.zero_grad()
    return tracker.get_tracker_snapshot("peak")[torch.device("cpu")]["Total"]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "checkpointing"), [("random-256m", False), ("random-256m", True), ("random-2.2b", False)]
)
def test_the_peak_is_within_7_percent_of_torchs_memory_tracker(name, checkpointing):
    config = config_of(name)
    config.vision_config.num_hidden_layers, config.text_config.num_hidden_layers = 4, 6
    run = RunConfig(model=ModelConfig(path=name, gradient_checkpointing=checkpointing))
    with FakeTensorMode():
        torch.set_default_dtype(DTYPE)
        model = Idefics3ForConditionalGeneration(config)
        torch.set_default_dtype(torch.float32)
        measured = tracked_peak(prepare_for_training(model, run), config)
    work = Workload(
        ModelShape.from_config(config.to_dict(), name),
        Training.of(run),
        Load(1, 1, TOKENS, 0, 0, TILES, LABELS),
        checkpointing,
    )
    trained = sum(work.trained)
    # No engine here: 16-bit weights, gradients and two 16-bit moments.
    predicted = sum(work.weights) + 3 * trained * 2 + activation_peak(work, several=False, gradient_bytes=2)
    assert predicted == pytest.approx(measured, rel=0.07)
