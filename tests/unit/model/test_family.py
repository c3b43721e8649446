"""Small models of the SmolVLM family by their published configs, without weights: which are taken, which refused."""

import json
from pathlib import Path

import pytest

from smolray.config import ConfigError, ModelConfig
from smolray.data.processor import load_processor
from smolray.engine.pipeline.load import empty_model
from smolray.model.load import load_model
from smolray.planner.model_files import shape_of
from smolray.pretrained import model_config
from tests.real import MODELS, real_model

README = Path(__file__).parents[3] / "smolray" / "README.md"

SIGLIP_BASE = {
    "hidden_size": 768,
    "intermediate_size": 3072,
    "num_attention_heads": 12,
    "num_hidden_layers": 12,
    "image_size": 512,
    "patch_size": 16,
}
SIGLIP_SO = {
    "hidden_size": 1152,
    "intermediate_size": 4304,
    "num_attention_heads": 16,
    "num_hidden_layers": 27,
    "image_size": 384,
    "patch_size": 14,
}


def llama(hidden: int, layers: int, heads: int, kv_heads: int, intermediate: int, vocab: int, theta: float) -> dict:
    return {
        "model_type": "llama",
        "hidden_size": hidden,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "head_dim": 64,
        "intermediate_size": intermediate,
        "vocab_size": vocab,
        "rope_theta": theta,
        "rms_norm_eps": 1e-5,
        "max_position_embeddings": 8192,
    }


def smolvlm(vision: dict, text: dict, scale: int, kind: str = "idefics3", tied: bool = False, made: str = "") -> dict:
    name = {"idefics3": "Idefics3", "smolvlm": "SmolVLM"}[kind]
    return {
        "architectures": [made or f"{name}ForConditionalGeneration"],
        "model_type": kind,
        "vision_config": vision,
        "text_config": text,
        "scale_factor": scale,
        "image_token_id": 49190,
        "tie_word_embeddings": tied,
    }


TEXT_135M = llama(576, 30, 9, 3, 1536, 49280, 100_000.0)
TEXT_360M = llama(960, 32, 15, 5, 2560, 49280, 100_000.0)
TEXT_1_7B = llama(2048, 24, 32, 32, 8192, 49280, 130_000.0)
TAKEN = {
    "SmolVLM-256M": (smolvlm(SIGLIP_BASE, TEXT_135M, 4), 256_484_928),
    "SmolVLM-500M": (smolvlm(SIGLIP_BASE, TEXT_360M, 4), 507_482_304),
    "SmolVLM (2.2B)": (smolvlm(SIGLIP_SO, TEXT_1_7B | {"vocab_size": 49155}, 3), 2_246_272_880),
    "SmolVLM2-256M": (smolvlm(SIGLIP_BASE, TEXT_135M, 4, "smolvlm"), 256_484_928),
    "SmolVLM2-500M": (smolvlm(SIGLIP_BASE, TEXT_360M, 4, "smolvlm"), 507_482_304),
    "SmolVLM2-2.2B": (smolvlm(SIGLIP_SO, TEXT_1_7B, 3, "smolvlm"), 2_246_784_880),
    "SmolDocling-256M": (smolvlm(SIGLIP_BASE, TEXT_135M, 4), 256_484_928),
    "Granite-Docling-258M": (smolvlm(SIGLIP_BASE, TEXT_135M | {"vocab_size": 100352}, 4, tied=True), 257_517_120),
}
REFUSED = {
    "ColSmolVLM-256M": (smolvlm(SIGLIP_BASE, TEXT_135M, 4, made="ColIdefics3"), "architecture ColIdefics3"),
    "ColSmolVLM-500M": (smolvlm(SIGLIP_BASE, TEXT_360M, 4, made="ColIdefics3"), "architecture ColIdefics3"),
    "Idefics3 over Granite": (smolvlm(SIGLIP_BASE, TEXT_135M | {"model_type": "granite"}, 4), "of type 'granite'"),
    "Idefics3 over Mistral": (smolvlm(SIGLIP_BASE, TEXT_135M | {"model_type": "mistral"}, 4), "of type 'mistral'"),
    "PaliGemma": ({"model_type": "paligemma", "text_config": {}, "vision_config": {}}, "model type 'paligemma'"),
}


def written(config: dict, folder: Path) -> ModelConfig:
    (folder / "config.json").write_text(json.dumps(config))
    return ModelConfig(path=str(folder))


@pytest.mark.parametrize("name", TAKEN)
def test_a_model_of_the_family_is_taken_with_its_published_size(name, tmp_path):
    config, parameters = TAKEN[name]
    model = written(config, tmp_path)
    model_config(model)
    assert sum(p.numel() for p in empty_model(model).parameters()) == parameters
    assert shape_of(model).parameters == parameters


@pytest.mark.parametrize("name", REFUSED)
def test_another_model_is_refused_everywhere_with_one_reason(name, tmp_path):
    config, reason = REFUSED[name]
    model = written(config, tmp_path)
    for use in (load_model, load_processor, shape_of):
        with pytest.raises(ConfigError, match=reason) as refused:
            use(model)
        assert str(tmp_path) in str(refused.value) and "expected" in str(refused.value)


def test_text_layers_of_another_kind_are_refused_though_their_weights_fit(tmp_path):
    folder = real_model(MODELS[0], tmp_path / "model")
    config = json.loads((folder / "config.json").read_text())
    config["text_config"] |= {"model_type": "granite", "attention_multiplier": 0.1, "logits_scaling": 8.0}
    with pytest.raises(ConfigError, match="the losses would be wrong"):
        load_model(written(config, folder))


def test_the_readme_names_each_model_and_why_one_is_refused():
    lines = README.read_text(encoding="utf-8").splitlines()
    table = {cells[1].strip(): cells[2].strip() for cells in (line.split("|") for line in lines) if len(cells) == 4}
    assert {name: table.get(name) for name in TAKEN} == dict.fromkeys(TAKEN, "loads")
    for name, (_, reason) in REFUSED.items():
        assert table.get(name, "").startswith("refused: ") and reason.replace("'", "`") in table[name], name
