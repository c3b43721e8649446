"""The report of a run as one HTML file that opens with no network.

In: events.jsonl, result.json, config.yaml and the newest predictions of a run folder (each may be missing), and sample
images. Out: `<run>/report.html`. The sample images are stored with the predictions, so that the report can be written
again from the folder alone.
"""

from dataclasses import replace
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from smolray import storage
from smolray.config import ConfigError, read_settings
from smolray.report import sections
from smolray.report.page import render
from smolray.report.sections import RunContents
from smolray.run.events import read_events
from smolray.run.folder import RunFolder
from smolray.run.predictions import prediction_steps, read_predictions
from smolray.run.progress import percent
from smolray.run.result import RunFileError, read_result, reading


def write_report(run_dir: str, images: dict[str, bytes] | None = None) -> str:
    """Write `<run_dir>/report.html` and return its URI. Raises RunFileError where the run's files are damaged.

    `images`: encoded images by prediction key, best as thumbnails. None: the images of the earlier report.
    """
    if images is None:
        images = read_images(run_dir)
    elif images:
        write_images(run_dir, images)

    uri = RunFolder(run_dir).report
    with reading(run_dir):
        page = report_page(read_run(run_dir, images))
    storage.write_bytes(uri, page.encode())
    return uri


def report_page(run: RunContents) -> str:
    """The page as text. Pure."""
    blind = sections.blind(run)
    return render(
        "run.html",
        title=f"{run.name} · smolray",
        name=run.name,
        status=sections.status(run),
        facts=sections.facts(run),
        wording=sections.wording(run),
        scores=sections.scores(run),
        blind=percent(blind) if blind is not None else "",
        tiles=sections.tiles(run),
        metrics=sections.metrics(run),
        charts=sections.charts(run),
        cards=sections.cards(run),
        images_evaluated=f"{len({row['key'] for row in run.predictions}):,}",
        events=sections.event_rows(run),
        restarts=sum(e["event"] == "resume" for e in run.events),
        details=sections.details(run),
        data=sections.data_lines(run),
    )


def read_run(run_dir: str, images: dict[str, bytes]) -> RunContents:
    """Read the run's folder. Without config.yaml the configuration is that of the newest start.

    Raises RunFileError where a file is damaged.
    """
    folder = RunFolder(run_dir)
    contents = RunContents(
        name=folder.name,
        events=read_events(run_dir),
        result=read_result(run_dir),
        images=images,
    )
    steps = prediction_steps(run_dir)
    return replace(
        contents,
        config=stored_settings(folder.config) or contents.start.get("config") or {},
        predictions=read_predictions(run_dir, steps[-1]) if steps else [],
    )


def stored_settings(uri: str) -> dict[str, Any]:
    """The settings in config.yaml as they stand there, also of a version that had others; empty where there is none."""
    if not storage.exists(uri):
        return {}
    try:
        return read_settings(uri)
    except ConfigError as error:
        raise RunFileError(f"{error}. Put back a copy, or move it away: its log keeps the settings too") from None


def read_images(run_dir: str) -> dict[str, bytes]:
    """The sample images of the run's report by prediction key; empty where it has none yet."""
    uri = RunFolder(run_dir).report_images
    if not storage.exists(uri):
        return {}
    table = pq.read_table(pa.BufferReader(storage.read_bytes(uri)))
    return dict(zip(table["key"].to_pylist(), table["image"].to_pylist(), strict=True))


def write_images(run_dir: str, images: dict[str, bytes]) -> None:
    """Keep the sample images of the report, by prediction key."""
    keys, encoded = pa.array(list(images), pa.string()), pa.array(list(images.values()), pa.binary())
    sink = pa.BufferOutputStream()
    pq.write_table(pa.table({"key": keys, "image": encoded}), sink)
    storage.write_bytes(RunFolder(run_dir).report_images, sink.getvalue().to_pybytes())
