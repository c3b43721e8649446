"""Puts cluster/ and k8s/ into the wheel, so that `smolray cluster join` and `smolray k8s render` need no checkout.

All else about the package is in pyproject.toml.
"""

import shutil
from pathlib import Path

from setuptools import setup
from setuptools.command.build_py import build_py

ROOT = Path(__file__).parent
FILES = (
    "cluster/site.yml",
    "cluster/inventory.example.yml",
    "cluster/roles/**/*.yml",
    "cluster/roles/**/*.j2",
    "k8s/**/*.yaml",
    "constraints.txt",
)


class BuildWithDeployFiles(build_py):
    """Copies the files for machines to smolray/deploy of what is built; an editable install reads the checkout's."""

    def run(self) -> None:
        super().run()
        if self.editable_mode:
            return

        target = Path(self.build_lib) / "smolray" / "deploy"
        for path in [path for pattern in FILES for path in ROOT.glob(pattern)]:
            copy = target / path.relative_to(ROOT)
            copy.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(path, copy)


setup(cmdclass={"build_py": BuildWithDeployFiles})
