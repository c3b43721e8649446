"""A fault planted in the facts of a node is named with the node and a remedy; a healthy cluster has none."""

import copy

import pytest

from smolray.cluster.checks import diagnose
from smolray.cluster.findings import Finding
from smolray.cluster.network_checks import Link, public_dashboard, ring_all_reduce_seconds, token_check

GPU_FACTS = {
    "name": "NVIDIA GeForce RTX 3090",
    "used": 1e9,
    "total": 24e9,
    "capability": (8, 6),
    "busy": False,
    "processes": [],
    "slowed": [],
    "lanes": (16, 16),
    "memory_errors": None,
    "rows_to_replace": False,
    "rows_broken": False,
}
HEALTHY = {
    "python": "3.11.7",
    "ray": "2.60.0",
    "torch": "2.13.0+cu128",
    "cuda": "12.8",
    "driver": "570.1",
    "packages": {"torch": "2.13.0", "ray": "2.60.0"},
    "gpus": [GPU_FACTS],
    "gpu_pairs": [],
    "xid": [],
    "torch_gpus": (1, ["sm_75", "sm_80", "sm_86", "sm_90"]),
    "ray_gpus": 1,
    "host": "den",
    "host_address": "192.168.1.11",
    "address": "192.168.1.11",
    "interfaces": {"lo": ["127.0.0.1"], "eno1": ["192.168.1.11"], "wlan0": ["192.168.1.77"]},
    "interface_of": {"gloo": "eno1", "nccl": "eno1"},
    "clock_offset": 0.002,
    "shm": (8e9, 16e9),
    "disk": ("/var/lib/smolray/ray", 200e9, 500e9),
    "token": ("/home/ray/.ray/auth_token", ""),
    "builds": {"C++ compiler": True, "Python.h": True},
    "storage": ("s3://bucket/runs", "", 0.02),
    "paths": {"/data/model": "abc"},
}
GOOD_LINK = Link("head", "den", 0.0002, 117e6, (), {"gloo": 0.15})


def nodes(**changes):
    """A head, a loft and a den that differs from them by `changes`."""
    return {"head": HEALTHY, "loft": HEALTHY, "den": copy.deepcopy(HEALTHY) | changes}


def ills(found):
    return [f for f in found if f.level != "ok"]


def test_a_healthy_cluster_has_no_fault():
    found = diagnose(nodes(), [GOOD_LINK])
    assert not ills(found)
    told = {f.name for f in found}
    assert {
        "python",
        "packages",
        "host name",
        "interface",
        "clock",
        "shared memory",
        "disk",
        "GPU 0",
        "storage",
        "files",
    } <= told
    assert {"link", "ports", "gloo all-reduce"} <= told


@pytest.mark.parametrize(
    ("changes", "name", "level", "found", "remedy"),
    [
        ({"python": "3.12.1"}, "python", "fail", "3.12.1", "constraints.txt"),
        ({"torch": "2.12.0"}, "torch", "fail", "2.12.0", "constraints.txt"),
        ({"cuda": "12.6"}, "cuda", "fail", "12.6", "constraints.txt"),
        ({"driver": "550.9"}, "driver", "warn", "550.9", "driver"),
        (
            {"packages": {"torch": "2.13.0", "ray": "2.59.0"}},
            "package",
            "fail",
            "ray 2.59.0",
            "pip install -c constraints.txt ray",
        ),
        ({"packages": {"torch": "2.13.0"}}, "package", "fail", "ray missing", "pip install -c constraints.txt ray"),
        (
            {"packages": {"torch": "2.13.0", "ray": "2.60.0", "apex": "0.1"}},
            "package",
            "fail",
            "apex 0.1",
            "pip uninstall apex",
        ),
        (
            {"host_address": "127.0.1.1", "interface_of": {"gloo": None, "nccl": "eno1"}},
            "host name",
            "fail",
            "den is 127.0.1.1",
            "/etc/hosts",
        ),
        (
            {"host_address": None, "interface_of": {"gloo": None, "nccl": "eno1"}},
            "host name",
            "fail",
            "den is unknown",
            "/etc/hosts",
        ),
        (
            {"interface_of": {"gloo": "enp5s0", "nccl": "eno1"}},
            "interface",
            "fail",
            "GLOO_SOCKET_IFNAME=enp5s0 is not there",
            "GLOO_SOCKET_IFNAME=eno1",
        ),
        (
            {"interface_of": {"gloo": "eno1", "nccl": "wlan0"}},
            "interface",
            "warn",
            "NCCL_SOCKET_IFNAME=wlan0",
            "NCCL_SOCKET_IFNAME=eno1",
        ),
        (
            {"interface_of": {"gloo": "eno1", "nccl": None}},
            "interface",
            "warn",
            "is not set",
            "NCCL_SOCKET_IFNAME=eno1",
        ),
        ({"clock_offset": -4.0}, "clock", "warn", "4 s behind", "timedatectl"),
        ({"clock_offset": 1200.0}, "clock", "fail", "1.2e+03 s ahead", "timedatectl"),
        ({"shm": (60e6, 64e6)}, "shared memory", "fail", "57 MiB of 61 MiB", "--shm-size"),
        ({"shm": (500e6, 16e9)}, "shared memory", "warn", "477 MiB", "/dev/shm"),
        ({"disk": ("/x", 20e9, 500e9)}, "disk", "fail", "under /x", "make room"),
        ({"disk": ("/x", 5e9, 50e9)}, "disk", "warn", "4.7 GiB of 46.6 GiB", "make room"),
        ({"builds": {"C++ compiler": True, "Python.h": False}}, "compiler", "fail", "no Python.h", "python3-dev"),
        (
            {"builds": {"C++ compiler": False, "Python.h": True}, "gpus": [], "ray_gpus": 0},
            "compiler",
            "warn",
            "no C++ compiler",
            "apt install g++",
        ),
        ({"ray_gpus": 0}, "GPUs", "warn", "Ray counts 0, the driver 1", "CUDA_VISIBLE_DEVICES"),
        ({"storage": ("s3://bucket/runs", "Access Denied", 0.0)}, "storage", "fail", "Access Denied", "credentials"),
        ({"paths": {"/data/model": None}}, "files", "fail", "/data/model is missing", "copy it"),
        ({"paths": {"/data/model": "other"}}, "files", "fail", "/data/model differs", "copy it"),
        (
            {"gpus": [GPU_FACTS | {"processes": [{"pid": 7, "name": "blender", "memory": 6e9}]}]},
            "GPU 0",
            "warn",
            "blender (pid 7, 5.6 GiB)",
            "--num-gpus",
        ),
    ],
)
def test_a_fault_of_one_node_is_named_with_its_remedy(changes, name, level, found, remedy):
    ill, *more = ills(diagnose(nodes(**changes), [GOOD_LINK]))
    assert (ill.name, ill.node, ill.level) == (name, "den", level) and {m.name for m in more} <= {"interface"}
    assert found in ill.found and remedy in ill.remedy and ill.expected


