"""Training at a true shape against TRL's trainer: how many times as fast, and how many times it could be."""

from functools import partial

import torch

from jobs.gpu.check import Check, Figures, Needs, expect

SHAPE, TRL = "random-256m", ("trl,workers=2,checkpointing=0",)
GOALS = {"sft_multi_question": 4.5, "sft_single_question": 1.15, "sft_frozen_cached": 12.0}


def beside_trl(case: str, device: torch.device) -> Figures:
    """A case of the benchmark: seconds of a step of 16 conversations, ours and TRL's."""
    from jobs.bench.train import train_case

    found = train_case(case, SHAPE, 1.0, 1, TRL)[0].to_json()
    names = {
        "ours_wall_s": "seconds_a_step",
        "peer_wall_s": "trl_seconds_a_step",
        "ratio": "times_as_fast",
        "limit": "limit",
        "share_of_limit": "share_of_limit",
        "ours_peak_mb": "allocated_mib",
        "peer_peak_mb": "trl_allocated_mib",
    }
    figures = {name: found[key] for key, name in names.items()}
    ratio, goal = figures["times_as_fast"], GOALS[case]
    return expect(ratio >= goal, f"{ratio:.2f} times as fast as TRL, expected {goal:g}", figures)


CHECKS = tuple(
    Check(
        case,
        "How many times as fast as TRL is a step?",
        partial(beside_trl, case),
        Needs(bf16=True, memory_gib=22, packages=("trl", "easy_vqa")),
    )
    for case in GOALS
)
