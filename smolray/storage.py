"""Access to files by URI: local paths, s3://, gs:// and hf://, through pyarrow and fsspec.

In: a URI. Out: a `pyarrow.fs.FileSystem` with the path inside it, or whole small files. A reader sees a write whole or
not at all.
"""

import errno
import os
import shutil
import tempfile
import uuid
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO

import pyarrow.fs as pafs

THREADS = 16  # that read or delete small files beside each other
UNWRITABLE = (errno.EROFS, errno.EACCES, errno.EPERM, errno.ENOTDIR, errno.EEXIST, errno.ELOOP, errno.ENAMETOOLONG)


class StorageError(OSError):
    """A storage location cannot be read or written. The message names it."""


class StorageFullError(StorageError):
    """There is no space for a file. Nothing of it was left behind."""


def is_local(uri: str) -> bool:
    """Whether `uri` is a path of this machine."""
    return "://" not in uri or uri.startswith("file://")


def join(uri: str, *parts: str) -> str:
    """`parts` below `uri`, with one slash between them."""
    return "/".join([uri.rstrip("/"), *(p.strip("/") for p in parts)])


def absolute(uri: str) -> str:
    """`uri` with a local path made absolute, so that every worker of a cluster reads the same."""
    return str(Path(uri.removeprefix("file://")).expanduser().absolute()) if is_local(uri) else uri


def filesystem(uri: str) -> tuple[pafs.FileSystem, str]:
    """The file system that holds `uri`, and the path inside it.

    s3:// takes credentials and `AWS_ENDPOINT_URL` from the standard AWS environment.

    Raises:
        StorageError: the scheme is unknown, the URI is malformed, or it contains credentials.
    """
    if is_local(uri):
        return pafs.LocalFileSystem(), absolute(uri)

    scheme, rest = uri.split("://", 1)
    if "@" in rest.split("/", 1)[0]:
        raise StorageError(
            f"credentials inside a storage URI ({scheme}://…@…) are refused: "
            "use the AWS environment or files of the node"
        )
    if scheme == "s3":
        return _s3(), rest
    if scheme == "hf":
        from huggingface_hub import HfFileSystem

        return pafs.PyFileSystem(pafs.FSSpecHandler(HfFileSystem())), rest
    try:
        return pafs.FileSystem.from_uri(uri)
    except (ValueError, OSError) as error:
        raise StorageError(f"cannot open {uri}: {error}; expected a local path, s3://, gs:// or hf://") from error


def _s3() -> pafs.FileSystem:
    endpoint = os.environ.get("AWS_ENDPOINT_URL_S3") or os.environ.get("AWS_ENDPOINT_URL")
    if not endpoint:
        return pafs.S3FileSystem()
    scheme, _, host = endpoint.rpartition("://")
    return pafs.S3FileSystem(
        endpoint_override=host, scheme=scheme or "https", region=os.environ.get("AWS_REGION", "us-east-1")
    )


def exists(uri: str) -> bool:
    """Whether there is a file or folder at `uri`."""
    fs, path = filesystem(uri)
    return fs.get_file_info(path).type != pafs.FileType.NotFound


def file_size(uri: str) -> int:
    """Bytes of a file, 0 where there is none."""
    fs, path = filesystem(uri)
    return fs.get_file_info(path).size or 0


def modified(uri: str) -> float:
    """When a file was written last, in seconds since 1970 by the storage's own clock.

    Raises:
        FileNotFoundError: there is none.
    """
    fs, path = filesystem(uri)
    info = fs.get_file_info(path)
    if info.mtime is None:
        raise FileNotFoundError(uri)
    return info.mtime.timestamp()


def list_files(uri: str, recursive: bool = False) -> list[pafs.FileInfo]:
    """Files in the folder `uri`, sorted by path; none where the folder does not exist."""
    fs, path = filesystem(uri)
    found = fs.get_file_info(pafs.FileSelector(path, recursive=recursive, allow_not_found=True))
    return sorted((f for f in found if f.type == pafs.FileType.File), key=lambda f: f.path)


def list_dirs(uri: str) -> list[str]:
    """Names of the folders directly in `uri`, sorted; none where it does not exist."""
    fs, path = filesystem(uri)
    found = fs.get_file_info(pafs.FileSelector(path, allow_not_found=True))
    return sorted(f.base_name for f in found if f.type == pafs.FileType.Directory)


