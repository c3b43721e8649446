"""The documentation is true: its commands run as written, its links and paths exist, its tables are complete.

Every `sh` block of a page is run, in order, in a fresh folder that holds nothing but `jobs/` and the Makefile. A block
that needs what is not there says so in a comment in the line before it: `<!-- not run: GPU, hub -->`, with reasons from
`tests.docs.markdown.REASONS`. A block after `<!-- slow -->` is run by `make slow` only.
"""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import typer

from tests.docs.markdown import PAGES, REASONS, ROOT, blocks, code_words, links, name_of

README = ROOT / "README.md"
WIDTH = 120
# Named in the text, made by the reader.
MADE_BY_THE_READER = {
    "cluster/inventory.yml",
    "smolray/data/formats/lines.py",
    "tests/unit/data/formats/test_lines.py",
}


def runnable(page, slow):
    return [block for block in blocks(page, "sh") if not block.reasons and (slow or not block.slow)]


def pages_with(slow):
    return [page for page in PAGES if any(slow == block.slow for block in runnable(page, slow))]


@pytest.fixture
def folder(tmp_path):
    """A fresh folder with `jobs/` and the Makefile, and a `smolray` of this checkout, whatever is installed."""
    shutil.copytree(ROOT / "jobs", tmp_path / "here" / "jobs", ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(ROOT / "Makefile", tmp_path / "here")
    command = tmp_path / "bin" / "smolray"
    command.parent.mkdir()
    command.write_text(f'#!/bin/sh\nexec {sys.executable} -m smolray "$@"\n', encoding="utf-8")
    command.chmod(0o755)
    return tmp_path / "here"


def run_as_written(block, page, folder):
    path = [str(folder.parent / "bin"), str(Path(sys.executable).parent), os.environ["PATH"]]
    environment = os.environ | {"PATH": os.pathsep.join(path), "PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(
        ["bash", "-euo", "pipefail", "-c", block.text],
        cwd=folder,
        env=environment,
        capture_output=True,
        text=True,
        timeout=540,
    )
    assert done.returncode == 0, (
        f"{name_of(page)}:{block.line} fails as written:\n{block.text}\n{done.stdout[-3000:]}\n{done.stderr[-3000:]}"
    )


@pytest.mark.parametrize("page", pages_with(slow=False), ids=name_of)
def test_commands_run_as_written(page, folder):
    for block in runnable(page, slow=False):
        run_as_written(block, page, folder)


@pytest.mark.slow
@pytest.mark.parametrize("page", pages_with(slow=True), ids=name_of)
def test_long_commands_run_as_written(page, folder):
    for block in runnable(page, slow=True):
        run_as_written(block, page, folder)


def test_readme_runs_the_whole_flow():
    commands = " ".join(block.text for block in runnable(README, slow=True))
    for command in ("preview", "train", "status", "report", "generate", "plan", "config show"):
        assert f"smolray {command} " in commands


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_commands_that_are_not_run_say_why(page):
    for block in blocks(page, "sh"):
        assert not set(block.reasons) - set(REASONS), f"{name_of(page)}:{block.line}: reasons are {sorted(REASONS)}"
    assert not blocks(page, "bash") and not blocks(page, "shell"), "write ```sh, which is what is run"


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_links_lead_to_files(page):
    for link in links(page):
        target, _, heading = link.partition("#")
        path = page.parent / target if target else page
        assert path.exists(), f"{name_of(page)} links to {link}, which does not exist"
        if heading:
            assert heading in headings(path), f"{name_of(page)} links to {link}; headings are {headings(path)}"


def headings(page):
    """The anchors of a page, as GitHub makes them of its headings."""
    found = re.findall(r"^#+ (.+)$", page.read_text(encoding="utf-8"), re.M)
    return [re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in found]


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_paths_in_the_text_exist(page):
    tops = {path.name for path in ROOT.iterdir() if path.is_dir()} - {"runs"}
    for word in code_words(page):
        inside = word.split("/")[0] in tops and re.fullmatch(r"[\w.\-]+(/[\w.\-]*)+", word)
        module = re.fullmatch(r"[\w\-]+(/[\w\-]+)*/[\w\-]+\.(py|md)", word)
        if (inside or module) and word not in MADE_BY_THE_READER:
            exists = (ROOT / word).exists() or (page.parent / word).exists()
            assert exists, f"{name_of(page)} names `{word}`, which does not exist"


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_lines_are_at_most_120_columns(page):
    lines = page.read_text(encoding="utf-8").splitlines()
    long = [number for number, line in enumerate(lines, 1) if len(line) > WIDTH]
    assert not long, f"{name_of(page)}: lines {long} are longer than {WIDTH} columns"


def commands_of(group, prefix=""):
    for name, command in group.commands.items():
        if getattr(command, "commands", None):
            yield from commands_of(command, f"{name} ")
        else:
            yield prefix + name


def test_the_table_of_commands_is_complete():
    from smolray.cli.app import app

    _, _, table = README.read_text(encoding="utf-8").partition("\n## Commands\n")
    rows = [row.split("|")[1] for row in table.partition("\n## ")[0].splitlines() if row.startswith("| `")]
    named = [name for row in rows for name in re.findall(r"`([^`…]+)`", row)]
    assert sorted(named) == sorted(commands_of(typer.main.get_command(app)))


def rows_of(text):
    """The JSON values in a block, one after the other."""
    rows, decoder, text = [], json.JSONDecoder(), text.strip()
    while text:
        row, end = decoder.raw_decode(text)
        rows.append(row)
        text = text[end:].strip()
    return rows


def test_every_kind_of_row_in_the_readme_is_read(tmp_path):
    from PIL import Image

    from smolray.config import DataConfig
    from smolray.data.first_rows import first_rows

    Image.new("RGB", (32, 32), "red").save(tmp_path / "a.png")
    (block,) = blocks(README, "json")
    rows = rows_of(block.text)
    assert len(rows) >= 5
    for number, row in enumerate(rows):
        path = tmp_path / f"{number}.jsonl"
        path.write_text(json.dumps(row) + "\n", encoding="utf-8")
        assert len(first_rows(str(path), DataConfig(), 1).rows) == 1, row
