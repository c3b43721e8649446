"""API keys: who may use the service.

In: a file that holds the names and hashes of the keys, readable by its owner alone. Out: the name of a key, or None. A
key is shown once, when it is made; it is 256 random bits, so that its SHA-256 is enough to keep.
"""

import fcntl
import hashlib
import hmac
import json
import os
import secrets
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

from smolray import storage
from smolray.cluster.token import open_token
from smolray.config import ConfigError

PREFIX = "sk-smolray-"


@dataclass(frozen=True)
class Key:
    """One key. `made`: seconds since 1970."""

    name: str
    sha256: str
    made: float


def read_keys(path: Path) -> list[Key]:
    """The keys in a file, none where there is no file. Raises ConfigError where others may read or write it."""
    if not path.exists():
        return []
    if mode := open_token(path):
        raise ConfigError(f"{path} has {mode}: others may read the keys; run: chmod 600 {path}")
    try:
        return [Key(**record) for record in json.loads(path.read_text())]
    except (ValueError, TypeError) as error:
        raise ConfigError(f"{path} holds no API keys ({error}); move it away, and make new keys") from None


def add_key(path: Path, name: str) -> str:
    """Make a key and return it. Raises ConfigError where the name is taken."""
    if not name.strip() or not name.isprintable():
        raise ConfigError(f"the name of a key is {name!r}; expected a printable word, such as laptop")
    with _changing(path) as keys:
        if any(key.name == name for key in keys):
            raise ConfigError(f"there is a key named {name} already; revoke it first, or take another name")
        key = PREFIX + secrets.token_urlsafe(32)
        keys.append(Key(name, _hash(key), time.time()))
    return key


def revoke_key(path: Path, name: str) -> None:
    """Remove a key. Raises ConfigError where there is none of this name."""
    with _changing(path) as keys:
        left = [key for key in keys if key.name != name]
        if len(left) == len(keys):
            names = ", ".join(key.name for key in keys) or "none"
            raise ConfigError(f"there is no key named {name} in {path}; there: {names}")
        keys[:] = left


class KeyRing:
    """The keys of a file for many requests. The file is read again when it has changed."""

    def __init__(self, path: Path):
        self.path = path
        self._seen: tuple[int, int, int] | None = None
        self._keys: list[Key] = []

    def name_of(self, key: str) -> str | None:
        """The name of a key; None where it is not among those of the file."""
        try:
            found = self.path.stat()
            seen = (found.st_mtime_ns, found.st_size, found.st_ino)
            if seen != self._seen:
                self._keys, self._seen = read_keys(self.path), seen
        except (OSError, ConfigError):
            self._keys, self._seen = [], None  # what cannot be read lets nobody in
        digest = _hash(key)
        names = [known.name for known in self._keys if hmac.compare_digest(known.sha256, digest)]
        return names[0] if names else None


def _hash(key: str) -> str:
    return hashlib.sha256(key.encode("utf-8", "surrogatepass")).hexdigest()


@contextmanager
def _changing(path: Path) -> Iterator[list[Key]]:
    """The keys of a file, written back at the end; one process at a time."""
    path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    lock = os.open(path.with_name(f"{path.name}.lock"), os.O_RDWR | os.O_CREAT, 0o600)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX)
        keys = read_keys(path)
        yield keys
        temporary = path.with_name(f"{path.name}.new")
        temporary.unlink(missing_ok=True)
        descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
        with os.fdopen(descriptor, "w") as file:
            json.dump([asdict(key) for key in keys], file, indent=1)
        temporary.replace(path)
    finally:
        os.close(lock)


def default_path() -> Path:
    """Where the keys of this user are."""
    return Path(storage.absolute("~/.smolray/api-keys.json"))
