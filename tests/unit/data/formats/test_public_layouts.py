"""The layouts of public data sets are imported right, or refused with the reason; a table of the README says which."""

import json
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from smolray.config import DataConfig
from smolray.data import formats
from smolray.data.first_rows import first_rows
from smolray.data.formats.images import ImageReader
from smolray.data.formats.layouts import parse
from smolray.data.formats.source import SourceError
from tests.layouts.case import HERE, encoded
from tests.layouts.chats import CHATS
from tests.layouts.questions import QUESTIONS

LAYOUTS = [*QUESTIONS, *CHATS]
README = Path(formats.__file__).parents[1] / "README.md"


def write(layout, folder):
    rows = [layout.row(n) for n in range(3)]
    for n in range(3):
        (folder / f"{n}.png").write_bytes(encoded(n))
    if layout.lines:
        (folder / "train.jsonl").write_text("\n".join(map(json.dumps, rows)))
        return folder / "train.jsonl"
    pq.write_table(pa.Table.from_pylist(rows), folder / "train.parquet")
    return folder / "train.parquet"


def shown(messages):
    return " | ".join("".join(HERE if p.type == "image" else p.text for p in m.content) for m in messages)


@pytest.mark.parametrize("layout", LAYOUTS, ids=lambda layout: layout.name)
def test_a_public_layout_is_imported_right_or_refused_with_the_reason(layout, tmp_path):
    source, data = write(layout, tmp_path), DataConfig.model_validate(layout.settings)
    if layout.refused:
        with pytest.raises(SourceError, match=layout.refused):
            first_rows(str(source), data, 3)
        return
    found = first_rows(str(source), data, 3)
    assert not found.left_out
    assert sorted(len(r.images) for r in found.rows) == sorted(layout.images)
    first = found.rows[0].conversations[0]
    turns = [*first.messages, *first.chosen]
    assert shown(turns[:-1]) == layout.asked
    said = [turns[-1], *first.rejected]
    assert shown(said) == layout.said


def test_sixty_layouts_are_tried():
    assert len({layout.name for layout in LAYOUTS}) == len(LAYOUTS) >= 60


def line(layout, folder):
    """The row of the table: the columns that are used, or why the data set is refused."""
    if layout.refused:
        return f"| {layout.name} | refused: {layout.why or layout.refused} |"
    for n in range(3):
        (folder / f"{n}.png").write_bytes(encoded(n))
    data, images = DataConfig.model_validate(layout.settings), ImageReader(str(folder), str(folder), 10**6)
    used = parse(layout.row(0), "row", data, images).used.items()
    columns = [f"`{c}`" if c in (use, f"{use}s") else f"`{c}` ({use})" for c, use in used if use not in ("id", "type")]
    settings = [f"`data.columns.{key}={name}`" for key, name in layout.settings.get("columns", {}).items()]
    return f"| {layout.name} | {', '.join(columns)}{' with ' if settings else ''}{', '.join(settings)} |"


def test_the_table_of_the_readme_is_what_is_imported(tmp_path):
    lines = [line(layout, tmp_path) for layout in LAYOUTS]
    table = "\n".join(["| data set | columns that are used, and as what |", "|---|---|", *lines]) + "\n"
    assert table in README.read_text(encoding="utf-8"), f"write this table into {README.name}:\n{table}"
