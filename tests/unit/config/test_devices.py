"""Whether a build of torch has kernels for a GPU follows CUDA's rules of binary compatibility."""

import pytest

from smolray.config.devices import WHEEL_ARCHITECTURES, no_kernels


@pytest.mark.parametrize(
    ("capability", "runs"),
    [
        ((6, 1), False),
        ((7, 0), False),
        ((7, 5), True),
        ((8, 0), True),
        ((8, 6), True),
        ((8, 9), True),
        ((9, 0), True),
        ((10, 3), True),
        ((12, 0), True),
        ((12, 1), True),
        ((13, 0), False),
    ],
)
def test_code_runs_on_its_own_generation_from_its_number_on(capability, runs):
    assert (no_kernels("a GPU", capability, WHEEL_ARCHITECTURES) == "") is runs


def test_ptx_runs_on_everything_newer_and_names_with_letters_are_read():
    assert no_kernels("a GPU", (13, 0), ["sm_80", "compute_120"]) == ""
    assert no_kernels("a GPU", (7, 5), ["sm_80", "compute_120"]) != ""
    assert no_kernels("a GPU", (9, 0), ["sm_90a"]) == ""


def test_what_is_missing_is_named():
    said = no_kernels("Tesla V100", (7, 0), ["sm_75", "sm_80"])
    assert "Tesla V100" in said and "7.0" in said and "sm_75, sm_80" in said and "nearest" in said
