"""Measure smolray against what one would use without it: `python jobs/benchmark.py [--only NAME] [--json FILE]`.

In: nothing but this machine; the data is easy-vqa or generated. Out: a table of medians with min..max, and JSON with an
object for each case. `ratio`: how many times as fast as the peer smolray is, by the clock that `clock` names. `limit`:
how many times as many floating-point operations the peer needs. A case that this machine cannot run is skipped, and the
reason said.
"""

import argparse
import json
import os
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

# A script finds modules of its own folder only; the cases are imported from the folder above.
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from jobs.bench.data import prepare_case, stream_case
from jobs.bench.epochs import lora_epochs, lora_steps
from jobs.bench.launch import launch_case
from jobs.bench.serve import serve_case
from jobs.bench.timing import Result
from jobs.bench.train import TRUE_SHAPES
from jobs.bench.train import cases as train_cases
from jobs.gpu.check import Machine

# (scale of the work, repetitions) -> Results; the first has the case's name
Case = Callable[[float, int], list[Result]]
SHAPELESS = ("prepare", "stream", "launch")
SHAPES = ("tiny", "30m", "256m", "500m", "2.2b")


def all_cases(model: str) -> tuple[dict[str, Case], dict[str, Case]]:
    """The cases by name: those that need no Ray, and those that run on it. `model`: the shape that is trained."""
    with_ray: dict[str, Case] = {"prepare": prepare_case, "stream": stream_case, "launch": launch_case}
    plain: dict[str, Case] = train_cases(model) | {
        "lora_steps": partial(lora_steps, model),
        "serve": partial(serve_case, model),
    }
    return plain, with_ray | {"lora_epochs": partial(lora_epochs, model)}


def main(arguments: list[str] | None = None) -> None:
    """Run the cases, print the table, write the JSON."""
    parser = argparse.ArgumentParser(description=__doc__)
    names = [name for cases in all_cases("") for name in cases]
    parser.add_argument("--only", choices=names, action="append", help="a case to run, may be repeated; default: all")
    parser.add_argument("--json", help="file to write the results to")
    parser.add_argument("--repetitions", type=int, default=3)
    parser.add_argument("--scale", type=float, default=1.0, help="fraction of the usual amount of work")
    parser.add_argument(
        "--shape",
        choices=SHAPES,
        default="30m",
        help="of the model that is trained; 256m, 500m and 2.2b need a GPU, or --cpu",
    )
    parser.add_argument("--cpu", action="store_true", help="run 256m, 500m or 2.2b without a GPU: minutes a step")
    options = parser.parse_args(arguments)

    model = options.shape if options.shape == "tiny" else f"random-{options.shape}"
    plain, with_ray = all_cases(model)
    records: dict[str, dict[str, Any]] = {}
    for name in options.only or names:
        began = time.monotonic()
        if why := skipped(name, model, options.cpu):
            records[name] = {"name": name, "skipped": why}
        else:
            if name in with_ray:
                start_ray()
            results = (plain | with_ray)[name](options.scale, options.repetitions)
            records |= {result.name: result.to_json() for result in results}
        print(f"{name}: {time.monotonic() - began:.0f} s", file=sys.stderr, flush=True)
        if options.json:  # after each case, so that a later failure loses nothing
            Path(options.json).write_text(json.dumps(records, indent=1) + "\n", encoding="utf-8")
    _print(list(records.values()))


def skipped(name: str, model: str, on_cpu: bool) -> str:
    """Why a case is not run here; empty: it is. `model`: the shape that is trained; `on_cpu`: no GPU is needed."""
    if model not in TRUE_SHAPES:
        return ""
    if name in SHAPELESS:
        return "it is the same for every shape"
    machine = Machine.here()
    return "" if machine.gpus or on_cpu else f"{model} needs a GPU: {machine.why_not} (--cpu: without one)"


def start_ray() -> None:
    """The local Ray that smolray starts for a run, with one thread a worker and the priority of everything else."""
    from smolray.cluster.connect import connect

    os.environ.pop("RAY_ADDRESS", None)
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    # Ray gives its workers a low priority by default, which the peer's processes do not have.
    os.environ.setdefault("RAY_worker_niceness", "0")
    connect()


def _print(records: list[dict[str, Any]]) -> None:
    from rich.console import Console
    from rich.table import Table

    for record in records:
        if "skipped" in record:
            print(f"{record['name']}: skipped: {record['skipped']}")
    records = [record for record in records if "skipped" not in record]
    table = Table(box=None, pad_edge=False, header_style="dim")
    for column in ("case", "seconds", "ours", "peer's", "times as fast", "limit", "peak MB, ours", "peer's"):
        table.add_column(column, justify="left" if column in ("case", "seconds") else "right")
    for record in records:
        peaks = ["" if (peak := record[f"{side}_peak_mb"]) is None else f"{peak:,}" for side in ("ours", "peer")]
        table.add_row(
            record["name"],
            record["clock"],
            *(_span(record, f"{side}_s") for side in ("ours", "peer")),
            f"{record['ratio']:.2f}",
            "" if record["limit"] is None else f"{record['limit']:.2f}",
            *peaks,
        )
    console = Console(highlight=False)
    if records:
        console.print(table)
    for record in records:
        work = f"{record['measured']}; {record['items']:,} {record['unit']}s; peer: {record['peer']}"
        console.print(f"{record['name']}: {work}", style="dim", soft_wrap=True)


def _span(record: dict[str, Any], key: str) -> str:
    low, high = record[f"{key}_range"]
    return f"{record[key]:.2f} ({low:.2f}..{high:.2f})"


if __name__ == "__main__":
    main()
