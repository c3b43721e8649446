"""What a search finds under its name, and what it leaves there: runs of others are not taken for its trials, best.yaml
repeats its trial, and what was interrupted is not taken for finished.
"""

import signal
from types import SimpleNamespace

import pytest
import yaml

from smolray import storage
from smolray.cluster.signals import StopSignals
from smolray.config import ConfigError, load_config, to_yaml
from smolray.run.status import stop_requested
from smolray.tune.callbacks import StopRequest, TrialQueue
from smolray.tune.conflicts import refuse_foreign_runs, refuse_other_search
from smolray.tune.cost import CostEstimate
from smolray.tune.log import STORED, TrialLog, TrialRecord, search_folder
from smolray.tune.result import best_config, finish
from smolray.tune.run import population
from smolray.tune.searcher import make_searcher
from smolray.tune.space import read_space

RATE = "optimizer.learning_rate"


@pytest.fixture
def make_config(tmp_path):
    def make(*overrides, **search):
        base = {"name": "find", "storage": str(tmp_path), "data": {"train": "a", "validation": "b"}}
        return load_config(None, overrides, {**base, "search": {"space": {RATE: {"uniform": [0, 1]}}, **search}})

    return make


def write_run(config, name, file="events.jsonl", text="\n"):
    storage.write_bytes(storage.join(config.storage, name, file), text.encode())


def test_a_run_that_is_called_like_a_trial_is_not_taken_for_it(make_config):
    config = make_config()
    folder = search_folder(config.storage, config.name)
    for name in ("find-3-g2", "find-13", "find-x", "find-2b", "find-best-1", "found-1"):
        write_run(config, name)
    write_run(config, "find-2", "config.yaml")
    write_run(config, "find-4", "control/stop")
    with pytest.raises(ConfigError, match=r"find-2, find-3-g2; choose another name .* or move them away"):
        refuse_foreign_runs(config, folder, 12)
    trial_log = TrialLog(folder)
    for number in (2, 3):
        trial_log.write("trial", number=number, run=f"find-{number}", settings={RATE: 0.1})
    refuse_foreign_runs(config, folder, 12)
    with pytest.raises(ConfigError, match="find-13"):
        refuse_foreign_runs(config, folder, 13)


def test_another_best_trial_is_trained_under_another_name(make_config):
    config = make_config()
    for run in ("find-1", "find-2", "find-2-g2"):
        write_run(config, run, "config.yaml", to_yaml(config))
    runs = [TrialRecord(int(run[5]), run, {RATE: 0.1}) for run in ("find-1", "find-2", "find-2-g2")]
    assert [best_config(config, trial).name for trial in runs] == ["find-best-1", "find-best-2", "find-best-2-g2"]


def test_best_yaml_has_the_batch_of_its_trial_whatever_the_workers_now(make_config):
    write_run(
        make_config(),
        "find-1",
        "config.yaml",
        to_yaml(make_config("train.global_batch=6", "train.per_device_train_batch_size=4")),
    )
    best = best_config(
        make_config("resources.num_workers=3"),
        TrialRecord(1, "find-1", {RATE: 0.1, "train.per_device_train_batch_size": 4}),
    )
    assert best.train.global_batch == 6 and best.train.per_device_train_batch_size == 4
    assert best.resources.num_workers == 3 and best.optimizer.learning_rate == 0.1


def test_a_search_resumes_with_other_workers_only_with_the_same_batch(make_config):
    config = make_config("resources.num_workers=4")
    folder = search_folder(config.storage, config.name)
    storage.write_bytes(storage.join(folder, STORED), to_yaml(config).encode())
    refuse_other_search(make_config("resources.num_workers=2", "train.global_batch=4"), folder)
    refuse_other_search(make_config("resources.num_workers=4", num_samples=99), folder)
    with pytest.raises(ConfigError, match=r"train\.global_batch"):
        refuse_other_search(make_config("resources.num_workers=2"), folder)


def test_a_search_from_before_a_setting_existed_resumes(make_config):
    config = make_config()
    folder = search_folder(config.storage, config.name)
    older = yaml.safe_load(to_yaml(config))
    older["train"]["deal"] = older["train"].pop("load_balancing")  # its earlier name
    del older["dpo"]
    storage.write_bytes(storage.join(folder, STORED), yaml.safe_dump(older).encode())
    refuse_other_search(config, folder)


@pytest.fixture
def half(make_config):
    """A search with train_best and the log of its two of three trials, of which one has ended."""
    config = make_config(num_samples=3, train_best=True)
    trial_log = TrialLog(search_folder(config.storage, config.name))
    for number in (1, 2):
        write_run(config, f"find-{number}", "config.yaml", to_yaml(config))
        trial_log.write("trial", number=number, run=f"find-{number}", settings={RATE: 0.1})
    trial_log.write("report", number=1, report=1, run="find-1", step=8, accuracy=0.5, loss=1.0, seconds=2.0)
    trial_log.write("end", number=1, status="finished", reason="")
    return config, trial_log


def test_an_interrupted_search_does_not_train_its_best(half):
    config, trial_log = half
    result = finish(config, read_space(config), trial_log, total=3, seconds=1.0)
    assert result["left"] == 2 and result["best"]["number"] == 1 and "final" not in result


def test_a_signal_lets_the_trials_save_and_none_begins(half):
    config, trial_log = half
    signals = StopSignals()
    stop = StopRequest(trial_log, config.storage, signals)
    assert not stop.stop_all() and not stop.requested
    signals.number, stop._polled = signal.SIGTERM, 0.0
    assert not stop.stop_all() and stop.requested
    assert [stop_requested(f"{config.storage}/find-{number}") for number in (1, 2)] == [False, True]


def test_tune_saves_its_state_without_taking_the_queue_for_a_wrapper(half, tmp_path):
    from ray.tune.search.search_generator import SearchGenerator

    config, trial_log = half
    searcher = make_searcher(config, read_space(config), trial_log.in_order())
    stop = StopRequest(trial_log, config.storage, StopSignals())
    queue = TrialQueue(searcher, trial_log.in_order(), 3, lambda settings: None, trial_log, stop)
    SearchGenerator(queue).save_to_dir(str(tmp_path), "session")
    assert queue.suggest("")["number"] == 2, "the interrupted trial first"
    assert queue.suggest("")["number"] == 3 and trial_log.trials[3].run == "find-3"
    assert queue.suggest("") == TrialQueue.FINISHED


def test_a_population_has_the_settings_that_the_searcher_suggests(make_config):
    config = make_config(num_samples=3, algorithm="random", scheduler="pbt")
    searcher, trial_log = make_searcher(config, read_space(config)), TrialLog(search_folder(config.storage, "find"))
    stop = StopRequest(trial_log, config.storage, StopSignals())
    no_room = CostEstimate(0.0, "does not fit")
    queue = TrialQueue(
        searcher, [], 3, lambda settings: no_room if settings == searcher.suggest(2) else None, trial_log, stop
    )
    param_space = population(queue, 3)
    assert param_space["number"] == {"grid_search": [1, 3]}
    for number in (1, 3):
        spec = SimpleNamespace(config={"number": number})
        assert param_space[RATE].func(spec) == searcher.suggest(number)[RATE]
        assert param_space["reported"].func(spec) == 0
    assert trial_log.trials[2].status == "failed" and trial_log.trials[2].reason == "does not fit"
