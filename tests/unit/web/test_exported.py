"""The pages as files: they lead to each other from a disk, show what the pages show, and ask for nothing."""

from pathlib import Path
from urllib.parse import unquote, urlsplit

import pytest

from tests.commands import refused, smolray
from tests.unit.web.test_app import attributes_of
from tests.webpages import EVIL, write_folder

EVIL_NAME = "<img src=x onerror=alert(1)> %2e?#"


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    """The folder of the pages of runs in every state."""
    folder = tmp_path_factory.mktemp("exported")
    root = folder / "runs"
    write_folder(root, "done")
    write_folder(root, "going", status="")
    write_folder(root, EVIL_NAME, question=EVIL, wrong=EVIL)
    write_folder(root, "damaged")
    (root / "damaged" / "events.jsonl").write_text('{"event": "step", "step": "x"}\n{"event": "start"}\n')
    done = smolray("web", "--storage", str(root), "--export", str(folder / "out"))
    assert done.exit_code == 0, done.output
    assert "4 runs" in done.stderr and "index.html" in done.stderr
    return folder / "out"


def test_every_link_leads_to_a_file(exported):
    pages = sorted(exported.rglob("index.html"))
    assert len(pages) == 5
    images = 0
    for page in pages:
        links = [value for name, value in attributes_of(page.read_text()) if name in ("href", "src")]
        for link in links:
            parts = urlsplit(link)
            if parts.scheme == "data" or not parts.path:
                continue
            assert not parts.scheme and not parts.netloc and not parts.path.startswith("/"), link
            assert not parts.query, link
            target = page.parent / unquote(parts.path)
            assert target.is_file() and target.resolve().is_relative_to(exported.resolve()), (page, link)
            images += target.parent.name == "images"
    assert images >= 6, "the pictures of the runs"


def test_they_show_what_the_pages_show(exported):
    listed = (exported / "index.html").read_text()
    assert "4 runs" in listed and 'href="runs/done/index.html"' in listed and "As of 20" in listed
    text = (exported / "runs" / "done" / "index.html").read_text()
    for words in ("Training loss", "Samples per second", "✓ correct", "truth: red", 'href="report.html"'):
        assert words in text, words
    assert "Report" not in (exported / "runs" / "going" / "index.html").read_text()
    assert "is damaged" in (exported / "runs" / "damaged" / "index.html").read_text()


def test_they_ask_for_nothing_and_run_nothing(exported):
    for page in exported.rglob("index.html"):
        text = page.read_text()
        for tag in ("<form", "<script", "<button"):
            assert tag not in text, (page, tag)
        assert "script-src 'none'" in text and "data-live" not in text and "/static/" not in text
        assert not [name for name, _ in attributes_of(text) if name.startswith("on") or name == "style"]
    assert "&lt;script&gt;alert" in (exported / "runs" / EVIL_NAME / "index.html").read_text()


def test_written_again_they_are_as_of_then(tmp_path):
    root, out = tmp_path / "runs", tmp_path / "out"
    for number, name in enumerate(("one", "two"), 1):
        write_folder(root, name)
        assert smolray("web", "--storage", str(root), "--export", str(out)).exit_code == 0
        assert f"{number} run" in (out / "index.html").read_text()


def test_a_storage_that_is_away_is_told(tmp_path):
    assert "cannot be read" in refused("web", "--storage", "unknown://nowhere", "--export", str(tmp_path / "out"))
    assert not Path(tmp_path / "out").exists()
