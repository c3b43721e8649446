"""Nodes that have Ray alone: the code of a job goes along, and Ray installs its packages there with uv."""

import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

from smolray.cluster.deploy import TOOLS
from tests.cluster.test_jobs_client import TOKEN, environment
from tests.ray_head import ray_head, wait_for_head

ROOT = Path(__file__).parents[2]
# In place of the training: which package and which code this process and a worker of Ray have.
TELL = """
import ray, tabulate
import smolray

def told():
    return tabulate.__version__, tabulate.__file__, smolray.__file__

ray.init(log_to_driver=False)
for where, has in (("driver", told()), ("worker", ray.get(ray.remote(told).remote()))):
    print(where, *has)
"""


def checkout(folder, version):
    """A checkout whose tested set is one small package."""
    shutil.copytree(ROOT / "smolray", folder / "smolray", ignore=shutil.ignore_patterns("__pycache__"))
    (folder / "smolray" / "__main__.py").write_text(TELL)
    (folder / "constraints.txt").write_text(f"# The set.\ntabulate=={version}\n{TOOLS}pytest==1.0\n")
    return folder


def submit(head, project, where, name):
    """`smolray submit --follow` with the code of `project`, from the folder `where`."""
    address, folder = head
    # not `-m smolray`: that module of the project is replaced
    smolray = [sys.executable, "-P", "-c", "from smolray.cli.app import app; app()"]
    command = [*smolray, "submit", "--address", address, "--follow"]
    settings = ["resources.uv=true", f"name={name}", f"storage={folder}/runs", "data.train=s3://bucket/data"]
    told = environment(str(folder), TOKEN) | {"PYTHONPATH": str(project)}
    return subprocess.run([*command, *settings], env=told, cwd=where, capture_output=True, text=True, timeout=400)


@pytest.fixture(scope="module")
def head(tmp_path_factory):
    """The job server of a node that has Ray and no smolray, and its folder."""
    made = tmp_path_factory.mktemp("node")
    subprocess.run([sys.executable, "-m", "venv", made], check=True, timeout=300)
    python = made / "bin" / "python"
    pip = [python, "-m", "pip", "install", "-q", "--disable-pip-version-check"]
    if subprocess.run([*pip, "uv"], timeout=300).returncode:
        pytest.skip("uv cannot be installed from here")
    [packages] = made.glob("lib/python*/site-packages")
    # searched for packages, and not for .pth files: an editable smolray there stays unseen
    (packages / "shared.pth").write_text("\n".join(path for path in sys.path if path.endswith("site-packages")))
    with tempfile.TemporaryDirectory(prefix="su", ignore_cleanup_errors=True) as folder:
        node = environment(folder) | {"PATH": f"{python.parent}:{os.environ['PATH']}"}
        node.pop("PYTHONPATH", None)
        with ray_head(python, folder, node) as address:
            wait_for_head(address, folder)
            yield address, Path(folder)


@pytest.mark.slow
@pytest.mark.timeout(1200)
@pytest.mark.parametrize("where", ["checkout", "elsewhere"])
def test_a_job_brings_its_code_and_the_packages_of_the_tested_set(head, tmp_path, tmp_path_factory, where):
    project = checkout(tmp_path_factory.mktemp("project"), "0.9.0")  # another version than is here
    done = submit(head, project, project if where == "checkout" else tmp_path, where)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    told = {line.split()[0]: line.split()[1:] for line in done.stdout.splitlines() if line.startswith(("dr", "wo"))}
    for version, package, code in (told["driver"], told["worker"]):
        assert version == "0.9.0" and f"{head[1]}/r/" in package and "/uv/" in package
        assert f"{head[1]}/r/" in code, "the job has other code than what was sent"


@pytest.mark.slow
def test_a_package_that_cannot_be_installed_is_told(head, tmp_path):
    project = checkout(tmp_path, "99.0")
    done = submit(head, project, project, "broken")
    assert done.returncode == 1 and "FAILED" in done.stdout
    assert "tabulate==99.0" in done.stderr, done.stderr[-3000:]
