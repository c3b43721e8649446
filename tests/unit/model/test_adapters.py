"""Adapters lie where they are meant, in the numbers that are meant, over the weights that are meant."""

import pytest
import torch
from transformers import AutoModelForImageTextToText

from smolray.config import ConfigError, load_config
from smolray.model.adapters import lora_config, merge, prepare_for_training, trainable
from smolray.model.forward import hidden_states
from smolray.model.load import base_model, group_of, load_model
from smolray.model.tiny import build_config, build_processor
from tests.losses import sft_sum
from tests.offline import TEXTS, asked, encoder_of, picture, shard_row

RECIPE = "vqav2_qlora"


@pytest.fixture(scope="module")
def shape_2b():
    """The 2.2B shape without weights."""
    made = build_config("random-2.2b", build_processor("random-2.2b", TEXTS))
    with torch.device("meta"):
        return AutoModelForImageTextToText.from_config(made)


def adapted(path, *overrides):
    config = load_config(
        None, [f"model.path={path}", "model.dtype=float32", "model.train=[]", "engine.stage=0", *overrides]
    )
    return prepare_for_training(load_model(config.model), config)


@pytest.mark.parametrize(
    ("overrides", "vision", "text"),
    [([], 0, 9_043_968), (["lora.groups=[text,vision]"], 1_492_992, 9_043_968)],
    ids=["text only, our default", "the published notebook"],
)
def test_the_recipe_has_as_many_parameters_as_the_published_notebook(shape_2b, overrides, vision, text):
    from peft import get_peft_model

    lora = load_config(RECIPE, overrides).lora
    with torch.device("meta"):
        model = get_peft_model(AutoModelForImageTextToText.from_config(shape_2b.config), lora_config(shape_2b, lora))
    found = {"vision": 0, "connector": 0, "text": 0}
    for name, parameter in trainable(model).items():
        found[group_of(name)] += parameter.numel()
    assert found == {"vision": vision, "connector": 0, "text": text}


def test_our_default_targets_in_the_text_model_are_those_of_the_recipe(shape_2b):
    ours, recipe = load_config(None, ["lora={}"]).lora, load_config(RECIPE).lora
    assert set(lora_config(shape_2b, ours).target_modules) == set(lora_config(shape_2b, recipe).target_modules)


def test_every_group_has_its_rank_and_all_the_same_scale(tiny_path):
    lora = "lora={r: 4, lora_alpha: 8, groups: [vision, connector, text], ranks: {vision: 2, connector: 6}%s}"
    for rs, scales in (("", {2: 2.0, 4: 2.0, 6: 2.0}), (", use_rslora: true", {2: 8 / 2**0.5, 4: 4.0, 6: 8 / 6**0.5})):
        model = adapted(tiny_path, lora % rs)
        ranks = {}
        for name, module in model.named_modules():
            if hasattr(module, "lora_A") and "default" in module.lora_A:
                rank = module.lora_A["default"].weight.shape[0]
                ranks.setdefault(group_of(name), set()).add(rank)
                assert module.scaling["default"] == pytest.approx(scales[rank])
        assert ranks == {"vision": {2}, "connector": {6}, "text": {4}}


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize(("bits", "kind"), [("", "Linear"), ("4", "Linear4bit"), ("8", "Linear8bitLt")])
def test_adapters_are_fp32_and_only_the_text_model_is_quantised(tiny_path, dtype, bits, kind):
    model = adapted(
        tiny_path,
        "lora.r=2",
        f"model.dtype={dtype}",
        "engine.stage=1",
        *([f"model.load_in_{bits}bit=true"] if bits else []),
    )
    assert {p.dtype for p in trainable(model).values()} == {torch.float32}
    layers = base_model(model).model
    assert type(layers.text_model.layers[0].mlp.down_proj.base_layer).__name__ == kind
    plain = [
        layers.vision_model.encoder.layers[0].mlp.fc1,
        layers.connector.modality_projection.proj,
        base_model(model).lm_head,
    ]
    assert {type(m).__name__ for m in plain} == {"Linear"} and {m.weight.dtype for m in plain} == {
        getattr(torch, dtype)
    }
    if bits == "4":
        state = layers.text_model.layers[0].mlp.down_proj.base_layer.weight.quant_state
        assert state.quant_type == "nf4" and state.nested, "nf4 with double quantisation"


def test_dora_starts_as_the_base_model_and_trains_magnitudes(tiny_path):
    model = adapted(tiny_path, "lora={r: 2, use_dora: true}")
    assert any("lora_magnitude_vector" in name for name in trainable(model))
    batch = training_batch(tiny_path)
    base = load_model(load_config(None, [f"model.path={tiny_path}", "model.dtype=float32"]).model)
    with torch.no_grad():
        torch.testing.assert_close(sft_sum(model.eval(), batch), sft_sum(base.eval(), batch))


