"""The vision tower sees as many tiles at once as its memory is meant for, and the last layer what is asked for, with
the results of one whole pass.
"""

from dataclasses import replace

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from smolray.config import ModelConfig
from smolray.data.collate import Group, collate_training
from smolray.model.forward import (
    TILES_AT_ONCE,
    embed,
    hidden_states,
    image_features,
    target_states,
    tower_features,
)
from smolray.model.load import load_model
from smolray.model.tiny import build_model
from tests.offline import asked, encoder_of, picture, shard_row


def test_without_gradients_the_tower_runs_a_large_batch_in_parts(tmp_path):
    model = load_model(ModelConfig(path=str(build_model("tiny", ["what is it?"], tmp_path)), dtype="float32"))
    seen: list[int] = []
    model.model.vision_model.encoder.register_forward_hook(
        lambda module, inputs, output: seen.append(len(output.last_hidden_state))
    )
    tiles = torch.randint(
        0, 256, (2 * TILES_AT_ONCE + 5, 3, 64, 64), dtype=torch.uint8, generator=torch.Generator().manual_seed(0)
    )
    whole = tower_features(model, tiles)
    assert seen == [len(tiles)] and whole.requires_grad, (
        "a trained tower keeps what its backward pass needs in any case"
    )
    seen.clear()
    with torch.no_grad():
        parts = tower_features(model, tiles)
    assert seen == [TILES_AT_ONCE, TILES_AT_ONCE, 5]
    torch.testing.assert_close(parts, whole.detach())


@pytest.mark.parametrize("packing", ["none", "image", "full"])
def test_the_last_mlp_runs_only_for_trained_tokens_to_the_same_result(processor, tiny_path, packing):
    model = load_model(ModelConfig(path=tiny_path, dtype="float32"))
    rows = [
        shard_row(
            [picture(64, 64, seed=i)],
            asked("what shape?", "circle", name=f"{i}"),
            asked("a box?", "yes it is", name=f"{i}b"),
        )
        for i in range(3)
    ]
    encoder = encoder_of(processor, {"longest_edge": 64}, max_length=4096, packing=packing)
    batch = collate_training([Group(row, (0, 1) if packing != "none" else (0,)) for row in rows], encoder)
    weights = torch.randn(batch.label_tokens, 1, generator=torch.Generator().manual_seed(0))
    rows_seen: list[int] = []
    model.model.text_model.layers[-1].mlp.register_forward_hook(
        lambda module, inputs, output: rows_seen.append(output.shape[:-1].numel())
    )

    def states_and_gradients(found):
        model.zero_grad()
        (found * weights).sum().backward()
        return found.detach(), {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}

    there, gradients = states_and_gradients(target_states(model, batch))
    everywhere, expected = states_and_gradients(hidden_states(model, batch).flatten(0, 1)[batch.target_positions])
    assert rows_seen == [batch.label_tokens, batch.input_ids.numel()]
    torch.testing.assert_close(there, everywhere, rtol=1e-5, atol=1e-6)
    norm = torch.sqrt(sum((g**2).sum() for g in expected.values()))
    assert gradients.keys() == expected.keys()
    assert all(float((gradients[name] - expected[name]).norm() / norm) < 1e-6 for name in expected)


# what a GPU computes and the host must know before it can go on: a number, or the size of a result
WAITS = {"_local_scalar_dense", "nonzero", "masked_select", "masked_scatter", "masked_scatter_backward"}


class Waits(TorchDispatchMode):
    """Lists the operations that would make the host wait for a GPU."""

    def __init__(self):
        super().__init__()
        self.found = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if (name := func.overloadpacket.__name__) in WAITS:
            self.found.append(name)
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("packing", ["none", "image"])
def test_the_host_waits_for_nothing_in_a_forward_and_backward_pass(processor, tiny_path, packing):
    """With packing=full neither, on a GPU with FlexAttention; group by group the lengths of the groups are read."""
    model = load_model(ModelConfig(path=tiny_path, dtype="float32"))
    rows = [
        shard_row([picture(64, 64, seed=i)], asked("what shape?", "circle", name=f"{i}"), asked("a box?", "yes"))
        for i in range(3)
    ]
    encoder = encoder_of(processor, {"longest_edge": 64}, max_length=4096, packing=packing)
    batch = collate_training([Group(row, (0, 1) if packing == "image" else (0,)) for row in rows], encoder)
    with Waits() as waits:
        target_states(model, batch).sum().backward()
    assert not waits.found


def test_image_features_stand_at_the_image_tokens(processor, tiny_path):
    model = load_model(ModelConfig(path=tiny_path, dtype="float32"))
    rows = [shard_row([picture(64, 64, seed=i)], asked("what shape?", "circle")) for i in range(3)]
    encoder = encoder_of(processor, {"longest_edge": 64}, max_length=4096, packing="image")
    batch = collate_training([Group(row, (0,)) for row in rows], encoder)
    places = batch.input_ids == encoder.image_token_id
    embeds, features = model.get_input_embeddings()(batch.input_ids), image_features(model, batch)
    assert torch.equal(embed(model, batch), embeds.masked_scatter(places[..., None], features))


def three_questions(processor, packing):
    rows = [shard_row([], asked("what is it? " * (i + 1), "a box", 0, name=f"{i}")) for i in range(3)]
    return collate_training([Group(row, (0,)) for row in rows], encoder_of(processor, packing=packing))


def noise_of(model, batch, alpha, seed):
    return embed(model, replace(batch, meta=batch.meta | {"noise": (alpha, seed)})) - embed(model, batch)


def test_neftune_noise_is_that_of_transformers(processor, tiny_path):
    """Its hook draws from the generator of the process, and takes padding for tokens: a row without any has none."""
    from transformers.integrations.neftune import neftune_post_forward_hook

    model = load_model(ModelConfig(path=tiny_path, dtype="float32"))
    batch = collate_training(
        [Group(shard_row([], asked("what is it?", "a box", 0)), (0,))], encoder_of(processor, packing="none")
    )
    table = model.get_input_embeddings().train()
    table.neftune_noise_alpha = 5.0
    torch.manual_seed(7)
    theirs = neftune_post_forward_hook(table, (batch.input_ids,), table(batch.input_ids)) - table(batch.input_ids)
    torch.testing.assert_close(noise_of(model, batch, 5.0, 7), theirs, atol=1e-7, rtol=1e-5)
    assert theirs.abs().max() > 0


@pytest.mark.parametrize("packing", ["none", "full"])
def test_neftune_noise_goes_by_the_tokens_of_each_sequence(processor, tiny_path, packing):
    model, batch = load_model(ModelConfig(path=tiny_path, dtype="float32")), three_questions(processor, packing)
    assert bool(len(batch.lengths)) == (packing == "full"), "end to end, or padded rows"
    noise, state = noise_of(model, batch, 5.0, 7).detach(), torch.get_rng_state()
    torch.testing.assert_close(noise_of(model, batch, 5.0, 7).detach(), noise, atol=0, rtol=0)
    assert not torch.equal(noise_of(model, batch, 5.0, 8), noise) and torch.equal(torch.get_rng_state(), state)

    parts = (
        noise[0].split(batch.lengths.tolist())
        if packing == "full"
        else [row[branch >= 0] for row, branch in zip(noise, batch.branch, strict=True)]
    )
    assert len({len(part) for part in parts}) == 3
    for part in parts:
        bound = 5.0 / part.numel() ** 0.5
        assert 0.95 * bound < part.abs().max() <= bound * 1.0001
