"""Benchmarks of the data side: prepare against a plain multiprocessing script, the stream against a torch DataLoader.

In: generated JPEG images with three questions each. Out: Results. Both sides do the same work with the same number of
processes.
"""

import hashlib
import io
import json
import multiprocessing
import random
import tempfile
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

from jobs.bench.timing import Cost, Result, in_turns, measured

QUESTIONS = 3
SIZE = (512, 384)
FILES = 4


def prepare_case(scale: float, repetitions: int) -> list[Result]:
    """Rows per second from raw Parquet to shards. Worker processes of both sides run when the clock starts."""
    import ray

    from smolray.config import DataConfig
    from smolray.data.prepare import prepare

    images, processes = max(8, int(2400 * scale)), int(ray.cluster_resources()["CPU"])
    with (
        tempfile.TemporaryDirectory(prefix="bench") as folder,
        multiprocessing.get_context("spawn").Pool(processes) as pool,
    ):
        source, numbers = write_images(Path(folder) / "raw", images), iter(range(1000))

        def ours() -> Cost:
            with measured(ray=True) as cost:
                manifest = prepare(str(source), f"{folder}/ours-{next(numbers)}", DataConfig())
            if (manifest.conversations, manifest.rows) != (images * QUESTIONS, images):
                raise RuntimeError(f"prepare kept {manifest.conversations} of {images * QUESTIONS} rows")
            return cost

        def plain() -> Cost:
            with measured(ray=False) as cost:
                rows = plain_prepare(pool, source, Path(folder) / f"plain-{next(numbers)}")
            if rows != images:
                raise RuntimeError(f"the plain script wrote {rows} of {images} rows")
            return cost

        costs = in_turns({"ours": ours, "plain": plain}, repetitions)
    what = "parse, decode every JPEG, gather questions by image, shuffle, write Parquet"
    peer = f"multiprocessing.Pool({processes}), all rows in memory"
    return [Result("prepare", what, images * QUESTIONS, "row", peer, costs["ours"], costs["plain"], "cpu")]


def write_images(folder: Path, count: int) -> Path:
    """Write `count` JPEG images of about 20 to 60 kB as FILES Parquet files, one row for each question."""
    folder.mkdir(parents=True)
    rng = np.random.default_rng(0)
    schema = pa.schema(
        [
            ("image", pa.struct([("bytes", pa.binary()), ("path", pa.string())])),
            ("question", pa.string()),
            ("answer", pa.string()),
            ("id", pa.string()),
        ]
    )
    for file, numbers in enumerate(np.array_split(np.arange(count), FILES)):
        rows = []
        for number in numbers.tolist():
            image = {"bytes": jpeg(rng), "path": f"{number}.jpg"}
            for q in range(QUESTIONS):
                rows.append(
                    {
                        "image": image,
                        "question": f"what is in part {q} of it?",
                        "answer": f"thing {number % 97}",
                        "id": f"{number}-{q}",
                    }
                )
        pq.write_table(pa.Table.from_pylist(rows, schema), folder / f"train-{file}.parquet", row_group_size=300)
    return folder


def jpeg(rng: np.random.Generator) -> bytes:
    """A JPEG of about 20 to 60 kB: blurred noise with some grain, which decodes about as a photograph does."""
    smooth = Image.fromarray(rng.integers(0, 256, (24, 32, 3), dtype=np.uint8)).resize(SIZE, Image.Resampling.BICUBIC)
    grain = rng.normal(0, rng.uniform(4, 12), (SIZE[1], SIZE[0], 1))
    sink = io.BytesIO()
    Image.fromarray((np.asarray(smooth) + grain).clip(0, 255).astype(np.uint8)).save(sink, "JPEG", quality=85)
    return sink.getvalue()


def plain_prepare(pool: Any, source: Path, out: Path) -> int:
    """Prepare without Ray: a pool reads row groups, this process gathers everything. Returns the rows written."""
    out.mkdir()
    work = [
        (str(file), group)
        for file in sorted(source.glob("*.parquet"))
        for group in range(pq.ParquetFile(file).num_row_groups)
    ]

    images: dict[str, bytes] = {}
    conversations: dict[str, list[str]] = {}
    for part in pool.imap_unordered(_plain_row_group, work):
        for key, image, texts in part:
            images.setdefault(key, image)
            conversations.setdefault(key, []).extend(texts)

    keys = sorted(images)
    random.Random(0).shuffle(keys)
    shards = max(1, round(sum(map(len, images.values())) / 2**26))
    list(
        pool.imap_unordered(
            _plain_shard,
            [
                (str(out / f"{n}.parquet"), [(k, images[k], conversations[k]) for k in keys[n::shards]])
                for n in range(shards)
            ],
        )
    )
    return len(keys)


