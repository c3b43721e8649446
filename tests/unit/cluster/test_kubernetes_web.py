"""The pages of k8s/web: what the API server accepts, who reaches them, and what they may do."""

import functools
import shutil

import pytest
from typer.main import get_command

from smolray.cli.app import app
from smolray.cluster.kubernetes import overlay_objects
from tests.kubernetes import faults
from tests.unit.cluster.test_kubernetes import K8S, objects_of, one


@functools.cache
def pages():
    if not (shutil.which("kubectl") or shutil.which("kustomize")):
        pytest.skip("neither kubectl nor kustomize is installed")
    return overlay_objects(str(K8S / "web"))


def container():
    [found] = one(pages(), "Deployment")["spec"]["template"]["spec"]["containers"]
    return found


def test_the_api_server_accepts_every_object():
    assert sorted(o["kind"] for o in pages()) == ["Deployment", "NetworkPolicy", "Service"]
    for manifest in pages():
        assert not faults(manifest), manifest["metadata"]["name"]
        assert manifest["metadata"]["namespace"] == "smolray"


def test_the_pages_ask_for_keys_and_their_options_exist():
    words = container()["command"]
    assert words[:2] == ["smolray", "web"] and "--no-key" not in words
    given = dict(zip(words[2::2], words[3::2], strict=True))
    assert given["--key-file"].startswith("/etc/smolray/") and given["--address"] == "http://pool-head-svc:8265"
    known = {option for parameter in get_command(app).commands["web"].params for option in parameter.opts}
    assert set(given) <= known
    volumes = {v["name"]: v for v in one(pages(), "Deployment")["spec"]["template"]["spec"]["volumes"]}
    assert volumes["keys"]["secret"]["secretName"] == "smolray-web-keys"


def test_the_pod_is_not_root_and_has_no_token_of_the_api():
    pod = one(pages(), "Deployment")["spec"]["template"]["spec"]
    assert pod["automountServiceAccountToken"] is False and pod["securityContext"]["runAsNonRoot"] is True
    assert pod["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
    security = container()["securityContext"]
    assert security["readOnlyRootFilesystem"] is True and security["allowPrivilegeEscalation"] is False
    assert security["capabilities"] == {"drop": ["ALL"]} and container()["resources"]["limits"]["memory"]
    assert "/tmp" in {mount["mountPath"] for mount in container()["volumeMounts"]}
    images = {c["image"] for o in objects_of("home") if o["kind"] == "RayCluster" for c in heads(o)}
    assert {container()["image"]} == images, "the pages and the runs are of one version"


def heads(cluster):
    return cluster["spec"]["headGroupSpec"]["template"]["spec"]["containers"]


def test_clients_alone_reach_the_pages_and_they_reach_the_job_server_and_the_storage():
    policy = one(pages(), "NetworkPolicy")["spec"]
    labels = one(pages(), "Deployment")["spec"]["template"]["metadata"]["labels"]
    assert policy["podSelector"]["matchLabels"].items() <= labels.items()
    [rule] = policy["ingress"]
    assert rule["from"] == [{"podSelector": {"matchLabels": {"smolray.io/client": "true"}}}]
    assert [{p["port"] for p in rule["ports"]} for rule in policy["egress"]] == [{8265}, {53}, {443}]
    assert "169.254.0.0/16" in policy["egress"][2]["to"][0]["ipBlock"]["except"]
    client = {"podSelector": {"matchLabels": {"smolray.io/client": "true"}}}
    assert client in one(objects_of("home"), "NetworkPolicy", "ray-jobs")["spec"]["ingress"][0]["from"]
    assert labels["smolray.io/client"] == "true", "the job server lets clients in"
    service = one(pages(), "Service")["spec"]
    assert service["type"] == "ClusterIP" and service["selector"].items() <= labels.items()
