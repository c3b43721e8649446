"""A job gets the code of a checkout without what it does not need, and elsewhere nothing but its config file."""

from pathlib import Path
from zipfile import ZipFile

import pytest

from smolray.cluster.upload import EXCLUDES, job_environment
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
