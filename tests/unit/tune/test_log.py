"""The log of a search, suggestions from it, and its report: a restart changes none and logs no trial twice."""

import pytest

from smolray.config import load_config, to_yaml
from smolray.run.events import read_events
from smolray.tune.console import result_lines, trials_table
from smolray.tune.log import FILE, TrialLog, best_trial, read_trials
from smolray.tune.report import importances, report_page
from smolray.tune.searcher import make_searcher
from smolray.tune.space import read_space

SPACE = {
    "optimizer.learning_rate": {"loguniform": [1e-5, 1e-2]},
    "train.per_device_train_batch_size": {"choice": [4, 8, 16]},
}


def searched(**search):
    return load_config(
        None, base={"name": "find", "data": {"train": "a", "validation": "b"}, "search": {"space": SPACE, **search}}
    )


def report(number, n, accuracy, step=None, **fields):
    return {
        "number": number,
        "report": n,
        "run": f"find-{number}",
        "step": step or 10 * n,
        "accuracy": accuracy,
        "loss": 1 - accuracy,
        "seconds": 5.0 * n,
        "memory_bytes": 2**30,
        "workers": 2,
        **fields,
    }


@pytest.fixture
def trial_log(tmp_path):
    """Eight trials: the higher the learning rate, the better. The sixth failed, the eighth is still running."""
    trial_log = TrialLog(str(tmp_path))
    trial_log.write("start", trials=9, slots=2)
    for number in range(1, 9):
        rate = 1e-5 * 2.2**number
        settings = {"optimizer.learning_rate": rate, "train.per_device_train_batch_size": (4, 8, 16)[number % 3]}
        trial_log.write("trial", number=number, run=f"find-{number}", settings=settings)
        for n in range(1, 3 if number % 2 else 4):
            trial_log.write("report", **report(number, n, 0.1 * number + 0.01 * n))
        if number < 8:
            status = "failed" if number == 6 else "stopped" if number % 2 else "finished"
            trial_log.write("end", number=number, status=status, reason="out of memory: <b>" if number == 6 else "")
    return trial_log


def test_the_log_tells_what_the_search_knew(trial_log, tmp_path):
    trials = read_trials(str(tmp_path))
    assert [t.status for t in trials] == [
        "stopped",
        "finished",
        "stopped",
        "finished",
        "stopped",
        "failed",
        "stopped",
        "running",
    ]
    assert [(t.settings, t.steps, t.reason) for t in trials] == [
        (t.settings, t.steps, t.reason) for t in trial_log.trials.values()
    ]
    assert trials[5].value("accuracy") is None and trials[5].reason.startswith("out of memory")
    assert (
        trials[3].value("accuracy") == pytest.approx(0.43) and trials[3].steps == 30 and trials[3].worker_minutes == 0.5
    )
    assert best_trial(trials, "accuracy").number == best_trial(trials, "loss").number == 8


def test_a_report_is_written_once(trial_log, tmp_path):
    before = read_events(str(tmp_path), FILE)
    TrialLog(str(tmp_path)).write("report", **report(8, 2, 0.9))
    assert read_events(str(tmp_path), FILE) == before
    TrialLog(str(tmp_path)).write("report", **report(8, 4, 0.9))
    assert len(read_events(str(tmp_path), FILE)) == len(before) + 1


def test_the_end_of_the_log_reaches_a_remote_storage_at_once(tmp_path):
    folder = f"local://{tmp_path}"  # any scheme but file is remote to smolray: without append
    trial_log = TrialLog(folder)
    trial_log.write("start", trials=1, slots=1)
    trial_log.write("over", stopped=False)
    assert [e["event"] for e in read_events(folder, FILE)] == ["start", "over"]


