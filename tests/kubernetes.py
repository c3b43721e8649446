"""What a Kubernetes cluster with KubeRay 1.7 would say of an object, without one: its schemas with unknown fields
refused, and the operator's own rules.

KubeRay's CRDs are read from the folder that KUBERAY_CRDS names; Kubernetes' schemas come with PyPI
`kubernetes-validate`.
"""

import functools
import os
import re
from pathlib import Path

import jsonschema
import pytest
import yaml

KUBERNETES = "1.34"
LABEL = re.compile(r"[a-z]([-a-z0-9]*[a-z0-9])?")  # DNS-1035
NAME_LIMITS = {"RayCluster": 53, "RayJob": 47, "RayCronJob": 36, "RayService": 47}
# Behind feature gates that are off in 1.7: the operator would refuse the object.
GATED = {"networkPolicy", "tlsOptions", "gcsFaultToleranceOptions", "historyServerOptions"}


def crd_folder() -> Path:
    folder = os.environ.get("KUBERAY_CRDS")
    if not folder or not Path(folder).is_dir():
        pytest.skip("KUBERAY_CRDS names no folder with KubeRay's CRDs (its release has them under config/crd/bases)")
    return Path(folder)


@functools.cache
def crd_schema(kind: str, version: str = "v1"):
    path = crd_folder() / f"ray.io_{kind.lower()}s.yaml"
    loaded = yaml.load(path.read_bytes(), Loader=yaml.CSafeLoader)  # the pure Python loader takes 10 s
    schema = next(v["schema"]["openAPIV3Schema"] for v in loaded["spec"]["versions"] if v["name"] == version)
    return jsonschema.Draft202012Validator(_closed(schema))


def _closed(schema):
    """The schema with unknown fields refused, as `kubectl apply --validate=strict` does."""
    if isinstance(schema, list):
        return [_closed(s) for s in schema]
    if not isinstance(schema, dict):
        return schema
    closed = {k: {n: _closed(s) for n, s in v.items()} if k == "properties" else _closed(v) for k, v in schema.items()}
    if (
        "properties" in schema
        and "additionalProperties" not in schema
        and not schema.get("x-kubernetes-preserve-unknown-fields")
    ):
        closed["additionalProperties"] = False
    return closed


def faults(manifest) -> list[str]:
    """What the API server would refuse."""
    if manifest["apiVersion"].startswith("ray.io/"):
        return [
            f"{error.json_path}: {error.message[:200]}" for error in crd_schema(manifest["kind"]).iter_errors(manifest)
        ]
    validate = pytest.importorskip("kubernetes_validate", reason="PyPI kubernetes-validate is not installed")
    try:
        validate.validate(manifest, KUBERNETES, strict=True)
    except validate.ValidationError as error:
        return [str(error)[:300]]
    return []


def operator_faults(manifest) -> list[str]:
    """What KubeRay's operator would refuse (ray-operator/controllers/ray/utils/validation.go of 1.7), as far as these
    files could do it.
    """
    kind, name, spec = manifest["kind"], manifest["metadata"]["name"], manifest["spec"]
    found = []
    if len(name) > NAME_LIMITS[kind]:
        found.append(f"the name {name} has {len(name)} characters, the limit of a {kind} is {NAME_LIMITS[kind]}")
    if not LABEL.fullmatch(name):
        found.append(f"the name {name} is no DNS-1035 label")
    if kind == "RayCluster":
        return found + _cluster_faults(spec)
    if kind == "RayService":
        return found + _cluster_faults(spec["rayClusterConfig"])
    if kind == "RayCronJob":
        found += [] if len(spec["schedule"].split()) == 5 else [f"schedule {spec['schedule']!r} has not five fields"]
        spec = spec["jobTemplate"]
    if not spec.get("shutdownAfterJobFinishes"):
        found += [
            f"{field} without shutdownAfterJobFinishes"
            for field in ("suspend", "ttlSecondsAfterFinished")
            if spec.get(field)
        ]
    for field in ("activeDeadlineSeconds", "preRunningDeadlineSeconds"):
        found += [f"{field} must be positive"] if spec.get(field, 1) <= 0 else []
    for field in ("backoffLimit", "ttlSecondsAfterFinished"):
        found += [f"{field} must not be negative"] if spec.get(field, 0) < 0 else []
    if spec.get("submissionMode") == "SidecarMode" and "submitterPodTemplate" in spec:
        found.append("SidecarMode with a submitterPodTemplate")
    if spec.get("submissionMode") == "InteractiveMode" and spec.get("backoffLimit"):
        found.append("InteractiveMode with a backoffLimit")
    if "rayClusterSpec" not in spec and "clusterSelector" not in spec:
        return [*found, "neither rayClusterSpec nor clusterSelector"]
    return found + _cluster_faults(spec["rayClusterSpec"])


def _cluster_faults(spec) -> list[str]:
    found = [f"{field} is behind a feature gate that is off" for field in sorted(GATED & set(spec))]
    autoscaled = spec.get("enableInTreeAutoscaling", False)
    if spec.get("authOptions", {}).get("mode") == "token":
        version = tuple(int(n) for n in spec.get("rayVersion", "0.0").split("."))
        found += [] if version >= (2, 52) else ["token authentication needs rayVersion 2.52 or later"]
    if not spec["headGroupSpec"]["template"]["spec"]["containers"]:
        found.append("the head has no container")
    for group in spec["workerGroupSpecs"]:
        name = group["groupName"]
        if not autoscaled and not {"minReplicas", "maxReplicas"} <= set(group):
            found.append(f"{name} needs minReplicas and maxReplicas without an autoscaler")
        low, high = group.get("minReplicas", 0), group.get("maxReplicas", 2**31 - 1)
        if not 0 <= low <= group.get("replicas", low) <= high:
            found.append(f"{name}: replicas {group.get('replicas')} not between {low} and {high}")
        if "labels" in group["rayStartParams"]:
            found.append(f"{name}: labels belong next to rayStartParams")
        for key, value in group.get("labels", {}).items():
            if not re.fullmatch(r"([a-z0-9.-]+/)?[A-Za-z0-9]([\w.-]{0,61}[A-Za-z0-9])?", key) or not re.fullmatch(
                r"[A-Za-z0-9]([\w.-]{0,61}[A-Za-z0-9])?", value
            ):
                found.append(f"{name}: label {key}={value} is malformed")
        if autoscaled and group["template"]["spec"].get("restartPolicy", "Never") != "Never":
            found.append(f"{name}: autoscaler v2 wants restartPolicy Never")
    return found
