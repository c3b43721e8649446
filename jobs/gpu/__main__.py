"""Check a GPU: `make gpu`, or `python -m jobs.gpu [--json FILE] [--html FILE] [--only SECTION]`.

In: this machine. Out: a line for each check with its verdict, a JSON file, and a page to attach to a report. What the
machine cannot do is skipped, and the reason said. It ends with 1 where a check failed.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Iterator, Sequence
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch

from jobs.gpu import facts, kernels, layers, shapes, throughput, training, two
from jobs.gpu.check import Check, Machine, Outcome, Section, UnexpectedFigureError, skipped
from smolray.engine.allocator import expand_segments
from smolray.report.page import render

SECTIONS = (
    Section("machine", facts.CHECKS, 60),
    Section("kernels", kernels.CHECKS, 240),
    *(Section(f"layers, {check.name}", (check,), 240) for check in layers.CHECKS),
    Section("tiny", training.CHECKS, 240),
    *(Section(f"step of {check.name}", (check,), 120) for check in shapes.TRAINING),
    *(Section(f"decoding, {check.name}", (check,), 90) for check in shapes.DECODING),
    *(Section(f"throughput, {check.name}", (check,), 120) for check in throughput.CHECKS),
    Section("two GPUs", two.CHECKS, 300),
)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the checks, print a line for each, write the files. Returns the exit code."""
    parser = argparse.ArgumentParser(prog="python -m jobs.gpu", description=__doc__)
    parser.add_argument("--json", default="gpu.json", help="file for the figures (default: gpu.json)")
    parser.add_argument("--html", default="gpu.html", help="file for the page (default: gpu.html)")
    names = [section.name for section in SECTIONS]
    parser.add_argument("--only", choices=names, action="append", help="a section; may be repeated; default: all")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    chosen = [section for section in SECTIONS if options.only is None or section.name in options.only]
    if options.child:
        expand_segments(os.environ)  # as workers do
        for section in chosen:
            run_here(section, Machine.here(), Path(options.child))
        return 0

    machine, began, outcomes = Machine.here(), time.monotonic(), []
    for section in chosen:
        for outcome in run(section, machine):
            print(line(outcome), flush=True)
            outcomes.append(outcome)

    report = summary(machine, outcomes, time.monotonic() - began)
    Path(options.json).write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    Path(options.html).write_text(page(machine, outcomes, report), encoding="utf-8")
    counts = report["counts"]
    told = ", ".join(f"{count} {verdict}" for verdict, count in counts.items())
    print(f"{told}: {options.json}, {options.html}")
    return 1 if counts["failed"] else 0


def run(section: Section, machine: Machine) -> Iterator[Outcome]:
    """The outcomes of a section, those that cannot run first; the others in a process of their own."""
    yield from skipped(section, machine)
    left = [check for check in section.checks if not check.needs.missing(machine)]
    if not left:
        return

    with tempfile.TemporaryDirectory(prefix="gpu-check") as folder:
        lines, why = Path(folder) / "outcomes.jsonl", ""
        command = [sys.executable, "-m", "jobs.gpu", "--only", section.name, "--child", str(lines)]
        try:
            done = subprocess.run(command, capture_output=True, text=True, timeout=section.seconds)
            if done.returncode:
                why = f"the process ended with {done.returncode}: {done.stderr.strip()[-600:]}"
        except subprocess.TimeoutExpired:
            why = f"not ended after {section.seconds} s"
        told = lines.read_text(encoding="utf-8").splitlines() if lines.exists() else []

    found = {outcome.name: outcome for outcome in (Outcome(**json.loads(each)) for each in told)}
    for check in left:
        lost = Outcome(section.name, check.name, check.asks, "failed", why or "the process told nothing")
        yield found.get(check.name, lost)


def run_here(section: Section, machine: Machine, lines: Path) -> None:
    """Run the checks of a section in this process; append the outcome of each to `lines` at once."""
    device = torch.device("cuda", 0)
    for check in section.checks:
        if not check.needs.missing(machine):
            with lines.open("a", encoding="utf-8") as file:
                file.write(json.dumps(outcome_of(section, check, device).to_json()) + "\n")


def outcome_of(section: Section, check: Check, device: torch.device) -> Outcome:
    """Run one check. Whatever it raises is its outcome."""
    began = time.monotonic()
    start = Outcome(section.name, check.name, check.asks, "passed")
    try:
        ended = replace(start, figures=check.run(device))
    except UnexpectedFigureError as error:
        ended = replace(start, verdict="failed", reason=str(error), figures=error.figures)
    except Exception as error:  # another check may still say something
        place = traceback.extract_tb(error.__traceback__)[-1]
        told = f"{type(error).__name__}: {error} ({Path(place.filename).name}:{place.lineno})"
        ended = replace(start, verdict="failed", reason=told[:600])
    return replace(ended, seconds=round(time.monotonic() - began, 2))


def summary(machine: Machine, outcomes: Sequence[Outcome], seconds: float) -> dict[str, Any]:
    """What the JSON file holds."""
    verdicts = [outcome.verdict for outcome in outcomes]
    return {
        "machine": machine.__dict__,
        "torch": torch.__version__,
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "seconds": round(seconds, 1),
        "counts": {verdict: verdicts.count(verdict) for verdict in ("passed", "failed", "skipped")},
        "checks": [outcome.to_json() for outcome in outcomes],
    }


def page(machine: Machine, outcomes: Sequence[Outcome], report: dict[str, Any]) -> str:
    """The HTML page."""
    sections = {name: [o for o in outcomes if o.section == name] for name in dict.fromkeys(o.section for o in outcomes)}
    return str(
        render(
            "gpu.html",
            package="jobs.gpu",
            title=f"smolray on {machine.name}",
            machine=machine,
            report=report,
            sections=sections,
            shown=shown,
        )
    )


def shown(figure: object) -> str:
    """A figure as the page and the lines show it."""
    if isinstance(figure, float):
        return f"{figure:.4g}"
    return ", ".join(map(shown, figure)) if isinstance(figure, list) else str(figure)


def line(outcome: Outcome) -> str:
    """A check in one line of the terminal."""
    figures = "; ".join(
        f"{name} {shown(value)}" for name, value in outcome.figures.items() if not isinstance(value, list)
    )
    told = "; ".join(each for each in (outcome.reason, figures) if each)
    return f"{outcome.verdict:7} {outcome.section}, {outcome.name}: {told}"


if __name__ == "__main__":
    sys.exit(main())
