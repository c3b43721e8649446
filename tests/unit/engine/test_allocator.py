"""Workers on a GPU take segments of memory that grow, unless the environment says otherwise. The GPU is pretended."""

import pytest
import torch

from smolray.engine.allocator import SETTING, VARIABLES, expand_segments


@pytest.mark.parametrize("variable", VARIABLES)
def test_segments_grow_unless_the_environment_sets_the_allocator(monkeypatch, variable):
    told = []
    monkeypatch.setattr(torch._C, "_accelerator_setAllocatorSettings", told.append)
    expand_segments({variable: "max_split_size_mb:128"})
    assert not told
    expand_segments({})
    assert told == [SETTING]
