"""Two checkpoints side by side: what changed, by how much, and whether that could be chance."""

import json
from io import StringIO
from pathlib import Path

import numpy as np
import pytest
from rich.console import Console
from scipy.stats import binomtest

from smolray.cli.tables import changes_table, comparison_table, metrics_table
from smolray.evaluate.bootstrap import MetricError
from smolray.evaluate.compare import compare_predictions, compare_runs, mcnemar
from smolray.evaluate.evaluator import summarize, to_prediction
from smolray.report.run import write_report
from smolray.run.predictions import write_predictions


def questions(count, per_image=2):
    return [
        {
            "id": f"q{n}",
            "key": f"image{n // per_image}",
            "type": ("colour", "shape")[n % 2],
            "question": f"[what] {n}?",
            "answer": "red",
            "answers": ["red", "Red "],
        }
        for n in range(count)
    ]


def answered(records, right):
    return [to_prediction(record, "red" if hit else "blue") for record, hit in zip(records, right, strict=True)]


def drawn(table):
    console = Console(width=200, file=StringIO())
    console.print(table)
    return console.file.getvalue()


def test_gained_and_lost_questions_are_named_and_counted_by_type():
    records = questions(8)
    before, after = answered(records, [1, 1, 0, 0, 1, 0, 1, 0]), answered(records, [1, 0, 1, 0, 1, 1, 1, 1])
    found = compare_predictions(before, after[::-1])
    assert [r["id"] for r in found.gained] == ["q2", "q5", "q7"] and [r["id"] for r in found.lost] == ["q1"]
    assert (found.lost[0]["a"], found.lost[0]["b"], found.lost[0]["metric_a"], found.lost[0]["metric_b"]) == (
        "red",
        "blue",
        1,
        0,
    )
    counts = {
        kind: (c.gained, c.lost, c.a["value"], c.b["value"], c.difference["value"]) for kind, c in found.by_type.items()
    }
    assert counts == {
        "overall": (3, 1, 0.5, 0.75, 0.25),
        "colour": (1, 0, 0.75, 1, 0.25),
        "shape": (2, 1, 0.25, 0.5, 0.25),
    }
    assert (found.only_a, found.only_b) == (0, 0)
    same = compare_predictions(before, before).by_type["overall"]
    assert same.difference == {"value": 0, "low": 0, "high": 0, "samples": 8} and same.p_value == 1


def test_a_paired_interval_is_narrower_than_the_two_apart():
    """b answers as a does but for 30 of 1,000 questions: apart their intervals overlap widely, side by side the gain is
    plain.
    """
    rng = np.random.default_rng(0)
    records = questions(1000)
    right = rng.random(1000) < 0.6
    better = right.copy()
    better[np.flatnonzero(~right)[:30]] = True
    change = compare_predictions(answered(records, right), answered(records, better)).by_type["overall"]
    assert (
        change.a["high"] > change.b["low"] and 0.01 < change.difference["low"] < 0.03 < change.difference["high"] < 0.05
    )
    assert change.p_value == pytest.approx(2 * 0.5**30)


def test_the_paired_interval_covers_the_true_difference():
    rng, inside, records = np.random.default_rng(3), 0, questions(150, per_image=3)
    for _ in range(150):
        luck = np.repeat(rng.random(50), 3)
        a, b = luck + rng.normal(0, 0.1, 150) < 0.5, luck + rng.normal(0, 0.1, 150) < 0.6
        difference = compare_predictions(answered(records, a), answered(records, b)).by_type["overall"].difference
        inside += difference["low"] <= 0.1 <= difference["high"]
    assert 0.88 <= inside / 150 <= 0.99


@pytest.mark.parametrize(("gained", "lost"), [(0, 0), (1, 0), (3, 1), (5, 5), (0, 12), (40, 60), (1000, 1100)])
def test_mcnemar_is_the_exact_binomial_test(gained, lost):
    want = binomtest(min(gained, lost), gained + lost, 0.5).pvalue if gained + lost else 1.0
    assert mcnemar(gained, lost) == mcnemar(lost, gained) == pytest.approx(want)


def test_graded_and_corpus_metrics_compare_too():
    records = [
        r | {"answers": ["a red bus on the street", "the red bus"], "answer": "a red bus on the street"}
        for r in questions(4)
    ]
    texts = (
        ["a red bus on the road", "a blue car", "the red bus", "bus"],
        ["a red bus on the street", "a blue car", "the red bus", ""],
    )
    before, after = ([to_prediction(r, t) for r, t in zip(records, said, strict=True)] for said in texts)
    for metric in ("anls", "rouge_l", "bleu"):
        found = compare_predictions(before, after, metric)
        overall = found.by_type["overall"]
        assert [r["id"] for r in found.gained] == ["q0"] and found.lost in ([], found.lost[:1])
        assert overall.difference["value"] == pytest.approx(overall.b["value"] - overall.a["value"])
        assert overall.difference["low"] <= overall.difference["value"] <= overall.difference["high"]


