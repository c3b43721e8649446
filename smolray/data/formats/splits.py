"""Which split of a data set a file belongs to, by its name, and the files of one split.

In: the files of a source, and the split that is wanted. Out: the files of one split, or an error: training and
validation files are never read as one.
"""

import re
from collections.abc import Sequence

from smolray.data.formats.listing import File, shown
from smolray.data.formats.source import SourceError

SPLIT_NAMES = {
    "train": "train",
    "training": "train",
    "validation": "validation",
    "valid": "validation",
    "val": "validation",
    "dev": "validation",
    "test": "test",
    "testing": "test",
    "testdev": "test",
    "eval": "test",
}


def split_of(path: str) -> str:
    """The split that a path below the source names: `val/0.tar`, `vqa_train.jsonl`, `train2017.json`, `x.test.csv`.

    The first folder or file that names any decides. One that names several is a split of its own: "train+validation".
    """
    for part in path.split("/"):
        words = re.split(r"[^a-z0-9]+", re.sub(r"(?<=[a-z0-9])(?=[A-Z])", "-", part).lower())
        bare = [re.sub(r"\d+$", "", word) for word in words]
        if "trainval" in bare:
            bare += ["train", "val"]
        named = sorted({SPLIT_NAMES[word] for word in bare if word in SPLIT_NAMES})
        if named:
            return "+".join(named)
    return ""


def files_of_split(source: str, root: str, files: Sequence[File], split: str) -> list[File]:
    """The files of a split; all files where their names say none, or no other one.

    `split`: the wanted one, empty for the only one there is. Raises SourceError.
    """
    named = {f: split_of(f.uri[len(root) :]) for f in files}
    splits = sorted(set(named.values()) - {""})
    if split:
        return _chosen(source, named, splits, split)
    if len(splits) > 1:
        raise SourceError(
            f"{source} holds several splits ({', '.join(splits)}); choose with {source}#{_first(splits)} "
            "or name the files by a glob"
        )

    unnamed = [f for f, name in named.items() if not name]
    if unnamed and splits and splits != ["train"]:
        example = next(f for f, name in named.items() if name)
        raise SourceError(
            f"{source} holds files of split {splits[0]} ({_base(example)}) and of none ({_base(unnamed[0])}); choose "
            f"with {source}#{splits[0]} or name the files by a glob"
        )
    return list(files)


def _chosen(source: str, named: dict[File, str], splits: list[str], split: str) -> list[File]:
    wanted = SPLIT_NAMES.get(split.lower(), split)
    if chosen := [f for f, name in named.items() if name == wanted]:
        return chosen
    if splits:
        raise SourceError(f"{source} has no split {split!r}; splits found in its file names: {', '.join(splits)}")
    if len(named) > 1 and wanted != "train":
        raise SourceError(
            f"{source} has no split {split!r}: no file name says a split, such as {_base(next(iter(named)))}"
        )
    return list(named)


def _first(splits: list[str]) -> str:
    return "train" if "train" in splits else splits[-1]


def _base(file: File) -> str:
    return shown(file.uri).rpartition("/")[2]