def test_after_an_exploit_the_reports_continue_from_the_other_trial(trial_log, tmp_path):
    trial_log.write(
        "exploit",
        number=8,
        run="find-8-g2",
        origin="find-2/…",
        hash="h",
        step=10,
        settings={"optimizer.learning_rate": 1e-4},
    )
    trial_log.write("report", **report(8, 2, 0.95, run="find-8-g2"))
    trial = read_trials(str(tmp_path))[7]
    assert (
        trial.value("accuracy") == 0.95 and trial.reported == 2 and trial.settings == {"optimizer.learning_rate": 1e-4}
    )


def test_random_draws_are_the_same_in_every_session():
    config = searched(algorithm="random", num_samples=6)
    first, again = (make_searcher(config, read_space(config)) for _ in range(2))
    drawn = [first.suggest(n) for n in range(1, 7)]
    assert drawn[3:] == [again.suggest(n) for n in range(4, 7)]
    assert len({d["optimizer.learning_rate"] for d in drawn}) == 6


def test_optuna_goes_where_the_trials_were_good(trial_log):
    config = searched(num_samples=30)
    fresh, told = (
        make_searcher(config, read_space(config)),
        make_searcher(config, read_space(config), [*trial_log.trials.values()] * 3),
    )
    assert len(told.study.trials) == 21, "the running trial is not in it, the failed one is"
    assert min(t.value for t in told.study.trials) == 0.0

    def mean_rate(searcher):
        return sum(searcher.suggest(n)["optimizer.learning_rate"] for n in range(100, 120)) / 20

    assert mean_rate(told) > 1.5 * mean_rate(fresh)


def test_two_objectives_are_weighed(trial_log):
    config = searched(second_objective="seconds")
    searcher = make_searcher(config, read_space(config), list(trial_log.trials.values()))
    assert {len(t.values) for t in searcher.study.trials} == {2} and "learning_rate" in str(searcher.suggest(9))
    page = report_page(config, read_space(config), list(trial_log.trials.values()), [])
    assert "on the front of accuracy and seconds" in page


def test_the_report_shows_the_best_the_cost_and_why_a_trial_failed(trial_log, tmp_path):
    config = searched(num_samples=9)
    page = report_page(config, read_space(config), read_trials(str(tmp_path)), read_events(str(tmp_path), FILE))
    for part in (
        "of trial 8",
        "83.0 %",
        "parallel coordinates",
        "Learning curves",
        "Importance",
        "worker minutes",
        "out of memory: &lt;b&gt;",
    ):
        assert part in page, part
    assert "http" not in page.replace("http://www.w3.org", "") and "<script" not in page
    shown = importances(read_trials(str(tmp_path)), config, read_space(config))
    assert set(shown) == set(SPACE) and sum(shown.values()) == pytest.approx(1.0)


def test_the_table_has_a_line_a_trial(trial_log):
    config = searched(num_samples=9)
    table = trials_table(list(trial_log.trials.values()), config, read_space(config), 9)
    assert table.row_count == 8 and "7 of 9 trials ended" in str(table.title)


def test_a_search_section_survives_yaml(tmp_path):
    config = searched(num_samples=9, algorithm="random", second_objective=None)
    (tmp_path / "run.yaml").write_text(to_yaml(config))
    assert load_config(str(tmp_path / "run.yaml")) == config and config.search.num_samples == 9


def test_the_end_says_what_to_do_next():
    best = {
        "number": 2,
        "run": "find-2",
        "accuracy": 0.75,
        "settings": {"optimizer.learning_rate": 3e-4},
        "config": "runs/find/best.yaml",
    }
    result = {
        "trials": 3,
        "steps": 1200,
        "worker_minutes": 4.2,
        "failed": {1: "out of memory"},
        "left": 0,
        "metric": "accuracy",
        "best": best,
    }
    told = "\n".join(result_lines(result, "runs/find"))
    assert (
        "learning_rate=0.0003" in told
        and "--config runs/find/best.yaml" in told
        and "trial 1 failed: out of memory" in told
    )
    assert "interrupted" not in told and "4 trials have not ended; re-run with the same name" in "\n".join(
        result_lines({**result, "left": 4}, "runs/find")
    )
    assert "best" not in "\n".join(result_lines({**result, "best": None}, "runs/find"))
