"""Raw JSON of COCO captions, VQA v2, OK-VQA, TextVQA and DocVQA: files that are one JSON object -> raw rows.

Captions name their images by id, answers name questions by id (in a file of their own) and images by number. The images
are looked for by name anywhere in the source.
"""

import posixpath
import re
from collections.abc import Iterator, Sequence
from typing import Any

from smolray.data.formats.compression import open_content, without_compression
from smolray.data.formats.images import folder_of
from smolray.data.formats.json_object import object_items
from smolray.data.formats.listing import File, is_image, list_source
from smolray.data.formats.source import Format, Raw, ReadTask, SourceError
from smolray.data.formats.splits import split_of

MOST_FILES = 64  # that are looked at
_HEAD = 2**16
_OPENING = re.compile(r'\s*\{\s*"[^"\n]{1,60}"\s*:')
_LISTS = re.compile(r'"(?:annotations|questions|images|data|info)"\s*:\s*[\[{]')


def object_files(files: Sequence[File]) -> list[File]:
    """Those of the files that hold captions, answers or `data` of one JSON object; none where others are among them."""
    jsons = [f for f in files if without_compression(f.uri).endswith(".json")]
    if not jsons or len(jsons) < len(files) or len(jsons) > MOST_FILES or not all(_is_object(f.uri) for f in jsons):
        return []
    return [file for file in jsons if _kind(file.uri) in ("captions", "answers", "data")]


def _is_object(uri: str) -> bool:
    with open_content(uri) as file:
        head = file.read(_HEAD).decode("utf-8-sig", "replace")
    first_line = head.lstrip().partition("\n")[0]
    return bool(_OPENING.match(head) and _LISTS.search(head)) and not (
        first_line.rstrip().endswith("}") and head.lstrip()[len(first_line) :].strip()
    )


def _kind(uri: str) -> str:
    """What a file holds: captions, answers, questions, data, or other, by the first element that tells."""
    try:
        for key, value in object_items(uri):
            if key == "questions":
                return "questions"
            if key == "data" and isinstance(value, dict):
                return "data"
            if key == "annotations":
                keys = set(value) if isinstance(value, dict) else set()
                return "captions" if "caption" in keys else "answers" if keys & {"answers", "answer"} else "other"
    except SourceError:  # not one object, or damaged before anything tells: its own reader says so
        pass
    return "other"


def cut_object(whole: ReadTask, size: int, task_bytes: int) -> Iterator[ReadTask]:
    """The file is one task."""
    yield whole


def read_object(task: ReadTask) -> Iterator[Raw]:
    """The rows of a file: one for each caption, answered question or element of `data`."""
    kind = _kind(task.uri)
    found, _ = list_source(task.root)
    images = {posixpath.basename(f.uri): f.uri for f in found if is_image(f.uri)}
    if kind == "answers":
        yield from _answers(task, images, [f.uri for f in found if without_compression(f.uri).endswith(".json")])
        return

    names = (
        {v.get("id"): v.get("file_name") for k, v in _dicts(task.uri) if k == "images"} if kind == "captions" else {}
    )
    wanted = "annotations" if kind == "captions" else "data"
    elements = (value for key, value in object_items(task.uri) if key == wanted)
    for row, element in enumerate(elements):
        if not isinstance(element, dict):
            yield Raw(row, {}, reason="wrong_type", message=f"a {type(element).__name__}; expected an object")
        elif kind == "captions" and element.get("image_id") not in names:
            message = f"image_id {element.get('image_id')!r} is none of the images of the file"
            yield Raw(row, {}, reason="missing_file", message=message)
        elif kind == "captions":
            name = posixpath.basename(str(names[element["image_id"]]))
            image = _relative(task, images[name]) if name in images else name
            yield Raw(row, {"image": image, "caption": element.get("caption"), "id": element.get("id")})
        elif "image" not in element and "image_id" in element:
            yield Raw(row, {**element, "image": _by_number(task, images, element["image_id"], "")})
        else:
            yield Raw(row, element)


def _answers(task: ReadTask, images: dict[str, str], files: list[str]) -> Iterator[Raw]:
    """Each annotation with its question; then the questions that have no annotation, which are bad rows."""
    split = split_of(task.name)
    questions: dict[Any, dict[str, Any]] = {}
    for uri in files:
        if split_of(uri[len(task.root) :]) == split and _is_object(uri) and _kind(uri) == "questions":
            questions |= {v.get("question_id"): v for k, v in _dicts(uri) if k == "questions"}
    if not questions:
        raise SourceError(
            f"{task.uri} holds answers, and no file of their questions is in {task.root}; expected one such as "
            "v2_OpenEnded_mscoco_train2014_questions.json beside it"
        )

    row, subtype = -1, next((str(v) for k, v in object_items(task.uri) if k == "data_subtype"), "")
    for key, element in _dicts(task.uri):
        if key != "annotations":
            continue
        row += 1
        question = questions.pop(element.get("question_id"), None)
        if question is None:
            message = f"question_id {element.get('question_id')!r} is in no file of questions, or came before"
            yield Raw(row, {}, reason="wrong_columns", message=message)
            continue
        number = question.get("image_id", element.get("image_id"))
        yield Raw(row, {**element, **question, "image": _by_number(task, images, number, subtype)})
    for left, number in enumerate(questions, row + 1):
        yield Raw(left, {}, reason="empty_answer", message=f"question {number!r} has no annotation")


def _dicts(uri: str) -> Iterator[tuple[str, dict[str, Any]]]:
    return ((key, value) for key, value in object_items(uri) if isinstance(value, dict))


def _by_number(task: ReadTask, images: dict[str, str], number: Any, subtype: str) -> str:
    """The path of the image with this number, as COCO, VQA v2 and TextVQA name them."""
    stems = [str(number)]
    if isinstance(number, int):
        stems = [f"COCO_{subtype}_{number:012d}", f"{number:012d}", *stems]
    for stem in stems:
        for ending in ("jpg", "png", "jpeg"):
            if f"{stem}.{ending}" in images:
                return _relative(task, images[f"{stem}.{ending}"])
    return f"{stems[0]}.jpg"


def _relative(task: ReadTask, uri: str) -> str:
    return posixpath.relpath(uri, folder_of(task.uri))


COCO = Format("coco", cut_object, read_object, names_images=True)
