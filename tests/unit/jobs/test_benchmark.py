"""The benchmark of a true shape runs to its end on a machine without a GPU: each case is skipped, and why is said."""

import json
import multiprocessing
import os

import torch

from jobs import benchmark
from jobs.bench import peers
from jobs.gpu.check import Machine


def test_without_a_gpu_true_shapes_are_skipped_with_the_reason(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(Machine, "here", lambda: Machine(0, why_not="torch is built without CUDA"))
    file = tmp_path / "figures.json"
    benchmark.main(["--shape", "256m", "--json", str(file)])
    records = json.loads(file.read_text())
    reasons = {name: record.pop("skipped") for name, record in records.items()}
    assert reasons.keys() == {name for cases in benchmark.all_cases("") for name in cases}
    assert reasons["sft_multi_question"] == "random-256m needs a GPU: torch is built without CUDA (--cpu: without one)"
    assert reasons["launch"] == "it is the same for every shape"
    assert "sft_multi_question: skipped: random-256m needs a GPU" in capsys.readouterr().out
    assert benchmark.skipped("lora_steps", "random-256m", on_cpu=True) == ""


def test_trl_is_started_as_a_user_starts_it_without_a_launcher(monkeypatch):
    """Where a rank is set, accelerate looks on a GPU for a launcher's port, and TRL's trainer does not start."""
    launcher, seen = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR"), {}
    for name in launcher:
        monkeypatch.setenv(name, "")  # put back as it was
        monkeypatch.delenv(name)
    monkeypatch.setenv("TOKENIZERS_PARALLELISM", "false")
    monkeypatch.setitem(peers.WAYS, "trl", lambda task, meter, options: seen.update(os.environ))

    _, there = multiprocessing.Pipe()
    peers.serve(there, "trl", peers.Task("", (), 1, 1, threads=torch.get_num_threads()))
    assert seen and not seen.keys() & set(launcher)
