"""The Ray that a command starts for itself ends with it, at once and whole."""

import time

import pytest

from smolray.cluster.local_ray import LocalRay
from smolray.cluster.ray_process import session_processes

pytestmark = pytest.mark.seconds


def test_a_local_ray_ends_at_once_and_leaves_no_process(monkeypatch):
    """Ray's own exit would wait five seconds for processes that are gone."""
    monkeypatch.setenv("RAY_AUTH_MODE", "token")
    monkeypatch.setenv("RAY_AUTH_TOKEN", "f" * 64)
    local = LocalRay()
    local.start()
    process = local.process
    assert len(session_processes(process.pid)) > 5  # its head, and this one's own

    began = time.monotonic()
    local.end()
    assert time.monotonic() - began < 3
    assert process.returncode == 0
    assert session_processes(process.pid) == []
