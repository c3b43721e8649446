"""Checks of `make gpu`, and whole runs through Ray, on the card of cuda.c: each must come to its end.

Nothing is computed there, so the figures mean nothing: a check may fail for its figures, but none may break.
"""

import json
import subprocess
import sys

import pytest

from jobs.gpu.__main__ import SECTIONS
from tests.proofs.cuda_torch import NEEDED, ROOT, on_null

pytestmark = [*NEEDED, pytest.mark.slow]
# Of the others, FlexAttention takes minutes to compile (test_attention.py), other steps are in test_null_card.py, and
# TRL's way needs numbers: a stock model looks at the pixels to find out which images are there.
CHOSEN = ("machine", "tiny", "step of 256m stage 2, offload", "decoding, 256m, 16 rows")
# These read sizes that they have sent through the card.
NUMBERS_MATTER = {
    "zero-3": "RuntimeError: Detected a disagreement on list length between rank0 and rank0",
    "retrieval": "RuntimeError: The expanded size of the tensor (0) must match the existing size",
}


def started(runtime, *arguments):
    """A Python on that card, when it has ended."""
    command = [sys.executable, *arguments]
    return subprocess.run(command, capture_output=True, text=True, env=on_null(runtime), cwd=ROOT)


@pytest.mark.parametrize("section", CHOSEN)
def test_the_checks_of_make_gpu_come_to_their_end(runtime, tmp_path, section):
    """As `make gpu` runs them, but for its time limit."""
    found = tmp_path / "outcomes.jsonl"
    done = started(runtime, "-m", "jobs.gpu", "--only", section, "--child", str(found))
    outcomes = [json.loads(line) for line in found.read_text().splitlines()] if found.exists() else []

    (checks,) = (s.checks for s in SECTIONS if s.name == section)
    assert [o["name"] for o in outcomes] == [check.name for check in checks], done.stderr[-3000:]
    assert [o for o in outcomes if not (o["figures"] or broken_by_numbers(o))] == []


def broken_by_numbers(outcome):
    return outcome["name"] in NUMBERS_MATTER and outcome["reason"].startswith(NUMBERS_MATTER[outcome["name"]])


@pytest.mark.parametrize(
    "settings",
    [["engine.stage=2"], ["engine.stage=0", "lora={r: 4}", "model.train=[]"]],
    ids=["stage 2", "lora, stage 0"],
)
def test_a_run_through_ray_comes_to_its_end(runtime, tmp_path, settings):
    """It trains, saves, evaluates and writes its result, on a worker to which Ray has given the GPU."""
    done = started(runtime, "-m", "tests.proofs.null_run", str(tmp_path / "run"), *settings)
    assert done.stdout, done.stderr[-3000:]
    told = json.loads(done.stdout.splitlines()[-1])
    result, events = told["result"], told["events"]

    kinds = [event["event"] for event in events]
    start, (worker,) = events[kinds.index("start")], events[kinds.index("inventory")]["workers"]
    assert (start["device"], start["workers"], worker["gpu"]) == ("no card", 1, "no card")
    assert result["status"] == "finished" and kinds.count("start") == 1 and kinds[-1] == "end"
    assert [e["step"] for e in events if e["event"] == "step"] == list(range(1, result["steps"] + 1))
    assert {"checkpoint", "evaluate"} <= set(kinds)
    assert result["accuracy_counts"]["overall"] > 0
