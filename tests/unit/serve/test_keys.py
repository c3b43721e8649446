"""API keys: hashed, named, revocable, readable by their owner alone."""

import json

import pytest

from smolray.config import ConfigError
from smolray.serve.keys import KeyRing, add_key, read_keys, revoke_key


def test_keys_are_stored_as_hashes_in_a_file_of_their_owner(tmp_path):
    path = tmp_path / "folder" / "keys.json"
    one, two = add_key(path, "laptop"), add_key(path, "phone")
    assert path.stat().st_mode & 0o777 == 0o600 and path.parent.stat().st_mode & 0o777 == 0o700
    assert one not in path.read_text() and one != two and len(one) > 50
    assert [key.name for key in read_keys(path)] == ["laptop", "phone"]
    ring = KeyRing(path)
    assert [ring.name_of(key) for key in (one, two, "sk-other", "", "\ud800")] == ["laptop", "phone", None, None, None]
    revoke_key(path, "laptop")
    assert (ring.name_of(one), ring.name_of(two)) == (None, "phone")


def test_a_name_is_given_once_and_only_known_ones_are_revoked(tmp_path):
    path = tmp_path / "keys.json"
    add_key(path, "laptop")
    with pytest.raises(ConfigError, match="named laptop already"):
        add_key(path, "laptop")
    for name in ("", " ", "a\nb"):
        with pytest.raises(ConfigError, match="expected a printable word"):
            add_key(path, name)
    with pytest.raises(ConfigError, match=r"no key named other in .*; there: laptop"):
        revoke_key(path, "other")


def test_a_file_that_others_may_read_or_that_is_damaged_lets_nobody_in(tmp_path):
    path = tmp_path / "keys.json"
    key, ring = add_key(path, "laptop"), KeyRing(path)
    assert ring.name_of(key) == "laptop"
    path.chmod(0o644)
    with pytest.raises(ConfigError, match="chmod 600"):
        read_keys(path)
    assert KeyRing(path).name_of(key) is None
    path.chmod(0o600)
    whole = path.read_text()
    for content in ("", "{}x", json.dumps([{"name": "x"}]), "5"):
        path.write_text(content)
        assert ring.name_of(key) is None
        with pytest.raises(ConfigError, match="holds no API keys"):
            read_keys(path)
    path.write_text(whole)
    assert ring.name_of(key) == "laptop"
    path.unlink()
    assert ring.name_of(key) is None and read_keys(path) == []
