"""What a job needs from this machine: the code of a checkout, or only the run's settings.

In: the folder in which a run is submitted, and the arguments of `smolray train`. Out: a runtime environment for Ray,
and the arguments that mean the same inside it.

Nodes have smolray installed, so no code is uploaded. In a checkout its code is, so that changes can be tried at once.
For nodes that have Ray alone, the code goes along, and Ray installs what it needs with uv.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from smolray import storage
from smolray.cluster.deploy import node_packages
from smolray.config.recipes import config_file

# Files that hold keys and passwords: never uploaded. `.rayignore` of this repository names the same.
SECRETS = (".env", ".env.*", "*.env", ".aws", ".ssh", ".netrc", "*.pem", "*.key", "auth_token", ".ray")
# Left behind in a checkout without ignore files of its own; Ray also honours .gitignore and .rayignore.
EXCLUDES = (
    ".git",
    ".venv",
    "venv",
    "runs",
    ".cache",
    ".mypy_cache",
    ".ruff_cache",
    ".pytest_cache",
    "__pycache__",
    "*.egg-info",
    "build",
    "dist",
    *SECRETS,
)
UPLOADED_CONFIG = "run.yaml"
PACKAGE = Path(__file__).parents[1]
INSTALL_SECONDS = 3600  # gigabytes on the first run, over somebody's line


def is_checkout(folder: Path) -> bool:
    """Whether a folder holds the code of smolray, which a job started there runs in place of the installed one."""
    return (folder / "smolray" / "__main__.py").is_file()


def config_argument(arguments: Sequence[str]) -> str:
    """The value of `--config` among the arguments; empty where there is none."""
    return arguments[list(arguments).index("--config") + 1] if "--config" in arguments else ""


@contextmanager
def job_environment(
    working_dir: str, arguments: Sequence[str], uv: bool = False
) -> Iterator[tuple[dict[str, Any], list[str]]]:
    """The runtime environment of a job and its arguments; files made for it are deleted at the end.

    In a checkout the whole folder is uploaded and the arguments stay. Elsewhere only the config file is uploaded, and
    with `uv` the installed code. `uv`: Ray installs the packages of constraints.txt on each node.
    """
    root, given = Path(working_dir).resolve(), config_argument(arguments)
    installed = uv_environment() if uv else {}
    if is_checkout(root):
        yield {"working_dir": str(root), "excludes": list(EXCLUDES)} | installed, list(arguments)
        return

    code = {"py_modules": [str(PACKAGE)], "excludes": list(EXCLUDES)} | installed if uv else {}
    if not given or not storage.is_local(given):
        yield code, list(arguments)  # a URI is read where the job runs
        return

    with TemporaryDirectory(prefix="smolray-job-") as folder:
        (Path(folder) / UPLOADED_CONFIG).write_bytes(storage.read_bytes(str(root / config_file(given))))
        moved = list(arguments)
        moved[moved.index("--config") + 1] = UPLOADED_CONFIG
        yield {"working_dir": folder} | code, moved


def uv_environment() -> dict[str, Any]:
    """What makes Ray install the packages on a node, once for all jobs that name the same ones.

    uv works in a copy of the environment that Ray has there: what fits stays as it is, a CUDA build of torch too.
    """
    return {
        "uv": {"packages": node_packages(), "uv_pip_install_options": []},  # with its cache on the node
        "config": {"setup_timeout_seconds": INSTALL_SECONDS},
    }
