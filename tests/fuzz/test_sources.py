"""2,000 damaged sources of all formats: no traceback, and no row is lost in silence.

Each is read as prepare reads it. It is refused (SourceError), or as many rows are kept or told as the whole source had.
A failure names its seed: `make fuzz ARGS="-k 1234"`.
"""

import pytest

from smolray.data.formats.source import SourceError
from tests.fuzz.sources import damaged_source, outcome

SOURCES, EACH = 2000, 20


@pytest.mark.fuzz
@pytest.mark.parametrize("first", range(0, SOURCES, EACH))
def test_a_damaged_source_is_refused_or_each_lost_row_is_told(first, tmp_path):
    for seed in range(first, first + EACH):
        folder = tmp_path / str(seed)
        folder.mkdir()
        done, rows, task_bytes = damaged_source(seed, folder)
        try:
            found = outcome(folder, task_bytes)
        except SourceError as error:
            assert str(folder) in str(error), f"{done}: the message names no file: {error}"
            continue
        except Exception as error:
            raise AssertionError(f"{done}: {type(error).__name__}: {error}") from error
        assert len(found.kept) <= rows <= len(found.kept) + found.told, f"{done}: {rows} rows, {found}"
