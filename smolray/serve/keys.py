"""Keys: who may use the service and the pages, and for what.

In: a file that holds the names, hashes and scopes of the keys, readable by its owner alone. Out: a Key, or None. A key
is shown once, when it is made; it is 256 random bits, so that its SHA-256 is enough to keep.

Scopes: `infer` asks models (`smolray serve`, the page Try), `view` sees the pages of `smolray web`, `operate` also
starts, stops and exports runs there.
"""

import fcntl
import hashlib
import hmac
import json
import os
import secrets
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

from smolray import storage
from smolray.cluster.token import open_token
from smolray.config import ConfigError

PREFIX = "sk-smolray-"
SCOPES = ("view", "operate", "infer")
INFER = ("infer",)  # of a key that was made before there were scopes, and the default


@dataclass(frozen=True)
class Key:
    """One key. `made`: seconds since 1970."""

    name: str
    sha256: str
    made: float
    scopes: tuple[str, ...] = INFER

    def may(self, scope: str) -> bool:
        """Whether the key is good for a scope; who may operate may also view."""
        return scope in self.scopes or (scope == "view" and "operate" in self.scopes)


def read_keys(path: Path) -> list[Key]:
    """The keys in a file, none where there is no file. Raises ConfigError where others may read or write it."""
    if not path.exists():
        return []
    if mode := open_token(path):
        raise ConfigError(f"{path} has {mode}: others may read the keys; run: chmod 600 {path}")
    try:
        return [
            Key(**record | {"scopes": _known(record.get("scopes", INFER))}) for record in json.loads(path.read_text())
        ]
    except (ValueError, TypeError, AttributeError) as error:
        raise ConfigError(f"{path} holds no API keys ({error}); move it away, and make new keys") from None


def add_key(path: Path, name: str, scopes: Sequence[str] = INFER) -> str:
    """Make a key and return it. Raises ConfigError where the name is taken, or a scope is not known."""
    if not name.strip() or not name.isprintable():
        raise ConfigError(f"the name of a key is {name!r}; expected a printable word, such as laptop")
    try:
        known = _known(scopes)
    except ValueError as error:
        raise ConfigError(str(error)) from None
    with _changing(path) as keys:
        if any(key.name == name for key in keys):
            raise ConfigError(f"there is a key named {name} already; revoke it first, or take another name")
        key = PREFIX + secrets.token_urlsafe(32)
        keys.append(Key(name, _hash(key), time.time(), known))
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

    def find(self, key: str) -> Key | None:
        """The key with its name and scopes; None where it is not among those of the file."""
        return self.known(_hash(key))

    def known(self, digest: str) -> Key | None:
        """The key of this hash, None where it was revoked."""
        try:
            found = self.path.stat()
            seen = (found.st_mtime_ns, found.st_size, found.st_ino)
            if seen != self._seen:
                self._keys, self._seen = read_keys(self.path), seen
        except (OSError, ConfigError):
            self._keys, self._seen = [], None  # what cannot be read lets nobody in
        found_keys = [key for key in self._keys if hmac.compare_digest(key.sha256, digest)]
        return found_keys[0] if found_keys else None


def _known(scopes: Sequence[str]) -> tuple[str, ...]:
    """The scopes in their order, each once. Raises ValueError where one is not known, or there is none."""
    if not scopes or not set(scopes) <= set(SCOPES):
        raise ValueError(f"scopes are {', '.join(map(str, scopes)) or 'none'}; expected some of {', '.join(SCOPES)}")
    return tuple(scope for scope in SCOPES if scope in scopes)


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
