"""A job gets the code of a checkout without what it does not need, and elsewhere nothing but its config file."""

import re
import tomllib
from importlib.metadata import PackageNotFoundError, requires
from pathlib import Path
from zipfile import ZipFile

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from smolray.cluster.deploy import node_packages
from smolray.cluster.upload import EXCLUDES, PACKAGE, job_environment
from smolray.config.recipes import recipe_text

ROOT = Path(__file__).parents[3]


def test_a_checkout_is_uploaded_and_the_arguments_stay(tmp_path):
    (tmp_path / "smolray").mkdir()
    (tmp_path / "smolray" / "__main__.py").touch()
    arguments = ["--config", "a.yaml", "seed=3"]
    with job_environment(str(tmp_path), arguments) as (environment, words):
        assert environment["working_dir"] == str(tmp_path) and words == arguments


@pytest.mark.parametrize("file", ["mine/a.yaml", "{folder}/mine/a.yaml", "vqa_lora"])
def test_elsewhere_the_config_file_alone_is_uploaded(tmp_path, file):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "a.yaml").write_text("seed: 5\n")
    (tmp_path / "secret.txt").touch()
    arguments = ["--config", file.format(folder=tmp_path), "seed=3"]
    with job_environment(str(tmp_path), arguments) as (environment, words):
        uploaded = Path(environment["working_dir"])
        assert [path.name for path in uploaded.rglob("*")] == ["run.yaml"]
        assert words == ["--config", "run.yaml", "seed=3"]
        expected = recipe_text(file) if file == "vqa_lora" else "seed: 5\n"
        assert (uploaded / "run.yaml").read_text() == expected
    assert not uploaded.exists()


@pytest.mark.parametrize("arguments", [["--config", "s3://bucket/runs/run/config.yaml"], ["name=x"]])
def test_settings_that_the_cluster_reads_itself_are_not_uploaded(tmp_path, arguments):
    with job_environment(str(tmp_path), arguments) as (environment, words):
        assert environment == {} and words == arguments


@pytest.mark.parametrize("checkout", [True, False])
def test_nodes_that_have_ray_alone_get_the_packages_and_the_code(tmp_path, checkout):
    if checkout:
        (tmp_path / "smolray").mkdir()
        (tmp_path / "smolray" / "__main__.py").touch()
    with job_environment(str(tmp_path), ["--config", "vqa_lora"], uv=True) as (environment, _):
        assert {"ray", "torch", "deepspeed"} <= {line.partition("==")[0] for line in environment["uv"]["packages"]}
        assert environment.get("py_modules") == (None if checkout else [str(PACKAGE)])
        assert (environment["working_dir"] == str(tmp_path)) is checkout
    with job_environment(str(tmp_path), [], uv=True) as (environment, _):
        assert "uv" in environment


def needed_by(requirements):
    """Names of the packages that these need on Linux, and those that these need, by what is installed here."""
    linux = {"sys_platform": "linux", "platform_system": "Linux", "os_name": "posix"}
    seen, names, todo = set(), set(), [Requirement(text) for text in requirements]
    while todo:
        one = todo.pop()
        names.add(name := canonicalize_name(one.name))
        for extra in {"", *one.extras} - {e for n, e in seen if n == name}:
            seen.add((name, extra))
            try:
                more = [Requirement(text) for text in requires(name) or ()]
            except PackageNotFoundError:
                continue
            todo += [r for r in more if r.marker is None or r.marker.evaluate(linux | {"extra": extra})]
    return names


def test_every_package_that_a_node_or_the_tests_need_is_pinned():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"]
    lines = [line for line in (ROOT / "constraints.txt").read_text().splitlines() if line and line[0] != "#"]
    assert all(re.fullmatch(r"[A-Za-z0-9._-]+==[^=]+", line) for line in lines) and set(node_packages()) < set(lines)
    pinned = [canonicalize_name(line.partition("==")[0]) for line in lines]
    assert len(set(pinned)) == len(pinned)
    on_nodes = set(pinned[: len(node_packages())])

    # not in the tested set: vLLM, which has pins of its own, two trackers, pip's own tool, and what a CUDA build of
    # torch brings along
    free = {"trackio", "swanlab", "setuptools", "triton", "smolray"}
    used = [*project["dependencies"], *(r for name in extras.keys() - {"dev", "demo", "vllm"} for r in extras[name])]
    needed = {name for name in needed_by(used) - free if not name.startswith(("nvidia-c", "cuda-"))}
    assert needed <= on_nodes, "constraints.txt has no version, in its first part, of these"
    tools = needed_by([*extras["dev"], *extras["demo"]]) - free - needed
    assert {name for name in tools if not name.startswith(("nvidia-c", "cuda-"))} <= set(pinned)
    assert not on_nodes & {"pytest", "mypy", "ansible-core"}


@pytest.mark.parametrize("excludes", [list(EXCLUDES), None], ids=["smolray submit", "ray job submit"])
def test_the_upload_leaves_behind_what_a_job_does_not_need(tmp_path, excludes):
    """Packed by Ray's own function, with the ignore files of this repository."""
    from ray._private.runtime_env.packaging import create_package

    tree = tmp_path / "tree"
    wanted = {
        "smolray/cli/app.py",
        "smolray/data/shards.py",
        "smolray/recipes/a.yaml",
        "smolray/cluster/jobs.py",
        "jobs/train.py",
        "pyproject.toml",
    }
    unwanted = {
        ".git/objects/ab/cd",
        ".venv/lib/x.py",
        "runs/demo/events.jsonl",
        ".cache/torch_extensions/x.so",
        "tests/unit/test_x.py",
        "smolray/__pycache__/cli.pyc",
        "smolray.egg-info/PKG-INFO",
        "k8s/x.yaml",
        "cluster/x.yaml",
        ".mypy_cache/a",
        "build/a",
        "dist/b",
        *(".env", ".env.local", "jobs/prod.env", ".aws/credentials", ".ssh/id_ed25519", ".netrc", "jobs/host.pem"),
        *("smolray/tls.key", "auth_token", ".ray/auth_token"),
    }
    for name in wanted | unwanted:
        (tree / name).parent.mkdir(parents=True, exist_ok=True)
        (tree / name).touch()
    for name in (".gitignore", ".rayignore"):
        (tree / name).write_bytes((ROOT / name).read_bytes())
    create_package(str(tree), tmp_path / "package.zip", include_gitignore=True, excludes=excludes)
    packed = {name for name in ZipFile(tmp_path / "package.zip").namelist() if not name.endswith("/")}
    assert packed - {".gitignore", ".rayignore"} == wanted
