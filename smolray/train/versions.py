"""The versions that a run was made with: for its log and its checkpoints."""

import platform
from importlib.metadata import version

from smolray import __version__

PACKAGES = (
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
    """Package -> version, and that of Python. Where a job brought the code along, smolray itself is not installed."""
    own = {"python": platform.python_version(), "smolray": __version__}
    return own | {name: version(name) for name in PACKAGES}
