"""What exists is taken as it is named; no file is read twice, and none that should be there is passed over."""

import os
from pathlib import Path

import pytest

from smolray.config import DataConfig
from smolray.data.formats.discover import image_files, is_hub, resolve
from smolray.data.formats.listing import list_source
from smolray.data.formats.source import SourceError

DATA = DataConfig()


def names_of(source):
    found = resolve(str(source), DATA)
    return [uri[len(found.root) :].strip("/") for uri, _ in found.files]


@pytest.mark.parametrize("name", ["set#v2", "photos [old]", "a b", "what?", "{1..2}", "x*", "50%"])
def test_a_folder_of_any_name_is_found(tmp_path, name):
    folder = tmp_path / name
    folder.mkdir()
    for file in ("a.jsonl", "b[1].jsonl", "c d.jsonl"):
        (folder / file).write_text("{}")
    (tmp_path / "set").mkdir()
    assert names_of(folder) == ["a.jsonl", "b[1].jsonl", "c d.jsonl"]
    assert names_of(folder / "b[1].jsonl") == ["b[1].jsonl"]
    assert names_of(folder / "[ac]*.jsonl") == ["a.jsonl", "c d.jsonl"]
    assert not is_hub(str(folder), DATA)


def test_a_link_to_a_folder_above_is_not_followed(tmp_path):
    (tmp_path / "x.jsonl").write_text("{}")
    (tmp_path / "loop").symlink_to(".")
    (tmp_path / "more").mkdir()
    (tmp_path / "more" / "up").symlink_to("..")
    assert names_of(tmp_path) == ["x.jsonl"]


def test_a_file_that_two_links_lead_to_is_read_once(tmp_path):
    (tmp_path / "v1").mkdir()
    (tmp_path / "v1" / "x.jsonl").write_text("{}")
    (tmp_path / "latest").symlink_to("v1")
    (tmp_path / "a.jsonl").symlink_to("v1/x.jsonl")
    assert names_of(tmp_path) == ["v1/x.jsonl"]


def test_a_link_that_leads_nowhere_is_refused(tmp_path):
    (tmp_path / "x.jsonl").write_text("{}")
    (tmp_path / "y.jsonl").symlink_to("gone.jsonl")
    with pytest.raises(SourceError, match=r"y\.jsonl is a link to gone\.jsonl, which does not exist"):
        resolve(str(tmp_path), DATA)


def test_a_file_name_that_is_not_unicode_is_refused(tmp_path):
    path = Path(os.fsdecode(os.fsencode(tmp_path) + b"/\xe9.jsonl"))
    path.write_text("{}")
    for source in (str(tmp_path), str(path)):
        with pytest.raises(SourceError, match=r"\\udce9\.jsonl|\\xe9\.jsonl"):
            resolve(source, DATA)


def test_images_that_are_not_read_are_listed_too(tmp_path):
    for name in ("a.png", "b.heic", "c.svg", "notes.txt"):
        (tmp_path / name).write_bytes(b"")
    assert image_files(str(tmp_path)) == (["a.png", "b.heic", "c.svg"], str(tmp_path))


def test_the_files_of_an_image_root_are_part_of_the_source(tmp_path):
    (tmp_path / "json").mkdir()
    (tmp_path / "images").mkdir()
    (tmp_path / "json" / "x.jsonl").write_text("{}")
    (tmp_path / "images" / "a.png").write_bytes(b"one")
    data = DataConfig(image_root=str(tmp_path / "images"))
    before = resolve(str(tmp_path / "json"), data).identity
    (tmp_path / "images" / "a.png").write_bytes(b"another")
    assert resolve(str(tmp_path / "json"), data).identity != before
    assert [f.bytes for f in list_source(str(tmp_path / "images"))[0]] == [7]
