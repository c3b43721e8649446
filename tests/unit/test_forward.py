"""The vision tower sees as many tiles at once as its memory is meant for, with the features of one pass."""

import torch

from smolray.config import ModelConfig
from smolray.forward import TILES_AT_ONCE, tower_features
from smolray.model.load import load_model
from smolray.model.tiny import build_model


def test_without_gradients_a_large_batch_goes_through_the_tower_in_parts(tmp_path):
    model = load_model(ModelConfig(path=str(build_model("tiny", ["what is it?"], tmp_path)), dtype="float32"))
    seen: list[int] = []
    model.model.vision_model.register_forward_hook(lambda module, inputs, output: seen.append(len(output.last_hidden_state)))
    tiles = torch.randint(0, 256, (2 * TILES_AT_ONCE + 5, 3, 64, 64), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    whole = tower_features(model, tiles)
    assert seen == [len(tiles)] and whole.requires_grad, "a trained tower keeps what its backward pass needs in any case"
    seen.clear()
    with torch.no_grad():
        parts = tower_features(model, tiles)
    assert seen == [TILES_AT_ONCE, TILES_AT_ONCE, 5]
    torch.testing.assert_close(parts, whole.detach())
