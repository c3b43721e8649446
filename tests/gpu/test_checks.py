"""`make gpu` without a GPU: all is skipped for a stated reason, and what a CPU can compute passes there."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from jobs.gpu import __main__ as command
from jobs.gpu import two
from jobs.gpu.check import Check, Machine, Needs, Section, UnexpectedFigureError

NO_GPU = Machine(0, why_not="torch is built without CUDA")
ONE = Machine(1, "NVIDIA GeForce RTX 3090", (8, 6), 24.0, True)


@pytest.fixture(autouse=True)
def no_gpu(monkeypatch):
    monkeypatch.setattr(Machine, "here", lambda: NO_GPU)


def test_without_a_gpu_every_check_is_skipped_with_its_reason(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert command.main([]) == 0
    report = json.loads(Path("gpu.json").read_text())
    assert {check["verdict"] for check in report["checks"]} == {"skipped"}
    assert all(check["reason"] == "no GPU: torch is built without CUDA" for check in report["checks"])
    assert len(report["checks"]) == sum(len(section.checks) for section in command.SECTIONS) >= 30
    page = Path("gpu.html").read_text()
    assert "40 skipped" in page and "Is FlexAttention with heads 15/5 SDPA" in page and "http" not in page
    assert capsys.readouterr().out.splitlines()[-1].startswith("0 passed, 0 failed")


@pytest.mark.parametrize(
    ("needs", "machine", "reason"),
    [
        (Needs(), ONE, ""),
        (Needs(gpus=2), ONE, "2 GPUs are needed, found 1"),
        (Needs(capability=(9, 0)), ONE, "compute capability 9.0 is needed, found 8.6 (NVIDIA GeForce RTX 3090)"),
        (Needs(memory_gib=40), ONE, "40 GiB of GPU memory are needed, found 24.0"),
        (Needs(bf16=True), Machine(1, "Tesla T4", (7, 5), 15.0), "Tesla T4 has no bf16 units"),
        (Needs(packages=("torch", "no_such_package")), ONE, "no_such_package is not installed"),
    ],
)
def test_a_check_is_skipped_for_what_the_machine_lacks(needs, machine, reason):
    assert needs.missing(machine) == reason


def test_the_verdict_and_the_figures_of_a_check_are_kept():
    def wrong(device):
        raise UnexpectedFigureError("2 is not 3", {"found": 2})

    def broken(device):
        raise torch.OutOfMemoryError("CUDA out of memory.")

    section, found = Section("s", (), 1), []
    for run in (lambda device: {"found": 3}, wrong, broken):
        found.append(command.outcome_of(section, Check("c", "?", run), torch.device("cpu")))
    assert [(o.verdict, o.figures) for o in found] == [
        ("passed", {"found": 3}),
        ("failed", {"found": 2}),
        ("failed", {}),
    ]
    assert found[1].reason == "2 is not 3" and found[2].reason.startswith("OutOfMemoryError: CUDA out of memory.")


def test_a_process_that_dies_fails_the_checks_it_has_not_told(monkeypatch):
    """Here it dies at once: there is no such section."""
    section = Section("no such section", (Check("c", "?", lambda device: {}),), 600)
    (outcome,) = command.run(section, ONE)
    assert outcome.verdict == "failed" and "invalid choice" in outcome.reason


ON_CPU = """
import json, sys, torch
from jobs.gpu import __main__ as command, kernels, shapes, training, two
from jobs.gpu.check import Section

cpu = torch.device("cpu")
wanted = ("zero-0", "zero-2", "zero-3", "lora", "dpo", "retrieval", "resume")
checks = [check for check in training.CHECKS if check.name in wanted]
checks += [check for check in kernels.CHECKS if check.name in ("image tokens", "cudnn")]
print(json.dumps([command.outcome_of(Section("s", (), 1), check, cpu).to_json() for check in checks]))
"""


@pytest.mark.slow
def test_the_checks_that_a_cpu_can_compute_pass_there():
    environment = os.environ | {"DS_ACCELERATOR": "cpu"}
    done = subprocess.run([sys.executable, "-c", ON_CPU], capture_output=True, text=True, env=environment, timeout=600)
    assert done.returncode == 0, done.stderr
    outcomes = json.loads(done.stdout.splitlines()[-1])
    assert {o["name"]: o["reason"] for o in outcomes if o["verdict"] != "passed"} == {}
    assert len(outcomes) == 9


@pytest.mark.slow
@pytest.mark.parametrize("check", [check.name for check in two.CHECKS])
def test_two_workers_have_the_losses_of_one(tmp_path, check):
    code = (
        "import json, sys, torch; from jobs.gpu import __main__ as command, two\n"
        "if __name__ == '__main__':\n"
        "    check = next(check for check in two.CHECKS if check.name == sys.argv[1])\n"
        "    outcome = command.outcome_of(command.Section('s', (), 1), check, torch.device('cpu'))\n"
        "    print(json.dumps(outcome.to_json()))\n"
    )
    (tmp_path / "run.py").write_text(code)
    environment = os.environ | {"DS_ACCELERATOR": "cpu", "PYTHONPATH": os.getcwd()}
    command = [sys.executable, tmp_path / "run.py", check]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=600)
    assert done.returncode == 0, done.stderr
    outcome = json.loads(done.stdout.splitlines()[-1])
    assert (outcome["verdict"], outcome["reason"]) == ("passed", ""), outcome


def test_a_random_batch_of_a_true_shape_is_one_that_the_model_takes():
    from jobs.gpu.shapes import random_batch, random_model
    from smolray.model.decoding import greedy
    from smolray.model.forward import target_states

    cpu = torch.device("cpu")
    model = random_model("tiny", torch.float32, cpu).eval()
    assert target_states(model, random_batch(model, 3, 300, 5, 12, flat=True)).shape == (12, 96)
    assert len(greedy(model, random_batch(model, 2, 40, 2, 0, flat=False), 3, {0})) == 2
