"""Puts cluster/ and k8s/ into the wheel, so that `smolray cluster join` and `smolray k8s render` need no checkout.

Only building the wheel uses it (pyproject.toml names the class); all else about the package is in pyproject.toml.
"""

import shutil
from pathlib import Path

from setuptools.command.build_py import build_py

FILES = (
    "cluster/site.yml",
    "cluster/grafana/*.json",
    "cluster/inventory.example.yml",
    "cluster/roles/**/*.yml",
    "cluster/roles/**/*.j2",
    "k8s/**/*.yaml",
    "constraints.txt",
)


class BuildWithDeployFiles(build_py):
    """Copies the files for machines to smolray/deploy of what is built; an editable install reads the checkout's."""

    def run(self) -> None:
        """Build the package as setuptools does, then add the files."""
        super().run()
        if self.editable_mode:
            return

        target = Path(self.build_lib) / "smolray" / "deploy"
        for path in _deploy_files():
            (target / path).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(path, target / path)

    def get_source_files(self) -> list[str]:
        """What a source distribution must hold, so that a wheel can be built from it."""
        return [*super().get_source_files(), *map(str, _deploy_files())]


def _deploy_files() -> list[Path]:
    """The files relative to the project's root, where a build runs."""
    return [path for pattern in FILES for path in Path().glob(pattern)]