def test_a_single_node_needs_no_interface_and_no_reachable_name():
    alone = {"den": HEALTHY | {"host_address": "127.0.1.1", "interface_of": {"gloo": None, "nccl": None}}}
    assert not ills(diagnose(alone))


def test_nodes_without_gpus_are_not_compared_by_cuda():
    assert not ills(diagnose(nodes(gpus=[], ray_gpus=0, cuda=None, driver=None)))


@pytest.mark.parametrize(
    ("link", "name", "level", "found"),
    [
        (Link("head", "den", error="TimeoutError: timed out"), "link", "fail", "timed out"),
        (Link("head", "den", 0.0002, 117e6, (10100, 10101)), "ports", "fail", "closed: 10100, 10101"),
        (Link("head", "den", 0.0003, 11.9e6), "link", "warn", "95 Mbit/s"),
        (Link("head", "den", 0.03, 117e6), "link", "warn", "30 ms"),
    ],
)
def test_a_fault_of_a_link_names_the_pair(link, name, level, found):
    [ill] = ills(diagnose(nodes(), [link]))
    assert (ill.name, ill.node, ill.level) == (name, "head > den", level)
    assert found in ill.found and ill.remedy


def test_the_predicted_all_reduce_is_that_of_a_ring():
    # each of two sends half, twice
    assert ring_all_reduce_seconds(2, 16 * 2**20, 125e6, 0.0) == pytest.approx(16 * 2**20 / 125e6)
    assert ring_all_reduce_seconds(4, 400.0, 100.0, 0.5) == pytest.approx(6 * (1.0 + 0.5))
    [link] = [f for f in diagnose(nodes(), [GOOD_LINK]) if f.name == "link"]
    assert "predicted 144 ms" in link.found and "936 Mbit/s" in link.found


def test_an_open_job_server_fails_where_others_reach_it():
    assert [f.level for f in token_check({"without": 401, "wrong": 403}, True)] == ["ok", "ok"]
    assert [f.level for f in token_check({"without": 200, "wrong": 200}, True)] == ["fail", "fail"]
    assert [f.level for f in token_check({"without": 200, "wrong": 403}, False)] == ["warn", "ok"]
    assert all("RAY_AUTH_MODE" in f.remedy for f in token_check({"without": 200}, True))


def test_a_public_dashboard_fails():
    assert public_dashboard(["127.0.0.1", "192.168.1.10"]).level == "ok"
    ill = public_dashboard(["192.168.1.10", "8.8.8.8"])
    assert ill.level == "fail" and "8.8.8.8" in ill.found and "--dashboard-host" in ill.remedy


def test_the_worst_comes_first():
    levels = [
        f.level
        for f in diagnose(
            nodes(python="3.9", clock_offset=2.0), [GOOD_LINK], [Finding("probe", "loft", "fail", "no answer")]
        )
    ]
    assert levels == sorted(levels, key=["fail", "warn", "ok"].index) and levels[:2] == ["fail", "fail"]


@pytest.mark.parametrize(
    ("changes", "found", "remedy"),
    [
        ({"cuda": None, "torch": "2.13.0+cpu"}, "2.13.0+cpu is built without CUDA", "torch with CUDA"),
        ({"cuda": "13.0"}, "driver 570.1 with CUDA 13.0", "at least 580"),
        ({"torch_gpus": (0, ["sm_86"])}, "torch sees 0 of 1 GPUs", "CUDA_VISIBLE_DEVICES"),
        ({"torch_gpus": (1, ["sm_90"])}, "compute capability 8.6", "see there"),
    ],
)
def test_a_torch_that_cannot_run_on_the_nodes_gpus_is_named_although_all_nodes_have_it(changes, found, remedy):
    everywhere = dict.fromkeys(("head", "den"), HEALTHY | changes)
    ill = ills(diagnose(everywhere, [GOOD_LINK]))
    assert {(f.name, f.node, f.level) for f in ill} == {("CUDA of torch", n, "fail") for n in ("head", "den")}
    assert all(found in f.found and remedy in f.remedy for f in ill)


def test_a_node_without_gpus_needs_no_cuda():
    facts = HEALTHY | {"gpus": [], "ray_gpus": 0, "cuda": None, "torch": "2.13.0+cpu", "torch_gpus": None}
    assert not ills(diagnose({"head": facts, "den": facts}, [GOOD_LINK]))