@pytest.mark.parametrize("groups", [["text"], ["vision", "connector"], ["vision", "connector", "text"]])
def test_all_linear_adapts_every_linear_layer_of_the_groups_but_the_head(tiny_path, groups):
    model = adapted(tiny_path, "lora.target_modules=all-linear", f"lora.groups=[{','.join(groups)}]")
    plain = load_model(load_config(None, [f"model.path={tiny_path}", "model.dtype=float32"]).model)
    linear = {n for n, m in plain.named_modules() if isinstance(m, torch.nn.Linear) and group_of(n) in groups}
    found = {n.removeprefix("base_model.model.") for n, m in model.named_modules() if hasattr(m, "lora_A")}
    assert found == linear - {"lm_head"}


def test_a_regular_expression_names_whole_modules_as_in_peft(tiny_path):
    model = adapted(tiny_path, "lora.target_modules=.*layers\\.0\\..*(q|v)_proj")
    found = {n.removeprefix("base_model.model.") for n, m in model.named_modules() if hasattr(m, "lora_A")}
    assert found == {f"model.text_model.layers.0.self_attn.{name}_proj" for name in "qv"}


def test_a_group_without_targets_and_a_tied_head_are_refused(tiny_path):
    with pytest.raises(ConfigError, match="'connector'"):
        adapted(tiny_path, "lora={groups: [text, connector], target_modules: [q_proj]}")
    with pytest.raises(ConfigError, match="token embedding"):
        adapted(tiny_path, "lora={target_modules: [q_proj, lm_head]}")


@pytest.mark.parametrize("bits", ["4", "8"])
def test_merging_into_quantised_weights_is_refused(tiny_path, bits):
    with pytest.raises(ConfigError, match="not merged into 4- or 8-bit weights"):
        merge(adapted(tiny_path, "lora.r=2", f"model.load_in_{bits}bit=true"))


@pytest.mark.parametrize("bits", ["4", "8"])
def test_a_quantised_model_trains_on_after_it_was_evaluated(tiny_path, bits):
    """bitsandbytes repacks 4-bit weights for inference on some CPUs: with rounding, and without gradients."""
    model, batch = adapted(tiny_path, "lora.r=2", f"model.load_in_{bits}bit=true"), training_batch(tiny_path)
    with torch.no_grad():
        before = sft_sum(model, batch)
        sft_sum(model.eval(), batch)
        assert torch.equal(sft_sum(model.train(), batch), before)
    sft_sum(model, batch).backward()
    assert all(p.grad is not None for p in trainable(model).values())


def training_batch(path):
    from smolray.config import ModelConfig
    from smolray.data.collate import Group, collate_training
    from smolray.data.processor import load_processor

    encoder = encoder_of(load_processor(ModelConfig(path=path)))
    row = shard_row([picture(64, 64)], asked("what is it?", "a red box"), asked("is it blue?", "no", name="b"))
    return collate_training([Group(row, (0, 1))], encoder)


def saved_bytes(model, batch):
    """(loss, bytes that autograd keeps of a forward pass, parameters left out)."""
    kept, parameters = {}, {p.untyped_storage().data_ptr() for p in model.parameters()}

    def keep(tensor):
        if tensor.untyped_storage().data_ptr() not in parameters:
            kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        loss = sft_sum(model, batch)
    loss.backward()
    return loss.item(), sum(kept.values()), {n: p.grad for n, p in trainable(model).items()}


def test_checkpointing_the_first_layers_keeps_loss_and_gradients(tiny_path):
    batch, found = training_batch(tiny_path), {}
    for layers in ("false", "1", "2", "true"):
        config = load_config(
            None, [f"model.path={tiny_path}", "model.dtype=float32", f"model.gradient_checkpointing={layers}"]
        )
        model = prepare_for_training(load_model(config.model), config)
        flags = [
            [getattr(layer, "gradient_checkpointing", False) for layer in tower]
            for tower in (model.model.vision_model.encoder.layers, model.model.text_model.layers)
        ]
        number = {"false": 0, "true": 3}.get(layers) if layers in ("false", "true") else int(layers)
        assert flags == [[n < number for n in range(3)]] * 2
        found[layers] = saved_bytes(model, batch)
    losses, sizes = [f[0] for f in found.values()], [f[1] for f in found.values()]
    assert len(set(losses)) == 1
    assert sizes == sorted(sizes, reverse=True) and len(set(sizes)) == 4, f"bytes kept: {sizes}"
    for name, gradient in found["true"][2].items():
        torch.testing.assert_close(gradient, found["false"][2][name], atol=1e-6, rtol=1e-5)
    assert hidden_states(model, batch).requires_grad


