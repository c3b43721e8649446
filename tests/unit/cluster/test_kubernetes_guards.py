"""Who reaches whom in a cluster of k8s/, where keys and tokens are, and that its nodes can be drained."""

import pytest

from tests.unit.cluster.test_kubernetes import K8S, OVERLAYS, clusters_of, everything, objects_of, one, pod_specs


def test_only_submitters_and_the_operator_reach_the_job_server():
    policy = one(objects_of("home"), "NetworkPolicy", "ray-jobs")["spec"]
    [rule] = policy["ingress"]
    assert policy["podSelector"] == {"matchLabels": {"ray.io/node-type": "head"}}
    assert rule["ports"] == [{"port": 8265, "protocol": "TCP"}]
    peers = [
        p["podSelector"].get("matchLabels") or p["podSelector"]["matchExpressions"][0]["values"] for p in rule["from"]
    ]
    operator = {"matchLabels": {"kubernetes.io/metadata.name": "kuberay"}}
    assert rule["from"][2]["namespaceSelector"] == operator, "not a pod of any namespace that calls itself the operator"
    assert "--namespace kuberay " in (K8S / "README.md").read_text(), "where the README installs it"
    assert peers == [{"ray.io/originated-from-crd": "RayJob"}, {"smolray.io/client": "true"}, ["kuberay-operator"]]
    assert all("namespaceSelector" not in p for p in rule["from"][:2]), "a label of another namespace opens nothing"
    [rule] = one(objects_of("home"), "NetworkPolicy", "ray-nodes")["spec"]["ingress"]
    assert rule["from"] == [{"podSelector": {"matchLabels": {"ray.io/is-ray-node": "yes"}}}]


def ways_out(overlay):
    """(who, peers, ports) of every egress rule, by the name of its policy."""
    policies = [o for o in objects_of(overlay) if o["kind"] == "NetworkPolicy"]
    return {
        o["metadata"]["name"]: (o["spec"]["podSelector"]["matchLabels"], o["spec"]["egress"])
        for o in policies
        if "Egress" in o["spec"]["policyTypes"]
    }


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_pods_reach_each_other_dns_and_the_storage_and_nothing_else(overlay):
    out = ways_out(overlay)
    ray_nodes = {"ray.io/is-ray-node": "yes"}
    wanted = {"ray-nodes", "submitters"} | ({"ray-s3"} if overlay != "cpu" else set())
    assert set(out) == wanted | ({"autoscaler"} if overlay == "autoscale" else set())

    who, rules = out["ray-nodes"]
    assert who == ray_nodes and rules[0] == {"to": [{"podSelector": {"matchLabels": ray_nodes}}]}
    assert [{p["port"] for p in rule["ports"]} for rule in rules[1:]] == [{53}]
    who, rules = out["submitters"]
    assert who == {"ray.io/originated-from-crd": "RayJob"} and {p["port"] for r in rules for p in r["ports"]} == {
        8265,
        53,
    }
    for name in set(out) - {"ray-nodes", "submitters"}:
        for rule in out[name][1]:
            assert {p["port"] for p in rule["ports"]} <= ({443} if name == "ray-s3" else {443, 6443})
            assert "169.254.0.0/16" in rule["to"][0]["ipBlock"]["except"], "the cloud's metadata gives keys away"


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_keys_of_s3_are_where_s3_is_used_and_nowhere_else(overlay):
    for manifest in everything(overlay):
        for cluster in clusters_of(manifest):
            for group in (cluster["headGroupSpec"], *cluster["workerGroupSpecs"]):
                [container] = group["template"]["spec"]["containers"]
                keys = [source["secretRef"]["name"] for source in container.get("envFrom", [])]
                assert keys == ([] if overlay == "cpu" else ["smolray-s3"])
        for pod in pod_specs(manifest):
            for container in pod["containers"]:
                assert container["name"] != "submitter" or "envFrom" not in container


def test_only_the_autoscalers_container_has_a_token_of_the_api():
    for manifest in everything("autoscale"):
        for cluster in clusters_of(manifest):
            head = cluster["headGroupSpec"]["template"]["spec"]
            [token] = [v["name"] for v in head["volumes"] if "projected" in v]
            [mount] = cluster["autoscalerOptions"]["volumeMounts"]
            where = "/var/run/secrets/kubernetes.io/serviceaccount"
            assert mount == {"name": token, "mountPath": where, "readOnly": True}, "where Ray's autoscaler reads it"
            assert token not in [m["name"] for c in head["containers"] for m in c["volumeMounts"]]
            [volume] = [v for v in head["volumes"] if v["name"] == token]
            files = [next(iter(s.values())) for s in volume["projected"]["sources"]]
            names = [f.get("path") or f["items"][0]["path"] for f in files]
            assert names == ["token", "ca.crt", "namespace"]


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_every_node_can_be_drained(overlay):
    budgets = [o["spec"] for o in objects_of(overlay) if o["kind"] == "PodDisruptionBudget"]
    kinds = [budget["selector"]["matchLabels"]["ray.io/node-type"] for budget in budgets]
    assert kinds == ["head", "worker"]
    for budget in budgets:
        assert budget["maxUnavailable"] == 1, "with 0 a drain never ends"
        assert budget["unhealthyPodEvictionPolicy"] == "AlwaysAllow"
    for manifest in everything(overlay):
        if manifest["kind"] == "RayJob":
            assert manifest["spec"]["backoffLimit"] > 0, "a run whose head has gone begins again"
