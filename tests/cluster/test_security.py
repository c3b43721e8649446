"""What smolray starts or sends is closed: a local Ray asks for its token, a job carries no secrets."""

import os
import subprocess
import sys
import tempfile

import pytest

from smolray.cluster.connect import refuse_open_head
from smolray.cluster.jobs import JobsError, check_submission
from smolray.cluster.upload import EXCLUDES
from smolray.config import ConfigError, load_config

START = """
import subprocess, sys, os
import ray
from smolray.cluster.connect import connect
connect()
address = ray.get_runtime_context().gcs_address
enter = "import ray, sys; ray.init(address=sys.argv[1], log_to_driver=False); print('let in')"
by_us = "from smolray.cluster.connect import connect; connect(); print('let in')"
wrong = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": "f" * 64}

def start(settings, enter=enter):
    own = {k: v for k, v in os.environ.items() if not k.startswith("RAY_AUTH")} | settings
    own["RAY_NUM_REDIS_GET_RETRIES"] = "2"  # Ray tries a wrong token for 20 s
    told = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    return subprocess.Popen([sys.executable, "-c", enter, address], env=own, **told)

told_by_us = "a head that runs asks for its token: copy its ~/.ray/auth_token here"
strangers = {
    "without": (start({"RAY_AUTH_MODE": "disabled"}), "AuthenticationError"),
    "wrong": (start(wrong), "AuthenticationError"),
    "ours, wrong": (start(wrong | {"RAY_ADDRESS": address}, by_us), told_by_us),
    "ours, without": (start({"HOME": os.environ["HOME"] + "/empty", "RAY_ADDRESS": address}, by_us), told_by_us),
}
for name, (stranger, told) in strangers.items():
    out, err = stranger.communicate(timeout=150)
    print(name, "let in" if "let in" in out else "refused" if told in err else err[-500:], sep=": ")
"""


def test_a_ray_that_smolray_starts_lets_in_nobody_without_its_token():
    with tempfile.TemporaryDirectory(prefix="sr") as folder:
        own = {k: v for k, v in os.environ.items() if not k.startswith("RAY_AUTH")} | {
            "HOME": folder,
            "RAY_TMPDIR": folder,
        }
        done = subprocess.run([sys.executable, "-c", START], env=own, capture_output=True, text=True, timeout=240)
        assert done.returncode == 0, done.stderr[-3000:]
        expected = ["without", "wrong", "ours, wrong", "ours, without"]
        assert done.stdout.splitlines()[-4:] == [f"{name}: refused" for name in expected], done.stdout


def test_an_open_head_is_refused_where_others_could_reach_it():
    with pytest.raises(ConfigError, match="everyone who reaches it may run code"):
        refuse_open_head("disabled", "192.168.1.10")
    refuse_open_head("disabled", "127.0.0.1")
    refuse_open_head("token", "192.168.1.10")


@pytest.mark.parametrize(
    "secret",
    [
        "storage=s3://key:word@bucket/runs",
        "data.train=s3://bucket/data?access_key=abc&secret_key=def",
        "data.shards=s3://AKIAABCDEFGHIJKLMNOP/x",
        "data.prompt=hf_abcdefghijklmnopqrstuvwxyz",
    ],
)
def test_a_job_with_a_secret_in_its_command_is_refused(secret, tmp_path):
    (tmp_path / "jobs").mkdir()
    (tmp_path / "jobs" / "train.py").touch()
    arguments = ["storage=s3://bucket/runs", "data.train=s3://bucket/data"]
    check_submission(load_config(None, arguments), arguments, str(tmp_path))
    arguments.append(secret)
    with pytest.raises(JobsError, match=rf"{secret.partition('=')[0]} carries credentials"):
        check_submission(load_config(None, arguments), arguments, str(tmp_path))


def test_files_with_secrets_are_not_uploaded():
    assert {".env", ".aws", "*.pem", "auth_token"} <= set(EXCLUDES)
