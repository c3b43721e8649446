"""The members of a tar as a stream. An archive is read to its proper end, or refused.

Python's `tarfile` ends quietly at a header that it cannot read. Here it does not: an archive ends with a block of
zeros, and nothing but zeros is behind it.
"""

import tarfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from io import BufferedReader

from smolray.data.formats.compression import open_content
from smolray.data.formats.damage import damaged
from smolray.data.formats.source import SCAN_BYTES, SourceError

MAX_EXTENDED_HEADER = 2**20  # bytes of a member's long name or PAX records
_EXTENDED = (
    tarfile.GNUTYPE_LONGNAME,
    tarfile.GNUTYPE_LONGLINK,
    tarfile.XHDTYPE,
    tarfile.XGLTYPE,
    tarfile.SOLARIS_XHDTYPE,
)


_ENDED, _NO_HEADER = tarfile.EOFHeaderError, tarfile.HeaderError  # type: ignore[attr-defined]


class _Header(tarfile.TarInfo):
    """A member's header. One that cannot be read is an error, not the end of the archive."""

    @classmethod
    def fromtarfile(cls, archive):  # type: ignore[no-untyped-def]
        try:
            return super().fromtarfile(archive)
        except _ENDED:
            raise
        except _NO_HEADER as error:
            empty = str(error) == "empty header"
            raise tarfile.ReadError("the archive ends without its end mark" if empty else str(error)) from error

    def _proc_member(self, archive):  # type: ignore[no-untyped-def]
        if self.type in _EXTENDED and self.size > MAX_EXTENDED_HEADER:
            raise tarfile.ReadError(f"an extended header of {self.size} bytes; the limit is {MAX_EXTENDED_HEADER}")
        return super()._proc_member(archive)  # type: ignore[misc]


@dataclass
class Member:
    """A member of an archive. Its content can be read until the next member is asked for."""

    uri: str
    tar: tarfile.TarFile
    info: tarfile.TarInfo

    def read(self) -> bytes:
        """The content. Raises SourceError where the archive is damaged."""
        with _archive_errors(self.uri, self.info.offset, f"in member {self.info.name!r}"):
            file = self.tar.extractfile(self.info)
            content = file.read() if file else b""
            if len(content) != self.info.size:
                raise tarfile.ReadError(f"it ends after {len(content)} of {self.info.size} bytes")
            return content


def tar_members(uri: str) -> Iterator[Member]:
    """Yield each member of an archive, in order.

    Raises SourceError where the archive is damaged: at which byte, behind which member.
    """
    with open_content(uri) as stream:
        yield from _members(uri, stream)


def _members(uri: str, stream: BufferedReader) -> Iterator[Member]:
    with _archive_errors(uri, 0, "at its start"):
        tar = tarfile.open(  # noqa: SIM115 - it holds no file but the stream
            fileobj=stream, mode="r|", tarinfo=_Header, errors="surrogateescape"
        )
    last = ""
    while True:
        with _archive_errors(uri, tar.offset, f"behind member {last!r}" if last else "at its start"):
            member = tar.next()
            if member is None:
                _check_end(tar)
                return
        yield Member(uri, tar, member)
        last = member.name
        tar.members = []  # type: ignore[attr-defined]  # the list of members would grow with the archive


@contextmanager
def _archive_errors(uri: str, place: int, where: str) -> Iterator[None]:
    """Turn what `tarfile` raises for a damaged archive into a SourceError."""
    try:
        yield
    except SourceError:
        raise
    except (tarfile.TarError, OSError, EOFError, ValueError, OverflowError) as error:
        lost = "all members from there on are lost"
        raise damaged(uri, f"{where}, at byte {place} of the archive: {error}", lost) from error


def _check_end(tar: tarfile.TarFile) -> None:
    """Raise ReadError unless only zeros are behind the block that ended the archive."""
    place = tar.offset
    while chunk := tar.fileobj.read(SCAN_BYTES):  # type: ignore[union-attr]
        if chunk.strip(b"\0"):
            at = place + len(chunk) - len(chunk.lstrip(b"\0"))
            raise tarfile.ReadError(
                f"zeros as at the end of an archive, but more data behind them, about byte {at} "
                "(a hole, or one archive behind another: join archives with tar --concatenate)"
            )
        place += len(chunk)
