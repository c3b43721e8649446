"""What is registered is all that a format needs: its name and suffixes choose it, and its rows are read."""

import pytest

from smolray.config import ConfigError, DataConfig
from smolray.data.formats.discover import image_files, is_hub, resolve
from smolray.data.formats.registry import FORMATS, named_format


def test_every_suffix_belongs_to_one_format():
    suffixes = [suffix for f in FORMATS.values() for suffix in f.suffixes]
    assert len(suffixes) == len(set(suffixes)) and all(s == s.lower() and s.startswith(".") for s in suffixes)
    assert all(set(f.metadata_suffixes) <= set(f.suffixes) for f in FORMATS.values())
    assert "auto" not in FORMATS


@pytest.mark.parametrize("name", [f.name for f in FORMATS.values() if f.suffixes])
def test_a_format_is_chosen_by_suffix_or_by_name(tmp_path, name):
    for number, suffix in enumerate(FORMATS[name].suffixes):
        folder = tmp_path / str(number)
        folder.mkdir()
        (folder / f"x{suffix}").write_bytes(b"")
        assert resolve(str(folder), DataConfig()).format == name
        assert resolve(str(folder), DataConfig(format=name)).format == name
    (tmp_path / "anything").write_bytes(b"")
    assert resolve(str(tmp_path / "anything"), DataConfig(format=name)).format == name


def test_a_wrong_format_is_refused_with_the_nearest_one():
    with pytest.raises(ConfigError, match=r"data.format = 'parqet': expected auto, parquet, .*; nearest: parquet"):
        is_hub("x", DataConfig(format="parqet"))
    assert named_format(DataConfig()) is None


@pytest.mark.parametrize(
    ("names", "expected"),
    [
        (["x.parquet", "meta.json", "classes.csv"], "parquet"),
        (["x.tar", "classes.csv"], "webdataset"),
        (["x.jsonl", "classes.csv"], "jsonl"),
        (["x.json", "classes.csv"], "jsonl"),
        (["x.tsv", "picture.png"], "csv"),
    ],
)
def test_metadata_next_to_the_data_are_not_read_as_data(tmp_path, names, expected):
    for name in names:
        (tmp_path / name).write_bytes(b"")
    assert resolve(str(tmp_path), DataConfig()).format == expected


def test_a_csv_among_images_is_metadata_and_alone_it_is_data(tmp_path):
    (tmp_path / "a.png").write_bytes(b"")
    (tmp_path / "labels.csv").write_bytes(b"")
    assert image_files(str(tmp_path)) == (["a.png"], str(tmp_path))
    assert image_files(str(tmp_path / "labels.csv")) == ([], str(tmp_path))
