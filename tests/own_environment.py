"""A Python of its own for a program whose packages do not fit the tested set: ours, and over them those of a list.

`python = own_python("lmms-eval")` installs tests/environments/lmms-eval.txt once into .cache/environments/lmms-eval.
"""

import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import requests

from tests.ray_head import free_port

ROOT = Path(__file__).parents[1]


def own_python(name: str) -> Path:
    """The interpreter; the test is skipped where its packages cannot be installed."""
    wanted = ROOT / "tests" / "environments" / f"{name}.txt"
    folder = ROOT / ".cache" / "environments" / name
    python, done = folder / "bin" / "python", folder / "installed.txt"
    if done.exists() and done.read_bytes() == wanted.read_bytes():
        return python

    shutil.rmtree(folder, ignore_errors=True)
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", folder], check=True, timeout=300)
    [packages] = folder.glob("lib/python*/site-packages")
    (packages / "shared.pth").write_text("\n".join(path for path in sys.path if path.endswith("site-packages")))
    pip = [sys.executable, "-m", "pip", f"--python={python}", "install", "--quiet", "--disable-pip-version-check"]
    options = ["--no-deps", "--retries=1", "--timeout=20", "--no-cache-dir", "--requirement", str(wanted)]
    said = subprocess.run([*pip, *options], capture_output=True, text=True, timeout=1800)
    if said.returncode:
        pytest.skip(f"the packages of {wanted.name} cannot be installed: {said.stderr.strip().splitlines()[-1]}")
    done.write_bytes(wanted.read_bytes())
    return python


def environment_of(python: Path | str, **more: str) -> dict[str, str]:
    """The environment variables of a command that `python` runs, with the smolray of this checkout."""
    path = f"{Path(python).parent}{os.pathsep}{os.environ['PATH']}"
    return os.environ | {"PATH": path, "PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1"} | more


@contextmanager
def served(python: Path | str, folder: Path, *words: str, **more: str) -> Iterator[str]:
    """The address of `smolray serve WORDS`, run by `python` in `folder`; without keys, on the loopback."""
    port, log = free_port(), folder / "serve.log"
    command = [python, "-m", "smolray", "serve", *words, "--no-key", "--port", str(port)]
    with log.open("w") as said:
        process = subprocess.Popen(
            command, cwd=folder, env=environment_of(python, **more), stdout=said, stderr=said, start_new_session=True
        )
    try:
        deadline = time.monotonic() + 1200
        while f"serving {words[0]}" not in log.read_text():
            assert process.poll() is None and time.monotonic() < deadline, log.read_text()[-5000:]
            time.sleep(1)
        assert requests.get(f"http://127.0.0.1:{port}/v1/models", timeout=60).ok
        yield f"http://127.0.0.1:{port}"
    finally:
        process.send_signal(signal.SIGTERM)
        process.wait(120)
