"""Connecting to Ray: the cluster that the environment names, or a local Ray of our own (local_ray.py)."""

import ipaddress
import logging
import os
import socket
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import ray
import torch
from ray._private.authentication.authentication_token_setup import enable_token_auth_by_default

from smolray.cluster.local_ray import start_local_ray
from smolray.cluster.signals import in_thread
from smolray.cluster.token import close_token, ensure_token
from smolray.config import ConfigError

CONNECT_SECONDS, ANSWER_SECONDS = 5.0, 10.0  # a head that does not accept or answer within them is taken for dead
HTTP2 = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + bytes((0, 0, 0, 4, 0, 0, 0, 0, 0))  # preface and an empty SETTINGS frame


def connect() -> None:
    """Join the cluster that RAY_ADDRESS names (a submitted job has it), else start a local Ray.

    The local Ray has this machine's cores and ends with this process (local_ray.py).

    A Ray of our own requires a token (Ray makes one where there is none): it listens on the machine's address, and who
    reaches it may run code.

    Raises:
        ConfigError: no Ray answers at RAY_ADDRESS, it refuses the token, or the environment turns tokens off on a
            machine with a network.
        RayStartError: Ray does not start on this machine.
    """
    if ray.is_initialized():
        return
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    if not torch.cuda.is_available():
        os.environ.setdefault("DS_ACCELERATOR", "cpu")  # else DeepSpeed warns in every process that it found no GPU
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    # a data task's process takes seconds to import torch: kept for the next
    os.environ.setdefault("RAY_idle_worker_killing_time_threshold_ms", "600000")
    address = os.environ.get("RAY_ADDRESS")
    if address and address != "local":
        close_token()
        refuse_dead_head(address)
        try:
            join(address)
        except (ConnectionError, ray.exceptions.AuthenticationError) as error:
            reason = str(error).splitlines()[0].partition(". ")[0]
            raise ConfigError(
                f"{_no_head(address, reason)}; a head that runs asks for its token: copy its ~/.ray/auth_token here "
                "(mode 0600), or name the file in RAY_AUTH_TOKEN_PATH"
            ) from None
        return

    mode = os.environ.get("RAY_AUTH_MODE", "token")
    refuse_open_head(mode, ray.util.get_node_ip_address())
    if mode.lower() == "token":
        ensure_token()
    # Ray warns of four times as many processes as may start at a time, by default one a core. Our data tasks take a
    # part of a core each: so many are meant.
    cores = int(ray._private.utils.get_num_cpus())
    os.environ.setdefault("RAY_worker_maximum_startup_concurrency", str(2 * cores))
    head = start_local_ray()
    logging.getLogger("ray").setLevel(logging.ERROR)
    enable_token_auth_by_default()  # as the head did
    join(head)


def join(address: str) -> None:
    """Connect this process to the head at `address`."""
    in_thread(partial(ray.init, address=address, log_to_driver=False, logging_level=logging.ERROR))


def refuse_dead_head(address: str) -> None:
    """Raise ConfigError where no Ray answers at `host:port` within seconds; other forms are left to Ray."""
    host, colon, port = address.removeprefix("ray://").rpartition(":")
    if not colon or not port.isdigit() or os.environ.get("RAY_USE_TLS") == "1":
        return
    try:
        with socket.create_connection((host.strip("[]"), int(port)), CONNECT_SECONDS) as head:
            head.sendall(HTTP2)
            head.settimeout(ANSWER_SECONDS)
            frame = head.recv(9)
            reason = "" if frame[3:4] == bytes((4,)) else "something else listens there"
    except (OSError, OverflowError) as error:
        reason = f"{getattr(error, 'strerror', None) or error}"
    if reason:
        raise ConfigError(_no_head(address, reason))


def _no_head(address: str, reason: str) -> str:
    return (
        f"no Ray answers at RAY_ADDRESS = {address} ({reason}); start its head, or unset RAY_ADDRESS for a Ray of "
        "this machine"
    )


def worker_logs() -> str:
    """Where Ray writes what the workers print: the same path on every node."""
    return f"{_log_folder()}/worker-*"


@contextmanager
def native_errors_in_log() -> Iterator[None]:
    """A block in which Ray's C++ code writes its errors into Ray's log folder; Python's stderr stays where it is.

    Ray Data starts its actors with arguments in the object store, for which Ray's core prints an error each time. It
    means nothing here: the driver holds these arguments as long as it needs the actors.
    """
    python, shown = sys.stderr, os.fdopen(os.dup(2), "w", buffering=1)
    with shown, (_log_folder() / f"smolray-driver-{os.getpid()}.err").open("ab") as log:
        python.flush()
        if python is sys.__stderr__:
            sys.stderr = shown
        os.dup2(log.fileno(), 2)
        try:
            yield
        finally:
            os.dup2(shown.fileno(), 2)
            sys.stderr = python


def _log_folder() -> Path:
    node: Any = ray._private.worker.global_worker.node
    return Path(node.get_logs_dir_path())


def refuse_open_head(auth_mode: str, address: str) -> None:
    """Raise ConfigError where a Ray started here would let in whoever reaches `address`."""
    if auth_mode.lower() != "token" and not ipaddress.ip_address(address).is_loopback:
        raise ConfigError(
            f"RAY_AUTH_MODE = {auth_mode!r} would start a Ray on {address} in which everyone who reaches it "
            "may run code; "
            "unset it, or set RAY_AUTH_MODE=token"
        )
