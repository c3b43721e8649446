"""A trained run as a service on Kubernetes.

In: a RunConfig and the objects of an overlay of k8s/. Out: a RayService whose replicas answer with the run's model, and
a policy that lets in its clients. The API keys are in the Secret `smolray-keys`, as the file api-keys.json.
"""

import copy
from collections.abc import Iterable
from typing import Any

import yaml

from smolray.cluster.kubernetes import (
    QUEUE_LABEL,
    RAYJOB_NAME,
    K8sError,
    Manifest,
    check_image,
    check_shared,
    check_way_out,
    fit_workers,
    object_name,
    pods_of,
)
from smolray.config import RunConfig

PORT = 8000
KEYS, KEY_FOLDER, KEY_FILE = "smolray-keys", "/etc/smolray-keys", "api-keys.json"
SECONDS = 300.0  # for a request; Ray Serve itself waits somewhat longer


def render_service(config: RunConfig, objects: Iterable[Manifest], image: str | None = None) -> list[Manifest]:
    """The run's RayService, with a replica for each of its workers, and what it uses of the overlay.

    That is all of the overlay that is not a cluster or a template.

    Raises K8sError where the overlay has no cluster or no room, or its pods do not see the run's storage.
    """
    check_image(image)
    objects = [copy.deepcopy(o) for o in objects]
    pool = next((o for o in objects if o["kind"] == "RayCluster"), None)
    if pool is None:
        raise K8sError("the overlay has no RayCluster: expected one made of k8s/base")
    cluster = pool["spec"]
    check_shared({"storage": config.storage}, cluster)
    check_way_out([config.storage], objects)
    most = fit_workers(config, cluster)

    for pod in pods_of(cluster):
        pod["volumes"].append({"name": "keys", "secret": {"secretName": KEYS, "defaultMode": 0o440}})
        (container,) = (c for c in pod["containers"] if c["name"] == "ray")
        container["volumeMounts"].append({"name": "keys", "mountPath": KEY_FOLDER, "readOnly": True})
        container.setdefault("ports", []).append({"name": "serve", "containerPort": PORT})
        if image:
            container["image"] = image

    namespace = pool["metadata"].get("namespace", "default")
    labels = {"app.kubernetes.io/part-of": "smolray", "smolray.io/run": config.name}
    policy = _policy(object_name(config.name, RAYJOB_NAME), namespace)
    if queue := pool["metadata"].get("labels", {}).get(QUEUE_LABEL):
        labels[QUEUE_LABEL] = queue
    service = {
        "apiVersion": "ray.io/v1",
        "kind": "RayService",
        "metadata": {"name": policy["metadata"]["name"], "namespace": namespace, "labels": labels},
        "spec": {"serveConfigV2": _serve_config(config, cluster, most), "rayClusterConfig": cluster},
    }
    return [*(o for o in objects if o["kind"] not in ("RayCluster", "RayJob", "RayCronJob")), policy, service]


def _serve_config(config: RunConfig, cluster: Manifest, most: int) -> str:
    """What Ray Serve reads: smolray.serve.settings.ServeSettings as the arguments of the application."""
    low = 1 if config.resources.num_workers == "auto" else config.resources.workers[0]
    limits = (c["resources"]["limits"] for pod in pods_of(cluster)[1:] for c in pod["containers"])
    gpus = config.resources.use_gpu != "no" and any("nvidia.com/gpu" in limit for limit in limits)
    arguments: dict[str, Any] = {
        "models": [config.name],
        "storage": config.storage,
        "overrides": [f"resources.use_gpu={'yes' if gpus else 'no'}"],  # decided before the first worker is there
        "key_file": f"{KEY_FOLDER}/{KEY_FILE}",
        "replicas": [low, most],
        "seconds": SECONDS,
    }
    serve = {
        "proxy_location": "EveryNode",
        "http_options": {"host": "0.0.0.0", "port": PORT, "request_timeout_s": SECONDS + 30},  # noqa: S104
        "applications": [
            {
                "name": "smolray",
                "route_prefix": "/",
                "import_path": "smolray.serve.deployment:application",
                "args": arguments,
            }
        ],
    }
    return yaml.safe_dump(serve, sort_keys=False)


def _policy(name: str, namespace: str) -> Manifest:
    """Who may reach the service: pods that say so, and the operator, which asks whether it is well."""
    clients: list[Manifest] = [
        {"podSelector": {"matchLabels": {"smolray.io/client": "true"}}},
        {
            "namespaceSelector": {"matchLabels": {"kubernetes.io/metadata.name": "kuberay"}},
            "podSelector": {
                "matchExpressions": [
                    {"key": "app.kubernetes.io/component", "operator": "In", "values": ["kuberay-operator"]}
                ]
            },
        },
    ]
    return {
        "apiVersion": "networking.k8s.io/v1",
        "kind": "NetworkPolicy",
        "metadata": {"name": name, "namespace": namespace},
        "spec": {
            "podSelector": {"matchLabels": {"ray.io/is-ray-node": "yes"}},
            "policyTypes": ["Ingress"],
            "ingress": [{"from": clients, "ports": [{"port": PORT, "protocol": "TCP"}]}],
        },
    }
