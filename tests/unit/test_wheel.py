"""The wheel stands alone: installed without a checkout, in an empty folder, every command has what it needs.

The wheel goes into an empty environment that sees the packages of this one, so nothing is downloaded.
"""

import json
import os
import shlex
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from zipfile import ZipFile

import pytest

from smolray.config.recipes import recipes
from tests.offline import picture
from tests.ray_head import ray_head, wait_for_head

pytestmark = pytest.mark.seconds

ROOT = Path(__file__).parents[2]
SOURCES = ("smolray", "cluster", "k8s", "pyproject.toml", "constraints.txt", "README.md", "LICENSE")
QUESTIONS = 24


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    """The wheel, built from a copy of the sources, so that the checkout stays as it is."""
    folder = tmp_path_factory.mktemp("wheel")
    source = folder / "source"
    source.mkdir()
    for name in SOURCES:
        if (ROOT / name).is_dir():
            shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copy(ROOT / name, source / name)
    options = ["--no-deps", "--no-build-isolation", "--no-index", "--wheel-dir", folder]
    built = subprocess.run(
        [sys.executable, "-m", "pip", "wheel", "-q", *options, source], capture_output=True, text=True, timeout=300
    )
    assert built.returncode == 0, built.stdout + built.stderr
    [wheel] = folder.glob("smolray-*.whl")
    return wheel


@pytest.fixture(scope="module")
def python(wheel, tmp_path_factory):
    """The interpreter of an environment that holds the wheel, and no checkout."""
    folder = tmp_path_factory.mktemp("environment")
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", folder], check=True, timeout=120)
    python = folder / "bin" / "python"
    pip = [sys.executable, "-m", "pip", "--python", python, "install", "-q", "--no-deps", "--no-index", wheel]
    subprocess.run(pip, check=True, capture_output=True, timeout=120)
    [packages] = folder.glob("lib/python*/site-packages")
    # Paths in a .pth file are searched, .pth files in those paths are not: an editable install there stays unseen.
    (packages / "shared.pth").write_text("\n".join(path for path in sys.path if path.endswith("site-packages")))
    return python


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """An empty folder with a few raw questions."""
    folder = tmp_path_factory.mktemp("empty")
    records = []
    for number in range(QUESTIONS):
        colour = ("red", "blue", "green")[number % 3]
        (folder / f"{number}.png").write_bytes(picture(48, 48, seed=number))
        records.append({"question": f"what colour is box {number}?", "answer": colour, "image": f"{number}.png"})
    (folder / "rows.jsonl").write_text("\n".join(map(json.dumps, records)))
    return folder


def environment(python, **extra):
    """The environment of a person who only installed the wheel."""
    kept = {k: v for k, v in os.environ.items() if k != "PYTHONPATH" and not k.startswith(("RAY_", "SMOLRAY_"))}
    told = {"HF_HUB_OFFLINE": "1", "RAY_USAGE_STATS_ENABLED": "0", "RAY_worker_niceness": "0", "COLUMNS": "160"}
    return kept | told | {"PATH": f"{python.parent}:{kept['PATH']}"} | extra


