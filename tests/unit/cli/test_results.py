"""What a run has produced is written again for people and for TensorBoard."""

import subprocess
import sys

import pytest
import torch

from smolray.run import checkpoint
from smolray.run.checkpoint import Progress
from smolray.run.state import EngineState
from tests.commands import smolray

HOLD = """
import sys, time
from smolray.run.lease import owning
with owning(*sys.argv[1:]):
    print(1, flush=True)
    time.sleep(60)
"""
DAMAGE = [b"", b"{", b"[1, 2]", b"\xff\xfe", b"a: &a [*a]", b"x" * 2**21]


def test_report_and_tensorboard_are_written(run):
    assert smolray("report", "demo", "--storage", str(run.parent)).exit_code == 0
    assert "Training loss" in (run / "report.html").read_text()
    done = smolray("track", "demo", "tensorboard", "--storage", str(run.parent))
    assert done.exit_code == 0 and "tensorboard: " in done.output
    assert len(list((run / "tensorboard").iterdir())) == 1
    refused = smolray("track", "demo", "tensorbored", "--storage", str(run.parent))
    assert refused.exit_code == 2 and "expected one of tensorboard, wandb" in refused.output


@pytest.mark.parametrize("damage", DAMAGE, ids=lambda d: repr(d[:12]))
@pytest.mark.parametrize("file", ["result.json", "config.yaml"])
def test_a_damaged_file_of_a_run_is_one_message_and_status_still_answers(run, file, damage):
    if file == "config.yaml" and damage == b"":
        pytest.skip("an empty file holds no settings, and the log has them")
    (run / file).write_bytes(damage)
    done = smolray("report", "demo", "--storage", str(run.parent))
    assert done.exit_code == 2 and str(run / file) in done.output.replace("\n", "")
    assert "Traceback" not in done.output and ("Delete it" in done.output or "Put back a copy" in done.output)
    assert smolray("status", "demo", "--storage", str(run.parent)).exit_code == 0


def hold(run_dir, what):
    """A living process that owns the run."""
    process = subprocess.Popen([sys.executable, "-c", HOLD, str(run_dir), what], stdout=subprocess.PIPE)
    process.stdout.readline()
    return process


@pytest.mark.parametrize(
    ("owner", "command", "told"),
    [
        ("train", "export", "`--out FOLDER` exports its newest weights beside it"),
        ("train", "evaluate", "saves and stops it"),
        ("evaluate", "evaluate", "Wait until it has ended"),
        ("export", "export", "Wait until it has ended"),
    ],
)
def test_who_writes_into_a_run_owns_it(run, owner, command, told):
    (run / "config.yaml").write_text("data: {train: t.parquet, validation: v.parquet}\nmodel: {path: tiny}\n")
    (run / "events.jsonl").write_text('{"event": "step", "time": 1, "step": 1}\n')
    process = hold(run, owner)
    try:
        done = smolray(command, "demo", "--storage", str(run.parent))
        said = done.output.replace("\n", " ")
        assert done.exit_code == 2 and f"belongs to `smolray {owner}`, process {process.pid}" in said and told in said
        if command == "export" and owner == "train":
            outside = smolray("export", "demo", "--storage", str(run.parent), "--out", str(run.parent / "elsewhere"))
            assert "belongs to" not in outside.output and "checkpoint" in outside.output, "the run has none to export"
    finally:
        process.kill()
        process.wait()


def test_the_checkpoints_of_a_run_are_listed_with_the_best_and_the_damaged(run):
    assert "demo has no checkpoint yet" in smolray("checkpoints", "demo", "--storage", str(run.parent)).stdout
    for step, accuracy in ((10, 0.75), (20, 0.5), (30, None)):
        state = EngineState({"a": torch.ones(3)}, {"a": torch.ones(3)}, {"a": torch.ones(3)})
        metrics = {"loss": 0.5} | ({} if accuracy is None else {"accuracy": accuracy})
        checkpoint.save(str(run), state, Progress(step=step, epoch=1, samples=step * 8), metrics, {})
    (run / "checkpoints" / "step-00000020" / "weights.safetensors").write_bytes(b"torn")
    said = smolray("checkpoints", "demo", "--storage", str(run.parent)).stdout
    lines = {line.split()[0]: line.split()[1:] for line in said.splitlines()}
    assert lines["step-00000010"] == ["1", "80", "0.5000", "75.0", "%", "best"]
    assert lines["step-00000020"][0] == "damaged:" and lines["step-00000030"] == ["1", "240", "0.5000", "–"]
    assert "smolray export demo --checkpoint step-00000030 --out FOLDER" in said
    weights = run / "checkpoints" / "step-00000030" / "weights.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1] + b"x")
    for options, damaged in (([], 1), (["--verify"], 2)):
        said = smolray("checkpoints", "demo", *options, "--storage", str(run.parent)).stdout
        assert said.count("damaged:") == damaged
