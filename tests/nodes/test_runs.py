"""Runs over two nodes with the faults of a home: a head without power, a pulled cable, a node that its owner takes or
gives back, a slow link.

Each ends with every sample trained exactly once, and prints the seconds without training.
"""

import statistics
import time

import pytest

from tests.nodes.conftest import ROOT
from tests.nodes.runs import LOSS_SECONDS, SAVE_STEPS, Run

pytestmark = [pytest.mark.faults, pytest.mark.timeout(900)]
HEAD_SECONDS, GROWTH_SECONDS = 120, 90  # the goals, on two cores


def test_a_pulled_cable_costs_only_the_steps_since_the_checkpoint(cluster, shared):
    run = Run(cluster, shared, "cable")
    run.reaches(SAVE_STEPS + 3)
    assert run.events("start")[-1]["workers"] == 2
    step_info, last = time.time(), run.events("step")[-1]["step"]
    cluster.lan["loft"].cable_out()
    seconds = run.trains_again_after(step_info)
    resumed = run.events("resume")[-1]["step"]
    print(f"cable pulled at step {last}: on 1 worker again from step {resumed} after {seconds:.1f} s")
    cluster.lan["loft"].cable_in()
    assert resumed >= last - SAVE_STEPS and seconds <= LOSS_SECONDS
    run.finishes()
    cluster.wait_alive("head", "den", "loft")


def test_a_run_saves_and_grows_when_a_node_returns(cluster, shared):
    cluster.lan["loft"].off()
    cluster.wait_alive("head", "den")
    run = Run(cluster, shared, "returned", "train.per_device_train_batch_size=2", epochs=3)
    run.reaches(SAVE_STEPS + 3)
    assert run.events("start")[-1]["workers"] == 1
    step_info = time.time()
    cluster.lan["loft"].on()
    cluster.start("loft")
    seconds = run.trains_again_after(step_info)
    [grown], resumed = run.events("resize"), run.events("resume")[-1]
    print(
        f"power on: on 2 workers from step {resumed['step']} after {seconds:.1f} s, of which "
        f"{run.interruptions()[-1]} s without a step"
    )
    assert run.events("start")[-1]["workers"] == 2
    assert grown["step"] == resumed["step"], "it has saved: nothing is trained twice"
    assert seconds <= GROWTH_SECONDS
    run.finishes()


def test_a_run_whose_head_loses_power_is_submitted_again_untouched_by_hand(cluster, shared):
    run = Run(cluster, shared, "head-cut")
    run.reaches(SAVE_STEPS + 3)
    step_info, last = time.time(), run.events("step")[-1]["step"]
    cluster.head.off()
    time.sleep(3)
    cluster.head.on()
    cluster.start("head")
    seconds = run.trains_again_after(step_info)
    resumed = run.events("resume")[-1]["step"]
    print(f"head cut at step {last}: training again from step {resumed} after {seconds:.1f} s")
    assert "was lost: submitting it again" in run.log.read_text()
    assert seconds <= HEAD_SECONDS
    run.finishes()


def test_a_slow_link_slows_a_run_and_breaks_nothing(cluster, shared):
    run = Run(cluster, shared, "slow-link", epochs=1)
    run.reaches(SAVE_STEPS + 3)
    slow = run.events("step")[-1]["step"] + 1
    cluster.lan["loft"].rate("100mbit")
    try:
        run.finishes()
    finally:
        cluster.lan["loft"].rate(None)
    fast, slowed = (
        [e["seconds"] for e in run.events("step") if (e["step"] > slow) == late and e["step"] > 3]
        for late in (False, True)
    )
    print(f"100 Mbit/s: {statistics.median(slowed):.2f} s a step, {statistics.median(fast):.2f} s before")
    assert len(run.events("start")) == 1 and statistics.median(slowed) > statistics.median(fast)


def test_a_node_with_a_wrong_token_is_refused_and_disturbs_no_run(cluster, shared):
    loft, wrong = cluster.lan["loft"], "f" * 64
    token = loft.folder / "srv/etc/token"
    right = token.read_text()
    loft.off()
    token.write_text(wrong)
    loft.on()
    cluster.start("loft")
    given = [
        "--config",
        "demo",
        "name=intruder",
        f"storage={shared}/runs",
        f"data.train={shared}/train.parquet",
    ]
    refused = cluster.smolray(
        "submit", "--address", cluster.address, *given, node="laptop", cwd=str(ROOT), RAY_AUTH_TOKEN=wrong
    )
    assert refused.returncode == 2 and "refused the token" in refused.stderr, refused.stderr
    cluster.wait_alive("head", "den")
    run = Run(cluster, shared, "wrong-token", epochs=1)
    run.finishes()
    assert [e["workers"] for e in run.events("start")] == [1] and not (shared / "runs/intruder").exists()
    assert cluster.alive() == {"head", "den"}, "the node with the wrong token tried all the while"
    assert (loft.folder / "srv/supervisor.log").read_text().count("ended with 1") >= 2
    token.write_text(right)
    seconds = cluster.wait_alive("head", "den", "loft")
    print(f"let in {seconds:.1f} s after its token was put right; the run had 0 s without a worker")


def test_a_drained_node_is_empty_and_its_run_continues_without_loss(cluster, shared):
    """The last: its node has left."""
    run = Run(cluster, shared, "drained")
    run.reaches(SAVE_STEPS + 3)
    told = cluster.python(
        f"import os; os.chdir({str(ROOT)!r})\nfrom smolray.cluster.nodes import drain\nfrom smolray.cluster.jobs "
        "import open_client\n"
        f"for line in drain(open_client('{cluster.address}'), '{cluster.address}', 'loft', '{shared}/runs'): "
        "print(line, flush=True)",
        node="laptop",
        timeout=400,
    )
    print(told)
    assert (
        "loft takes no new work" in told and "drained stopped at step" in told and "trains on with 1 worker(s)" in told
    )
    stop, resume = run.events("end")[0]["step"], run.events("resume")[-1]["step"]
    assert stop == resume, "nothing is trained twice"
    assert cluster.alive() == {"head", "den"}
    run.finishes()
