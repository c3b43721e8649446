"""The files of cluster/: the role is run for a head and a worker, and what it lays down is held to its promises; `ray
up` reads its YAML.
"""

import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from smolray.cluster import nodes as cluster
from tests.nodes.supervisor import environment, parse

ROOT = Path(__file__).parents[2]
BIN = Path(sys.executable).parent
DEFAULTS = yaml.safe_load((ROOT / "cluster/roles/smolray/defaults/main.yml").read_text())
PORTS = DEFAULTS["smolray_ports"]


def ansible(folder, *arguments, **extra):
    if not (BIN / "ansible-playbook").exists():
        pytest.skip("PyPI ansible-core is not installed")
    own = os.environ | {
        "ANSIBLE_HOME": str(folder / "ansible"),
        "ANSIBLE_NOCOLOR": "1",
        "ANSIBLE_LOCALHOST_WARNING": "0",
    }
    command = [
        BIN / "ansible-playbook",
        str(ROOT / "cluster/site.yml"),
        *arguments,
        *(f"-e{k}={v}" for k, v in extra.items()),
    ]
    return subprocess.run(command, env=own, capture_output=True, text=True, timeout=120)


@pytest.fixture(scope="module")
def laid(tmp_path_factory):
    """Folder with HOST/{etc,units} of the example's nodes, as the role writes them on this machine."""
    if os.geteuid():
        pytest.skip("the role makes files of root")
    folder = tmp_path_factory.mktemp("role")
    (folder / "token").write_text("a" * 64)
    for host in ("tower", "den"):
        (folder / host / "units").mkdir(parents=True)
    common = {
        "ansible_connection": "local",
        "ansible_become": "false",
        "ansible_python_interpreter": sys.executable,
        "smolray_user": "root",
        "smolray_install": "false",
        "smolray_manage_services": "false",
        "smolray_token_file": folder / "token",
        "smolray_venv": sys.prefix,
        "smolray_etc": f"{folder}/{{{{ inventory_hostname }}}}/etc",
        "smolray_home": f"{folder}/{{{{ inventory_hostname }}}}/home",
        "smolray_web_storage": "s3://bucket/runs",
        "smolray_unit_dir": f"{folder}/{{{{ inventory_hostname }}}}/units",
    }
    settings = folder / "vars.yml"
    settings.write_text(
        yaml.safe_dump({k: str(v) if v not in ("true", "false") else v == "true" for k, v in common.items()})
    )
    done = ansible(folder, "-i", str(ROOT / "cluster/inventory.example.yml"), "-e", f"@{settings}")
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr
    return folder


def unit(laid, host, name="smolray-ray.service"):
    return parse((laid / host / "units" / name).read_text())


def flags(settings):
    """The options of the unit's `ray start`."""
    words = shlex.split(settings["ExecStart"][0])
    assert words[0] == f"{sys.prefix}/bin/ray" and words[1] == "start"
    return {name: value for name, _, value in (word[2:].partition("=") for word in words[2:])}


@pytest.mark.parametrize("host", ["tower", "den"])
def test_a_node_needs_the_token_and_starts_again_whatever_happens(laid, host):
    settings = unit(laid, host)
    told = environment(settings)
    assert told["RAY_AUTH_MODE"] == "token" and Path(told["RAY_AUTH_TOKEN_PATH"]).read_text() == "a" * 64
    assert Path(told["RAY_AUTH_TOKEN_PATH"]).stat().st_mode & 0o777 == 0o440
    assert settings["ExecStartPre"] == [f"/usr/bin/test -s {told['RAY_AUTH_TOKEN_PATH']}"]
    assert settings["Restart"] == ["always"] and settings["StartLimitIntervalSec"] == ["0"], (
        "systemd gives up after five starts unless told"
    )
    assert "block" in flags(settings)
    assert (
        settings["User"] == ["root"]
        and "User={{ smolray_user }}" in (ROOT / "cluster/roles/smolray/templates/smolray-ray.service.j2").read_text()
    )
    assert DEFAULTS["smolray_user"] == "smolray"


