"""Files for machines that ship with smolray: the playbook of cluster/, the overlays of k8s/, and constraints.txt.

A checkout has them at its top. The wheel holds a copy, made when it is built (wheel.py).
"""

from pathlib import Path
from typing import Literal

INSTALLED = Path(__file__).parents[1] / "deploy"
CHECKOUT = Path(__file__).parents[2]
TOOLS = "\n# The tests and their tools.\n"  # the line of constraints.txt from which on a node needs nothing


def is_installed() -> bool:
    """Whether this is an installed copy, without a checkout around it."""
    return INSTALLED.is_dir()


def deploy_folder(name: Literal["cluster", "k8s"]) -> Path:
    """The folder of that name, in the installed package or in the checkout."""
    return _top() / name


def node_packages() -> list[str]:
    """`name==version` of what smolray and its extras need: the first part of constraints.txt, Ray included."""
    needed, _, _ = (_top() / "constraints.txt").read_text(encoding="utf-8").partition(TOOLS)
    return [line for line in needed.splitlines() if "==" in line]


def _top() -> Path:
    return INSTALLED if is_installed() else CHECKOUT
