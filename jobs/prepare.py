"""Turn raw data into shards, as a job: `python jobs/prepare.py [--config run.yaml] data.train=/data/vqav2
out=s3://bucket/shards`.

In: settings. Out: a shard folder each for train and validation, and a summary. Started again, it goes on where it was.
"""

import argparse
import sys
import time

from smolray.config import ConfigError, load_config
from smolray.data.formats.source import SourceError
from smolray.data.prepare import prepare_run, shard_folder
from smolray.data.shards import ShardError
from smolray.storage import StorageError


def main(arguments: list[str] | None = None) -> int:
    """Exit code 0, or 2 with the fault on stderr."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--config", help="YAML file of the run")
    parser.add_argument(
        "overrides",
        nargs="*",
        metavar="KEY=VALUE",
        help="settings, such as data.train=…; out=… is short for data.shards=…",
    )
    options = parser.parse_args(arguments)
    try:
        overrides = [f"data.shards={o.removeprefix('out=')}" if o.startswith("out=") else o for o in options.overrides]
        config = load_config(options.config, overrides)
        # Before Ray starts, so that a wrong path is told at once.
        folders = {part: shard_folder(config, part) for part in ("train", "validation") if getattr(config.data, part)}
        from smolray.cluster.connect import connect  # imports torch, which takes seconds

        connect()
        began = time.monotonic()
        manifests = prepare_run(config, _show)
    except (ConfigError, SourceError, ShardError, StorageError) as error:
        print(error, file=sys.stderr)
        return 2
    seconds = time.monotonic() - began
    for part, manifest in manifests.items():
        bad = ", ".join(f"{reason}: {rows}" for reason, rows in manifest.quarantined.items()) or "none"
        print(
            f"{part}: {manifest.rows:,} rows, {manifest.conversations:,} conversations, {manifest.images:,} images "
            f"in {len(manifest.files)} shards; quarantined: {bad}\n  {folders[part]}"
        )
    conversations = sum(m.conversations for m in manifests.values())
    print(
        f"{seconds:.1f} s, {conversations / seconds:,.0f} rows of the source/s"
        if seconds > 1
        else "all of it was there already"
    )
    return 0


def _show(phase: str, done: int, pieces: int) -> None:
    if done == pieces or done * 20 // pieces != (done - 1) * 20 // pieces:  # at most a line per twentieth
        print(f"{'reading' if phase == 'read' else 'writing shards'}: {done} of {pieces}", file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main())
