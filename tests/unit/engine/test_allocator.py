"""Workers on a GPU take segments of memory that grow, unless the environment says otherwise. The GPU is pretended."""

import pytest
import torch

from smolray.engine import allocator
from smolray.engine.allocator import SETTING, VARIABLES, expand_segments


@pytest.fixture
def told(monkeypatch):
    """What torch's allocator is told, where NVIDIA's management library is there."""
    told = []
    monkeypatch.setattr(torch._C, "_accelerator_setAllocatorSettings", told.append)
    monkeypatch.setattr(allocator, "MANAGEMENT", "libc.so.6")
    return told


@pytest.mark.parametrize("variable", VARIABLES)
def test_segments_grow_unless_the_environment_sets_the_allocator(told, variable):
    expand_segments({variable: "max_split_size_mb:128"})
    assert not told
    expand_segments({})
    assert told == [SETTING]


def test_segments_stay_fixed_where_the_management_library_is_missing(told, monkeypatch):
    """With segments that grow, torch would crash there at its first allocation."""
    monkeypatch.setattr(allocator, "MANAGEMENT", "libno-such-library.so.1")
    expand_segments({})
    assert not told
