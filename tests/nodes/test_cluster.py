"""The role and its units on real nodes: up from nothing, and again after a power cut."""

import time

import pytest

from tests.nodes.conftest import ETC, HOME
from tests.nodes.runs import LOSS_SECONDS, SAVE_STEPS, Run


@pytest.mark.faults
def test_the_role_starts_a_cluster_and_a_second_run_changes_nothing(cluster):
    again = cluster.provision("head", "den")
    assert again.count("changed=0") == 2 and "failed=0" in again, again[-2000:]
    assert cluster.head.run("ls", HOME).stdout.split() == ["gcs", "ray"], "the session and the record lie in the home"
    assert cluster.head.run("stat", "-c", "%a", f"{ETC}/token").stdout.strip() == "440"


@pytest.mark.faults
def test_a_power_cut_costs_only_the_steps_since_the_checkpoint(cluster, shared):
    run = Run(cluster, shared, "worker-cut")
    run.reaches(SAVE_STEPS + 3)
    assert run.events("start")[-1]["workers"] == 2
    step_info, last, den = time.time(), run.events("step")[-1]["step"], cluster.lan["den"]
    den.off()
    gone = cluster.wait_alive("head", "loft", seconds=20)
    seconds = run.trains_again_after(step_info)
    [resumed] = run.events("resume")
    print(
        f"worker cut at step {last}, noticed after {gone:.1f} s; on 1 worker again from step {resumed['step']} after "
        f"{seconds:.1f} s"
    )
    assert resumed["step"] >= last - SAVE_STEPS and run.events("start")[-1]["workers"] == 1
    assert gone <= 12 and seconds <= LOSS_SECONDS
    run.finishes()
    den.on()
    cluster.start("den")
    back = cluster.wait_alive("head", "den", "loft", seconds=60)
    print(f"the node is back {back:.1f} s after power on")


@pytest.mark.faults
def test_a_pulled_cable_is_noticed_and_the_node_rejoins_afterwards(cluster):
    loft = cluster.lan["loft"]
    loft.cable_out()
    gone = cluster.wait_alive("head", "den", seconds=20)
    loft.cable_in()
    back = cluster.wait_alive("head", "den", "loft", seconds=90)
    print(f"pulled cable noticed after {gone:.1f} s, back {back:.1f} s after it was put in")
    assert gone <= 12
    assert "ended with" in (loft.folder / "srv/supervisor.log").read_text(), (
        "a node that was declared dead starts Ray anew"
    )


@pytest.mark.faults
def test_workers_come_back_to_a_head_that_lost_power(cluster):
    before = cluster.python(NODES)
    cluster.head.off()
    time.sleep(3)
    cluster.head.on()
    cluster.start("head")
    back = cluster.wait_alive("head", "den", "loft", seconds=90)
    print(f"cluster whole {back:.1f} s after the head's power on")
    after = cluster.python(NODES)
    workers = [{line for line in nodes.splitlines() if not line.startswith("head")} for nodes in (before, after)]
    assert workers[0] == workers[1], "the workers' nodes are the same ones: the record outlived the power cut"


NODES = """
import ray
ray.init(address="auto", log_to_driver=False, logging_level="ERROR")
for node in ray.nodes():
    if node["Alive"]:
        print(node["Labels"]["smolray.io/node"], node["NodeID"])
"""
