"""The pages as files, to be read without a server: the list of runs, and each run with its images and its report.

In: the runs of a storage folder. Out: files in a folder or bucket, which lead to each other, hold no form and run no
script.
"""

import hashlib
import math
import time
from urllib.parse import quote

from smolray import storage
from smolray.report.page import render
from smolray.report.sections import IMAGE_TYPES
from smolray.run.folder import RunFolder
from smolray.run.result import RunFileError, reading
from smolray.run.status import RunStatus
from smolray.web.live import Part
from smolray.web.run_list import RunList
from smolray.web.run_page import Actions, contents_parts
from smolray.web.run_view import RunViews
from smolray.web.runs_page import read_parts
from smolray.web.site import PACKAGE, Addresses, fragment, static_file

HTML = "text/html; charset=utf-8"
INDEX, STYLE, REPORT = "index.html", "web.css", "report.html"


class FileAddresses(Addresses):
    """Where the files are, seen from one that lies `up` folders below the first page."""

    def __init__(self, up: int):
        self.top = "../" * up

    def run(self, name: str) -> str:
        """The page of a run."""
        return f"{self.top}runs/{quote(name, safe='')}/{INDEX}"

    def report(self, name: str) -> str:
        """Beside the page of its run."""
        return REPORT

    def image(self, name: str, key: str) -> str:
        """Beside the page of its run; a key may be any text."""
        return f"images/{hashlib.sha256(key.encode('utf-8', 'surrogatepass')).hexdigest()[:24]}"


def export_pages(runs: RunList, target: str) -> int:
    """Write the pages into the folder or bucket `target`, over those of before; returns the number of runs.

    Raises StorageError where `runs` cannot be read or `target` cannot be written.
    """
    views, found = RunViews(), runs.look(None)
    if runs.error:
        raise storage.StorageError(f"the runs cannot be read: {runs.error}")
    runs.poll = math.inf  # the list is that of the pages
    storage.write_bytes(storage.join(target, STYLE), static_file(STYLE), "text/css")
    for run in found:
        _export_run(run, views, storage.join(target, "runs", run.name))
    parts = read_parts(runs, None, FileAddresses(0))
    _write_page(storage.join(target, INDEX), "runs.html", "Runs", 0, parts=_by_id(parts))
    return len(found)


def _export_run(run: RunStatus, views: RunViews, target: str) -> None:
    """The page of one run; where its files are damaged, what is wrong with them."""
    folder, where = RunFolder(run.run_dir), FileAddresses(2)
    index = storage.join(target, INDEX)
    try:
        with reading(folder.uri):
            contents = views.of(folder).contents()
            parts = contents_parts(run, contents, where)
    except RunFileError as error:
        _write_page(index, "fault.html", run.name, 2, message=str(error))
        return

    report = storage.exists(folder.report)
    if report:
        storage.write_bytes(storage.join(target, REPORT), storage.read_bytes(folder.report), HTML)
    for key, data in contents.images.items():
        kind = next((kind for magic, kind in IMAGE_TYPES.items() if data.startswith(magic)), "application/octet-stream")
        storage.write_bytes(storage.join(target, where.image(run.name, key)), data, kind)
    actions = fragment("run_actions.html", actions=Actions(), may_operate=False, path="", report=REPORT * report)
    parts += [Part("actions", actions), Part("commands", "")]
    _write_page(index, "run.html", run.name, 2, parts=_by_id(parts), name=run.name, path="")


def _write_page(uri: str, template: str, title: str, up: int, **values: object) -> None:
    top = FileAddresses(up).top
    written = render(
        template,
        PACKAGE,
        title=title,
        pages={"Runs": f"{top}{INDEX}"},
        here="" if up else INDEX,
        asks_for_keys=False,
        live=False,
        home=f"{top}{INDEX}",
        style=f"{top}{STYLE}",
        made=time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime()),
        **values,
    )
    storage.write_bytes(uri, written.encode("utf-8", "replace"), HTML)


def _by_id(parts: list[Part]) -> dict[str, Part]:
    return {part.id: part for part in parts}
