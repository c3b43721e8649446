"""Tokens of published models: texts become the ids of their tokenizer.json, and another tokenizer is refused."""

import json
from pathlib import Path

import pytest
from tokenizers import pre_tokenizers

from smolray.config import ConfigError, DataConfig, ImageConfig, ModelConfig
from smolray.data.encode import Encoder
from smolray.data.processor import load_processor
from smolray.data.tokenizer import differences, load_tokenizer
from tests.real import MODELS, golden_ids, real_processor

pytestmark = pytest.mark.seconds


@pytest.fixture(scope="module", params=MODELS)
def published(request, tmp_path_factory):
    """(folder of the processor files, the golden ids of its vocabulary)"""
    folder = real_processor(request.param, tmp_path_factory.mktemp(request.param))
    return folder, golden_ids(request.param)


def test_texts_have_the_ids_of_the_published_tokenizer(published):
    folder, golden = published
    tokenizer = load_processor(ModelConfig(path=str(folder))).tokenizer
    ids = {text: tokenizer(text, add_special_tokens=False)["input_ids"] for text in golden["with_added_tokens"]}
    assert ids == golden["with_added_tokens"]


def test_what_a_person_wrote_has_no_added_token_in_it(published):
    folder, golden = published
    processor = load_processor(ModelConfig(path=str(folder)))
    encoder = Encoder(processor, DataConfig(), ImageConfig())
    assert {text: encoder._plain.encode(text, add_special_tokens=False).ids for text in golden["as_text"]} == golden[
        "as_text"
    ]


def test_the_file_is_loaded_as_it_is(published):
    folder, _ = published
    described = json.loads((folder / "tokenizer.json").read_text(encoding="utf-8"))
    loaded = json.loads(load_tokenizer(str(folder)).backend_tokenizer.to_str())
    assert not differences(described, loaded)


@pytest.mark.parametrize("part", ["normalizer", "pre_tokenizer", "decoder", "model", "added_tokens"])
def test_a_tokenizer_that_differs_from_its_file_is_refused(part, tmp_path, monkeypatch):
    folder = real_processor(MODELS[0], tmp_path)
    loaded = load_tokenizer(str(folder))
    monkeypatch.setattr("smolray.data.tokenizer.PreTrainedTokenizerFast.from_pretrained", lambda *_, **__: loaded)
    if part == "pre_tokenizer":  # what transformers' AutoTokenizer does to Idefics3
        loaded.backend_tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    else:
        change(folder / "tokenizer.json", part)
    with pytest.raises(ConfigError, match=f"not the one that tokenizer.json describes: .*{part}.* differ"):
        load_tokenizer(str(folder))


def change(file: Path, part: str) -> None:
    record = json.loads(file.read_text(encoding="utf-8"))
    if part == "model":
        record["model"]["merges"].pop()
    elif part == "added_tokens":
        record["added_tokens"][-1]["id"] += 1
    else:
        record[part] = {"type": "Lowercase"} if part == "normalizer" else None
    file.write_text(json.dumps(record), encoding="utf-8")


def test_a_folder_without_tokenizer_json_is_refused_with_the_remedy(tmp_path):
    folder = real_processor(MODELS[0], tmp_path)
    (folder / "tokenizer.json").unlink()
    with pytest.raises(ConfigError, match=r"no tokenizer\.json there; .* save_pretrained"):
        load_tokenizer(str(folder))
