"""`smolray serve` refuses an open door before anything starts; `smolray key` makes, lists and revokes keys."""

import socket

import pytest

from tests.commands import refused, smolray


@pytest.fixture
def keys(tmp_path):
    return ("--key-file", str(tmp_path / "keys.json"))


def test_keys_are_made_listed_and_revoked(keys, tmp_path):
    made = smolray("key", "add", "laptop", *keys)
    assert made.exit_code == 0 and made.stdout.startswith("sk-smolray-") and len(made.stdout.splitlines()) == 1
    assert smolray("key", "add", "[red]phone", *keys).exit_code == 0
    listed = smolray("key", "list", *keys).stdout
    assert [line.split("  ")[0] for line in listed.splitlines()] == ["laptop", "[red]phone"]
    assert made.stdout.strip() not in listed + (tmp_path / "keys.json").read_text()
    assert smolray("key", "revoke", "laptop", *keys).exit_code == 0
    assert "there: [red]phone" in refused("key", "revoke", "laptop", *keys)


def test_without_a_key_nothing_is_served(keys):
    assert "make one: smolray key add NAME" in refused("serve", "nope", *keys)
    for host in ("0.0.0.0", "::"):
        assert "would let everyone in" in refused("serve", "nope", "--no-key", "--host", host)


def test_what_cannot_work_is_told_before_ray_starts(keys, tiny_path, tmp_path):
    smolray("key", "add", "laptop", *keys)
    assert "nope" in refused("serve", "nope", *keys, "--storage", str(tmp_path))
    assert "named twice" in refused("serve", tiny_path, tiny_path, *keys)
    assert "max_tiles" in refused("serve", tiny_path, "image.max_tile=3", *keys)
    assert "cannot be listened on" in refused("serve", tiny_path, "--host", "192.0.2.77", *keys)
    for wrong in ("0", "x", "2:1", "1:x", ":", "-1"):
        assert "expected a number of at least 1" in refused("serve", tiny_path, f"--replicas={wrong}", *keys)
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = str(taken.getsockname()[1])
        assert "Address already in use" in refused("serve", tiny_path, "--port", port, *keys)
