"""A run finishes after evaluations that are not better, wherever it was interrupted."""

import pytest

from smolray.config import ConfigError, load_config
from smolray.run.checkpoint import Progress
from smolray.train.early_stopping import EarlyStopping, evaluations_of
from smolray.train.hooks import evaluates_at

SCORES = [0.5, 0.6, 0.58, 0.61, 0.61, 0.6, 0.7]


def stops_at(patience, threshold=0.0, resumed_after=0):
    """The number of the evaluation after which the run finishes; None where it never does."""
    stopping = EarlyStopping(patience, threshold).add_history(SCORES[:resumed_after])
    for number, score in enumerate(SCORES[resumed_after:], start=resumed_after + 1):
        stopping.add(score)
        if stopping.reached:
            return number
    return None


def test_evaluations_in_a_row_are_counted_from_the_best():
    assert stops_at(None) is None
    assert stops_at(1) == 3
    assert stops_at(2) == 6  # 0.61 again is not better than 0.61
    assert stops_at(3) is None
    assert stops_at(2, threshold=0.05) == 4


@pytest.mark.parametrize("after", range(6))
def test_a_resumed_run_stops_where_an_uninterrupted_one_does(after):
    assert stops_at(2, resumed_after=after) == 6


def test_only_evaluated_checkpoints_before_the_step_are_history():
    saved = [{"event": "checkpoint", "step": n, "accuracy": n / 10} for n in (2, 4, 6)]
    log = [*saved, {"event": "checkpoint", "step": 5}, {"event": "evaluate", "step": 2, "accuracy": {}}]
    assert evaluations_of(log, before=6) == [0.2, 0.4]


@pytest.mark.parametrize(
    ("settings", "steps"),
    [
        (["evaluate.eval_epochs=1"], [4, 8, 12]),
        (["evaluate.eval_epochs=2"], [8]),
        (["evaluate.eval_epochs=0"], []),
        (["evaluate.eval_epochs=0", "evaluate.eval_steps=3"], [3, 6, 9, 12]),
        (["evaluate.eval_epochs=2", "evaluate.eval_steps=5"], [5, 8, 10]),
    ],
)
def test_evaluations_are_due_by_epochs_and_by_steps(settings, steps):
    """Epochs of 4 steps."""
    config = load_config(None, ["data.validation=x", *settings])
    places = [Progress(step=n, epoch=n // 4, consumed=n % 4) for n in range(1, 13)]
    assert [place.step for place in places if evaluates_at(config, place)] == steps


@pytest.mark.parametrize(
    ("settings", "why"),
    [
        (["evaluate.eval_steps=5"], "evaluate.eval_steps = 5 without data.validation"),
        (["evaluate.early_stopping_patience=2"], "without data.validation"),
        (
            ["data.validation=x", "evaluate.early_stopping_patience=2", "evaluate.eval_epochs=0"],
            "the only one is at",
        ),
        (["data.validation=x", "evaluate.eval_steps=2", "search={num_samples: 2}"], "with search: its schedulers"),
        (["optimizer.loraplus_lr_ratio=16"], "loraplus_lr_ratio = 16 with lora = null"),
    ],
)
def test_settings_that_could_not_work_are_refused(settings, why):
    with pytest.raises(ConfigError, match=why):
        load_config(None, settings)