@pytest.mark.parametrize("use_dora", [False, True])
def test_updates_too_small_for_bf16_survive_the_merge(tiny_path, use_dora):
    """Each changes a weight by less than half a step of bf16; together they must move the outputs as far as they do
    unmerged.
    """

    def change(dtype):
        before = load_model(load_config(None, [f"model.path={tiny_path}", f"model.dtype={dtype}"]).model)
        model = adapted(tiny_path, f"lora={{r: 8, use_dora: {str(use_dora).lower()}}}", f"model.dtype={dtype}")
        rng = torch.Generator().manual_seed(0)
        for name, p in model.named_parameters():
            if "lora_A" in name or "lora_B" in name:  # the same way for every input
                p.data = torch.rand(p.shape, generator=rng) * 2e-3
        after, before = (
            m.model.text_model.layers[0].mlp.down_proj.weight.detach().double() for m in (merge(model), before)
        )
        return before, after - before

    _, wanted = change("float32")
    before, got = change("bfloat16")
    nearest = (before + wanted).bfloat16().double() - before
    kept, kept_by_nearest = (float(found.sum() / wanted.sum()) for found in (got, nearest))
    assert kept == pytest.approx(1, abs=0.1)
    assert abs(kept_by_nearest) < 0.5, "updates of this size would have survived anyhow"


@pytest.mark.parametrize("init", ["pissa", "pissa_niter_4", "olora", "gaussian"])
@pytest.mark.parametrize("rs", ["false", "true"])
def test_adapters_start_as_those_of_peft(tiny_path, init, rs):
    from peft import LoraConfig, get_peft_model

    model = adapted(tiny_path, f"lora={{r: 4, use_rslora: {rs}, init_lora_weights: {init}}}")
    plain = load_model(load_config(None, [f"model.path={tiny_path}", "model.dtype=float32"]).model)
    targets = [n.removeprefix("base_model.model.") for n, m in model.named_modules() if hasattr(m, "lora_A")]
    torch.manual_seed(0)
    peft = get_peft_model(
        plain, LoraConfig(r=4, use_rslora=rs == "true", init_lora_weights=init, target_modules=targets)
    )
    ours, theirs = dict(model.named_parameters()), dict(peft.named_parameters())
    assert ours.keys() == theirs.keys()
    for name, value in theirs.items():
        torch.testing.assert_close(ours[name], value, atol=0, rtol=0, msg=name)


@pytest.mark.parametrize("init", ["pissa", "olora"])
def test_the_weights_and_what_was_taken_out_of_them_are_the_loaded_model(tiny_path, init):
    model, batch = adapted(tiny_path, f"lora={{init_lora_weights: {init}}}"), training_batch(tiny_path)
    base = load_model(load_config(None, [f"model.path={tiny_path}", "model.dtype=float32"]).model)
    name = "model.text_model.layers.0.mlp.down_proj"
    left, whole = (dict(m.named_modules())[name].weight for m in (base_model(model), base))
    assert float((left - whole).abs().max()) > 1e-3 * float(whole.abs().max()), "nothing was taken out"
    with torch.no_grad():
        torch.testing.assert_close(sft_sum(model.eval(), batch), sft_sum(base.eval(), batch), atol=1e-4, rtol=1e-5)


def test_loftq_starts_nearer_to_the_weights_than_4_bits_do(tiny_path):
    """At full rank it is exact: rounded weights + B A are the weights."""
    settings = ["model.load_in_4bit=true", "lora.lora_alpha=16"]
    plain = load_model(load_config(None, [f"model.path={tiny_path}", "model.dtype=float32"]).model)
    name = "model.text_model.layers.0.self_attn.q_proj"
    whole, lost = dict(plain.named_modules())[name].weight, {}
    for rank in (2, 16, min(whole.shape)):
        model = adapted(tiny_path, *settings, f"lora.r={rank}", "lora.init_lora_weights=loftq")
        layer = dict(base_model(model).named_modules())[name]
        held = layer.base_layer.weight
        import bitsandbytes.functional as F

        rounded = F.dequantize_4bit(held.data, held.quant_state)
        lost[rank] = float((rounded + layer.get_delta_weight("default") - whole).norm())
        assert lost[rank] < float((rounded - whole).norm())
    assert sorted(lost.values(), reverse=True) == [*lost.values()] and lost[min(whole.shape)] < 1e-4


@pytest.mark.parametrize("bits", ["", "model.load_in_4bit=true"])
def test_named_modules_are_trained_whole_beside_the_adapters(tiny_path, bits):
    model = adapted(tiny_path, "lora={r: 2, modules_to_save: [embed_tokens, connector]}", *([bits] if bits else []))
    whole = {name for name in trainable(model) if "lora_" not in name}
    inner = "base_model.model.model"
    assert whole == {
        f"{inner}.text_model.embed_tokens.weight",
        f"{inner}.connector.modality_projection.proj.weight",
    }
    sft_sum(model, training_batch(tiny_path)).backward()
    assert all(p.grad is not None and p.grad.any() for name, p in trainable(model).items() if name in whole)


def test_a_tied_head_is_trained_with_its_embeddings_or_refused(tiny_path):
    with pytest.raises(ConfigError, match=r"nearest: lora\.modules_to_save=\[embed_tokens\]"):
        adapted(tiny_path, "lora.modules_to_save=[lm_head]")
    model = base_model(adapted(tiny_path, "lora.modules_to_save=[lm_head,embed_tokens]"))
    assert model.lm_head.weight is model.get_input_embeddings().weight and model.lm_head.weight.requires_grad