def test_ports_are_fixed_and_a_node_that_joins_by_hand_has_the_same(laid):
    for host in ("tower", "den"):
        for name, port in cluster.PORTS.items():
            assert flags(unit(laid, host))[name] == str(port)
    head = flags(unit(laid, "tower"))
    assert (head["port"], head["dashboard-port"]) == (str(PORTS["gcs"]), str(PORTS["dashboard"]))
    assert head["dashboard-host"] == "192.168.1.10", "not on every interface"
    assert PORTS["gcs"] == cluster.GCS_PORT
    assert flags(unit(laid, "den"))["address"] == "192.168.1.10:6379"


def test_nodes_and_gpus_are_labels_and_each_node_names_its_interface(laid):
    for host, gpu, interface in (("tower", "rtx-4090", "enp5s0"), ("den", "rtx-3090", "eno1")):
        settings = unit(laid, host)
        assert flags(settings)["labels"] == f"smolray.io/node={host},smolray.io/gpu={gpu}"
        told = environment(settings)
        assert told["GLOO_SOCKET_IFNAME"] == told["NCCL_SOCKET_IFNAME"] == interface


def test_a_dead_node_is_noticed_in_ten_seconds_and_the_record_survives(laid):
    told = environment(unit(laid, "tower"))
    period, timeout, times = (
        int(told[f"RAY_health_check_{name}"]) for name in ("period_ms", "timeout_ms", "failure_threshold")
    )
    assert (period + timeout) * times <= 10_000
    assert told["RAY_gcs_storage"] == "rocksdb" and told["RAY_gcs_storage_path"].startswith(str(laid / "tower"))
    assert "RAY_gcs_storage" not in environment(unit(laid, "den"))


def test_the_page_is_on_the_loopback_of_the_head_and_asks_for_keys(laid):
    settings = unit(laid, "tower", "smolray-web.service")
    words = shlex.split(settings["ExecStart"][0])
    assert words[:2] == [f"{sys.prefix}/bin/smolray", "web"] and "--no-key" not in words
    given = dict(zip(words[2::2], words[3::2], strict=True))
    assert given.pop("--key-file").startswith(str(laid / "tower/home"))
    assert given == {
        "--host": "127.0.0.1",
        "--port": str(PORTS["web"]),
        "--address": f"http://192.168.1.10:{PORTS['dashboard']}",
        "--storage": "s3://bucket/runs",
    }
    assert f"dport {PORTS['web']}" not in (laid / "tower/etc/smolray.nft").read_text()
    assert settings["KillMode"] == ["process"], "what it has started goes on"
    assert not (laid / "den/units/smolray-web.service").exists()
    assert DEFAULTS["smolray_web_storage"] == "", "no page unless it is asked for"


def test_the_firewall_lets_in_what_the_units_listen_on(laid):
    rules = (laid / "tower/etc/smolray.nft").read_text()
    assert "policy drop" in rules and DEFAULTS["smolray_firewall"] is True
    for needed in ("dport { 68, 546 } accept", "dport 5353 accept", "limit rate over 10/minute"):
        assert needed in rules
    assert f"tcp dport {{ {PORTS['metrics']}, 44217, 44227 }} drop" in rules, "metrics have no token"
    opened = {int(p) for p in re.findall(r"dport \{ (\d+)|, (\d+) \}|dport (\d+) accept", rules) for p in p if p}
    ranges = [(int(a), int(b)) for a, b in re.findall(r"dport (\d+)-(\d+)", rules)]
    listening = flags(unit(laid, "tower")).items()
    needed = {int(v) for name, v in listening if name.endswith("port") and "metrics" not in name and v}
    assert not {p for p in needed if p not in opened and not any(a <= p <= b for a, b in ranges)}
    assert "dport 8265" not in (laid / "den/etc/smolray.nft").read_text(), "only the head has a job server"


