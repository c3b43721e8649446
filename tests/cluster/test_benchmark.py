"""The benchmark as a command: its cases run, and its JSON has the keys that a reader of the figures relies on."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SIDE = {"s", "s_range", "wall_s", "wall_s_range", "cpu_s", "cpu_s_range", "peak_mb"}
KEYS = {
    "name",
    "measured",
    "items",
    "unit",
    "peer",
    "repetitions",
    "ratio",
    "limit",
    "share_of_limit",
    "clock",
    "ours_flops",
    "peer_flops",
    *(f"{side}_{key}" for side in ("ours", "peer") for key in SIDE),
}
CASES = ["sft_multi_question", "sft_multi_question_plain", "dpo", "stream", "stream_alone", "launch"]


@pytest.mark.slow
def test_the_benchmark_writes_what_it_measured(tmp_path):
    only = [part for case in ("sft_multi_question", "dpo", "stream", "launch") for part in ("--only", case)]
    command = [
        sys.executable,
        "jobs/benchmark.py",
        "--scale",
        "0.05",
        "--repetitions",
        "2",
        "--shape",
        "tiny",
        "--json",
        str(tmp_path / "b.json"),
        *only,
    ]
    environment = {k: v for k, v in os.environ.items() if not k.startswith("RAY_")}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=500)
    assert done.returncode == 0, done.stderr[-3000:]
    records = json.loads((tmp_path / "b.json").read_text())
    assert list(records) == CASES
    for name, record in records.items():
        assert record.keys() == KEYS and record["name"] == name
        assert record["repetitions"] == 2 and record["items"] > 0
        assert record["ratio"] == pytest.approx(record["peer_s"] / record["ours_s"], rel=2e-2)
        for side in ("ours", "peer"):
            for key in (f"{side}_s", f"{side}_cpu_s", f"{side}_wall_s"):
                low, high = record[f"{key}_range"]
                assert 0 < low <= record[key] <= high
        assert record["name"] in done.stdout, "the table names every case"
