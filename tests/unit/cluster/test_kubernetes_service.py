"""A service on Kubernetes: what the API server and the operator accept, and what Ray Serve reads in it."""

import pytest
import yaml
from typer.testing import CliRunner

from smolray.cli.app import app
from smolray.cluster.kubernetes import K8sError
from smolray.cluster.kubernetes_service import KEY_FILE, render_service
from smolray.config import load_config
from smolray.serve.settings import ServeSettings
from tests.kubernetes import faults, operator_faults
from tests.unit.cluster.test_kubernetes import K8S, OVERLAYS, S3, VOLUME, objects_of, one, pod_specs

IMAGE = f"registry.example/smolray:1@sha256:{'0' * 64}"


def service(*overrides, overlay="home", **options):
    paths = VOLUME if overlay == "cpu" else S3
    return render_service(load_config(None, ["name=vqa", *paths, *overrides]), objects_of(overlay), **options)


def arguments(rendered):
    """What `application` is called with."""
    serve = yaml.safe_load(one(rendered, "RayService")["spec"]["serveConfigV2"])
    return ServeSettings(**serve["applications"][0]["args"])


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_api_server_operator_and_ray_serve_accept_every_object(overlay):
    from ray.serve.schema import ServeDeploySchema

    rendered = service(overlay=overlay)
    for manifest in rendered:
        assert not faults(manifest), manifest["metadata"]["name"]
    assert not operator_faults(one(rendered, "RayService"))
    config = ServeDeploySchema.model_validate(yaml.safe_load(one(rendered, "RayService")["spec"]["serveConfigV2"]))
    assert config.http_options.port == 8000
    assert not {"RayCluster", "RayJob", "RayCronJob"} & {o["kind"] for o in rendered}


def test_ray_serve_imports_the_application():
    from smolray.serve import deployment

    serve = yaml.safe_load(one(service(), "RayService")["spec"]["serveConfigV2"])
    module, _, name = serve["applications"][0]["import_path"].partition(":")
    assert module == deployment.__name__ and callable(getattr(deployment, name))


def test_the_run_is_served_with_keys_on_every_pod_and_as_many_replicas_as_workers():
    rendered = service("resources.num_workers=[1,2]", "train.global_batch=4", image=IMAGE)
    told = arguments(rendered)
    assert (told.models, told.storage, told.replicas) == (["vqa"], "s3://bucket/runs", (1, 2))
    assert told.overrides == ["resources.use_gpu=yes"] and told.key_file.endswith(KEY_FILE)
    pods = list(pod_specs(one(rendered, "RayService")))
    assert len(pods) == 2
    for pod in pods:
        [volume] = [v for v in pod["volumes"] if v["name"] == "keys"]
        [mount] = [m for m in pod["containers"][0]["volumeMounts"] if m["name"] == "keys"]
        assert volume["secret"] == {"secretName": "smolray-keys", "defaultMode": 0o440}
        assert told.key_file.startswith(mount["mountPath"]) and mount["readOnly"]
        assert pod["containers"][0]["image"] == IMAGE
    assert arguments(service(overlay="cpu")).overrides == ["resources.use_gpu=no"]
    assert arguments(service("resources.num_workers=auto")).replicas == (1, 2)


def test_only_named_clients_and_the_operator_reach_the_service():
    policy = one(service(), "NetworkPolicy", "vqa")["spec"]
    [rule] = policy["ingress"]
    assert rule["ports"] == [{"port": 8000, "protocol": "TCP"}] and len(rule["from"]) == 2
    assert rule["from"][0] == {"podSelector": {"matchLabels": {"smolray.io/client": "true"}}}


def test_what_does_not_fit_is_refused():
    with pytest.raises(K8sError, match=r"nearest: resources\.num_workers=2"):
        service("resources.num_workers=3")
    with pytest.raises(K8sError, match="has no version"):
        service(image="smolray:latest")
    with pytest.raises(K8sError, match="storage = 'runs'"):
        service("storage=runs")
    with pytest.raises(K8sError, match="no RayCluster"):
        render_service(load_config(None, list(S3)), [])


def test_the_command_prints_it(tmp_path):
    run = tmp_path / "run.yaml"
    run.write_text("name: vqa\nstorage: s3://bucket/runs\n")
    objects_of("home")
    options = ["k8s", "render", "--config", str(run), "--overlay", str(K8S / "overlays" / "home"), "--serve"]
    done = CliRunner().invoke(app, options)
    assert done.exit_code == 0 and "kind: RayService" in done.stdout
    done = CliRunner().invoke(app, [*options, "--tune"])
    assert done.exit_code == 2 and "neither a search" in done.output