def _plain_row_group(place: tuple[str, int]) -> list[tuple[str, bytes, list[str]]]:
    """(hash of the image, its bytes, conversations as JSON) of a row group, each image once and decoded."""
    found: dict[str, tuple[str, bytes, list[str]]] = {}
    for row in pq.ParquetFile(place[0]).read_row_group(place[1]).to_pylist():
        image = row["image"]["bytes"]
        key = hashlib.blake2b(image, digest_size=16).hexdigest()
        if key not in found:
            Image.open(io.BytesIO(image)).verify()
            Image.open(io.BytesIO(image)).load()
            found[key] = (key, image, [])
        user = [{"type": "image"}, {"type": "text", "text": row["question"]}]
        answer = [{"type": "text", "text": row["answer"]}]
        messages = [{"role": "user", "content": user}, {"role": "assistant", "content": answer}]
        found[key][2].append(json.dumps({"id": row["id"], "messages": messages}))
    return list(found.values())


def _plain_shard(work: tuple[str, list[tuple[str, bytes, list[str]]]]) -> None:
    path, rows = work
    table = pa.table(
        {
            "key": [r[0] for r in rows],
            "images": pa.array([[r[1]] for r in rows], pa.list_(pa.binary())),
            "conversations": [r[2] for r in rows],
        }
    )
    pq.write_table(table, path, row_group_size=8, use_dictionary=False, write_statistics=False, compression="none")


def stream_case(scale: float, repetitions: int) -> list[Result]:
    """An epoch of Batches through the stream of one worker.

    The peers are torch DataLoaders that read, decode and collate with the same functions.
    """
    import ray

    from smolray.config import load_config
    from smolray.data.plan import PlanLimits, build_epoch
    from smolray.data.prepare import prepare
    from smolray.data.ray_jobs import ensure_index, load_index
    from smolray.data.shards import read_manifest
    from smolray.data.stream import Stream
    from smolray.model.tiny import build_config, build_processor

    images = max(8, int(1000 * scale))
    with tempfile.TemporaryDirectory(prefix="bench") as folder:
        # The processor of SmolVLM-256M: tiles of 512 pixels; its weights are not needed.
        processor = build_processor("random-256m", ["what is in part of it? thing 1234567890"])
        for part in (processor, build_config("random-256m", processor)):
            part.save_pretrained(f"{folder}/processor")
        config = load_config(None, [f"model.path={folder}/processor", "train.per_device_train_batch_size=12"])
        prepare(str(write_images(Path(folder) / "raw", images)), f"{folder}/shards", config.data)
        ensure_index(f"{folder}/shards", config)
        plan = build_epoch(load_index(f"{folder}/shards", config), PlanLimits.of(config), 0, 0)
        files = tuple(f.name for f in read_manifest(f"{folder}/shards").files)
        ways: dict[str, Callable[[], Cost]] = {
            "ours": lambda: _epoch(Stream(f"{folder}/shards", plan, range(len(plan)), config), images, ray=True)
        }
        loaders = {}
        for workers in (0, 2):
            loaders[workers] = _loader(_Batches(f"{folder}/shards", files, plan, config), workers)
            ways[f"workers={workers}"] = partial(_epoch, loaders[workers], images, ray=False)
        costs = in_turns(ways, repetitions)
        del loaders, ways
    cpus = int(ray.cluster_resources()["CPU"])
    what = f"read, decode to tiles of 512 px, encode, collate {len(plan)} micro-batches of 12 questions ({cpus} CPUs)"
    return [
        Result(
            name,
            what,
            images * QUESTIONS,
            "sample",
            f"torch DataLoader, num_workers={workers}",
            costs["ours"],
            costs[f"workers={workers}"],
            "cpu",
        )
        for name, workers in (("stream", 2), ("stream_alone", 0))
    ]


def _epoch(batches: Any, images: int, ray: bool) -> Cost:
    with measured(ray=ray) as cost:
        samples = sum(batch.samples for batch in batches)
    if samples != images * QUESTIONS:
        raise RuntimeError(f"{samples} of {images * QUESTIONS} samples arrived")
    return cost


def _loader(batches: Any, workers: int) -> Any:
    from torch.utils.data import DataLoader

    # Not forked: this process has Ray's threads. Persistent: as with Ray, only the first epoch pays for starting
    # processes.
    options: dict[str, Any] = (
        {"multiprocessing_context": "spawn", "persistent_workers": True, "prefetch_factor": 2} if workers else {}
    )
    return DataLoader(batches, batch_size=None, num_workers=workers, **options)


class _Batches:
    """The micro-batches of a plan as a map-style data set for torch; a pickled copy opens its own files."""

    def __init__(self, folder: str, files: Sequence[str], plan: Any, config: Any):
        self.folder, self.files, self.plan, self.config = folder, tuple(files), plan, config
        self._reader: Any = None

    def __len__(self) -> int:
        return len(self.plan)

    def __getitem__(self, number: int) -> Any:
        from smolray.data.collate import collate_training
        from smolray.data.encode import cached_encoder
        from smolray.data.reader import ShardReader

        self._reader = self._reader or ShardReader(self.folder, self.files)
        encoder = cached_encoder(self.config.model, self.config.data, self.config.image)
        return collate_training(self._reader.groups([self.plan.micro_batch(number)])[0], encoder)
