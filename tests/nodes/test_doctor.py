"""Faults planted on real nodes: the doctor names each with its node and a remedy."""

import json
import subprocess

import pytest

pytestmark = [pytest.mark.faults, pytest.mark.timeout(900)]
EXAMINE = """
from smolray.cluster import doctor
from smolray.cluster.findings import findings_json
doctor.join_running({address!r})
print(findings_json(doctor.examine({storage!r})))
"""
FAST_CLOCK = """
#define _GNU_SOURCE
#include <dlfcn.h>
#include <time.h>
int clock_gettime(clockid_t id, struct timespec *t) {
    int (*real)(clockid_t, struct timespec *) = dlsym(RTLD_NEXT, "clock_gettime");
    int failed = real(id, t);
    if (!failed && id == CLOCK_REALTIME) t->tv_sec += 90;
    return failed;
}
"""  # the nodes share the machine's clock: for one of them it is 90 s ahead
ASK = """
import os, urllib.error, urllib.request
headers = {"Authorization": "Bearer " + os.environ["TOKEN"]} if os.environ["TOKEN"] else {}
for method, path in [
    ("GET", "/api/jobs/"), ("POST", "/api/jobs/"), ("DELETE", "/api/jobs/x"), ("GET", "/api/v0/nodes"),
    ("GET", "/nodes?view=summary"), ("GET", "/api/cluster_status"),
    ("GET", "/api/packages/gcs/x.zip"), ("PUT", "/api/packages/gcs/x.zip"),
]:
    body = None if method == "GET" else b'{"entrypoint": "id"}'
    try:
        request = urllib.request.Request(os.environ["JOB_SERVER"] + path, body, headers, method=method)
        status = urllib.request.urlopen(request, timeout=20).status
    except urllib.error.HTTPError as error:
        status = error.code
    print(method, path, status)
"""


def examine(cluster, storage=""):
    out = cluster.python(EXAMINE.format(address=f"{cluster.head.ip}:6379", storage=str(storage)), timeout=400)
    return json.loads(out[out.index("[\n") :])


def ills(found):
    return {(f["name"], f["node"]): f for f in found if f["level"] != "ok"}


def test_doctor_names_every_planted_fault_and_nothing_else(cluster, tmp_path_factory):
    storage = tmp_path_factory.mktemp("storage")
    healthy = ills(examine(cluster, storage))
    assert not {k for k, f in healthy.items() if f["level"] == "fail"}, healthy

    den, loft = cluster.lan["den"], cluster.lan["loft"]
    # den: another version of a package, a name that is 127.0.1.1 and no interface named
    package = den.folder / "srv/extra/transformers-4.0.0.dist-info"
    package.mkdir(parents=True)
    (package / "METADATA").write_text("Metadata-Version: 2.1\nName: transformers\nVersion: 4.0.0\n")
    environment = den.folder / "srv/etc/ray.env"
    environment.write_text(
        "".join(line + "\n" for line in environment.read_text().splitlines() if "SOCKET_IFNAME" not in line)
    )
    den.environment |= {"PYTHONPATH": "/srv/extra"}
    hosts = den.folder / "hosts"
    hosts.write_text(hosts.read_text().replace(f"{den.ip} den", "127.0.1.1 den"))
    # loft: a slow cable, a storage that cannot be written, a clock that is ahead, a port that den does not reach
    (loft.folder / "srv/clock.c").write_text(FAST_CLOCK)
    subprocess.run(
        ["gcc", "-shared", "-fPIC", "-o", loft.folder / "srv/clock.so", loft.folder / "srv/clock.c", "-ldl"], check=True
    )
    loft.environment |= {"LD_PRELOAD": "/srv/clock.so"}
    rule = den.run("ip", "rule", "add", "to", loft.ip, "ipproto", "tcp", "dport", "10101", "prohibit")
    assert rule.returncode == 0, rule.stderr
    for node in (den, loft):
        node.off()
    cluster.wait_alive("head", seconds=20)  # else the nodes that are gone would be taken for those that come
    for node in (den, loft):
        node.on()
    assert loft.run("mount", "--bind", str(storage), str(storage)).returncode == 0
    assert loft.run("mount", "-o", "remount,bind,ro", str(storage)).returncode == 0
    cluster.start("den", "loft")
    cluster.wait_alive("head", "den", "loft", seconds=300)
    loft.rate("100mbit")

    found = ills(examine(cluster, storage))
    print(json.dumps(list(found.values()), indent=1))
    assert (
        "transformers 4.0.0" in found["package", "den"]["found"]
        and "constraints.txt transformers" in found["package", "den"]["remedy"]
    )
    assert "127.0.1.1" in found["host name", "den"]["found"] and "/etc/hosts" in found["host name", "den"]["remedy"]
    assert (
        "GLOO_SOCKET_IFNAME=eth0" in found["interface", "den"]["remedy"]
        or "NCCL_SOCKET_IFNAME=eth0" in found["interface", "den"]["remedy"]
    )
    assert "ead-only" in found["storage", "loft"]["found"] and "writable" in found["storage", "loft"]["remedy"]
    assert found["clock", "loft"]["level"] == "fail" and "timedatectl" in found["clock", "loft"]["remedy"]
    assert (
        abs(float(found["clock", "loft"]["found"].split()[0]) - 90) < 1 and "ahead" in found["clock", "loft"]["found"]
    )
    assert (
        found["ports", "den > loft"]["found"] == "closed: 10101"
        and "open them on loft for den" in found["ports", "den > loft"]["remedy"]
    )
    slow = {pair for name, pair in found if name == "link"}
    assert {"head > loft", "loft > head"} <= slow, slow
    assert not [f for f in found.values() if f["node"] == "head"]
    loft.rate(None)


@pytest.mark.parametrize("token", ["", "f" * 64], ids=["none", "wrong"])
def test_doctor_and_jobs_are_refused_without_the_right_token(cluster, token):
    code = (
        "from smolray.cluster import doctor\n"
        "try:\n    doctor.join_running({!r})\n"
        "except doctor.DoctorError as error:\n    print('told:', error)\n"
    )
    told = cluster.python(
        code.format(f"{cluster.head.ip}:6379"), node="laptop", RAY_AUTH_TOKEN=token, HOME="/srv/nobody"
    )
    assert "told: no cluster to look at" in told
    told = cluster.python(ASK, node="laptop", TOKEN=token, JOB_SERVER=cluster.address)
    answers = told.splitlines()
    assert len(answers) == 8
    assert {line.split()[-1] for line in answers} == {"403" if token else "401"}, answers
