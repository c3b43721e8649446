"""API keys: hashed, named, revocable, readable by their owner alone."""

import json

import pytest

from smolray.config import ConfigError
from smolray.serve.keys import SCOPES, KeyRing, add_key, read_keys, revoke_key


def name_of(ring, key):
    found = ring.find(key)
    return found and found.name


def test_keys_are_stored_as_hashes_in_a_file_of_their_owner(tmp_path):
    path = tmp_path / "folder" / "keys.json"
    one, two = add_key(path, "laptop"), add_key(path, "phone")
    assert path.stat().st_mode & 0o777 == 0o600 and path.parent.stat().st_mode & 0o777 == 0o700
    assert one not in path.read_text() and one != two and len(one) > 50
    assert [key.name for key in read_keys(path)] == ["laptop", "phone"]
    ring = KeyRing(path)
    assert [name_of(ring, key) for key in (one, two, "sk-other", "", "\ud800")] == ["laptop", "phone", None, None, None]
    revoke_key(path, "laptop")
    assert (name_of(ring, one), name_of(ring, two)) == (None, "phone")


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
    assert name_of(ring, key) == "laptop"
    path.chmod(0o644)
    with pytest.raises(ConfigError, match="chmod 600"):
        read_keys(path)
    assert name_of(KeyRing(path), key) is None
    path.chmod(0o600)
    whole = path.read_text()
    for content in ("", "{}x", json.dumps([{"name": "x"}]), "5"):
        path.write_text(content)
        assert name_of(ring, key) is None
        with pytest.raises(ConfigError, match="holds no API keys"):
            read_keys(path)
    path.write_text(whole)
    assert name_of(ring, key) == "laptop"
    path.unlink()
    assert name_of(ring, key) is None and read_keys(path) == []


def test_a_key_is_good_for_its_scopes_and_no_others(tmp_path):
    path = tmp_path / "keys.json"
    made = {name: add_key(path, name, scopes) for name, scopes in (("a", ("view",)), ("b", ("operate", "infer")))}
    made["c"] = add_key(path, "c")
    ring = KeyRing(path)
    may = {name: [ring.find(key).may(scope) for scope in SCOPES] for name, key in made.items()}
    assert may == {"a": [True, False, False], "b": [True, True, True], "c": [False, False, True]}
    for wrong in (("admin",), ("view", ""), ()):
        with pytest.raises(ConfigError, match="expected some of view, operate, infer"):
            add_key(path, "d", wrong)
    assert ring.known(ring.find(made["a"]).sha256).name == "a"
    digest = ring.find(made["a"]).sha256
    revoke_key(path, "a")
    assert ring.known(digest) is None


def test_a_key_from_before_there_were_scopes_may_infer(tmp_path):
    path = tmp_path / "keys.json"
    key = add_key(path, "old")
    path.write_text(json.dumps([{k: v for k, v in json.loads(path.read_text())[0].items() if k != "scopes"}]))
    assert KeyRing(path).find(key).scopes == ("infer",)
