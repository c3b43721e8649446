"""The bytes that the planner expects autograd to keep are those it keeps, counted by torch's own hooks."""

import dataclasses

import pytest
import torch
from peft import LoraConfig as PeftLoraConfig
from peft import inject_adapter_in_model
from transformers import Idefics3Config
from transformers.models.idefics3.modeling_idefics3 import Idefics3EncoderLayer
from transformers.models.llama.modeling_llama import LlamaDecoderLayer, LlamaRotaryEmbedding

from smolray.config import LoraConfig, ModelConfig, RunConfig
from smolray.data.collate import Group, collate_training
from smolray.model.adapters import prepare_for_training
from smolray.model.load import load_model
from smolray.model.tiny import SHAPES
from smolray.planner.activations import Gradients, adapter_bytes, gradients, kept_bytes, positions
from smolray.planner.model_files import known_shape, shape_of
from smolray.planner.shapes import Training
from smolray.planner.statistics import Load
from tests.losses import sft_sum
from tests.offline import asked, encoder_of, picture, shard_row

ALL = ("vision", "connector", "text")


def saved_bytes(module, run) -> int:
    """Bytes of the distinct storages, weights left out, that autograd keeps while `run` goes forward."""
    weights = {p.untyped_storage().data_ptr() for p in module.parameters()}
    found = {}

    def pack(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            found[storage.data_ptr()] = storage.nbytes()
            kept.append(tensor)  # so that no address is used twice
        return tensor

    kept: list[torch.Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        kept.append(run())
    return sum(found.values())


def load_of(batch) -> Load:
    rows, length = batch.input_ids.shape
    masked = float(rows * length**2) if int(batch.branch.max()) > 0 else 0.0
    return Load(batch.samples, rows, rows * length, 0.0, masked, len(batch.pixel_values), batch.label_tokens)


@pytest.fixture(scope="module")
def batches(processor):
    """One micro-batch of single questions (no mask) and one of packed ones."""
    rows = [
        shard_row(
            [picture(120, 60, seed=i)],
            asked("what shape?", "circle", name=f"{i}"),
            asked("a box?", "yes", name=f"{i}b"),
        )
        for i in range(3)
    ]
    encoder = encoder_of(processor, {"longest_edge": 128}, max_length=4096, packing="image")
    single = collate_training([Group(row, (0,)) for row in rows], encoder)
    packed = collate_training([Group(row, (0, 1)) for row in rows], encoder)
    return {"single": single, "packed": packed}


@pytest.mark.parametrize("packing", ["single", "packed"])
@pytest.mark.parametrize(
    ("train", "lora"),
    [
        (ALL, None),
        (("connector", "text"), None),
        (("text",), None),
        (("vision",), None),
        ((), {"groups": ["text"]}),
        ((), {"groups": ["vision", "connector", "text"]}),
        (("connector",), {"groups": ["text"], "target_modules": ["q_proj", "v_proj"]}),
    ],
    ids=str,
)
def test_bytes_of_the_whole_tiny_model_are_those_autograd_keeps(tiny_path, batches, packing, train, lora):
    config = RunConfig(
        model=ModelConfig(path=tiny_path, dtype="float32", train=train), lora=LoraConfig(r=4, **lora) if lora else None
    )
    model = prepare_for_training(load_model(config.model), config)
    batch, shape, training = batches[packing], shape_of(config.model), Training.of(config)
    measured = saved_bytes(model, lambda: sft_sum(model, batch))
    inputs = len(batch.pixel_values) * 3 * shape.vision.image_size**2  # uint8, the batch's own: not autograd's
    load = load_of(batch)
    expected = (
        sum(
            kept_bytes(shape, u, training, g, load).saved
            for u, g in zip(shape.layers, gradients(shape, training), strict=True)
        )
        - inputs
    )
    assert expected == pytest.approx(measured, rel=0.02)


def config_of(name: str) -> Idefics3Config:
    spec = SHAPES[name]
    config = Idefics3Config(
        vision_config=spec["vision"],
        text_config={**spec["text"], "model_type": "llama"},
        scale_factor=spec["scale_factor"],
    )
    config._attn_implementation = "sdpa"
    return config


FULL = Training(frozenset(ALL), None, "bfloat16")


@pytest.mark.parametrize("name", ["random-256m", "random-2.2b"])
def test_a_vision_layer_of_a_published_shape_keeps_what_is_counted(name):
    config, shape = config_of(name), known_shape(name)
    module = Idefics3EncoderLayer(config.vision_config).bfloat16()
    patches = shape.vision.patches
    x = torch.randn(1, patches, shape.vision.hidden, dtype=torch.bfloat16, requires_grad=True)
    layer = next(u for u in shape.layers if u.kind == "vision")
    expected = kept_bytes(shape, layer, FULL, Gradients(True, True), Load(1, 1, 1, 1, 0, 1, 1)).saved
    # the CPU keeps LayerNorm's statistics in bf16, CUDA in fp32: two norms, two numbers, two bytes
    on_cpu = 2 * 2 * 2 * patches
    assert expected - on_cpu == saved_bytes(module, lambda: module(x, None))


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("name", ["random-256m", "random-500m"])
def test_a_text_layer_of_a_published_shape_keeps_what_is_counted(name, masked):
    config, shape = config_of(name), known_shape(name)
    module, rotary = LlamaDecoderLayer(config.text_config, 0).bfloat16(), LlamaRotaryEmbedding(config.text_config)
    rows, length = 2, 120
    x = torch.randn(rows, length, shape.text.hidden, dtype=torch.bfloat16, requires_grad=True)
    mask = torch.ones(rows, 1, length, length, dtype=torch.bool).tril() if masked else None
    positions = rotary(x, torch.arange(length)[None].expand(rows, length))
    layer = next(u for u in shape.layers if u.kind == "text")
    load = Load(rows, rows, rows * length, 0, float(rows * length**2) if masked else 0.0, 0, 1)
    expected = kept_bytes(shape, layer, FULL, Gradients(True, True), load).saved
    cos_and_sin = sum(p.numel() * p.element_size() for p in positions)  # once a micro-batch, counted at the merge
    assert expected + cos_and_sin == saved_bytes(
        module, lambda: module(x, attention_mask=mask, position_embeddings=positions)
    )


@pytest.mark.parametrize("kind", ["vision", "text"])
def test_adapters_of_fp32_keep_a_cast_of_each_input(kind):
    config, shape, lora = (
        config_of("random-256m"),
        known_shape("random-256m"),
        LoraConfig(r=8, groups=("vision", "text")),
    )
    holder = torch.nn.Module()
    holder.layer = (
        Idefics3EncoderLayer(config.vision_config) if kind == "vision" else LlamaDecoderLayer(config.text_config, 0)
    ).bfloat16()
    inject_adapter_in_model(PeftLoraConfig(r=8, target_modules=list(lora.target_modules)), holder)
    for name, p in holder.named_parameters():
        p.data, p.requires_grad = (p.data.float(), True) if "lora_" in name else (p.data, False)
    length = shape.vision.patches if kind == "vision" else 120
    x = torch.randn(
        1,
        length,
        shape.vision.hidden if kind == "vision" else shape.text.hidden,
        dtype=torch.bfloat16,
        requires_grad=True,
    )
    rotary = LlamaRotaryEmbedding(config.text_config)(x, torch.arange(length)[None]) if kind == "text" else ()
    given = {"attention_mask": None} | ({"position_embeddings": rotary} if kind == "text" else {})
    layer = next(u for u in shape.layers if u.kind == kind)
    load = Load(1, 1, length, 0, 0, 1, 1)
    expected = kept_bytes(shape, layer, Training(frozenset(), lora, "bfloat16"), Gradients(True, True), load).saved
    # as in the tests above
    beside = sum(p.numel() * p.element_size() for p in rotary) if kind == "text" else -2 * 2 * 2 * length
    assert expected + beside == saved_bytes(holder, lambda: holder.layer(x, **given))


def test_2b_with_batch_4_and_13_tiles_keeps_the_designed_gigabytes():
    """The arithmetic's check from the design: bytes saved for backward, bf16, no checkpointing."""
    shape = known_shape("random-2.2b")
    load = Load(4, 4, 4 * 1207, 0, 0, 4 * 13, 16)
    total = {"vision": 0.0, "text": 0.0}
    for layer, gradient in zip(shape.layers, gradients(shape, FULL), strict=True):
        if layer.kind in total:
            total[layer.kind] += kept_bytes(shape, layer, FULL, gradient, load).saved
    assert total["vision"] / 1e9 == pytest.approx(36.6, rel=0.005)
    assert total["text"] / 1e9 == pytest.approx(13.3 - 0.39, rel=0.005), (
        "all 24 layers whole would keep 13.3: the last one's MLP runs for 16 tokens"
    )


def test_layers_frozen_before_anything_trained_keep_nothing():
    shape = known_shape("random-256m")
    training = dataclasses.replace(FULL, full=frozenset({"text"}))
    load = Load(8, 8, 8 * 100, 0, 0, 8, 8)
    for layer, gradient in zip(shape.layers, gradients(shape, training), strict=True):
        kept = kept_bytes(shape, layer, training, gradient, load)
        assert (kept.saved > 0) == (layer.kind in ("merge", "text", "head", "vision_embeddings"))
        assert kept.transient > 0


@pytest.mark.parametrize("dora", [False, True])
def test_adapters_of_the_last_layer_are_priced_at_the_rows_that_run(tiny_path, batches, dora):
    """The rows that go through each adapter are counted in the real model, layer by layer."""
    config = RunConfig(
        model=ModelConfig(path=tiny_path, dtype="float32", train=()), lora=LoraConfig(r=4, use_dora=dora)
    )
    model, batch, shape = (
        prepare_for_training(load_model(config.model), config),
        batches["single"],
        shape_of(config.model),
    )
    seen: dict[str, int] = {}

    def count(name):
        return lambda module, inputs, output: seen.__setitem__(name, inputs[0].shape[:-1].numel())

    for name, module in model.named_modules():
        if hasattr(module, "lora_A") and "text_model" in name:
            module.register_forward_hook(count(name))
    sft_sum(model, batch)
    for layer in (layer for layer in shape.layers if layer.kind == "text"):
        number = layer.name.partition(".")[2]
        for _, linear in layer.linears:
            found = [n for name, n in seen.items() if f"layers.{number}." in name and linear.name in name]
            assert found == [positions(shape, layer, linear, load_of(batch))], (layer.name, linear.name)


def test_adapters_keep_fewer_bytes_in_the_last_layer_by_what_its_mlp_does_not_run():
    shape, load = known_shape("random-256m"), Load(4, 4, 4000, 0, 0, 4, 40)
    training = Training(frozenset(), LoraConfig(r=8), "bfloat16")
    *_, before, last = (layer for layer in shape.layers if layer.kind == "text")
    whole, few = (adapter_bytes(shape, layer, training, load) for layer in (before, last))
    mlp = sum(
        8 * 4 + linear.inputs * 4
        for _, linear in last.linears
        if linear.name.endswith(("gate_proj", "up_proj", "down_proj"))
    )
    assert whole - few == (4000 - 40) * mlp > 0
