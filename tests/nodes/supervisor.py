"""Runs a systemd unit where there is no systemd: its environment files, ExecStartPre, ExecStart and restart rule, and
nothing else.

python supervisor.py UNIT: runs on a node, as the init system would.
"""

import shlex
import subprocess
import sys
import time
from pathlib import Path


def parse(text: str) -> dict[str, list[str]]:
    """All settings of a unit, sections aside: name -> values in order."""
    settings: dict[str, list[str]] = {}
    for line in text.replace("\\\n", " ").splitlines():
        name, equals, value = line.strip().partition("=")
        if equals and not name.startswith(("#", ";", "[")):
            settings.setdefault(name, []).append(value.strip())
    return settings


def environment(settings: dict[str, list[str]]) -> dict[str, str]:
    """What the unit's environment files say; a file marked with `-` may be absent."""
    found: dict[str, str] = {}
    for name in settings.get("EnvironmentFile", []):
        path = Path(name.removeprefix("-"))
        if name.startswith("-") and not path.exists():
            continue
        for line in path.read_text().splitlines():
            key, equals, value = line.strip().partition("=")
            if equals and not key.startswith("#"):
                found[key] = value.strip()
    return found


def supervise(unit: Path) -> int:
    import os

    settings = parse(unit.read_text())
    own = dict(os.environ) | environment(settings)
    while True:
        code = 0
        for command in settings.get("ExecStartPre", []) + settings["ExecStart"]:
            code = subprocess.run(shlex.split(command), env=own).returncode
            print(f"{time.time():.1f} {shlex.split(command)[0]} ended with {code}", flush=True)
            if code:
                break
        rule = settings.get("Restart", ["no"])[0]
        if (
            rule == "no"
            or (rule == "on-failure" and code == 0)
            or str(code) in settings.get("RestartPreventExitStatus", [""])[0].split()
        ):
            return code
        time.sleep(float(settings.get("RestartSec", ["0.1"])[0]))


if __name__ == "__main__":
    sys.exit(supervise(Path(sys.argv[1])))
