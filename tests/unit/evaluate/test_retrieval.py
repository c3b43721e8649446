"""Image search by text: the metrics are the standard ones, whatever blocks and workers they are computed in."""

import tracemalloc

import numpy as np
import pytest
from sklearn.metrics import average_precision_score

from smolray.evaluate.bootstrap import MetricError
from smolray.evaluate.retrieval import EmbeddedPairs, average_precision, per_text, recall_at, report_of


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


def test_similarities_that_mean_nothing_are_refused():
    good = np.eye(3)
    with pytest.raises(MetricError, match="1 similarities are not numbers"):
        recall_at(np.where(good == 1, [np.nan, 1, 1], 0), good, 1)
    with pytest.raises(MetricError, match=r"texts \[2\] have no relevant image"):
        average_precision(good, np.diag([1, 1, 0]))
    with pytest.raises(MetricError, match="found"):
        average_precision(good, good[:2])


def embedded(texts, images, parts=1, order=1):
    """(text vectors, image vectors), text n asking for images n and n + 1, spread over `parts` workers."""
    workers = [EmbeddedPairs() for _ in range(parts)]
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
        workers[place % parts].add_image(record, images[m])
        workers[place % parts].add_text(record, texts[n], [record["key"]])
    for other in workers[1:]:
        workers[0].add(other)
    return workers[0]


def vectors(count, seed, width=16):
    made = np.random.default_rng(seed).normal(size=(count, width)).astype(np.float32)
    return made / np.linalg.norm(made, axis=1, keepdims=True)


def test_metrics_have_intervals_over_the_texts():
    images = vectors(60, 1)
    metrics = report_of(embedded(images + vectors(60, 0) * 1.5, images)).metrics
    assert list(metrics) == ["exact_match", "recall@1", "recall@5", "recall@10", "mean_average_precision"]
    for name in list(metrics)[1:]:
        found = metrics[name]["overall"]
        assert found["low"] < found["value"] < found["high"] and found["samples"] == 60


def test_precision_of_one_wanted_image_lies_between_recalls():
    similarity = np.eye(60) * 1.5 + np.random.default_rng(1).normal(size=(60, 60))
    means = {name: values.mean() for name, values in per_text(similarity, np.eye(60)).items()}
    assert means["recall@1"] < means["mean_average_precision"] < means["recall@5"]


def test_recall_at_more_than_there_are_images_is_left_out():
    assert list(per_text(np.eye(3), np.eye(3), ranks=(1, 3, 5))) == ["recall@1", "recall@3", "mean_average_precision"]


def test_a_search_block_by_block_has_the_metrics_of_the_whole():
    texts, images = vectors(40, 0), vectors(40, 1)
    texts += images
    relevant = np.eye(40, dtype=bool) | np.eye(40, k=1, dtype=bool)
    whole = {name: values.mean() for name, values in per_text(texts @ images.T, relevant).items()}
    metrics = [report_of(embedded(texts, images), cells).metrics for cells in (1, 130, 10**6)]
    for name, value in whole.items():
        assert metrics[0][name]["overall"]["value"] == pytest.approx(value), name
        assert metrics[1][name] == metrics[2][name] == metrics[0][name]
    assert 0.2 < whole["recall@1"] < 1


def test_predictions_do_not_depend_on_which_worker_has_a_record():
    texts, images = vectors(20, 0), vectors(20, 1)
    (want, *others) = [
        report_of(embedded(texts, images, parts, order)).predictions for parts, order in ((1, 1), (2, 1), (3, -1))
    ]
    assert others == [want] * 2
    assert [(p["id"], p["key"], p["question"]) for p in want[:2]] == [
        ("0-0", "k00000", "t00000"),
        ("1-1", "k00001", "t00001"),
    ]


def test_exact_match_is_recall_at_1_with_ties_too():
    # of two equal images the wrong one counts against the text that asks for the other
    images = np.repeat(vectors(10, 1), 2, axis=0)
    for texts in (images + vectors(20, 0) / 2, np.zeros_like(images)):
        report = report_of(embedded(texts, images))
        assert report.accuracy["overall"] == report.metrics["recall@1"]["overall"]["value"]
        assert report.accuracy["overall"] < 1
    assert report.accuracy["overall"] == 0, "a model that tells nothing apart finds nothing"


def test_a_search_holds_a_block_of_similarities_at_a_time():
    count = 6000
    data = embedded(vectors(count, 0), vectors(count, 1))
    tracemalloc.start()
    report_of(data, 100_000)
    held = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert held < 4 * count * count / 2, "bytes; float32 scores of all would be twice as much"
