"""The parts of a Markdown page that the tests of the documentation look at: code blocks, links and paths."""

import re
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[2]
IGNORED = {".venv", ".cache", ".git", "runs", "build", "dist"}
PAGES = sorted(p for p in ROOT.rglob("*.md") if not IGNORED & {*p.relative_to(ROOT).parts})

# Why a block of commands is not run, as `<!-- not run: GPU, hub -->` in the line before it.
REASONS = {
    "GPU": "needs a GPU",
    "hub": "downloads a model or a data set from the Hugging Face hub",
    "cluster": "needs a running Ray cluster, several machines or Kubernetes",
    "S3": "needs object storage",
    "install": "installs packages from the network",
    "root": "needs root",
    "minutes": "runs for minutes, and is itself the demo, the test suite or a benchmark",
    "your files": "names files or images of the reader's own",
}
# A block after `<!-- slow -->` is run by `make slow`, with all blocks before it.
SLOW = "<!-- slow -->"

_BLOCK = re.compile(r"^(?:<!-- (?P<mark>[^\n]*?) -->\n)?```(?P<language>\w*)\n(?P<text>.*?)^```$", re.S | re.M)
_LINK = re.compile(r"\[[^\]]*\]\(([^)\s]+)\)")
_CODE = re.compile(r"`([^`\n]+)`")


@dataclass(frozen=True)
class Block:
    """A code block. `mark` is the comment in the line before it."""

    language: str
    text: str
    mark: str
    line: int

    @property
    def reasons(self) -> list[str]:
        """Why it is not run; empty: it is run."""
        return self.mark.removeprefix("not run: ").split(", ") if self.mark.startswith("not run") else []

    @property
    def slow(self) -> bool:
        return self.mark == "slow"


def name_of(page: Path) -> str:
    return str(page.relative_to(ROOT))


def blocks(page: Path, language: str) -> list[Block]:
    """The code blocks of a language, in order."""
    text = page.read_text(encoding="utf-8")
    found = [
        Block(m["language"], m["text"], m["mark"] or "", text.count("\n", 0, m.start()) + 1)
        for m in _BLOCK.finditer(text)
    ]
    return [block for block in found if block.language == language]


def prose(page: Path) -> str:
    """The page without its code blocks."""
    return _BLOCK.sub("", page.read_text(encoding="utf-8"))


def links(page: Path) -> list[str]:
    """The targets of links to files of this repository."""
    found = _LINK.findall(_CODE.sub("code", prose(page)))
    return [link for link in found if "://" not in link and not link.startswith("mailto:")]


def code_words(page: Path) -> list[str]:
    """What stands between backticks in the prose."""
    return _CODE.findall(prose(page))
