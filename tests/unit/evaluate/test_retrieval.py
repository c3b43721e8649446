"""Image search by text: the figures are the standard ones, and a model's score of a caption is that of the caption
alone.
"""

import tracemalloc

import numpy as np
import pytest
import torch
from sklearn.metrics import average_precision_score

from smolray.config import ModelConfig
from smolray.data.collate import Group, collate_training
from smolray.evaluate.bootstrap import MetricError
from smolray.evaluate.retrieval import (
    Embedded,
    average_precision,
    caption_batches,
    caption_scores,
    found_report,
    mean_log_probabilities,
    measure_retrieval,
    recall_at,
)
from smolray.model.load import load_model
from tests.offline import encoder_of, picture, shard_row


def test_average_precision_is_scikit_learns_with_ties_too():
    rng = np.random.default_rng(0)
    for levels in (3, 10, 10_000):
        scores = rng.integers(0, levels, (50, 30)).astype(float)
        relevant = rng.random((50, 30)) < 0.2
        relevant[:, 0] |= ~relevant.any(axis=1)
        want = [average_precision_score(hits, row) for hits, row in zip(relevant, scores, strict=True)]
        assert average_precision(scores, relevant) == pytest.approx(want)


def test_recall_asks_for_one_relevant_image_among_the_first_k():
    scores = np.array([[0.9, 0.8, 0.7, 0.1], [0.1, 0.9, 0.8, 0.7], [0.5, 0.5, 0.5, 0.5], [0.3, 0.2, 0.9, 0.9]])
    relevant = np.array([[0, 1, 0, 1], [1, 0, 0, 0], [1, 0, 0, 0], [0, 0, 1, 1]])
    found = {k: recall_at(scores, relevant, k).tolist() for k in (1, 2, 3, 4)}
    assert found == {
        1: [False, False, False, True],
        2: [True, False, False, True],
        3: [True, False, False, True],
        4: [True] * 4,
    }


def test_retrieval_figures_have_intervals_over_the_texts():
    rng = np.random.default_rng(1)
    relevant = np.eye(60, dtype=bool)
    figures = measure_retrieval(relevant * 1.5 + rng.normal(size=(60, 60)), relevant, ks=(1, 5, 100))
    assert list(figures) == ["recall@1", "recall@5", "mean_average_precision"]
    for figure in figures.values():
        assert figure["low"] < figure["value"] < figure["high"] and figure["samples"] == 60
    assert figures["recall@1"]["value"] < figures["mean_average_precision"]["value"] < figures["recall@5"]["value"]
    assert measure_retrieval(np.zeros((5, 5)), np.eye(5))["recall@1"]["value"] == 0, (
        "a model that tells nothing apart finds nothing"
    )


def test_scores_that_mean_nothing_are_refused():
    good = np.eye(3)
    with pytest.raises(MetricError, match="1 scores are not numbers"):
        recall_at(np.where(good == 1, [np.nan, 1, 1], 0), good, 1)
    with pytest.raises(MetricError, match=r"texts \[2\] have no relevant image"):
        average_precision(good, np.diag([1, 1, 0]))
    with pytest.raises(MetricError, match="found"):
        average_precision(good, good[:2])


def embedded(texts, images, parts=1, order=1):
    """(text vectors, image vectors), text n asking for images n and n + 1, dealt to `parts` workers."""
    dealt = [Embedded() for _ in range(parts)]
    pairs = [(n, m) for n in range(len(texts)) for m in (n, n + 1) if m < len(images)]
    for place, (n, m) in enumerate(pairs[::order]):
        record = {
            "id": f"{n}-{m}",
            "key": f"k{m:05}",
            "type": "ab"[m % 2],
            "question": "?",
            "answer": f"t{n:05}",
            "answers": [],
        }
        dealt[place % parts].add_image(record, images[m])
        dealt[place % parts].add_text(record, texts[n], [record["key"]])
    for other in dealt[1:]:
        dealt[0].add(other)
    return dealt[0]


def vectors(count, seed, width=16):
    made = np.random.default_rng(seed).normal(size=(count, width)).astype(np.float32)
    return made / np.linalg.norm(made, axis=1, keepdims=True)


def test_a_search_block_by_block_has_the_figures_of_the_whole():
    texts, images = vectors(40, 0), vectors(40, 1)
    texts += images
    relevant = np.eye(40, dtype=bool) | np.eye(40, k=1, dtype=bool)
    whole = measure_retrieval(texts @ images.T, relevant)
    for cells in (1, 130, 10**6):
        report = found_report(embedded(texts, images), cells)
        for name, want in whole.items():
            assert report.metrics[name]["overall"] == pytest.approx(want), (name, cells)
    assert 0.2 < whole["recall@1"]["value"] < 1


def test_predictions_do_not_depend_on_how_records_were_dealt_to_workers():
    texts, images = vectors(20, 0), vectors(20, 1)
    (want, *others) = [
        found_report(embedded(texts, images, parts, order)).predictions for parts, order in ((1, 1), (2, 1), (3, -1))
    ]
    assert others == [want] * 2
    assert [(p["id"], p["key"], p["question"]) for p in want[:2]] == [
        ("0-0", "k00000", "t00000"),
        ("1-1", "k00001", "t00001"),
    ]


