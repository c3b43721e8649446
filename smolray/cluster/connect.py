"""Connecting to Ray: the cluster that the environment names, or a local Ray of our own."""

import ipaddress
import logging
import os

import ray
import torch

from smolray.config import ConfigError


def connect() -> None:
    """Join the cluster that RAY_ADDRESS names (a submitted job has it), else start a local Ray of this machine's cores.

    A Ray of our own asks for a token (Ray makes one where there is none): it listens on the machine's address, and who
    reaches it may run code. Raises ConfigError where the environment turns that off on a machine with a network.
    """
    if ray.is_initialized():
        return
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    if not torch.cuda.is_available():
        os.environ.setdefault("DS_ACCELERATOR", "cpu")  # else DeepSpeed warns in every process that it found no GPU
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    # a data task's process takes seconds to import torch: kept for the next
    os.environ.setdefault("RAY_idle_worker_killing_time_threshold_ms", "600000")
    if os.environ.get("RAY_ADDRESS"):
        ray.init(log_to_driver=False, logging_level=logging.ERROR)
    else:
        refuse_open_head(os.environ.get("RAY_AUTH_MODE", "token"), ray.util.get_node_ip_address())
        ray.init(address="local", include_dashboard=False, log_to_driver=False, logging_level=logging.ERROR)


def refuse_open_head(auth_mode: str, address: str) -> None:
    """Raise ConfigError where a Ray started here would let in whoever reaches `address`."""
    if auth_mode.lower() != "token" and not ipaddress.ip_address(address).is_loopback:
        raise ConfigError(
            f"RAY_AUTH_MODE = {auth_mode!r} would start a Ray on {address} in which everyone who reaches it may run code; "
            "unset it, or set RAY_AUTH_MODE=token"
        )
