"""The whole flow on real data: `make demo` prepares easy-vqa, trains a small SmolVLM on a local Ray with 2 workers,
evaluates and exports.

In: nothing but the installed packages. Out: runs/demo with result.json, report.html and export/, a folder that plain
transformers loads.
"""

import argparse
from pathlib import Path
from typing import Any

from jobs.easyvqa import export_easy_vqa
from smolray.config import load_config
from smolray.export import export_run
from smolray.launch.driver import launch_run
from smolray.run.folder import RunFolder


def main() -> None:
    """Run the demo; settings given as KEY=VALUE replace those of the recipe `demo`."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("overrides", nargs="*", metavar="KEY=VALUE")
    options = parser.parse_args()
    raw = Path("runs/easy-vqa")
    if not (raw / "test.parquet").exists():
        export_easy_vqa(raw)
    data = [f"data.train={raw}/train.parquet", f"data.validation={raw}/test.parquet"]
    config = load_config("demo", [*data, *options.overrides])
    result = launch_run(config)
    folder = export_run(config.run_dir)
    print_result(result)
    print(f"report:   {RunFolder(config.run_dir).report}\nexported: {folder}")


def print_result(result: dict[str, Any]) -> None:
    """The accuracy by question type, that of answering without looking, and how long it took."""
    counts, blind = result["accuracy_counts"], result["blind_baseline"]
    print(f"\n{'type':10} {'questions':>9} {'accuracy':>9}")
    for name, value in result["accuracy"].items():
        print(f"{name:10} {counts[name]:>9,} {value:>9.1%}")
    print(f"{'blind':10} {counts['overall']:>9,} {blind:>9.1%}   (answers without looking)")
    print(
        f"\n{result['steps']} steps, {result['train_seconds']:.0f} s of training, {result['seconds']:.0f} s in all; "
        f"{result['samples_per_second']} samples/s"
    )


if __name__ == "__main__":
    main()
