"""The doctor on a real local Ray: every check answers, and what is planted here is found."""

import json
import time

import pytest

from smolray.cluster import doctor, node_probe
from smolray.cluster.findings import exit_code, findings_json, findings_table


@pytest.fixture(scope="module")
def findings(ray_cluster, tmp_path_factory):
    folder = tmp_path_factory.mktemp("doctor")
    (folder / "storage").mkdir()
    (folder / "model").mkdir()
    (folder / "model" / "config.json").write_text("{}")
    return doctor.examine(str(folder / "storage"), [str(folder / "model"), str(folder / "absent")]), folder


def test_every_check_of_a_node_answers(findings):
    found, folder = findings
    names = {f.name for f in found if f.level == "ok"}
    assert {
        "python",
        "ray",
        "torch",
        "packages",
        "clock",
        "storage",
        "host name",
        "dashboard",
    } <= names, found
    assert not list((folder / "storage").iterdir()), "the doctor leaves nothing behind"


def test_what_is_missing_on_a_node_fails_with_a_remedy(findings):
    found, folder = findings
    [missing] = [f for f in found if f.name == "files" and f.level == "fail"]
    assert str(folder / "absent") in missing.found and missing.remedy
    assert exit_code(found) == 1
    assert found[0].level == "fail", "the worst comes first"
    assert all(f.remedy and f.expected for f in found if f.level != "ok")


def test_findings_are_json_and_a_table(findings):
    from rich.console import Console

    found, _ = findings
    assert [set(f) for f in json.loads(findings_json(found))] == [
        {"name", "node", "level", "found", "expected", "remedy"}
    ] * len(found)
    console = Console(width=200)
    with console.capture() as captured:
        console.print(findings_table(found))
    assert all(f.name in captured.get() for f in found)


def test_a_link_and_an_all_reduce_are_measured(ray_cluster):
    """Two probes of one node: what two nodes do, over the loopback."""
    [node] = doctor._named_nodes().values()
    probes = {"a": doctor._start(doctor.NodeProbe, node), "b": doctor._start(doctor.NodeProbe, node)}
    link = doctor._measure("a", "b", {"a": node, "b": node}, probes, {"a": {"gpus": []}, "b": {"gpus": []}})
    assert not link.error and not link.closed
    assert 0 < link.latency < 0.5 and link.bandwidth > 1e6
    assert 0 < link.all_reduce["gloo"] < 60
    assert abs(doctor._clock_offset(probes["a"])) < 1
    [closed] = ray_cluster.get(probes["a"].closed.remote("127.0.0.1", (1,)))
    assert closed == 1
    for probe in probes.values():
        ray_cluster.kill(probe)


def test_a_missing_cluster_is_reported_at_once(monkeypatch):
    monkeypatch.setattr(doctor.ray, "is_initialized", lambda: False)
    began = time.monotonic()
    with pytest.raises(
        doctor.DoctorError, match=r"no cluster to look at: .*refused.*; run it on a node of the cluster"
    ):
        doctor.join_running("127.0.0.1:1")
    assert time.monotonic() - began < 10


def test_storage_that_cannot_be_written_is_reported(tmp_path):
    (tmp_path / "file").touch()
    uri, error, _ = node_probe._try_storage(str(tmp_path / "file" / "runs"))
    assert uri.endswith("runs") and error
