"""A run as Kubernetes manifests.

In: a RunConfig and the objects of an overlay of k8s/. Out: a RayJob with its own cluster, and what else it needs.

The overlay describes the pods of a cluster; the run decides how many there are. A run resumes when its manifests are
applied again under the same name.
"""

import copy
import hashlib
import math
import re
import shutil
import subprocess
from collections.abc import Iterable
from pathlib import Path
from typing import Any, Literal

import yaml

from smolray import storage
from smolray.cluster.deploy import deploy_folder
from smolray.config import RunConfig, to_yaml

Manifest = dict[str, Any]
RAYJOB_NAME, CRONJOB_NAME = 47, 36  # what KubeRay 1.7 allows: longer ones would not fit into the names it makes of them
CONFIG_FOLDER = "/etc/smolray"
QUEUE_LABEL = "kueue.x-k8s.io/queue-name"


class K8sError(ValueError):
    """The run does not fit the overlay, or the overlay cannot be read. The message names the fault and the remedy."""


def overlay_objects(overlay: str) -> list[Manifest]:
    """The objects of a kustomize overlay: a folder, or the name of one that ships with smolray, such as home.

    Raises K8sError where neither kustomize nor kubectl is there, or it refuses the folder.
    """
    shipped = deploy_folder("k8s") / "overlays"
    folder = str(shipped / overlay) if (shipped / overlay / "kustomization.yaml").is_file() else overlay
    if not (Path(folder) / "kustomization.yaml").is_file():
        names = sorted(path.parent.name for path in shipped.glob("*/kustomization.yaml"))
        raise K8sError(
            f"{overlay} is neither a folder with a kustomization.yaml nor an overlay of smolray: {', '.join(names)}"
        )
    tool = ["kustomize", "build"] if shutil.which("kustomize") else ["kubectl", "kustomize"]
    if shutil.which(tool[0]) is None:
        raise K8sError("neither kustomize nor kubectl is on the PATH: install one of them")
    done = subprocess.run([*tool, folder], capture_output=True, text=True)
    if done.returncode:
        raise K8sError(f"{' '.join(tool)} {folder} failed: {done.stderr.strip()}")
    return [m for m in yaml.safe_load_all(done.stdout) if m]


def render(
    config: RunConfig,
    objects: Iterable[Manifest],
    kind: Literal["train", "tune"] = "train",
    image: str | None = None,
    schedule: str | None = None,
) -> list[Manifest]:
    """The run's RayJob (with `schedule`, in cron's format, a RayCronJob), its ConfigMap, and the overlay's parts.

    That is all of the overlay that is not a cluster or a template.

    Raises K8sError where the overlay has no room for the run's workers, or its pods do not see the run's storage.
    """
    check_image(image)
    objects = [copy.deepcopy(o) for o in objects]
    wanted = ("RayCronJob", "nightly") if schedule else ("RayJob", kind)
    template = next((o for o in objects if (o["kind"], o["metadata"]["name"]) == wanted), None)
    pool = next((o for o in objects if o["kind"] == "RayCluster"), None)
    if template is None or pool is None:
        raise K8sError(
            f"the overlay has no {' '.join(wanted)} or no RayCluster: expected one made of k8s/base and k8s/jobs"
        )
    spec = template["spec"]["jobTemplate"] if schedule else template["spec"]
    name = object_name(config.name, CRONJOB_NAME if schedule else RAYJOB_NAME)
    labels = {"app.kubernetes.io/part-of": "smolray", "smolray.io/run": config.name}
    if queue := pool["metadata"].get("labels", {}).get(QUEUE_LABEL):
        labels[QUEUE_LABEL] = queue
    template["metadata"] = {"name": name, "namespace": pool["metadata"].get("namespace", "default"), "labels": labels}
    template["spec"].pop("suspend", None)
    if schedule:
        template["spec"]["schedule"] = schedule
        # one run a day, not one that resumes and has ended
        spec["entrypoint"] += f" name={config.name}-$(date -u +%Y%m%d)"
    cluster = spec["rayClusterSpec"]
    _check_paths(config, cluster)
    data = config.data
    check_way_out((config.storage, data.shards, *data.train_paths.values(), data.validation), objects)
    fit_workers(config, cluster)
    _mount_config(cluster, f"{name}-config")
    settings = {
        "apiVersion": "v1",
        "kind": "ConfigMap",
        "metadata": {"name": f"{name}-config", "namespace": template["metadata"]["namespace"], "labels": labels},
        "data": {"run.yaml": to_yaml(config)},
    }
    if image:
        for container in _containers(spec):
            container["image"] = image
    return [*(o for o in objects if o["kind"] not in ("RayCluster", "RayJob", "RayCronJob")), settings, template]


def to_manifests(objects: Iterable[Manifest]) -> str:
    """The objects as one YAML stream for `kubectl apply -f -`."""
    return yaml.safe_dump_all(objects, sort_keys=False)


def object_name(name: str, limit: int) -> str:
    """A run's name as a DNS label of at most `limit` characters.

    What had to be changed carries a hash, so that no two runs meet.
    """
    label = re.sub(r"[^a-z0-9-]", "-", name)
    if label == name and label[0].isalpha() and len(label) <= limit:
        return label
    digest = hashlib.blake2b(name.encode(), digest_size=3).hexdigest()
    return f"{('' if label[0].isalpha() else 'run-') + label}"[: limit - 7].rstrip("-") + f"-{digest}"


def _containers(spec: Manifest) -> Iterable[Manifest]:
    yield from spec["submitterPodTemplate"]["spec"]["containers"]
    for pod in pods_of(spec["rayClusterSpec"]):
        yield from pod["containers"]