def test_a_lower_error_rate_is_a_gain():
    records = [record | {"answers": ["total"], "answer": "total"} for record in questions(4)]
    before, after = (
        [to_prediction(r, t) for r, t in zip(records, texts, strict=True)]
        for texts in (["tatal", "total", "tutal", "total"], ["total", "totally", "total", "total"])
    )
    found = compare_predictions(before, after, "cer")
    assert [r["id"] for r in found.gained] == ["q0", "q2"] and [r["id"] for r in found.lost] == ["q1"]
    assert found.by_type["overall"].difference["value"] == pytest.approx((2 - 2) / 20)
    assert found.by_type["colour"].difference["value"] == pytest.approx(-2 / 10)
    text = drawn(comparison_table(compare_predictions(before, after[:1] + before[1:], "cer")))
    assert "-5.0 %" in text


def test_what_cannot_be_compared_is_refused_and_what_one_lacks_is_counted():
    records = questions(6)
    before = answered(records, [1] * 6)
    found = compare_predictions(before[:5], before[2:])
    assert (found.only_a, found.only_b, found.by_type["overall"].a["samples"]) == (2, 1, 3)
    with pytest.raises(MetricError, match="share no question"):
        compare_predictions(before[:2], before[2:])
    with pytest.raises(MetricError, match="'q1' has other reference answers"):
        compare_predictions(before, [before[0], before[1] | {"answers": ["blue"]}])
    with pytest.raises(MetricError, match="'q0' occurs twice"):
        compare_predictions([before[0], before[0]], before)
    with pytest.raises(MetricError, match="expected one of exact_match"):
        compare_predictions(before, before, "f1")


def test_runs_are_compared_at_the_steps_asked_for(tmp_path):
    records = questions(4)
    for run, step, right in (
        ("r", 10, [0, 0, 0, 0]),
        ("r", 200, [1, 0, 0, 0]),
        ("r", 3000, [1, 1, 1, 0]),
        ("s", 5, [0, 0, 0, 1]),
    ):
        write_predictions(str(tmp_path / run), step, answered(records, right))
    r, s = str(tmp_path / "r"), str(tmp_path / "s")

    def values(*arguments):
        overall = compare_runs(*arguments).by_type["overall"]
        return overall.a["value"], overall.b["value"]

    assert values(r, r) == (0.25, 0.75), "the two newest"
    assert values(r, r, None, 200) == (0, 0.25) and values(r, r, 3000, 10) == (0.75, 0) and values(r, s) == (0.75, 0.25)
    with pytest.raises(MetricError, match=r"predictions of step 7, found steps \[10, 200, 3000\]"):
        compare_runs(r, s, 7)
    with pytest.raises(MetricError, match=r"another evaluation to compare with, found steps \[5\]"):
        compare_runs(s, s)


def test_tables_show_values_intervals_and_the_questions_that_changed():
    records = questions(40)
    before, after = answered(records, [0] * 40), answered(records, [0] * 20 + [1] * 20)
    found = compare_predictions(before, after)
    text = drawn(comparison_table(found))
    line = next(line for line in text.splitlines() if line.startswith("overall"))
    assert "40" in line and "+50.0 %" in line and " 20 " in line and "1.9e-06" in line and "to +" in line
    assert [line.split()[0] for line in text.splitlines()[2:]] == ["colour", "shape"]
    changes = drawn(changes_table(found, limit=3))
    assert changes.count("[what] 2") == 3 and "and 17 more gained" in changes and "red, Red" in changes
    metrics = drawn(metrics_table(summarize(after, ["exact_match"]).metrics))
    assert "exact_match" in metrics and "50.0 %" in metrics and "95 % interval" in metrics


def test_the_report_shows_metrics_with_their_intervals(tmp_path):
    figures = summarize(answered(questions(40), [1, 1, 1, 0] * 10), ["exact_match", "anls"]).metrics
    (tmp_path / "result.json").write_text(json.dumps({"metrics": figures, "accuracy": {"overall": 0.75}}))
    text = Path(write_report(str(tmp_path))).read_text(encoding="utf-8")
    overall = figures["anls"]["overall"]
    assert (
        f"anls, overall</th><td>40</td><td>75.0 %</td><td>{100 * overall['low']:.1f} to {100 * overall['high']:.1f} %"
        in text
    )
    assert text.count("exact_match, ") == 3