def read_bytes(uri: str) -> bytes:
    """The whole file.

    Raises:
        FileNotFoundError: there is none.
    """
    fs, path = filesystem(uri)
    with fs.open_input_stream(path) as stream:
        return stream.read()


def read_files(folder: str, names: Sequence[str]) -> list[bytes]:
    """Many small files of one folder, in the order of their names, read beside each other.

    Raises:
        FileNotFoundError: one of them is not there.
    """
    fs, path = filesystem(folder)

    def read(name: str) -> bytes:
        with fs.open_input_stream(join(path, name)) as stream:
            return stream.read()

    with ThreadPoolExecutor(THREADS) as pool:
        return list(pool.map(read, names))


def write_bytes(uri: str, data: bytes, content_type: str = "") -> None:
    """Write a whole file. A reader sees the old one, the new one, or none, never a part.

    `content_type`: what object storage tells a browser that it is.

    Raises:
        StorageFullError: the disk is full.
    """
    fs, path = filesystem(uri)
    metadata = {"Content-Type": content_type} if content_type else None
    local = isinstance(fs, pafs.LocalFileSystem)
    with writing(uri) if local else fs.open_output_stream(path, metadata=metadata) as file:
        file.write(data)


@contextmanager
def writing(uri: str, spool: bool = True) -> Iterator[IO[bytes]]:
    """A context with a file to write into. It appears at `uri` when the block ends, and not at all where it raises.

    A file in object storage is first written to the local disk. With `spool=False` it is sent as it is written: where
    the block raises, a part of it may stay there.

    Raises:
        StorageFullError: the disk is full.
    """
    fs, path = filesystem(uri)
    if not spool and not isinstance(fs, pafs.LocalFileSystem):
        with fs.open_output_stream(path) as stream:
            yield stream
        return
    if not isinstance(fs, pafs.LocalFileSystem):  # an abandoned stream would leave a part of the file
        with tempfile.TemporaryFile() as file:
            yield file
            file.seek(0)
            with fs.open_output_stream(path) as stream:
                shutil.copyfileobj(file, stream, 2**20)
        return

    target = Path(path)
    temporary = target.with_name(f".{target.name}.{uuid.uuid4().hex}.tmp")
    try:
        with _room_for(target):
            target.parent.mkdir(parents=True, exist_ok=True)
            with temporary.open("wb") as file:
                yield file
                file.flush()
                os.fsync(file.fileno())
            os.replace(temporary, target)
    finally:
        with suppress(OSError):  # a folder that takes no files has none to delete
            temporary.unlink(missing_ok=True)


def require_writable(uri: str, setting: str) -> None:
    """Write a small file below `uri` and delete it.

    Raises:
        StorageError: that is not possible; the message names `setting`, the place and the reason.
    """
    probe = join(uri, f".writable-{uuid.uuid4().hex}")
    try:
        write_bytes(probe, b"")
        delete(probe)
    except OSError as error:
        reason = str(error).strip().splitlines()[0].removeprefix(f"{absolute(probe)} cannot be written: ")
        raise StorageError(f"{setting} = {uri} cannot be written: {reason}") from None


def append_text(uri: str, text: str) -> None:
    """Append to a local file: the whole text, or nothing of it.

    Raises:
        StorageFullError: the disk is full.
    """
    path = Path(absolute(uri))
    with _room_for(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("ab", buffering=0) as file:
            before, data = file.tell(), text.encode()
            if file.write(data) != len(data):  # a full disk takes what fits, without an error
                os.truncate(path, before)
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


@contextmanager
def _room_for(path: Path) -> Iterator[None]:
    """Raise our own errors in place of the system's.

    Those of a full disk or quota become StorageFullError, and those of a place that takes no files StorageError.
    """
    try:
        yield
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise StorageFullError(f"no room for {path}: {error.strerror}") from None
        if error.errno in UNWRITABLE:
            raise StorageError(f"{path} cannot be written: {error.strerror}") from None
        raise


def delete(uri: str) -> None:
    """Delete a file, or a folder with its contents. Nothing happens where there is none."""
    fs, path = filesystem(uri)
    kind = fs.get_file_info(path).type
    if kind == pafs.FileType.Directory:
        fs.delete_dir(path)
    elif kind == pafs.FileType.File:
        fs.delete_file(path)


def delete_files(folder: str, names: Sequence[str]) -> None:
    """Delete many files of one folder, beside each other."""
    fs, path = filesystem(folder)
    with ThreadPoolExecutor(THREADS) as pool:
        list(pool.map(lambda name: fs.delete_file(join(path, name)), names))