def pods_of(cluster: Manifest) -> list[Manifest]:
    """The pods of a cluster: that of the head, and one for each group of workers."""
    return [group["template"]["spec"] for group in (cluster["headGroupSpec"], *cluster["workerGroupSpecs"])]


def _mount_config(cluster: Manifest, name: str) -> None:
    """The driver runs on the head and reads the run's settings there."""
    pod = cluster["headGroupSpec"]["template"]["spec"]
    pod["volumes"].append({"name": "run", "configMap": {"name": name}})
    pod["containers"][0]["volumeMounts"].append({"name": "run", "mountPath": CONFIG_FOLDER, "readOnly": True})


def check_image(image: str | None) -> None:
    """Raise K8sError for an image that may be another one tomorrow."""
    if image is None:
        return
    named, _, digest = image.partition("@")
    version = named.rsplit("/", 1)[-1].partition(":")[2]
    if version in ("", "latest"):
        raise K8sError(f"the image {image} has no version: expected one, such as {named.removesuffix(':latest')}:1")
    if "/" in named and not re.fullmatch(r"sha256:[0-9a-f]{64}", digest):
        raise K8sError(
            f"the image {image} has no digest: whoever may push to the registry could change what the cluster runs; "
            f"expected {named}@sha256:…, which `docker inspect --format '{{{{.RepoDigests}}}}' {named}` prints"
        )


def check_way_out(uris: Iterable[str], objects: Iterable[Manifest]) -> None:
    """Raise K8sError for a URI where the overlay's policies let nothing out."""
    policies = {o["metadata"]["name"] for o in objects if o["kind"] == "NetworkPolicy"}
    remote = [uri for uri in uris if uri and "://" in uri]
    if remote and "ray-nodes" in policies and "ray-s3" not in policies:
        raise K8sError(
            f"{remote[0]} is not reached: the overlay lets nothing out; add ../../s3 to its components, before "
            "`cluster`, or use a path on its volume"
        )


def _check_paths(config: RunConfig, cluster: Manifest) -> None:
    """Raise K8sError for paths that the pods do not share: their own folders end with them."""
    if not config.data.train:
        raise K8sError("data.train is not set: expected a URI or a path with training data")

    paths = {"storage": config.storage, "data.shards": config.data.shards}
    if config.data.format != "hub":
        paths |= {**config.data.train_paths, "data.validation": config.data.validation}
    check_shared(paths, cluster)


def check_shared(paths: dict[str, str], cluster: Manifest) -> None:
    """Raise K8sError for paths, by the names of their settings, that not all pods see."""
    shared = set.intersection(*map(_claimed, pods_of(cluster)))
    lost = [
        f"{key} = {value!r}"
        for key, value in paths.items()
        if value
        and storage.is_local(value)
        and not any(value == mount or value.startswith(f"{mount}/") for mount in shared)
    ]

    if lost:
        there = (
            f"or a path under {', '.join(sorted(shared))}"
            if shared
            else "(the overlay has no volume; k8s/pvc adds one)"
        )
        raise K8sError(f"{', '.join(lost)}: not seen by all pods; expected s3://… {there}")


def _claimed(pod: Manifest) -> set[str]:
    """Mount paths of the pod that lie on a persistent volume."""
    volumes = {v["name"] for v in pod["volumes"] if "persistentVolumeClaim" in v}
    return {m["mountPath"] for m in pod["containers"][0]["volumeMounts"] if m["name"] in volumes}


def fit_workers(config: RunConfig, cluster: Manifest) -> int:
    """Set the pods of each group to the number that the run's workers need; returns the most workers.

    Where an autoscaler decides, only check that it may start enough of them.
    """
    low, high = config.resources.workers
    groups, room, seen = cluster["workerGroupSpecs"], 0, []
    known = {key for group in groups for key in group.get("labels", {})}
    chosen = {k: v for k, v in config.resources.label_selector.items() if k in known}
    if config.resources.num_workers == "auto" and config.resources.use_gpu != "no":
        high = sum(int(_limits(group).get("nvidia.com/gpu", 0)) * group["maxReplicas"] for group in groups) or 1

    left = high
    for group in groups:
        fits = all(group.get("labels", {}).get(key) == value for key, value in chosen.items())
        each, most = (_workers_per_pod(config, group) if fits else 0), group["maxReplicas"]
        room += each * most
        seen.append(f"{group['groupName']}: {most} pods x {each}")
        pods = min(most, math.ceil(left / each)) if each else 0
        left = max(0, left - pods * each)
        if not cluster.get("enableInTreeAutoscaling"):
            group["replicas"], group["minReplicas"] = pods, min(group["minReplicas"], pods)

    if room < low:
        nearest = (
            f"nearest: resources.num_workers={room}" if room else "none fits; see resources.* and the pods' limits"
        )
        raise K8sError(f"asked for {low} workers, the overlay has room for {room} ({'; '.join(seen)}); {nearest}")
    return high


def _workers_per_pod(config: RunConfig, group: Manifest) -> int:
    limits = _limits(group)
    resources, gpus = config.resources, float(limits.get("nvidia.com/gpu", 0))
    each = resources.cpus_per_worker + config.data.num_cpus_per_task  # a worker's own, and its data tasks'
    by_cpu = int((math.ceil(_cpus(limits["cpu"])) + 1e-9) // each)  # KubeRay tells Ray of whole CPUs
    if resources.use_gpu == "no" or (resources.use_gpu == "auto" and not gpus):
        return by_cpu
    return min(by_cpu, int(gpus // resources.gpus_per_worker))


def _limits(group: Manifest) -> Manifest:
    return group["template"]["spec"]["containers"][0]["resources"]["limits"]


def _cpus(quantity: str | int) -> float:
    text = str(quantity)
    return float(text[:-1]) / 1000 if text.endswith("m") else float(text)
