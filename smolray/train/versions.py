"""The versions that a run was made with: for its log and its checkpoints."""

import platform
from importlib.metadata import version

PACKAGES = (
    "smolray",
    "ray",
    "torch",
    "transformers",
    "peft",
    "trl",
    "deepspeed",
    "bitsandbytes",
    "pyarrow",
    "datasets",
)


def versions() -> dict[str, str]:
    """Package -> version, and that of Python."""
    return {"python": platform.python_version()} | {name: version(name) for name in PACKAGES}
