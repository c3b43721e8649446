"""Commands for training data: `smolray prepare` and `smolray preview`."""

import time
from typing import Annotated

import typer

from smolray.cli.options import ConfigFile, Overrides, console, errors, plain
from smolray.config import ConfigError, load_config

ALREADY_PREPARED_SECONDS = 1


def prepare(overrides: Overrides = None, config: ConfigFile = None) -> None:
    """Turn raw data into shards, which training reads fast.

    Example: smolray prepare data.train=/data/vqav2 out=s3://bucket/shards
    """
    settings = [f"data.shards={o.removeprefix('out=')}" if o.startswith("out=") else o for o in overrides or ()]
    run = load_config(config, settings)
    if not run.data.train:
        raise ConfigError("data.train = '': nothing to prepare; give data.train=PATH, a URI or a hub data set id")

    from smolray.cli.tables import manifests_table
    from smolray.data.prepare import check_sources, parts_of, prepare_run, shard_folder, with_leak
    from smolray.data.shards import prepared_account

    check_sources(run)
    folders = {part: shard_folder(run, part) for part in parts_of(run)}

    from smolray.cluster.connect import connect  # Ray and torch

    connect()
    began = time.monotonic()
    manifests = prepare_run(run, _show_progress)
    seconds = time.monotonic() - began

    console.print(manifests_table(manifests))
    accounts = {part: prepared_account(manifest) for part, manifest in manifests.items()}
    if "validation" in folders:
        accounts["validation"] = with_leak(accounts["validation"], folders["train"], folders["validation"])
    for part, account in accounts.items():
        for line in account.lines(part):
            console.print(plain(line), soft_wrap=True)
    for part, folder in folders.items():
        console.print(f"{part}: {plain(folder)}", soft_wrap=True)
    rows = sum(manifest.conversations for manifest in manifests.values())
    quick = seconds < ALREADY_PREPARED_SECONDS
    console.print("all of it was prepared before" if quick else f"{seconds:.1f} s, {rows / seconds:,.0f} rows/s")


def _show_progress(phase: str, done: int, total: int) -> None:
    """At most one line for each twentieth of a phase."""
    if done == total or done * 20 // total != (done - 1) * 20 // total:
        errors.print(f"{'reading' if phase == 'read' else 'writing shards'}: {done} of {total}")


def preview(
    overrides: Overrides = None,
    config: ConfigFile = None,
    count: Annotated[int, typer.Option("--count", "-n", min=0, help="samples shown")] = 5,
) -> None:
    """Show samples as the model sees them, and their lengths.

    The «trained tokens» are marked. Of data that is not prepared yet, the first rows are read. Needs no GPU.
    """
    run = load_config(config, overrides or ())

    from itertools import islice

    from smolray.cli.preview import open_preview, raw_text
    from smolray.cli.preview_lengths import lengths, lengths_table
    from smolray.cli.preview_samples import item_text, preview_item

    with open_preview(run, count) as data:
        for row in islice(data.rows(), count):
            console.print(item_text(preview_item(row, row.conversations[0], data.encoder)), soft_wrap=True)
            console.print()
        summary = lengths(data, run)
        console.print(lengths_table(summary))
        for line in summary.account.lines("train"):
            console.print(plain(line), soft_wrap=True)
        if data.raw is not None:
            console.print(raw_text(data.raw), soft_wrap=True)
