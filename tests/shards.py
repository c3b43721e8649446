"""Small shards of real easy-vqa data, made without Ray, and a tiny model for them."""

import hashlib
import random
from collections import defaultdict
from pathlib import Path

from smolray import storage
from smolray.data.sample import Conversation, Message, Part, ShardRow, image_key
from smolray.data.shards import SCHEMA_VERSION, Manifest, ShardFile, encode_shard


def vqa_rows(split: str, images: int) -> list[ShardRow]:
    """The first `images` images of easy-vqa's split with all their questions."""
    import easy_vqa

    questions = easy_vqa.get_train_questions() if split == "train" else easy_vqa.get_test_questions()
    paths = easy_vqa.get_train_image_paths() if split == "train" else easy_vqa.get_test_image_paths()
    by_image: dict[int, list[Conversation]] = defaultdict(list)
    for i, (question, answer, image) in enumerate(zip(*questions, strict=True)):
        kind = "yes/no" if answer in ("yes", "no") else "shape" if answer in ("circle", "rectangle", "triangle") else "color"
        turns = (Message("user", (Part("image"), Part("text", question))), Message("assistant", (Part("text", answer),)))
        by_image[image].append(Conversation(f"{split}-{i}", turns, type=kind, answers=(answer,)))
    rows = []
    for image in sorted(by_image)[:images]:
        encoded = (Path(paths[image]).read_bytes(),)
        rows.append(ShardRow(image_key(encoded, by_image[image][0]), encoded, tuple(by_image[image])))
    random.Random(0).shuffle(rows)
    return rows


def write_shards(folder: str, rows: list[ShardRow], rows_per_file: int = 50) -> str:
    files = []
    for n, start in enumerate(range(0, len(rows), rows_per_file)):
        part = rows[start : start + rows_per_file]
        data, name = encode_shard(part), f"shard-{n:05d}.parquet"
        storage.write_bytes(storage.join(folder, name), data)
        conversations = sum(len(r.conversations) for r in part)
        files.append(ShardFile(name, len(part), conversations, len(data), hashlib.blake2b(data, digest_size=16).hexdigest()))
    total = sum(f.conversations for f in files)
    manifest = Manifest(SCHEMA_VERSION, "test", len(rows), total, sum(len(r.images) for r in rows), {}, tuple(files))
    storage.write_bytes(storage.join(folder, "manifest.json"), manifest.to_json().encode())
    return folder
