"""How costs grow: of the stream with the number of samples, of a training step with the questions per image.

In: nothing but this machine. Out: `python jobs/bench/scaling.py OUT.html` prints both and writes a page with charts.
All costs are CPU-seconds.
"""

import sys
import tempfile
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from jobs.bench.timing import measured
from jobs.bench.train import BATCH, Case, make_task, process
from jobs.benchmark import start_ray
from smolray.report.charts import Series, line_chart
from smolray.report.page import render

SAMPLES = (1_000, 10_000, 100_000)
QUESTIONS = (1, 2, 4, 8)


def stream_costs(samples: Sequence[int] = SAMPLES) -> list[tuple[int, float]]:
    """(samples of an epoch, CPU-milliseconds of the whole stream for each).

    The images are those of easy-vqa, repeated under other names as needed.
    """
    from jobs.easyvqa import vqa_rows
    from smolray.config import load_config
    from smolray.data.local import local_plan
    from smolray.data.ray_jobs import ensure_index
    from smolray.data.shards import write_shards
    from smolray.data.stream import Stream
    from smolray.model.tiny import build_config, build_processor

    rows = vqa_rows("train", 4000)
    found: list[tuple[int, float]] = []
    with tempfile.TemporaryDirectory(prefix="bench") as folder:
        texts = [m.text for row in rows[:200] for c in row.conversations for m in c.messages]
        processor = build_processor("tiny", texts)
        for part in (processor, build_config("tiny", processor)):
            part.save_pretrained(f"{folder}/processor")
        config = load_config(None, [f"model.path={folder}/processor", "train.per_device_train_batch_size=64"])

        for wanted in (samples[0], *samples):  # the first twice: it starts Ray's worker processes
            shards = write_shards(f"{folder}/shards-{len(found)}", _rows(rows, wanted), rows_per_file=1000)
            ensure_index(shards, config)
            plan = local_plan(shards, config)
            with measured(ray=True) as cost:
                arrived = sum(batch.samples for batch in Stream(shards, plan, range(len(plan)), config))
            if arrived != wanted:
                raise RuntimeError(f"{arrived} of {wanted} samples arrived")
            found.append((wanted, 1000 * cost.cpu_s / wanted))
    return found[1:]


def question_costs(questions: Sequence[int] = QUESTIONS, model: str = "random-30m") -> list[tuple[int, float, float]]:
    """(questions per image, CPU-milliseconds of training a question, the same by the arithmetic of shared images)."""
    costs = []
    for count in questions:
        with tempfile.TemporaryDirectory(prefix="bench") as folder:
            task = make_task(Path(folder), Case("", (count,)), model, BATCH, 8)
            with process("ours", task) as ask:
                turns = [ask(2) for _ in range(3)]
        costs.append(1000 * sorted(t.cpu_s / t.items for t in turns)[1])
    # An image costs p and a question q. Both follow from the two ends: p + q and p / n + q.
    first, last = questions[0], questions[-1]
    image = (costs[0] - costs[-1]) / (1 / first - 1 / last)
    question = costs[0] - image / first
    return [(n, cost, image / n + question) for n, cost in zip(questions, costs, strict=True)]


def _rows(rows: Sequence[Any], wanted: int) -> list[Any]:
    """Rows with exactly `wanted` conversations in all."""
    found, count = [], 0
    for number in range(10**9):
        row = rows[number % len(rows)]
        kept = row.conversations[: wanted - count]
        found.append(
            replace(
                row, key=f"{number}-{row.key}", conversations=tuple(replace(c, id=f"{number}-{c.id}") for c in kept)
            )
        )
        count += len(kept)
        if count >= wanted:
            return found
    raise AssertionError


def main(out: str) -> None:
    """Measure, print, write the page."""
    trained = question_costs()
    start_ray()
    streamed = stream_costs()

    for samples, cost in streamed:
        print(f"stream of {samples:,} samples: {cost:.3f} CPU-ms a sample ({cost / streamed[0][1]:.2f} of the first)")
    for count, cost, expected in trained:
        print(f"{count} questions per image: {cost:.1f} CPU-ms a question, {expected:.1f} by p / n + q")

    charts = [
        line_chart(
            "CPU-milliseconds of the stream a sample, by samples of an epoch (logarithm)",
            [Series("measured", tuple((len(str(n)) - 1.0, c) for n, c in streamed), dots=True)],
            y_limits=(0, None),
            x_label="10^",
        ),
        line_chart(
            "CPU-milliseconds of training a question, by questions per image",
            [
                Series("measured", tuple((float(n), c) for n, c, _ in trained), dots=True),
                Series("p / n + q", tuple((float(n), e) for n, _, e in trained)),
            ],
            y_limits=(0, None),
            x_label="questions per image",
        ),
    ]
    page = render("charts.html", title="How costs grow", charts=charts)
    Path(out).write_text(page, encoding="utf-8")


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit(f"usage: {sys.argv[0]} OUT.html")
    main(sys.argv[1])
