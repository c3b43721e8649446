"""The file of the cluster's token. Who reads it may run code on every node, so only its owner may.

In: the environment of this process. Out: a file of mode 0600 in a folder of mode 0700; Ray makes both readable by all.
"""

import os
import secrets
import stat
from pathlib import Path


def token_file() -> Path | None:
    """The file that Ray reads the token from; None where the token itself is in the environment."""
    if os.environ.get("RAY_AUTH_TOKEN"):
        return None
    return Path(os.environ.get("RAY_AUTH_TOKEN_PATH") or Path.home() / ".ray" / "auth_token")


def ensure_token() -> None:
    """Make the token of a Ray of our own where there is none, before Ray does, and close one that others may read."""
    path = token_file()
    if path is None:
        return
    if not path.exists() and "RAY_AUTH_TOKEN_PATH" not in os.environ:
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        try:
            descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
        except FileExistsError:
            return  # another process has made it meanwhile, in the same way
        with os.fdopen(descriptor, "w") as file:
            file.write(secrets.token_hex(32))
    close_token()


def close_token() -> None:
    """Take the token's file from all but its owner, where that is the user of this process."""
    path = token_file()
    if path is not None and open_token(path) and path.stat().st_uid == os.getuid():
        path.chmod(0o600)


def open_token(path: Path) -> str:
    """Who else may read the token's file, such as `mode 0644`; empty where nobody else may, or there is none.

    A file of root, or of another user, may be read by a group: so a service gets it.
    """
    try:
        found = path.stat()
    except OSError:
        return ""
    allowed = 0o700 if found.st_uid == os.getuid() != 0 else 0o750
    mode = stat.S_IMODE(found.st_mode)
    return f"mode {mode:04o}" if mode & ~allowed else ""
