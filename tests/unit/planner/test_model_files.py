"""The planner knows a model by its files, wherever they are, and the published ones without a hub."""

import json

import pytest

from smolray.config import ConfigError, ModelConfig
from smolray.planner.model_files import PUBLISHED, known_shape, shape_of
from tests.real import MODELS, real_processor, tokenizer_json

HUB_IDS = {
    "HuggingFaceTB/SmolVLM-256M-Instruct": ("smolvlm-256m", 256_484_928),
    "HuggingFaceTB/SmolVLM2-256M-Video-Instruct": ("smolvlm2-256m", 256_484_928),
    "HuggingFaceTB/SmolVLM2-500M-Video-Instruct": ("smolvlm2-256m", 507_482_304),
    "HuggingFaceTB/SmolVLM-Instruct": ("smolvlm-2.2b", 2_246_272_880),
    "HuggingFaceTB/SmolVLM2-2.2B-Instruct": ("smolvlm2-256m", 2_246_784_880),
}


@pytest.mark.parametrize("path", HUB_IDS)
def test_a_published_model_has_the_parameters_its_hub_page_says(path):
    """With a head of its own: the published configs do not tie it to the embeddings."""
    assert shape_of(ModelConfig(path=path)).parameters == HUB_IDS[path][1]


@pytest.mark.parametrize("path", HUB_IDS)
def test_a_hub_id_that_was_never_loaded_has_the_marks_of_its_tokenizer(path, tmp_path):
    folder = real_processor(HUB_IDS[path][0], tmp_path / "model")
    counted = shape_of(ModelConfig(path=str(folder))).tokens_around_tile
    assert shape_of(ModelConfig(path=path)).tokens_around_tile == pytest.approx(counted)


def test_the_vocabulary_of_2024_is_smaller_than_that_of_smolvlm2():
    assert shape_of(ModelConfig(path="HuggingFaceTB/SmolVLM-Instruct")).text.vocab == 49155
    assert shape_of(ModelConfig(path="HuggingFaceTB/SmolVLM2-2.2B-Instruct")).text.vocab == 49280


@pytest.mark.parametrize("name", MODELS)
def test_files_in_storage_and_in_the_hubs_cache_say_the_same_as_a_folder(name, tmp_path, monkeypatch):
    cached = tmp_path / "hub" / "models--me--mine"
    folder = real_processor(name, cached / "snapshots" / "abc123")
    (cached / "refs").mkdir()
    (cached / "refs" / "main").write_text("abc123")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    shape = shape_of(ModelConfig(path=str(folder)))
    assert shape.tokens_around_tile > (9 if name == "smolvlm-2.2b" else 2)
    assert shape_of(ModelConfig(path=folder.as_uri())) == shape_of(ModelConfig(path="me/mine")) == shape


def test_a_folder_without_a_tokenizer_has_the_marks_of_most_models(tmp_path):
    folder = real_processor(MODELS[0], tmp_path / "model")
    shape = shape_of(ModelConfig(path=str(folder)))
    (folder / "tokenizer.json").unlink()
    assert shape_of(ModelConfig(path=str(folder))) == shape


def test_marks_are_counted_anew_where_a_tokenizer_has_them_as_text(tmp_path):
    folder = real_processor(MODELS[0], tmp_path / "model")
    record = json.loads(tokenizer_json(MODELS[0]))
    record["added_tokens"] = [token for token in record["added_tokens"] if "_col_" not in token["content"]]
    (folder / "tokenizer.json").write_text(json.dumps(record))
    shape = shape_of(ModelConfig(path=str(folder)))
    assert shape.tokens_around_tile > 8


@pytest.mark.parametrize("path", ["nobody/knows-this", "not-a-folder"])
def test_an_unknown_model_is_refused_with_its_path(path):
    with pytest.raises(ConfigError, match=r"config\.json") as refused:
        shape_of(ModelConfig(path=path))
    assert path in str(refused.value)


def test_every_published_name_has_a_known_shape():
    assert all(known_shape(name, vocab).parameters > 2e8 for name, vocab, _ in PUBLISHED.values())
