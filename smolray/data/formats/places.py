"""Where the image files are that rows name: beside the data, below data.image_root, or inside a zip beside them.

In: a path or URI as a row has it. Out: the bytes of the file, or a SampleError. Nothing outside of the source and of
data.image_root is opened, also not through a link, unless data.allow_absolute_paths says so.
"""

import os
import posixpath
import re
import zipfile
from collections.abc import Iterator
from io import BufferedReader
from typing import cast
from urllib.parse import unquote

import pyarrow.fs as pafs

from smolray import storage
from smolray.data.formats.damage import damaged
from smolray.data.sample import SampleError

MAX_IMAGE_BYTES = 256 * 2**20


class ImagePlaces:
    """The places of the images of one source file.

    `folder`: that of the file; `root`: the source as the person named it, empty where rows may not name files at all;
    `image_root`: what paths are relative to in place of `folder`, where it is set.
    """

    def __init__(self, folder: str, root: str, image_root: str = "", anywhere: bool = False):
        self.base = storage.absolute(image_root) if image_root else folder
        self.roots = [r.rstrip("/") for r in (root, image_root and self.base) if r]
        self.anywhere = anywhere
        self._real_roots = [real for r in self.roots if storage.is_local(r) for real in _real_roots(r)]
        self._zips: list[tuple[str, zipfile.ZipFile]] | None = None

    def read(self, path: str) -> bytes:
        """Raises SampleError: missing_file, path_escapes, image_too_large. Raises SourceError for a damaged zip."""
        if not self.roots:
            raise SampleError(
                "path_escapes", f"image {shown_path(path)!r}: a file named inside an archive is not opened"
            )
        if not path or "\0" in path:
            raise SampleError("missing_file", f"{shown_path(path)!r} is not a path of an image")

        path = _without_scheme(path)
        uris = []
        for spelling in _spellings(path):
            uris.append(self._inside(spelling))
            try:
                if (content := self._file(uris[-1], path)) is not None:
                    return content
            except (OSError, UnicodeEncodeError) as error:
                message = f"image {shown_path(path)!r} cannot be read: {str(error).splitlines()[0][:300]}"
                raise SampleError("missing_file", message) from error
        if (content := self._from_zip(path)) is not None:
            return content
        raise SampleError(
            "missing_file",
            f"image {shown_path(path)!r} is not a file at {shown_path(uris[0])}; data.image_root names another folder",
        )

    def _inside(self, path: str) -> str:
        """The URI of a path, inside the places where images may be."""
        scheme, slashes, base = self.base.rpartition("://")
        if "://" in path:
            uri = path
        elif posixpath.isabs(path) and slashes:
            message = f"image path {shown_path(path)!r} is absolute, but the data is at {self.base}; use relative paths"
            raise SampleError("path_escapes", message)
        else:
            uri = scheme + slashes + posixpath.normpath(posixpath.join(base, path))

        if self.anywhere or any(uri == root or uri.startswith(root + "/") for root in self.roots):
            return uri
        raise SampleError(
            "path_escapes", f"image path {shown_path(path)!r} leads out of the data folder; {self._hint()}"
        )

    def _hint(self) -> str:
        return (
            f"name a folder that holds both the data and the images as the source, instead of {self.roots[0]}, or set "
            "data.image_root or data.allow_absolute_paths=true"
        )

    def _file(self, uri: str, path: str) -> bytes | None:
        """The bytes of a file, None where there is none."""
        fs, inner = storage.filesystem(uri)
        info = fs.get_file_info(inner)
        if info.type != pafs.FileType.File:  # no folders, pipes or devices
            return None
        if storage.is_local(uri) and not self.anywhere:
            real = os.path.realpath(inner)
            if not any(real.startswith(root.rstrip("/") + "/") for root in self._real_roots):
                message = f"image {shown_path(path)!r} is a link that leads out of the data folder; {self._hint()}"
                raise SampleError("path_escapes", message)
        _check_size(path, info.size)
        with fs.open_input_stream(inner) as stream:
            return stream.read()

    def _from_zip(self, path: str) -> bytes | None:
        """The bytes of a member of a zip that lies where the images are looked for; None where there is none."""
        for stem, archive in self._archives():
            for name in (path, path.removeprefix(f"{stem}/"), f"{stem}/{path}"):
                try:
                    member = archive.getinfo(posixpath.normpath(name.replace("\\", "/")))
                except KeyError:
                    continue
                _check_size(path, member.file_size)
                try:
                    return archive.read(member)
                except (zipfile.BadZipFile, OSError, EOFError, ValueError, RuntimeError, NotImplementedError) as error:
                    message = f"image {shown_path(path)!r} cannot be read from {archive.filename}: {error}"
                    raise SampleError("missing_file", message) from error
        return None

    def _archives(self) -> list[tuple[str, zipfile.ZipFile]]:
        if self._zips is None:
            folders = dict.fromkeys((self.base, *self.roots))
            self._zips = [found for folder in folders for found in _zips_in(folder)]
        return self._zips


def _zips_in(folder: str) -> Iterator[tuple[str, zipfile.ZipFile]]:
    """(name without its ending, archive) of the zips in a folder."""
    for info in storage.list_files(folder):
        if not info.base_name.lower().endswith(".zip") or info.base_name.startswith((".", "_")):
            continue
        fs, _ = storage.filesystem(folder)
        try:
            file = BufferedReader(fs.open_input_file(info.path))
            archive = zipfile.ZipFile(file)
        except zipfile.BadZipFile as error:
            raise damaged(storage.join(folder, info.base_name), str(error), "its images are lost") from error
        archive.filename = storage.join(folder, info.base_name)
        yield info.base_name[:-4], archive


def _real_roots(root: str) -> list[str]:
    """What a folder is without links. A snapshot in the cache of the hub consists of links to the blobs beside it."""
    real = os.path.realpath(root)
    snapshot = re.fullmatch(r"(.*)/snapshots/[^/]+(?:/.*)?", real)
    return [real, f"{snapshot[1]}/blobs"] if snapshot else [real]


def _check_size(path: str, size: int) -> None:
    if size > MAX_IMAGE_BYTES:
        found = f"{shown_path(path)!r} has {size} bytes; the limit of a file is {MAX_IMAGE_BYTES}"
        raise SampleError("image_too_large", found)


def _without_scheme(path: str) -> str:
    """The path in a `file:` URI; others as they are."""
    if path[:5].lower() != "file:":
        return path
    path = path[5:]
    if path.startswith("//"):
        path = path[2:].removeprefix("localhost")
    return cast(str, unquote(path)) if "%" in path else path


def _spellings(path: str) -> list[str]:
    """A path as it is, and with `/` where Windows writes a backslash."""
    return [path, path.replace("\\", "/")] if "\\" in path else [path]


def shown_path(path: str) -> str:
    """A path for a message; a long one, which may be something else than a path, is cut short."""
    return path if len(path) <= 200 else f"{path[:60]}… ({len(path)} characters)"