@pytest.mark.parametrize("host", ["tower", "den"])
def test_nft_reads_the_rules(laid, host):
    nft = shutil.which("nft", path="/usr/sbin:/sbin:/usr/bin")
    if nft is None:
        pytest.skip("no nft on this machine")
    done = subprocess.run(
        ["unshare", "-n", nft, "-c", "-f", laid / f"{host}/etc/smolray.nft"], capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("name", ["smolray-ray.service", "smolray-keep@.service", "smolray-web.service"])
def test_a_unit_may_do_little_besides_training(laid, tmp_path, name):
    """systemd's own measure of exposure, 0 to 10; without the restrictions it was 8.8."""
    if shutil.which("systemd-analyze") is None:
        pytest.skip("no systemd-analyze on this machine")
    text = (laid / "tower/units" / name).read_text()
    (tmp_path / name).write_text(text.replace("User=root", "User=smolray").replace("Group=root", "Group=smolray"))
    command = ["systemd-analyze", "security", "--offline=true", "--no-pager", "--threshold=40", str(tmp_path / name)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    exposure = re.search(r"exposure level for \S+: ([\d.]+)", done.stdout)
    assert exposure and float(exposure[1]) < 4 and done.returncode == 0, done.stdout[-2000:] + done.stderr
    assert ("PrivateDevices=yes" in text) == ("ray" not in name.removeprefix("smolray")), "Ray needs the GPUs"


def test_systemd_reads_the_units(laid):
    if shutil.which("systemd-analyze") is None:
        pytest.skip("no systemd-analyze on this machine")
    units = [
        laid / "tower/units/smolray-ray.service",
        laid / "den/units/smolray-ray.service",
        laid / "tower/units/smolray-keep@.service",
        laid / "tower/units/smolray-web.service",
    ]
    for path in units:
        shutil.copy(path, laid / path.name)  # of the same name: one at a time
        done = subprocess.run(
            ["systemd-analyze", "verify", "--man=no", str(laid / path.name)], capture_output=True, text=True, timeout=60
        )
        told = [line for line in done.stderr.splitlines() if "smolray-" in line]
        assert not told, told


def test_a_node_without_interface_or_a_cluster_without_token_is_refused(tmp_path):
    common = {"ansible_connection": "local", "ansible_become": "false", "smolray_head_address": "10.0.0.1"}
    told = ansible(tmp_path, "-i", "box,", **common)
    assert told.returncode and "smolray_interface is not set for box" in told.stdout
    told = ansible(tmp_path, "-i", "box,", **common, smolray_interface="eth0", smolray_token_file=tmp_path / "none")
    assert told.returncode and "ray get-auth-token --generate" in told.stdout


@pytest.mark.parametrize("path", sorted((ROOT / "cluster").rglob("*.yml")), ids=lambda path: path.name)
def test_every_file_of_the_playbook_is_yaml(path):
    assert yaml.safe_load(path.read_text())  # tasks that are included late are not parsed by the other tests


def test_ray_up_reads_its_yaml():
    from ray.autoscaler._private.util import prepare_config, validate_config

    text = (ROOT / "cluster/ray-up.yaml").read_text()
    config = prepare_config(yaml.safe_load(text))
    validate_config(config)
    assert config["provider"]["head_ip"] == "192.168.1.10" and config["max_workers"] == 1
    for command in (config["head_start_ray_commands"][-1], config["worker_start_ray_commands"][-1]):
        assert "RAY_AUTH_MODE=token" in command
    with pytest.raises(Exception, match="head_ip"):
        validate_config(prepare_config(yaml.safe_load(text.replace("head_ip:", "head_ips:"))))


def test_join_prints_one_command():
    forever = cluster.join_command("192.168.1.12", "http://192.168.1.10:8265", "eno1", user="me", gpu="rtx-3090")
    assert forever == (
        "ansible-playbook cluster/site.yml -i 192.168.1.12, -u me -e smolray_head_address=192.168.1.10 -e "
        "smolray_interface=eno1 -e smolray_gpu_label=rtx-3090"
    )
    once = shlex.split(cluster.join_command("loft", "192.168.1.10", "eno1", once=True))
    assert once[:2] == ["env", "RAY_AUTH_MODE=token"] and "--address=192.168.1.10:6379" in once
    assert "ray" in once and "start" in once and "--labels=smolray.io/node=loft" in once
    with pytest.raises(cluster.ClusterError, match="names no host"):
        cluster.join_command("loft", "http://", "eno1")
