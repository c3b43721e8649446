"""Rows that begin with the same pages are found, and attend to them at once as each row would alone."""

import pytest
import torch
from torch.nn import functional as F

from smolray.serve.kv_cache import FoldedRows, KVShape, PagedKV, Rows
from smolray.serve.pages import PAGE
from smolray.serve.prefixes import shared_prefixes

IMAGE, OTHER = [5, 6, 7, 8], [9, 10, 11, 12]


@pytest.mark.parametrize(
    ("beginnings", "expected"),
    [
        ([IMAGE, IMAGE, IMAGE], [(IMAGE, [0, 1, 2])]),
        ([[*IMAGE, 20], OTHER, [*IMAGE, 21], IMAGE, OTHER], [(IMAGE, [0, 2, 3]), (OTHER, [1, 4])]),
        # the same question twice among others about the image
        ([[*IMAGE, 20], [*IMAGE, 20], [*IMAGE, 21]], [(IMAGE, [0, 1, 2])]),
        # the same system message and other images
        ([[1, *IMAGE], [1, *OTHER], [1, *IMAGE], [1, *OTHER]], [([1, *IMAGE], [0, 2]), ([1, *OTHER], [1, 3])]),
        ([[], [], [3]], [([], [0]), ([], [1]), ([3], [2])]),
        ([IMAGE], [(IMAGE, [0])]),
    ],
)
def test_rows_about_one_image_are_together(beginnings, expected):
    found = [([*prefix.pages], sorted(prefix.rows)) for prefix in shared_prefixes(beginnings)]
    assert sorted(found, key=lambda one: one[1]) == sorted(expected, key=lambda one: one[1])


@pytest.mark.parametrize(("dtype", "close"), [(torch.float32, 1e-5), (torch.bfloat16, 2e-2)])
@pytest.mark.parametrize("key_heads", [1, 3, 6])
def test_folded_rows_attend_as_each_row_alone(dtype, close, key_heads):
    torch.manual_seed(0)
    memory = PagedKV(KVShape(2, key_heads, 8, dtype), 30, torch.device("cpu"))
    memory.keys.normal_(), memory.values.normal_()
    beginnings = [IMAGE, OTHER[:2], IMAGE, [], IMAGE, OTHER[:2], [13, 14, 15]]
    tables = [[*pages, 16 + row, 23 + row] for row, pages in enumerate(beginnings)]
    past = [len(pages) * PAGE + extra for pages, extra in zip(beginnings, (0, 3, 15, 5, 16, 20, 31), strict=True)]
    prefixes = shared_prefixes(beginnings)
    assert sorted(len(prefix.rows) for prefix in prefixes) == [1, 1, 2, 3]

    query = torch.randn(len(tables), 6, 1, 8, dtype=dtype)
    new = torch.randn(2, len(tables), key_heads, 1, 8, dtype=dtype)
    rows, folded = Rows(memory, tables, past, [1] * len(tables)), FoldedRows(memory, tables, past, prefixes)
    folded.update(*new, 1)
    found = folded.attend(1, query, 0.3)
    keys, values = rows.update(*new, 1)
    want = F.scaled_dot_product_attention(query, keys, values, rows.mask, scale=0.3, enable_gqa=True).transpose(1, 2)
    assert found.dtype == dtype and torch.allclose(found, want, atol=close, rtol=close)
    assert torch.equal(folded.position_ids, rows.position_ids)
