"""SimPO trains on pairs: two workers give the metrics of one, and the chosen answers gain on the rejected."""

import pytest

from tests.gloo import run_workers
from tests.recipes.curves import step_metrics

STEPS, COMPARED = 12, 4
SIMPO = ["method=simpo", "simpo.beta=2", "simpo.simpo_gamma=0.5"]
JOBS = {"full": SIMPO, "lora": [*SIMPO, "lora={r: 4}", "model.train=[]", "optimizer.learning_rate=1e-2"]}
# On stage 3 every pass is collective: a worker without a micro-batch runs a dummy pair.
STAGES = {"full": "engine.stage=2", "lora": "engine.stage=3"}


@pytest.fixture(scope="module")
def alone(pairs):
    shards, overrides = pairs
    jobs = {name: [*overrides, *settings] for name, settings in JOBS.items()}
    return run_workers(step_metrics, 1, shards, jobs, STEPS)


def test_two_workers_give_the_metrics_of_one(pairs, alone):
    shards, overrides = pairs
    jobs = {name: [*overrides, *settings, STAGES[name]] for name, settings in JOBS.items()}
    two = run_workers(step_metrics, 2, shards, jobs, COMPARED)
    for name in JOBS:
        for step in range(COMPARED):
            for metric, want in alone[name][step].items():
                assert two[name][step][metric] == pytest.approx(want, rel=1e-5, abs=1e-5), f"{name}, {step}: {metric}"


@pytest.mark.parametrize("name", JOBS)
def test_the_chosen_answers_gain_on_the_rejected(alone, name):
    def mean(metric, steps):
        return sum(step[metric] for step in steps) / len(steps)

    first, last = alone[name][:4], alone[name][-4:]
    assert mean("loss", last) < 0.7 * mean("loss", first)
    assert mean("rewards/margins", last) > mean("rewards/margins", first) + 1
