"""The benchmark as a command: its cases run, and its JSON has the keys that a reader of the figures relies on."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
KEYS = {
    "name", "measured", "items", "unit", "peer", "repetitions", "ratio", "cpu_ratio", "ours_s", "ours_s_range", "peer_s", "peer_s_range",
    "ours_cpu_s", "ours_cpu_s_range", "peer_cpu_s", "peer_cpu_s_range",
}  # fmt: skip


@pytest.mark.slow
def test_the_benchmark_writes_what_it_measured(tmp_path):
    command = [sys.executable, "jobs/benchmark.py", "--scale", "0.02", "--repetitions", "2", "--json", str(tmp_path / "b.json")]
    environment = {k: v for k, v in os.environ.items() if not k.startswith("RAY_")}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=500)
    assert done.returncode == 0, done.stderr[-3000:]
    records = json.loads((tmp_path / "b.json").read_text())
    assert [r["name"] for r in records] == ["prepare", "stream", "stream-alone"]
    for record in records:
        assert record.keys() == KEYS
        assert record["repetitions"] == 2 and record["items"] > 0
        assert record["ratio"] == pytest.approx(record["ours_s"] / record["peer_s"], abs=2e-3)
        for side in ("ours", "peer"):
            for key in (f"{side}_s", f"{side}_cpu_s"):
                low, high = record[f"{key}_range"]
                assert 0 < low <= record[key] <= high
        assert record["name"] in done.stdout, "the table names every case"
