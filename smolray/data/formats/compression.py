"""Compressed files as a stream of their content: gzip, bzip2 and Zstandard, recognised by their first bytes.

In: the URI of a source file. Out: its content from end to end. A stream that is cut, or has anything else behind it,
is refused; several streams in a row are one content.
"""

import io

import pyarrow as pa
import pyarrow.fs as pafs

from smolray import storage
from smolray.data.formats.damage import damaged
from smolray.data.formats.source import SCAN_BYTES

COMPRESSED_ENDINGS = (".gz", ".bz2", ".zst")
_MAGIC = {b"\x1f\x8b": "gzip", b"BZh": "bz2", b"\x28\xb5\x2f\xfd": "zstd"}


def open_content(uri: str) -> io.BufferedReader:
    """The content of a file as a buffered stream of bytes, decompressed where it is compressed.

    Reading it raises SourceError where the compressed data are damaged.
    """
    fs, path = storage.filesystem(uri)
    file = fs.open_input_file(path)
    codec = _codec(file)
    if not codec and uri.lower().endswith(COMPRESSED_ENDINGS):
        fault = f"its name ends in {uri.rpartition('.')[2]}, its content does not begin as such a file"
        raise damaged(uri, fault, "its rows are lost")
    return io.BufferedReader(_Content(uri, fs, path, codec) if codec else file, SCAN_BYTES)


def is_compressed(uri: str) -> bool:
    """Whether the file is compressed, so that it can only be read from its start."""
    fs, path = storage.filesystem(uri)
    with fs.open_input_file(path) as file:
        return _codec(file) != ""


def without_compression(name: str) -> str:
    """The name of a file without the ending of its compression, in lower case."""
    name = name.lower()
    ending = next((e for e in COMPRESSED_ENDINGS if name.endswith(e)), "")
    return name.removesuffix(ending)


def _codec(file: pa.NativeFile) -> str:
    start = file.read(4)
    file.seek(0)
    return next((codec for magic, codec in _MAGIC.items() if start.startswith(magic)), "")


class _Content(io.RawIOBase):
    """The decompressed bytes of a file. Going back means to read it again from its start."""

    def __init__(self, uri: str, fs: pafs.FileSystem, path: str, codec: str):
        self.uri, self.fs, self.path, self.codec = uri, fs, path, codec
        self._open()

    def _open(self) -> None:
        self.file = self.fs.open_input_file(self.path)
        self.content = pa.CompressedInputStream(self.file, self.codec)
        self.place = 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self.place

    def readinto(self, buffer) -> int:  # type: ignore[no-untyped-def]
        try:
            data = self.content.read(len(buffer))
        except OSError as error:
            fault = f"its {self.codec} data cannot be read behind byte {self.place} of the content: {error}"
            lost = f"what is behind byte {self.file.tell()} of {self.file.size()}, or a little before it, is lost"
            raise damaged(self.uri, fault, lost) from error
        buffer[: len(data)] = data
        self.place += len(data)
        return len(data)

    def seek(self, place: int, whence: int = io.SEEK_SET) -> int:
        if whence == io.SEEK_CUR:
            place += self.place
        if place < self.place:
            self.close_file()
            self._open()
        while self.place < place and self.readinto(memoryview(bytearray(min(SCAN_BYTES, place - self.place)))):
            pass
        return self.place

    def close_file(self) -> None:
        self.content.close()
        self.file.close()

    def close(self) -> None:
        if not self.closed:
            self.close_file()
        super().close()
