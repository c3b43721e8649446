"""Files for machines that ship with smolray: the Ansible playbook of cluster/ and the Kubernetes overlays of k8s/.

A checkout has them at its top. The wheel holds a copy, made when it is built (wheel.py).
"""

from pathlib import Path
from typing import Literal

INSTALLED = Path(__file__).parents[1] / "deploy"
CHECKOUT = Path(__file__).parents[2]


def is_installed() -> bool:
    """Whether this is an installed copy, without a checkout around it."""
    return INSTALLED.is_dir()


def deploy_folder(name: Literal["cluster", "k8s"]) -> Path:
    """The folder of that name, in the installed package or in the checkout."""
    return (INSTALLED if is_installed() else CHECKOUT) / name
