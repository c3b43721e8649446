"""What a job needs from this machine: the code of a checkout, or only the run's settings.

In: the folder in which a run is submitted, and the arguments of `smolray train`. Out: a runtime environment for Ray,
and the arguments that mean the same inside it.

Nodes have smolray installed, so no code is uploaded. In a checkout its code is, so that changes can be tried at once.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from smolray import storage
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


def is_checkout(folder: Path) -> bool:
    """Whether a folder holds the code of smolray, which a job started there runs in place of the installed one."""
    return (folder / "smolray" / "__main__.py").is_file()


def config_argument(arguments: Sequence[str]) -> str:
    """The value of `--config` among the arguments; empty where there is none."""
    return arguments[list(arguments).index("--config") + 1] if "--config" in arguments else ""


@contextmanager
def job_environment(working_dir: str, arguments: Sequence[str]) -> Iterator[tuple[dict[str, Any], list[str]]]:
    """The runtime environment of a job and its arguments; files made for it are deleted at the end.

    In a checkout the whole folder is uploaded and the arguments stay. Elsewhere only the config file is uploaded.
    """
    root, given = Path(working_dir).resolve(), config_argument(arguments)
    if is_checkout(root):
        yield {"working_dir": str(root), "excludes": list(EXCLUDES)}, list(arguments)
        return
    if not given or not storage.is_local(given):
        yield {}, list(arguments)  # a URI is read where the job runs
        return

    with TemporaryDirectory(prefix="smolray-job-") as folder:
        (Path(folder) / UPLOADED_CONFIG).write_bytes(storage.read_bytes(str(root / config_file(given))))
        moved = list(arguments)
        moved[moved.index("--config") + 1] = UPLOADED_CONFIG
        yield {"working_dir": folder}, moved
