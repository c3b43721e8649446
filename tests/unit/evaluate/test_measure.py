"""Metrics by question type, of an evaluation or of predictions that a run has kept."""

from importlib import import_module

import pytest

from smolray.config import METRICS, EvalConfig, load_config
from smolray.evaluate.bootstrap import MetricError
from smolray.evaluate.evaluator import summarize, to_prediction
from smolray.evaluate.measure import goodness, interval, measure, sample_scores, shown
from smolray.run.predictions import prediction_steps, read_predictions, write_predictions
from tests.predictions import predicted, ten_answers


def test_measure_gives_each_metric_by_type_and_says_why_one_is_missing():
    records = [
        predicted("yes", *ten_answers(("yes", 3), ("no", 7)), kind="yes/no", key="a"),
        predicted("2", *ten_answers(("two", 5), ("2", 5)), kind="number", key="b"),
    ]
    records.append(predicted("red", *ten_answers(("blue", 10)), key="b"))
    figures, skipped = measure(records, ["exact_match", "vqa_accuracy"])
    assert not skipped and list(figures) == ["exact_match", "vqa_accuracy"]
    values = {kind: (f["value"], f["samples"]) for kind, f in figures["vqa_accuracy"].items()}
    assert values == {"overall": (pytest.approx(1.9 / 3), 3), "yes/no": (pytest.approx(0.9), 1), "number": (1.0, 1)}
    figures, skipped = measure([predicted("a", "a")], ["vqa_accuracy", "exact_match"])
    assert list(figures) == ["exact_match"] and "ten annotators" in skipped["vqa_accuracy"]
    assert measure([], ["exact_match"]) == ({}, {})


@pytest.mark.parametrize("metric", METRICS)
def test_every_metric_has_a_module_and_a_summary(metric):
    assert callable(import_module(f"smolray.evaluate.metrics.{metric}").score) and METRICS[metric].summary


def test_a_config_takes_every_metric_and_refuses_others():
    assert EvalConfig().metrics == ("exact_match",)
    assert load_config(None, [f"evaluate.metrics=[{','.join(METRICS)}]"]).evaluate.metrics == tuple(METRICS)
    with pytest.raises(ValueError, match="nearest: token_f1"):
        load_config(None, ["evaluate.metrics=[token_f2]"])
    with pytest.raises(MetricError, match="expected one of exact_match, "):
        sample_scores("token_f2", [predicted("a", "a")])


def test_an_error_rate_is_better_the_lower():
    assert goodness("cer", 0.1) > goodness("cer", 0.2) and goodness("cer", 0.0) == 1
    assert goodness("anls", 0.2) > goodness("anls", 0.1) and goodness("recall@1", 0.5) == 0.5


def test_kept_predictions_are_scored_again_without_decoding(tmp_path):
    kept = [
        {
            "id": str(n),
            "key": f"k{n}",
            "type": "t",
            "question": "q",
            "answer": "a",
            "answers": ten_answers(("a", 3), ("b", 7)),
        }
        for n in range(4)
    ]
    for step, text in ((300, "a"), (20, "c")):
        write_predictions(str(tmp_path), step, [to_prediction(r, text) for r in kept])
    (tmp_path / "predictions" / "images.parquet").touch()
    assert prediction_steps(str(tmp_path)) == [20, 300] and prediction_steps(str(tmp_path / "none")) == []
    report = summarize(read_predictions(str(tmp_path), 300), ["vqa_accuracy"])
    assert report.metrics["vqa_accuracy"]["t"]["value"] == pytest.approx(0.9) and report.accuracy == {
        "overall": 1,
        "t": 1,
    }
    assert summarize([]).metrics == {} and summarize([]).accuracy == {}


def test_figures_are_printed_in_percent_and_cider_as_it_is():
    assert (
        shown("anls", 0.5) == "50.0 %"
        and shown("cider", 1.25) == "1.250"
        and shown("anls", -0.01, sign=True) == "-1.0 %"
    )
    assert interval("anls", {"value": 0.0, "low": -0.1, "high": 0.25, "samples": 3}, sign=True) == "-10.0 to +25.0 %"
