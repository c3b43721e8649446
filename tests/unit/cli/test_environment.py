"""`smolray env` shows the software and hardware of the machine."""

import json

from smolray import __version__
from tests.commands import smolray


def test_env_shows_what_a_bug_report_needs():
    shown = smolray("env").stdout
    facts = json.loads(smolray("env", "--json").stdout)
    assert facts["smolray"] == __version__ and facts["packages"]["torch"] in shown
    assert {"python", "platform", "NVIDIA driver", "CUDA of torch", "gpus"} <= facts.keys()
    assert "pytest" not in facts["packages"], "what a developer needs is left out"
