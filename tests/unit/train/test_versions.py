"""The versions that a run records."""

import smolray
from smolray.train.versions import PACKAGES, versions


def test_the_version_of_smolray_is_that_of_its_code_also_where_it_is_not_installed():
    assert "smolray" not in PACKAGES, "importlib.metadata knows installed packages only"
    assert versions()["smolray"] == smolray.__version__
