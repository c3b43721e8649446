"""Who may use what a command serves: the file of the keys, and addresses that are not left open.

In: --host, --port, --key-file. Out: the file of the keys; ConfigError where everyone could come in, or nobody.
"""

import importlib
import ipaddress
import socket
from pathlib import Path
from typing import Annotated

import typer

from smolray.config import ConfigError

KeyFile = Annotated[
    str, typer.Option("--key-file", envvar="SMOLRAY_KEY_FILE", help="default: ~/.smolray/api-keys.json")
]


def key_path(key_file: str) -> Path:
    """The file of the keys."""
    from smolray.serve.keys import default_path
    from smolray.storage import absolute

    return Path(absolute(key_file)) if key_file else default_path()


def check_access(host: str, port: int, key_file: str, scope: str) -> bool:
    """Returns whether only this machine reaches the address. Empty `key_file`: no key is asked for.

    Raises ConfigError where the address is not free, everyone could come in, or no key has `scope`.
    """
    from smolray.serve.keys import read_keys

    try:
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
        addresses = [(family, where) for family, _, _, _, where in found]
        for family, where in addresses:
            with socket.socket(family, socket.SOCK_STREAM) as one:
                one.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
                one.bind(where)
    except OSError as error:
        raise ConfigError(f"--host {host} --port {port} cannot be listened on: {error.strerror or error}") from None

    own = all(ipaddress.ip_address(str(where[0]).partition("%")[0]).is_loopback for _, where in addresses)
    if not key_file and not own:
        raise ConfigError(f"--no-key with --host {host} would let everyone in; leave one of them out")
    if key_file and not any(key.may(scope) for key in read_keys(Path(key_file))):
        made = "smolray key add NAME" + (f" --scope {scope}" if scope != "infer" else "")
        raise ConfigError(f"there is no API key with the scope {scope} in {key_file}; make one: {made}")
    return own


def require_web_packages(extra: str) -> None:
    """Raise ConfigError where the packages of an HTTP server are not installed."""
    try:
        for package in ("fastapi", "uvicorn"):
            importlib.import_module(package)
    except ModuleNotFoundError as error:
        raise ConfigError(
            f"`smolray {extra}` needs {error.name}, which is not installed; run: pip install 'smolray[{extra}]'"
        ) from None
