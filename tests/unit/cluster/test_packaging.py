"""The Helm chart gives the objects of the kustomize base, and Docker Compose runs the image that is built here."""

import re
import shutil
import subprocess
from pathlib import Path

import helm_python as helm
import pytest
import yaml

K8S = Path(__file__).parents[3] / "k8s"


def by_name(objects):
    """Objects by kind and name, without the namespace, which kustomize writes into each and Helm leaves to the call."""
    found = {(o["kind"], o["metadata"]["name"]): o for o in objects if o and o["kind"] != "Namespace"}
    for one in found.values():
        one["metadata"].pop("namespace", None)
    return found


def rendered(**values):
    """The chart's objects, by Helm's own library (PyPI: helm-python-sdk)."""
    assert not helm.lint(str(K8S / "chart"))["errors"]
    with helm.Chart.load(str(K8S / "chart")) as chart:
        made = chart.render(values, name="pool", namespace="smolray")
    return by_name(one for text in made.values() for one in yaml.safe_load_all(text))


def built(folder):
    if not shutil.which("kubectl"):
        pytest.skip("kubectl is not installed")
    done = subprocess.run(["kubectl", "kustomize", K8S / folder], capture_output=True, text=True, check=True)
    return by_name(yaml.safe_load_all(done.stdout))


def test_the_chart_is_the_kustomize_base():
    assert rendered() == built("base")


def test_the_chart_takes_image_workers_and_keys():
    changed, plain = rendered(workers=3, image="me/it:1", s3Secret="keys"), rendered()
    assert changed.keys() - plain.keys() == {("NetworkPolicy", "ray-s3")}
    spec = changed["RayCluster", "pool"]["spec"]
    (group,) = spec["workerGroupSpecs"]
    assert (group["replicas"], group["minReplicas"], group["maxReplicas"]) == (3, 3, 3)
    for template in (group["template"], spec["headGroupSpec"]["template"]):
        (container,) = template["spec"]["containers"]
        assert container["image"] == "me/it:1" and container["envFrom"] == [{"secretRef": {"name": "keys"}}]
    for key in plain.keys() - {("RayCluster", "pool")}:
        assert changed[key] == plain[key]


def test_compose_runs_the_image_that_the_dockerfile_says_how_to_build():
    compose = yaml.safe_load((K8S / "compose.yaml").read_text())
    tags = re.findall(r"docker build .* -t (\S+) \.", (K8S / "Dockerfile").read_text())
    assert tags == ["smolray:0.1.0-cu13-py311", "smolray:0.1.0-cpu-py311"]
    for service in compose["services"].values():
        assert service["image"] == tags[0] and service["read_only"] and service["cap_drop"] == ["ALL"]
        assert (K8S / service["build"]["context"] / service["build"]["dockerfile"]).is_file()
        assert all(port.startswith("127.0.0.1:") for port in service.get("ports", ()))
