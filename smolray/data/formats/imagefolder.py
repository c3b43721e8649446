"""Images in a folder for each class, `cat/1.png` and `dog/2.png` -> raw rows: an image, and its folder as label."""

import posixpath
from collections.abc import Iterator, Sequence
from dataclasses import replace

from smolray.data.formats.listing import File, is_image, list_source
from smolray.data.formats.source import Format, Raw, ReadTask
from smolray.data.formats.splits import SPLIT_NAMES, split_of


def class_files(found: Sequence[File], root: str) -> list[File]:
    """The images of a source where each lies in a folder of its class, of at least two; else none."""
    images = [file for file in found if is_image(file.uri)]
    classes = {_class_of(file.uri, root) for file in images}
    return images if len(classes) > 1 and "" not in classes else []


def _class_of(uri: str, root: str) -> str:
    """The name of the folder that an image lies in; empty for the source itself and the folder of a split."""
    folder = posixpath.dirname(uri[len(root) :].strip("/"))
    return "" if "/" not in folder and split_of(folder) else posixpath.basename(folder)


def cut_folder(whole: ReadTask, size: int, task_bytes: int) -> Iterator[ReadTask]:
    """Ranges of images of about `task_bytes`. `start` and `stop` count images."""
    start = held = 0
    files = _files(whole)
    for number, file in enumerate(files, 1):
        held += file.bytes
        if held >= task_bytes or number == len(files):
            yield replace(whole, start=start, stop=number, first_row=start)
            start, held = number, 0


def read_folder(task: ReadTask) -> Iterator[Raw]:
    """The images of a range, each with its class."""
    above = posixpath.basename(task.root)  # paths count from the folder of `task.uri`, which is the source itself
    for row, file in enumerate(_files(task)[task.start : task.stop], task.start):
        name = file.uri[len(task.root) :].strip("/")
        yield Raw(row, {"image": f"{above}/{name}", "label": _class_of(file.uri, task.root)}, name)


def _files(task: ReadTask) -> list[File]:
    wanted = SPLIT_NAMES.get(task.split.lower(), task.split)
    files = class_files(list_source(task.root)[0], task.root)
    return [f for f in files if not wanted or split_of(f.uri[len(task.root) :]) == wanted]


IMAGEFOLDER = Format("imagefolder", cut_folder, read_folder)
