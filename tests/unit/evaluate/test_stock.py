"""What a stock call changes about the answers is measured with a stock call's own tiles, on few questions."""

import io
import json
from pathlib import Path

import pytest
from PIL import Image
from transformers import AutoModelForImageTextToText, AutoProcessor

from smolray.config import ImageConfig, RunConfig
from smolray.evaluate import stock
from smolray.evaluate.metrics.exact_match import is_correct
from smolray.evaluate.stock import stock_answers
from smolray.export import export_run
from smolray.model.load import load_model
from tests.offline import asked, hf_messages, picture, shard_row
from tests.shards import write_shards
from tests.unit.test_export import write_run

pytestmark = pytest.mark.seconds

TWO_TILES_AN_EDGE, ONE = (128, 96), (64, 48)
QUESTIONS = ["what is it?", "which colour is the box?", "is it red?", "describe the image"]


def settings_of(tmp_path, tiny_path, validation, **sections) -> RunConfig:
    """A run over three large images and no small one: an export scales all to 128 pixels."""
    train = [shard_row([picture(*TWO_TILES_AN_EDGE, seed=n)], asked("what is it?", "red")) for n in range(3)]
    return RunConfig(
        name="my-run",
        storage=str(tmp_path),
        model={"path": tiny_path, "dtype": "float32"},
        data={
            "train": write_shards(str(tmp_path / "train"), train),
            "validation": write_shards(str(tmp_path / "validation"), validation),
        },
        image={"longest_edge": 128},
        **sections,
    )


def rows_of(answers: dict[tuple[int, str], str]) -> list:
    """Images 0 and 1 are small, 2 and 3 large; `answers` by image and question."""
    rows = []
    for n, size in enumerate((ONE, ONE, TWO_TILES_AN_EDGE, TWO_TILES_AN_EDGE)):
        conversations = [asked(q, answers.get((n, q), "?"), name=f"{n}{q}") for q in QUESTIONS]
        rows.append(shard_row([picture(*size, seed=10 + n)], *conversations))
    return rows


def by_transformers(folder: str, rows, small: int) -> dict[tuple[int, str], str]:
    """The answers of plain transformers; small images are scaled to `small` pixels."""
    processor, model = AutoProcessor.from_pretrained(folder), AutoModelForImageTextToText.from_pretrained(folder)
    found = {}
    for n, row in enumerate(rows):
        size = {"longest_edge": small if n < 2 else 128}
        for conversation in row.conversations:
            question = hf_messages(conversation)[:1]
            text = processor.apply_chat_template(question, add_generation_prompt=True)
            image = Image.open(io.BytesIO(row.images[0]))
            inputs = processor(text=[text], images=[[image]], return_tensors="pt", size=size)
            ids = model.generate(**inputs, max_new_tokens=16, do_sample=False)[0, inputs["input_ids"].shape[1] :]
            found[n, question[0]["content"][1]["text"]] = processor.decode(ids, skip_special_tokens=True).strip()
    return found


@pytest.fixture(scope="module")
def answers(tmp_path_factory, tiny_path):
    """(answers of plain transformers to tiles of training, to a stock call's) of an exported model."""
    folder = tmp_path_factory.mktemp("answers")
    out = export_run(write_run(folder, settings_of(folder, tiny_path, rows_of({}))))
    trained, called = (by_transformers(out, rows_of({}), small) for small in (64, 128))
    differ = {place for place in trained if trained[place] != called[place]}
    assert differ and {n for n, _ in differ} <= {0, 1}, "only small pictures may have other answers, and some must"
    return trained, called


@pytest.mark.parametrize("right", ["as trained", "stock"])
def test_the_card_and_the_result_say_what_a_stock_call_gets_right(tmp_path, tiny_path, answers, right):
    trained, called = answers
    config = settings_of(tmp_path, tiny_path, rows_of(trained if right == "as trained" else called))
    run = Path(write_run(tmp_path, config))
    (run / "result.json").write_text(json.dumps({"accuracy": {}}))
    card = (Path(export_run(str(run))) / "README.md").read_text()

    said = json.loads((run / "result.json").read_text())["stock_call"]
    same = sum(is_correct(trained[place], [called[place]]) for place in trained) / len(trained)
    assert 0.5 <= same < 1
    want = {"as_trained": 1.0, "stock": same} if right == "as trained" else {"as_trained": same, "stock": 1.0}
    assert said["answers"] == {"metric": "exact_match", "questions": 16, "other_tiles": 8, **want}
    assert said["images"]["longest_edge"] == 128
    assert (said["images"]["validation_images"], said["images"]["validation_same"]) == (4, 2)
    assert "100% of 3 training images and 50% of 4 validation images" in card
    shares = [f"{100 * want[name]:.1f} %" for name in ("as_trained", "stock")]
    assert f"is {shares[0]} with the tiles of training and {shares[1]} with a stock call" in card


def test_few_questions_are_asked_and_those_of_the_same_tiles_once(tmp_path, tiny_path, monkeypatch):
    monkeypatch.setattr(stock, "QUESTIONS", 10)
    config = settings_of(tmp_path, tiny_path, rows_of({}))
    model, asked_about = load_model(config.model), []
    collate = stock.collate_prompts
    monkeypatch.setattr(stock, "collate_prompts", lambda g, e: asked_about.append(len(g)) or collate(g, e))
    found = stock_answers(model, config, ImageConfig(longest_edge=128, upscale=True))
    assert (found.questions, found.other_tiles) == (10, 8)
    assert sum(asked_about) == 10 + 8


def test_a_search_has_no_answers_to_compare(tmp_path, tiny_path):
    config = settings_of(tmp_path, tiny_path, rows_of({}), method="retrieval", engine={"stage": 0})
    assert stock_answers(load_model(config.model), config, ImageConfig(longest_edge=128, upscale=True)) is None


def test_a_metric_that_does_not_apply_is_left_out(tmp_path, tiny_path):
    config = settings_of(tmp_path, tiny_path, rows_of({}), evaluate={"metrics": ["vqa_accuracy"]})
    assert stock_answers(load_model(config.model), config, ImageConfig(longest_edge=128, upscale=True)) is None


@pytest.mark.parametrize("gone", ["the shards", "the result"])
def test_an_export_needs_neither_validation_data_nor_a_result(tmp_path, tiny_path, gone):
    config = settings_of(tmp_path, tiny_path, rows_of({}))
    run = Path(write_run(tmp_path, config))
    if gone == "the shards":
        (tmp_path / "validation" / "manifest.json").unlink()
    card = (Path(export_run(str(run))) / "README.md").read_text()
    assert ("validation questions" in card) == (gone == "the result") and not (run / "result.json").exists()
