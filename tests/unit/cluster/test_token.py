"""Nobody but its owner reads the token of a cluster."""

import os

import pytest

from smolray.cluster.node_checks import token_file as finding
from smolray.cluster.token import close_token, ensure_token, open_token, token_file


@pytest.fixture
def home(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.delenv("RAY_AUTH_TOKEN", raising=False)
    monkeypatch.delenv("RAY_AUTH_TOKEN_PATH", raising=False)
    before = os.umask(0o000)
    yield tmp_path
    os.umask(before)


def test_a_token_that_smolray_makes_is_private_from_its_first_moment(home):
    ensure_token()
    path = home / ".ray" / "auth_token"
    assert path.stat().st_mode & 0o777 == 0o600 and path.parent.stat().st_mode & 0o777 == 0o700
    token = path.read_text()
    assert len(token) == 64 and open_token(path) == ""
    ensure_token()
    assert path.read_text() == token, "a token that is there stays"


@pytest.mark.parametrize("close", [ensure_token, close_token])
def test_a_token_that_ray_left_readable_by_all_is_closed(home, close):
    path = home / ".ray" / "auth_token"
    path.parent.mkdir()
    path.write_text("t" * 64)
    path.chmod(0o644)
    assert token_file() == path and open_token(path) == "mode 0644"
    close()
    assert open_token(path) == "" and path.stat().st_mode & 0o777 == 0o600


@pytest.mark.skipif(os.getuid() != 0, reason="only root can make a file of root")
def test_a_file_of_root_may_be_read_by_the_group_of_a_service(home):
    path = home / "token"
    path.write_text("t" * 64)
    path.chmod(0o440)  # as the playbook installs it
    assert open_token(path) == ""
    path.chmod(0o444)
    assert open_token(path) == "mode 0444"


def test_a_token_of_the_environment_needs_no_file(home, monkeypatch):
    monkeypatch.setenv("RAY_AUTH_TOKEN", "t" * 64)
    ensure_token()
    assert token_file() is None and not (home / ".ray").exists()


def test_the_doctor_says_who_else_may_read_it():
    found = finding("den", {"token": ("/home/ray/.ray/auth_token", "mode 0644")})
    assert found.level == "fail" and "0644" in found.found and found.remedy == "chmod 600 /home/ray/.ray/auth_token"
    assert finding("den", {"token": ("", "")}).level == "ok"
