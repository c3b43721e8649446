"""Two workers of unequal speed: dealing by what was measured trains the same and is as much faster as the arithmetic
says.
"""

import statistics
import time

import pytest
import torch
import torch.distributed as dist

from smolray.config import load_config
from smolray.data.local import local_plan
from smolray.planner.probe import HardwareProbe, probe_hardware
from smolray.run.checkpoint import Progress
from smolray.train.balance import MEASURED, WARM_UP, MicroBatchBalancer
from smolray.train.loop import TrainLoop
from tests.gloo import build_engine, run_workers
from tests.recipes.curves import stream_of

# seconds that each worker sleeps in a micro-batch
STEPS, MICRO_BATCHES, BREAKS = WARM_UP + MEASURED + 4, 8, (0.15, 0.45)
SLOW = ["engine.stage=2", "train.global_batch=8", "train.per_device_train_batch_size=2", f"train.max_steps={STEPS}"]


def train_unequal(shards: str, overrides: list[str], names: list[str]) -> dict[str, dict[str, list[float]]]:
    """Curves and seconds of a run that balances by "speed" and of one with "equal" counts, on workers that sleep, and
    the balance that the first one found.
    """
    found = {}
    for name in names:
        config = load_config(None, overrides)
        engine = build_engine(config)
        engine.engine.register_forward_hook(lambda *_: time.sleep(BREAKS[dist.get_rank()]))
        balance, losses, seconds, done = [], [], [], []

        def note(step_info, losses=losses, seconds=seconds, done=done):
            losses.append(step_info.metrics.loss)
            seconds.append(step_info.metrics.seconds - step_info.metrics.data_wait_seconds)
            done.append(len(step_info.local.ids))

        balancer = MicroBatchBalancer(
            *engine.data_parallel,
            measure=name == "speed",
            on_balanced=lambda *found, balance=balance: balance.extend(found),
        )
        TrainLoop(
            config,
            engine,
            [local_plan(shards, config)],
            stream_of(shards, config),
            Progress(),
            [note],
            balancer=balancer,
        ).run()
        found[name] = {"losses": losses, "seconds": seconds, "balance": balance, "done": done}
    return found


def look_around() -> dict[str, object]:
    began = time.perf_counter()
    found = probe_hardware(torch.device("cpu"), "float32", (f"10.0.0.{dist.get_rank()}", "id"))
    return {"survey": found.to_json(), "seconds": time.perf_counter() - began}


@pytest.fixture(scope="module")
def unequal(recipe):
    shards, overrides = recipe
    return run_workers(train_unequal, 2, shards, [*overrides, *SLOW], ["equal", "speed"])


def test_balancing_by_speed_trains_what_equal_counts_train(unequal):
    equal, balanced = unequal["equal"], unequal["speed"]
    assert len(balanced["losses"]) == STEPS and set(equal["done"]) == {4}
    assert balanced["done"] == [4] * (WARM_UP + MEASURED) + [6] * 4, (
        "the fast one takes three where the slow one takes one"
    )
    assert balanced["losses"] == pytest.approx(equal["losses"], abs=1e-5)
    assert equal["losses"][-1] < equal["losses"][0]


def test_a_step_is_as_much_shorter_as_the_arithmetic_says(unequal):
    speeds, shares = unequal["speed"]["balance"]
    each = [1 / s for s in speeds]
    before = max(4 * each[0], 4 * each[1])
    after = max(n * t for n, t in zip(shares, each, strict=True))
    measured = [statistics.median(unequal[name]["seconds"][-4:]) for name in ("equal", "speed")]
    assert measured[0] / measured[1] == pytest.approx(before / after, rel=0.15)
    assert measured[0] / measured[1] > 1.5


def test_in_a_contrastive_step_waiting_for_the_others_is_no_work(recipe):
    """Its first pass ends with every worker's embeddings on every worker: the fast one waits there for the slow one."""
    shards, overrides = recipe
    few = ["method=retrieval", "train.global_batch=4", f"train.max_steps={WARM_UP + MEASURED + 1}"]
    balance = run_workers(train_unequal, 2, shards, [*overrides, *SLOW, *few], ["speed"])["speed"]["balance"]
    assert balance[0][0] / balance[0][1] == pytest.approx(BREAKS[1] / BREAKS[0], rel=0.2)


def test_workers_see_cards_and_links_within_seconds():
    found = run_workers(look_around, 3)
    seen = HardwareProbe.from_json(found["survey"])
    assert found["seconds"] < 10
    assert seen.nodes == ("10.0.0.0", "10.0.0.1", "10.0.0.2") and set(seen.links) == {(0, 1), (0, 2), (1, 2)}
    for one in seen.workers:
        assert (
            one.gpu.startswith("CPU") and one.memory > 2**20 and 1e-3 < one.tflops < 100 and 1e8 < one.bandwidth < 1e13
        )
    for link in seen.links.values():
        assert 1e6 < link.bandwidth < 1e12 and 0 < link.latency < 0.1
    assert not seen.unequal and seen.inventory().gpus[0].measured