def smolray(python, folder, *arguments, **extra):
    done = subprocess.run(
        [python.with_name("smolray"), *arguments],
        cwd=folder,
        env=environment(python, **extra),
        capture_output=True,
        text=True,
        timeout=500,
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return done.stdout


def test_the_wheel_holds_recipes_templates_and_files_for_machines(wheel):
    names = set(ZipFile(wheel).namelist())
    assert {f"smolray/recipes/{name}.yaml" for name in recipes()} <= names
    expected = {
        "smolray/py.typed",
        "smolray/deploy/constraints.txt",
        "smolray/deploy/cluster/site.yml",
        "smolray/deploy/cluster/roles/smolray/templates/ray.env.j2",
        "smolray/deploy/k8s/overlays/home/kustomization.yaml",
    }
    assert expected <= names
    data = {str(p.relative_to(ROOT)) for p in (ROOT / "smolray").rglob("*") if p.suffix in (".html", ".css", ".js")}
    assert data <= names, "a template of a page is missing: see package-data in pyproject.toml"
    assert not [name for name in names if name.startswith(("tests", "jobs"))]


def test_the_commands_that_need_no_cluster_run_in_an_empty_folder(python, folder):
    where = smolray(python, folder, "env", "--json")
    assert str(python.parents[1]) in json.loads(where)["installed in"], "this is another smolray than the wheel's"
    assert smolray(python, folder, "--version").startswith("smolray ")
    assert "vqa_lora" in smolray(python, folder, "config", "list")

    (folder / "run.yaml").write_text(smolray(python, folder, "config", "new", "demo"))
    shown = smolray(python, folder, "config", "show", "-c", "run.yaml")
    assert shown == smolray(python, folder, "config", "show", "-c", "demo")
    preview = smolray(python, folder, "preview", "-c", "run.yaml", "data.train=rows.jsonl", "-n", "1")
    assert "what colour is box 0?" in preview and "all 24 rows of the raw data" in preview


def test_a_playbook_and_overlays_are_found_without_a_checkout(python, folder):
    join = smolray(
        python, folder, "cluster", "join", "den", "--head", "192.168.1.10", "--interface", "eno1", "--user", "me"
    )
    command, playbook, *options = shlex.split(join)
    assert command == "ansible-playbook" and Path(playbook).is_file() and str(python.parents[1]) in playbook
    assert any(option.startswith("smolray_package=smolray[s3,web]==") for option in options)
    if not (shutil.which("kubectl") or shutil.which("kustomize")):
        return
    paths = ["storage=s3://bucket/runs", "data.train=s3://bucket/shards"]
    rendered = smolray(python, folder, "k8s", "render", "-c", "vqa_lora", *paths, "resources.num_workers=1")
    assert "kind: RayJob" in rendered and "python -m smolray train --config" in rendered


def settings(folder, name):
    return [
        *("--config", "run.yaml", f"name={name}", f"storage={folder}/runs"),
        *(f"data.train={folder}/rows.jsonl", f"data.validation={folder}/rows.jsonl", "model.path=tiny"),
        *("train.max_steps=2", "train.per_device_train_batch_size=4", "train.global_batch=1"),
        *("evaluate.max_new_tokens=3", "evaluate.eval_epochs=0", "resources.num_workers=1"),
        "resources.cpus_per_worker=0.5",
    ]


@pytest.mark.slow
def test_a_run_is_trained_reported_and_used_in_an_empty_folder(python, folder, tmp_path):
    (folder / "run.yaml").write_text(smolray(python, folder, "config", "new", "demo"))
    assert "finished" in smolray(python, folder, "train", *settings(folder, "alone"))
    assert "alone" in smolray(python, folder, "status")
    assert Path(folder, smolray(python, folder, "report", "alone").strip()).is_file()
    smolray(python, folder, "export", "alone")
    smolray(
        python, folder, "generate", "alone", "0.png", "-p", "what colour is it?", "--out", str(tmp_path / "a.jsonl")
    )
    [answer] = (tmp_path / "a.jsonl").read_text().splitlines()
    assert json.loads(answer)["error"] is None


@pytest.mark.slow
def test_a_run_is_submitted_without_a_checkout(python, folder):
    (folder / "run.yaml").write_text(smolray(python, folder, "config", "new", "demo"))
    token = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": "0123456789abcdef" * 4}
    # short: socket paths have a limit
    with (
        tempfile.TemporaryDirectory(prefix="sw", ignore_cleanup_errors=True) as home,
        ray_head(python, home, environment(python, **token)) as address,
    ):
        wait_for_head(address, home)
        options = ["--address", address, "--follow", *settings(folder, "submitted")]
        assert "SUCCEEDED" in smolray(python, folder, "submit", *options, **token)
    assert "finished" in smolray(python, folder, "status", "submitted", "--storage", str(folder / "runs"))