def test_exact_match_is_recall_at_1_with_ties_too():
    # of two equal pictures the wrong one counts against the text that asks for the other
    images = np.repeat(vectors(10, 1), 2, axis=0)
    for texts in (images + vectors(20, 0) / 2, np.zeros_like(images)):
        report = found_report(embedded(texts, images))
        assert report.accuracy["overall"] == report.metrics["recall@1"]["overall"]["value"]
        assert report.accuracy["overall"] < 1
    assert report.accuracy["overall"] == 0, "a model that tells nothing apart finds nothing"


def test_a_search_holds_a_block_of_scores_and_no_table_of_all():
    count = 6000
    data = embedded(vectors(count, 0), vectors(count, 1))
    tracemalloc.start()
    found_report(data, 100_000)
    held = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert held < 4 * count * count / 2, "bytes; float32 scores of all would be twice as much"


CAPTIONS = ["a red box", "a blue circle in the picture", "yes", "a small grey box of the same thing", "no"]


@pytest.fixture(scope="module")
def encoder(processor):
    return encoder_of(processor, {"longest_edge": 128}, max_length=4096)


@pytest.fixture(scope="module")
def model(tiny_path):
    torch.manual_seed(0)
    return load_model(ModelConfig(path=tiny_path, dtype="float32")).eval()


def test_a_caption_scores_as_if_it_were_the_only_one(model, encoder):
    images = [picture(64, 64, 1), picture(120, 64, 2), picture(64, 64, 3)]
    of = mean_log_probabilities(model)
    scores = caption_scores(images, CAPTIONS, encoder, of, "what is it?", captions_per_sequence=2)
    alone = [
        [caption_scores([image], [caption], encoder, of, "what is it?").item() for image in images]
        for caption in CAPTIONS
    ]
    assert scores.shape == (5, 3) and scores == pytest.approx(np.array(alone), abs=1e-5)
    assert (scores < 0).all() and np.ptp(scores, axis=1).min() > 1e-5, "the image matters"


def test_a_score_is_the_mean_over_the_captions_tokens_that_plain_transformers_gives(model, encoder):
    image = picture(64, 64, 1)
    (batch,) = caption_batches([image], CAPTIONS[:1], encoder, "what is it?")
    pixels = ((batch.pixel_values.float() / 255 - 0.5) / 0.5)[batch.tile_order][None]
    with torch.no_grad():
        logits = model(
            input_ids=batch.input_ids, pixel_values=pixels, attention_mask=torch.ones_like(batch.input_ids)
        ).logits[0]
    logps = logits.log_softmax(-1)[batch.target_positions, batch.target_ids]
    assert len(logps) > 2 and mean_log_probabilities(model)(batch).item() == pytest.approx(
        logps.mean().item(), abs=1e-5
    )


def test_the_vision_tower_sees_each_image_once(model, encoder):
    seen = []
    handle = model.model.vision_model.encoder.register_forward_hook(
        lambda module, inputs, output: seen.append(len(output.last_hidden_state))
    )
    images = [picture(64, 64, 1), picture(120, 64, 2)]
    caption_scores(images, CAPTIONS * 4, encoder, mean_log_probabilities(model), "", captions_per_sequence=3)
    handle.remove()
    assert seen == [len(encoder.tiler.tiles(image)) for image in images]


def test_captions_that_do_not_fit_are_refused(processor):
    short = encoder_of(processor, {"longest_edge": 128}, max_length=200)
    with pytest.raises(MetricError, match="1 of 2 captions do not fit"):
        list(caption_batches([picture(64, 64, 1)], ["a box", "a box " * 300], short, "what?"))


def test_training_on_captions_finds_the_images(tiny_path, encoder):
    """From chance to near perfect on the images that were trained on."""
    from smolray.model.forward import target_states
    from smolray.model.load import base_model
    from smolray.objectives.base import Normalisers
    from smolray.objectives.sft import sft
    from tests.offline import asked

    torch.manual_seed(0)
    images, captions = [picture(64, 64, seed) for seed in range(4)], ["a red box", "a blue circle", "yes", "no"]
    model = load_model(ModelConfig(path=tiny_path, dtype="float32"))
    rows = [shard_row([image], asked("what?", caption)) for image, caption in zip(images, captions, strict=True)]
    batch = collate_training([Group(row, (0,)) for row in rows], encoder)
    before = measure_retrieval(
        caption_scores(images, captions, encoder, mean_log_probabilities(model.eval()), "what?"), np.eye(4), ks=(1,)
    )
    optimizer = torch.optim.AdamW(model.train().parameters(), lr=2e-3)
    for _ in range(60):
        optimizer.zero_grad()
        sft(base_model(model).lm_head, target_states(model, batch), batch, Normalisers(4, batch.label_tokens))[
            0
        ].backward()
        optimizer.step()
    after = measure_retrieval(
        caption_scores(images, captions, encoder, mean_log_probabilities(model.eval()), "what?"), np.eye(4), ks=(1,)
    )
    assert after["mean_average_precision"]["value"] == 1 > before["mean_average_precision"]["value"]
